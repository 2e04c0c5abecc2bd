"""Which calls `record` sees: threads, nested blocks, compiled models, forks and unsupported calls."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook

import unrolled as ur
from helpers.layer_pairs import assert_close
from helpers.recorded_models import Model
from unrolled.tracing import eager_stance


@pytest.mark.slow
def test_call_options_and_unsupported_calls() -> None:
    layer, x = ur.GRU(3, 4, dropout=0.3, num_layers=2), torch.randn(6, 3, 3)
    with ur.record(layer, gradients=True) as rec:
        torch.manual_seed(2)
        output, _ = layer(x, lengths=[2, 6, 4])
        output.square().sum().backward()
    t = rec[""]
    assert t.layers[0].lengths.tolist() == [2, 6, 4]
    assert_close(t.layer(1)["h"], output.detach(), 1e-6)
    assert_close(t.layer(1).gradient("h")[5, 1], 2 * output.detach()[5, 1], 1e-5)
    assert not t.layer(1).gradient("h")[3:, 0].any()
    for options, words in (
        ({"lengths": [0, 6, 4]}, "used lengths= with a row of length 0"),
        ({"resets": torch.rand(6, 3) < 0.5}, "used resets=, which changes states"),
        ({"all_states": True}, "which gradients=True doesn't support"),
    ):
        with ur.record(layer, gradients=True) as rec:
            layer(x, **options)
        assert not rec
        with pytest.raises(ValueError, match=words):
            rec[""]
        assert "not recorded" in repr(rec)
    with ur.record(layer) as rec, torch.no_grad():
        layer(x, resets=torch.rand(6, 3) < 0.5)
        _, _, states = layer.eval()(x, all_states=True)  # the last call counts
        with torch.autocast("cpu", torch.bfloat16):
            assert list(rec) == [""]
            assert_close(rec[""].layer(0)["h"], states["h"][0], 1e-6)
            layer(x)
    with pytest.raises(ValueError, match="autocast"):
        rec[""]
    zoneout = ur.GRU(3, 4, zoneout=0.1)
    with ur.record(zoneout) as rec:
        zoneout(x)
    with pytest.raises(ValueError, match="zoneout"):
        rec[""]

    class DoubledInput(nn.GRU):
        def forward(self, *args: Any) -> Any:
            return super().forward(args[0] * 2)

    model = nn.ModuleDict({"custom": DoubledInput(3, 4), "usual": nn.GRU(3, 4)})
    with ur.record(model) as rec:
        model["custom"](x)
        model["usual"](x)
    assert list(rec) == ["custom", "usual"]
    assert_close(rec["custom"]["h"], nn.GRU.forward(model["custom"], x * 2)[0], 1e-6)


def test_nested_blocks_threads_copies_and_errors() -> None:
    model, x = Model(), torch.randn(5, 2, 3)
    outer = ur.record(model)
    with outer:
        with ur.record(model, names="h") as inner:
            model(x)
            thread = threading.Thread(target=model, args=(x,))
            thread.start()
            thread.join()
            model_copy = pickle.loads(pickle.dumps(copy.deepcopy(model)))
            model_copy(x)
            copy.copy(model.middle)(torch.randn(5, 2, 8))
        model(x)
        with pytest.raises(RuntimeError, match="already running"):
            outer.__enter__()
    assert "2 calls" in repr(outer)
    assert "1 call," in repr(inner)
    assert inner["middle"].names == ("h",)
    failing = ur.record(model)
    with failing:
        model(x)
        with pytest.raises(RuntimeError, match="input_size"):
            model(x[..., :2])
    with pytest.raises(ZeroDivisionError), ur.record(model):
        print(1 / 0)
    assert "1 call," in repr(failing)
    message = "record of LSTM 'encoder.lstm': step 7 is out of range: there are 5"
    with ur.record(model, steps=[7]), pytest.raises(IndexError, match=message):
        model(x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for module in model_copy.modules():
        assert "_compiled_call_impl" not in vars(module)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            assert hook.__module__ == "contextlib"  # copies have a hook that does nothing
    pieces, expected, stream = torch.randn(6, 2, 5), ur.Stream(model.decoder), ur.Stream(model.decoder)
    stream(pieces[:2])
    with ur.record(model.decoder) as rec:
        output = stream(pieces[2:4])
    output = torch.cat([output, stream(pieces[4:])])
    assert torch.equal(expected(pieces)[2:], output)
    assert_close(rec[""].output, output[:2], 1e-6)


def test_blocks_end_in_any_order_and_in_several_threads() -> None:
    model, x, runs = Model(), torch.randn(5, 2, 3), list[Any]()
    fast = torch.compile(model.decoder, backend=lambda graph, inputs: runs.append(graph) or graph)
    first, second = ur.record(model), ur.record(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    fast(torch.randn(5, 2, 5))
    assert "decoder" in second
    second.__exit__(None, None, None)
    assert not runs
    fast(torch.randn(5, 2, 5))
    assert runs
    errors = list[BaseException]()

    def record_repeatedly() -> None:
        try:
            for _ in range(30):
                with ur.record(model.decoder) as rec:
                    model.decoder(torch.randn(1, 1, 5))
                assert len(rec) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=record_repeatedly) for _ in range(4)]
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch_interval)
    assert not errors
    assert model(x).requires_grad
    assert not model.decoder._forward_hooks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_child_does_not_wait_for_a_lock_of_its_parent() -> None:
    with eager_stance._lock:  # as if another thread was starting a block
        child = os.fork()
        if child == 0:
            os._exit(0 if eager_stance._lock.acquire(blocking=False) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_compiled_models_run_uncompiled() -> None:
    model, x = Model(), torch.randn(5, 2, 3)
    model.eval()
    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = fast(x)
        count = len(runs)
        assert count
        with ur.record(fast) as rec:
            assert_close(fast(x), expected, 1e-6)
        assert len(runs) == count
        assert list(rec) == ["encoder.lstm", "middle", "decoder"]
        fast(x)
    assert len(runs) > count


def test_mismatch_gives_a_warning() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    handle = register_module_forward_hook(
        lambda module, args, result: (result[0] * 2, result[1]) if module is layer else None
    )
    try:
        with (
            ur.record(layer),
            pytest.warns(UserWarning, match="the trace of GRU '' differs from what the call"),
        ):
            layer(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_empty_batch_and_meta_device(make: type[nn.Module]) -> None:
    layer = make(3, 4)
    for filters in ({}, {"steps": [-1]}):
        with ur.record(layer, gradients=True, **filters) as rec:
            layer(torch.randn(5, 0, 3))[0].sum().backward()
        assert "0 rows" in repr(rec)
        assert rec[""]["h"].shape == (1 if filters else 5, 0, 4)
    layer = make(3, 4, device="meta")
    with ur.record(layer, rows=[0]) as rec:
        layer(torch.randn(5, 2, 3, device="meta"))
    with pytest.raises(ValueError, match="its last call was on the meta device, which holds no values"):
        rec[""]


def test_captured_graph_is_unchanged() -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        plain = make_fx(lambda x: layer(x)[0])(x)
        with ur.record(layer) as rec:
            recorded = make_fx(lambda x: layer(x)[0])(x)
    assert [node.name for node in recorded.graph.nodes] == [node.name for node in plain.graph.nodes]
    with pytest.raises(ValueError, match="its last call was inside a torch transform"):
        rec[""]


def test_unknown_names_and_unsupported_modules() -> None:
    model, x = Model(), torch.randn(5, 2, 3)
    with ur.record(model, units=[3], names=["f", "r"], rows=range(5)) as rec:
        with pytest.raises(ValueError, match="not recorded"):
            raise ValueError(repr(rec))
        model(torch.randn(5, 9, 3))
    assert list(rec) == ["encoder.lstm", "middle"]
    for name, words in (
        ("unused", "unit 3 is out of range: there are 2"),
        ("decoder", "it has none of the quantities f, r"),
    ):
        with pytest.raises(ValueError, match=words):
            rec[name]
    with ur.record(model) as rec:
        model(x)
    for name, words in (
        ("unused", "GRU 'unused' wasn't called in the block; recorded layers: 'encoder.lstm', 'middle'"),
        ("cell", "GRUCell 'cell' wasn't called in the block"),
        ("head", "'head' is a Linear; the recurrent layers are 'encoder.lstm', 'middle'"),
        ("encoder.gru", "'encoder.gru' is not a module of this model"),
    ):
        with pytest.raises(KeyError, match=words):
            rec[name]
    with pytest.raises(ValueError, match="record needs a model with recurrent layers, but Linear has none"):
        ur.record(nn.Linear(2, 3))
    with pytest.raises(TypeError, match="record expects a torch.nn.Module, got int"):
        ur.record(3)  # type: ignore[arg-type]
