"""Recording of a model: its run doesn't change, and the traces match those of each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.recorded_models import CoupledRows, Model, RandomStep
from helpers.step_by_hand import step_by_hand


def test_recording_does_not_change_the_run() -> None:
    model, x = Model(), torch.randn(7, 4, 3)
    model.middle.register_forward_hook(lambda module, args, result: (result[0] * 2, result[1]))
    model.middle.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    torch.manual_seed(3)
    expected = model(x)
    expected.backward()
    expected_random_state = torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(3)
    with ur.record(model, gradients=True) as rec:
        loss = model(x)
        random_state = torch.get_rng_state()
        loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(random_state, expected_random_state)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True)
    )
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert list(rec) == ["encoder.lstm", "middle", "decoder"]
    assert len(rec) == 3
    assert "middle" in rec
    assert "alias" in rec
    assert "unused" not in rec
    assert rec["alias"] is rec["middle"]
    # The input of each layer is the output of the one below, as the hooks changed it.
    lstm, middle, decoder = rec.values()
    assert_close(middle.input, lstm.output + 1, 1e-6)
    assert_close(decoder.input, middle.output * 2, 1e-6)
    assert_close(model.head(decoder.output).square().mean() + middle.final_state.sum(), expected, 1e-6)
    assert torch.equal(ur.trace(model.decoder, decoder.input)["h"], decoder["h"])
    above = ur.trace(model.middle, middle.input).backward(
        lambda h, state: model.head(model.decoder(h * 2)[0]).square().mean() + state.sum()
    )
    assert_close(middle.gradient("h"), above.gradient("h"), 1e-5)
    assert set(middle.layers[0].gradients) == set(middle.names)
    assert max(lstm.check(), decoder.check()) < 1e-6


@NEEDS_COMPILER
def test_native_engine_is_used() -> None:
    model, x = Model(), torch.randn(7, 4, 3)
    with ur.engine("native"), ur.record(model) as rec:  # an error if another engine runs a layer
        model(x)
        with torch.no_grad(), ur.frozen(model):
            model(x)
    assert "GRU 'middle'" not in repr(rec)
    assert "Recurrent 'middle': 2 calls, 1 recorded" in repr(rec)


@pytest.mark.parametrize("form", ["time first", "batch first", "packed", "sorted", "unbatched"])
def test_selected_rows(form: str) -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 4, 3, dropout=0.5, bidirectional=True, batch_first=True)})
    model["a"].batch_first = form != "time first"
    rows, sequences = [0, 2, 3], [torch.randn(n, 3) for n in (2, 6, 4, 5)]
    if form == "sorted":
        sequences.sort(key=len, reverse=True)
    x: Any = torch.randn(4, 6, 3) if form == "batch first" else torch.randn(6, 4, 3)
    x = pack_sequence(sequences, enforce_sorted=form == "sorted") if form in ("packed", "sorted") else x
    x = torch.randn(6, 3) if form == "unbatched" else x
    rows = [0] if form == "unbatched" else rows
    state = tuple(torch.randn(6, *([] if form == "unbatched" else [4]), 4) for _ in "hc")
    model.requires_grad_()
    with ur.record(model, gradients=True) as full:
        torch.manual_seed(5)
        output, final = model["a"](x, state)
        (output if isinstance(output, Tensor) else output.data).square().sum().backward()
    with ur.record(model, rows=rows, gradients=True) as some:
        torch.manual_seed(5)
        output, final = model["a"](x, state)
        (output if isinstance(output, Tensor) else output.data).square().sum().backward()
    for a, b in zip(full["a"].layers, some["a"].layers, strict=True):
        assert torch.equal(a.lengths[rows], b.lengths)
        time = int(b.lengths.max())
        assert_close(b.input, a.input[:time, rows], 1e-6)
        for name in ("i", "c", "h"):
            assert_close(b[name], a[name][:time, rows], 1e-5)
            assert_close(b.gradient(name), a.gradient(name)[:time, rows], 1e-4)
        assert_close(b.initial_state["c"], a.initial_state["c"][rows], 0)
    t = some["a"]
    expected = tuple(part if form == "unbatched" else part[:, rows] for part in final)
    assert_close(t.final_state, tuple(part.detach() for part in expected), 1e-6)
    if form in ("time first", "batch first"):
        selected = output[rows] if form == "batch first" else output[:, rows]
        assert_close(t.output, selected.detach(), 1e-6)
        with pytest.raises(ValueError, match="comparison with torch.nn needs the whole batch"):
            t.check()
    model.eval()
    with ur.record(model, rows=rows) as some:
        model["a"](x, state)
    assert some["a"].check() < 1e-6


@pytest.mark.parametrize("cell", [RandomStep, CoupledRows])
def test_selected_rows_that_cannot_run_alone(cell: type[ur.Cell]) -> None:
    layer = ur.Recurrent(cell, 3, 4, dtype=torch.float64)
    x = torch.randn(6, 5, 3).double()
    traces = []
    for filters in ({}, {"rows": [1, 4]}, {"rows": [4], "steps": [-1, 2]}):
        with ur.record(layer, gradients=True, **filters) as rec:
            torch.manual_seed(7)
            with ur.engine("reference"):
                output, _ = layer(x)
            output.square().sum().backward()
        traces.append(rec[""])
    full, some_rows, some_steps = traces
    assert_close(some_rows["h"], output.detach()[:, [1, 4]], 1e-12)
    assert_close(some_rows.gradient("h"), full.gradient("h")[:, [1, 4]], 1e-12)
    assert_close(some_steps["h"], output.detach()[[2, 5]][:, [4]], 1e-12)
    assert_close(some_steps.gradient("h"), full.gradient("h")[[2, 5]][:, [4]], 1e-12)
    assert some_steps.final_state.shape == (1, 1, 4)
    with pytest.raises(ValueError, match="doesn't have the whole call: select only rows"):
        some_rows.backward(torch.sum)


@pytest.mark.parametrize(
    "filters", [{}, {"rows": [2, 0]}, {"steps": [1, -1], "names": ["h", "f"], "units": [2]}]
)
def test_gradients_match_a_loop_by_hand(filters: dict[str, Any]) -> None:
    first, second = nn.LSTM(3, 4, dtype=torch.float64), ur.GRU(4, 4, dtype=torch.float64)
    model = nn.ModuleDict({"first": first, "second": second})
    x, weights = torch.randn(5, 3, 3).double(), torch.randn(5, 3, 4).double()

    def loss(output: Tensor, c: Tensor, h: Tensor) -> Tensor:
        return (output * weights).sum().sin() + c.square().sum() + (h[0] * 3).sum()

    with ur.record(model, gradients=True, **filters) as rec:
        output, (h, c) = first(x)
        value = loss(second(output)[0], c[0], h[0])
    with pytest.raises(ValueError, match="there are no gradients yet"):
        rec["first"].gradient("h")
    value.backward()  # after the block

    named: dict[str, list[dict[str, Tensor]]] = {"first": [], "second": []}
    states = {
        "first": tuple(torch.zeros(3, 4).double() for _ in "hc"),
        "second": (torch.zeros(3, 4).double(),),
    }
    for step in range(5):
        below = x[step]
        for name, kind in (("first", "lstm"), ("second", "gru")):
            layer = model[name]
            for state in states[name]:
                state.requires_grad_()
            quantities = step_by_hand(
                kind, lambda key, layer=layer: getattr(layer, key + "_l0"), below, states[name]
            )
            quantities = {key: tensor for key, tensor in quantities.items() if tensor.requires_grad}
            for tensor in quantities.values():
                tensor.retain_grad()
            states[name] = (quantities["h"], quantities["c"]) if "c" in quantities else (quantities["h"],)
            below = quantities["h"]
            named[name].append(quantities)
    outputs = torch.stack([quantities["h"] for quantities in named["second"]])
    loss(outputs, named["first"][-1]["c"], named["first"][-1]["h"]).backward()
    rows = sorted(filters.get("rows", range(3)))
    steps = [1, 4] if "steps" in filters else range(5)
    units = filters.get("units", range(4))
    for name, t in rec.items():
        assert "h" in t.names
        for key in t.names:
            if key in named[name][0]:
                expected = torch.stack([named[name][step][key].grad for step in steps])[:, rows]
                expected = expected[..., list(units)] if expected.shape[-1] == 4 else expected
                assert_close(t.gradient(key), expected, 1e-12)
    before = rec["first"].gradient("h").clone()
    loss(second(first(x)[0])[0], c[0].detach(), h[0].detach()).backward()
    assert torch.equal(rec["first"].gradient("h"), before)  # no longer recorded


def test_each_call_has_its_own_gradient() -> None:
    layer = ur.LSTM(3, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 3).double()
    with ur.record(layer, calls=2, gradients=True) as rec:
        hidden, state = layer(x)
        hidden.retain_grad()
        output, _ = layer(hidden, state)
        output.square().sum().backward()
    first, second = rec.calls("")
    expected = ur.trace(layer, x).backward(lambda h, state: layer(h, state)[0].square().sum()).gradient("c")
    assert_close(first.gradient("c"), expected, 1e-12)
    assert_close(second.gradient("h")[-1], 2 * output.detach()[-1], 1e-12)


def test_checkpointed_calls_count_once() -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(6, 3, 3, requires_grad=True)
    with ur.record(layer, gradients=True) as rec:
        checkpoint(lambda x: layer(x)[0].square().square(), x, use_reentrant=False).sum().backward()
    assert "1 call," in repr(rec)
    assert_close(rec[""].gradient("h")[-1], 4 * layer(x)[0].detach()[-1] ** 3, 1e-5)
