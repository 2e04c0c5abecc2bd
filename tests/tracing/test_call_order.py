"""The order in which a recorded model calls its modules, and what flows between them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.recorded_models import Translator


def facts(record: ur.Record) -> list[tuple[Any, ...]]:
    return [(one.name, one.number, one.input, one.output, one.input_from) for one in record.call_order]


def test_order_shapes_and_sources() -> None:
    model, x = Translator(), torch.randint(0, 20, (7, 3))
    expected = model(x)
    with ur.record(model, calls=2) as rec:
        assert torch.equal(model(x), expected)
    assert facts(rec) == [
        ("embed", 1, "(7, 3)", "(7, 3, 6)", None),
        ("encoder", 1, "(7, 3, 6)", "(7, 3, 16)", "embed"),
        ("between.0", 1, "(7, 3, 16)", "(7, 3, 5)", "encoder"),
        ("between.1", 1, "(7, 3, 5)", "(7, 3, 5)", "between.0"),
        ("decoder", 1, "(7, 3, 5)", "(7, 3, 4)", "between.1"),
        ("decoder", 2, "(7, 3, 5)", "(7, 3, 4)", None),
        ("head", 1, "(7, 3, 4)", "(7, 3, 3)", None),
    ]
    encoder, decoder, again = (rec.call_order[k] for k in (1, 4, 5))
    assert encoder.module == repr(model.encoder)
    assert [one.trace for one in (encoder, decoder, again)] == [rec["encoder"], *rec.calls("decoder")]
    assert (encoder.initial_state, encoder.state_from) == (None, None)
    assert encoder.final_state == "(2, 3, 8), (2, 3, 8)"
    assert (again.initial_state, again.state_from) == ("(1, 3, 4), (1, 3, 4)", "decoder")
    assert [one.is_recurrent for one in rec.call_order].count(True) == 3
    assert rec.not_recorded == {"unused": "not called"}
    assert str(decoder) == "decoder: LSTM(5, 4), (7, 3, 5) → (7, 3, 4)"


def test_only_the_last_call_of_the_model_counts() -> None:
    model = Translator()
    with ur.record(model) as rec:
        model(torch.randint(0, 20, (7, 3)))
        model(torch.randint(0, 20, (2, 1)))
    assert [one.number for one in rec.call_order] == [2, 2, 2, 2, 3, 4, 2]
    assert rec.call_order[1].input == "(2, 1, 6)"
    first, second = (one for one in rec.call_order if one.name == "decoder")
    assert first.trace is None  # only the last call of a layer was kept
    assert second.trace is rec["decoder"]


def test_copies_and_other_threads_are_not_observed() -> None:
    model, x = Translator(), torch.randint(0, 20, (4, 2))
    with ur.record(model) as rec:
        copied = copy.deepcopy(model)
        copied(x)
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
        assert not rec.call_order
    model(x)
    assert not rec.call_order
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in [*model.modules()])


def test_transformer_layers_keep_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(layer, ur.GRU(4, 3, batch_first=True)).eval()
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = model(x)[0]
        with ur.record(model) as rec:
            assert torch.equal(model(x)[0], expected)
            assert not any(part._forward_hooks for part in layer.modules())
    assert [one.name for one in rec.call_order] == ["1"]


def test_packed_calls_and_single_layers() -> None:
    layer = nn.GRU(2, 3)
    with ur.record(layer) as rec:
        layer(pack_sequence([torch.randn(4, 2), torch.randn(2, 2)]))
    (call,) = rec.call_order
    assert (call.input, call.output) == ("packed (4, 2, 2)", "packed (4, 2, 3)")
    assert call.trace is rec[""]


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_calls_that_cannot_be_recorded_have_a_reason() -> None:
    model = nn.ModuleDict({"lstm": ur.LSTM(2, 3)})
    x = torch.randn(4, 1, 2)
    with ur.record(model) as rec:
        model["lstm"](x, resets=torch.zeros(4, 1, dtype=torch.bool))
    (call,) = rec.call_order
    assert call.trace is None
    assert call.not_recorded is not None
    assert "used resets=" in call.not_recorded
    assert rec.not_recorded == {"lstm": call.not_recorded}
