"""The recorder beside the same model without it, its layers traced by hand, and loops by hand in float64."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_trace import by_hand
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout, linear
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from unrolled import plot
from unrolled.tracing.gradient_flow import flow


class Model(nn.Module):
    """Layers of torch's and ours, in places of several depths, and some that aren't called."""

    def __init__(self, batch_first: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"batch_first": batch_first, "dtype": dtype}
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(3, 4, 2, dropout=0.5, bidirectional=True, **sizes)})
        self.middle = ur.Recurrent(ur.cells.GRU, 8, 5, **sizes)
        self.alias = self.middle
        self.decoder = ur.RNN(5, 6, **sizes)
        self.cell = nn.GRUCell(2, 3)
        self.unused = nn.GRU(2, 2)
        self.head = nn.Linear(6, 2, dtype=dtype)

    def forward(self, x: Any) -> Tensor:
        x, _ = self.encoder["lstm"](x)
        x, state = self.middle(x)
        x, _ = self.decoder(x)
        x = x if isinstance(x, Tensor) else x.data
        return self.head(x).square().mean() + state.sum()


class Drawing(ur.Cell):
    """Draws random numbers in its step."""

    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        kept = dropout(x, 0.5)
        h = torch.tanh(linear(kept, self.weight_ih) + linear(h, self.weight_hh))
        return h


class Coupled(Drawing):
    """Its rows depend on each other."""

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        inside = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        h = torch.tanh(inside - inside.mean(0))
        return h


class Counting(Drawing):
    """Notes the most bytes of all tensors that live while it runs, where ``peak`` isn't 0."""

    peak = 0

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        inside = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        wide = torch.cat([inside] * 8, -1)
        h = torch.tanh(wide[..., : self.hidden])
        if not Counting.peak:
            return h
        alive = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}
        Counting.peak = max(Counting.peak, sum(storages.values()))
        return h


def test_the_model_runs_as_without_it() -> None:
    model, x = Model(), torch.randn(7, 4, 3)
    model.middle.register_forward_hook(lambda module, args, made: (made[0] * 2, made[1]))
    model.middle.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    torch.manual_seed(3)
    expected = model(x)
    expected.backward()
    after = torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(3)
    with ur.record(model, gradients=True) as rec:
        loss = model(x)
        drawn = torch.get_rng_state()
        loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(drawn, after)
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
    # each layer's trace is that of what the one below gave, the hooks' doings included
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
def test_the_native_engine_stays() -> None:
    model, x = Model(), torch.randn(7, 4, 3)
    with ur.engine("native"), ur.record(model) as rec:  # an error where another engine ran a layer
        model(x)
        with torch.no_grad(), ur.frozen(model):
            model(x)
    assert "GRU 'middle'" not in repr(rec)
    assert "Recurrent 'middle': 2 calls, 1 kept" in repr(rec)


@pytest.mark.parametrize("form", ["time first", "batch first", "packed", "sorted", "unbatched"])
def test_some_rows_are_those_of_the_batch(form: str) -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 4, 3, dropout=0.5, bidirectional=True, batch_first=True)})
    model["a"].batch_first = form != "time first"
    rows, inputs = [0, 2, 3], [torch.randn(n, 3) for n in (2, 6, 4, 5)]
    if form == "sorted":
        inputs.sort(key=len, reverse=True)
    x: Any = torch.randn(4, 6, 3) if form == "batch first" else torch.randn(6, 4, 3)
    x = pack_sequence(inputs, enforce_sorted=form == "sorted") if form in ("packed", "sorted") else x
    x = torch.randn(6, 3) if form == "unbatched" else x
    rows = [0] if form == "unbatched" else rows
    state = tuple(torch.randn(6, *([] if form == "unbatched" else [4]), 4) for _ in "hc")
    model.requires_grad_()
    with ur.record(model, gradients=True) as whole:
        torch.manual_seed(5)
        output, final = model["a"](x, state)
        (output if isinstance(output, Tensor) else output.data).square().sum().backward()
    with ur.record(model, rows=rows, gradients=True) as some:
        torch.manual_seed(5)
        output, final = model["a"](x, state)
        (output if isinstance(output, Tensor) else output.data).square().sum().backward()
    for a, b in zip(whole["a"].layers, some["a"].layers, strict=True):
        assert torch.equal(a.lengths[rows], b.lengths)
        time = int(b.lengths.max())
        assert_close(b.input, a.input[:time, rows], 1e-6)
        for name in ("i", "c", "h"):
            assert_close(b[name], a[name][:time, rows], 1e-5)
            assert_close(b.gradient(name), a.gradient(name)[:time, rows], 1e-4)
        assert_close(b.initial_state["c"], a.initial_state["c"][rows], 0)
    t = some["a"]
    kept = tuple(part if form == "unbatched" else part[:, rows] for part in final)
    assert_close(t.final_state, tuple(part.detach() for part in kept), 1e-6)
    if form in ("time first", "batch first"):
        along = output[rows] if form == "batch first" else output[:, rows]
        assert_close(t.output, along.detach(), 1e-6)
        with pytest.raises(ValueError, match="a check needs the whole batch: torch.nn would draw another"):
            t.check()
    model.eval()
    with ur.record(model, rows=rows) as some:
        model["a"](x, state)
    assert some["a"].check() < 1e-6


@pytest.mark.parametrize("cell", [Drawing, Coupled])
def test_rows_that_can_not_run_alone(cell: type[ur.Cell]) -> None:
    layer = ur.Recurrent(cell, 3, 4, dtype=torch.float64)
    x = torch.randn(6, 5, 3).double()
    traces = []
    for limits in ({}, {"rows": [1, 4]}, {"rows": [4], "steps": [-1, 2]}):
        with ur.record(layer, gradients=True, **limits) as rec:
            torch.manual_seed(7)
            with ur.engine("reference"):
                output, _ = layer(x)
            output.square().sum().backward()
        traces.append(rec[""])
    whole, some, few = traces
    assert_close(some["h"], output.detach()[:, [1, 4]], 1e-12)
    assert_close(some.gradient("h"), whole.gradient("h")[:, [1, 4]], 1e-12)
    assert_close(few["h"], output.detach()[[2, 5]][:, [4]], 1e-12)
    assert_close(few.gradient("h"), whole.gradient("h")[[2, 5]][:, [4]], 1e-12)
    assert few.final_state.shape == (1, 1, 4)
    with pytest.raises(ValueError, match="not all was kept"):
        some.backward(torch.sum)


def test_limits_cut_what_is_kept() -> None:
    model, x = Model(), torch.randn(9, 4, 3)
    model.eval()
    with ur.record(model) as rec:
        model(x)
    with ur.record(model, steps=[-1, 3, 0]) as steps:
        model(x)
    with ur.record(model, units=slice(1, 3), names=("h", "hidden_sum", "x"), rows=slice(2)) as some:
        model(x)
    for name in rec:
        for whole, few, part in zip(rec[name].layers, steps[name].layers, some[name].layers, strict=True):
            assert few.steps == (0, 3, 8)
            hidden = whole.cell.hidden
            gates = whole["hidden_sum"].shape[-1] // hidden
            columns = [block * hidden + unit for block in range(gates) for unit in (1, 2)]
            assert part.columns["hidden_sum"] == tuple(columns)
            assert_close(part["x"], whole.input[:, :2], 1e-6)
            assert_close(part["h"], whole["h"][:, :2, 1:3], 1e-6)
            assert_close(part["hidden_sum"], whole["hidden_sum"][:, :2, columns], 1e-6)
            assert set(part.names) == {"h", "hidden_sum"}
            for quantity in whole.names:
                assert torch.equal(few[quantity], whole[quantity][[0, 3, 8]])
            for step in (0, 3, -1):
                assert few.explain("h", step, 2, batch=1) == whole.explain("h", step, 2, batch=1)
            with pytest.raises(IndexError, match="step 4 wasn't kept: this trace has the steps 0, 3, 8"):
                few.explain("h", 4, 2)
            with pytest.raises(ValueError, match="keeps hidden_sum, h of units 1, 2: limit steps or rows"):
                part.explain("h", 4, 1)
            with pytest.raises(KeyError, match="no quantity 'n'"):
                part["n"]
    t = steps["middle"]
    assert "3 of 9 steps × 4 rows" in repr(t)
    assert t.input is None
    for what in (lambda: t.backward(torch.sum), lambda: t.check()):
        with pytest.raises(ValueError, match="not all was kept: limit no more than rows"):
            what()
    for what, draw in (
        ("a picture", lambda: plot.gates(t)),
        ("a page", lambda: t.to_html("page.html")),
        ("the gradient's way", lambda: flow(some["middle"].layers[0], "h")),
    ):
        with pytest.raises(ValueError, match=f"{what} needs every step, quantity and unit"):
            draw()
    # the true numbers of steps and units, wherever one reads them
    frame, all_of = some["middle"].to_pandas(), rec["middle"].to_pandas()
    keys = ["layer", "direction", "step", "batch", "name", "unit"]
    both = frame.merge(all_of, on=keys, how="left")
    assert len(both) == len(frame) > 0
    assert (both.value_x - both.value_y).abs().max() < 1e-6
    frame = t.to_pandas().merge(all_of, on=keys, how="left")
    assert (frame.value_x == frame.value_y).all()
    assert sorted(set(frame.step)) == [0, 3, 8]
    assert (
        str(t.table(names=["h"], steps=[3, -1])).split("\n")[3:]
        == (str(rec["middle"].table(names=["h"], steps=[3, -1])).split("\n")[3:])
    )
    with pytest.raises(IndexError, match="step 5 wasn't kept"):
        t.table(steps=[5])
    lines = str(some["middle"].table(names=["hidden_sum", "h"], units=9)).splitlines()
    assert lines[2].split() == ["step", "quantity", "1", "2", "6", "7", "11", "12"]
    assert len(lines[5].split()) == len(lines[4].split()) - 1 - 4


def test_steps_of_rows_of_several_lengths() -> None:
    model = nn.GRU(3, 4, bidirectional=True)
    x = pack_sequence([torch.randn(n, 3) for n in (2, 6, 4)], enforce_sorted=False)
    with ur.record(model) as rec:
        model(x)
    with ur.record(model, steps=[3, 1, 4]) as some:
        model(x)
    for whole, few in zip(rec[""].layers, some[""].layers, strict=True):
        assert few.steps == (1, 3, 4)
        for name in whole.names:
            assert torch.equal(few[name], whole[name][[1, 3, 4]])
        assert few.explain("h", -1, 0, batch=2) == whole.explain("h", 3, 0, batch=2)
        assert few.explain("h", 1, 0, batch=0) == whole.explain("h", 1, 0, batch=0)
    with ur.record(model, steps=-1) as last:
        model(x)
    with pytest.raises(ValueError, match="row 0 has 2 steps, and none of them was kept"):
        last[""].table()


@pytest.fixture
def _new_objects_only() -> Iterator[None]:
    """The garbage collector knows but what is made from here on: it is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_new_objects_only")
def test_the_memory_that_it_takes() -> None:
    time, batch, hidden = 24, 6, 32
    layer, x = ur.Recurrent(Counting, 4, hidden), torch.randn(time, batch, 4)

    def peak(calls: int = 1, **limits: Any) -> tuple[int, ur.Record]:
        with torch.no_grad(), ur.engine("reference"):
            layer(x)
            gc.collect()
            Counting.peak = 1
            layer(x)
            alone, Counting.peak = Counting.peak, 1
            with ur.record(layer, **limits) as rec:
                for _ in range(calls):
                    layer(x)
            taken, Counting.peak = Counting.peak - alone, 0
        return taken, rec

    number, state = 4, hidden
    parameters = number * (hidden * 4 + hidden * hidden)
    output = number * time * batch * hidden
    every, rec = peak()
    # inside, wide and h of every step; input, output and states
    assert every >= number * time * batch * 10 * hidden
    assert rec.nbytes >= number * time * batch * (10 * hidden + 4)
    assert peak(calls=2)[0] <= every + parameters + output  # the trace of the first call has gone
    slack = 2 * torch.get_rng_state().nbytes + number * batch * 12 * hidden  # of the step that runs
    for limits, kept in (
        ({"steps": [-1]}, batch * (10 * hidden + 4 + state)),
        ({"steps": range(10)}, 10 * batch * (10 * hidden + 4 + state)),
        ({"names": ["h"]}, time * batch * hidden),
        ({"names": ["wide"], "units": [0, 3]}, time * batch * 8 * 2),
        ({"rows": 2, "names": ["wide"]}, time * 8 * hidden),
    ):
        taken, rec = peak(**limits)
        assert number * kept <= rec.nbytes <= number * kept + parameters + number * 4 * batch * hidden
        assert taken <= number * kept + parameters + output + slack
    with torch.no_grad(), ur.record(layer, calls=5, steps=[0]) as rec:
        for _ in range(7):
            layer(x)
    assert len(rec.calls("")) == 5
    assert rec.nbytes < 5 * rec.calls("")[0].nbytes - 3 * parameters  # one copy of the parameters
    assert (
        f"7 calls, 5 kept, {rec.nbytes / 1000:.3g} KB; 1 of {time} steps × 6 rows; inside, wide, h"
        in repr(rec)
    )
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
        with ur.record(layer, calls=2) as rec:
            layer(x)
            layer.weight_hh_l0.mul_(2)
            layer(x)
    first, second = rec.calls("")
    assert_close(second.layers[0].cell.weight_hh, first.layers[0].cell.weight_hh * 2, 0)
    with ur.record(layer, calls=2) as rec:
        layer(x)
        layer.double()(x.double())
    first, second = rec.calls("")
    assert_close(
        second.backward(torch.sum).gradient("h"), first.backward(torch.sum).gradient("h").double(), 1e-3
    )


@pytest.mark.usefixtures("_new_objects_only")
@pytest.mark.parametrize("limits", [None, {}, {"steps": [1], "rows": [0]}])
def test_nothing_waits_for_the_garbage_collector(limits: dict[str, Any] | None) -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(6, 2, 3)

    def train() -> None:
        if limits is None:
            looking: Any = ur.watch(layer, every=1, share=None)
        else:
            looking = ur.record(layer, gradients=True, **limits)
        with looking:
            layer(x)[0].sum().backward()

    def alive() -> int:
        return sum(type(one) in (Tensor, nn.Parameter) for one in gc.get_objects())

    train()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        train()
        assert alive() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "limits", [{}, {"rows": [2, 0]}, {"steps": [1, -1], "names": ["h", "f"], "units": [2]}]
)
def test_gradients_against_a_loop_by_hand(limits: dict[str, Any]) -> None:
    first, second = nn.LSTM(3, 4, dtype=torch.float64), ur.GRU(4, 4, dtype=torch.float64)
    model = nn.ModuleDict({"first": first, "second": second})
    x, weights = torch.randn(5, 3, 3).double(), torch.randn(5, 3, 4).double()

    def loss(output: Tensor, c: Tensor, h: Tensor) -> Tensor:
        return (output * weights).sum().sin() + c.square().sum() + (h[0] * 3).sum()

    with ur.record(model, gradients=True, **limits) as rec:
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
            found = by_hand(kind, lambda key, layer=layer: getattr(layer, key + "_l0"), below, states[name])
            found = {key: tensor for key, tensor in found.items() if tensor.requires_grad}
            for tensor in found.values():
                tensor.retain_grad()
            states[name] = (found["h"], found["c"]) if "c" in found else (found["h"],)
            below = found["h"]
            named[name].append(found)
    outputs = torch.stack([found["h"] for found in named["second"]])
    loss(outputs, named["first"][-1]["c"], named["first"][-1]["h"]).backward()
    rows = sorted(limits.get("rows", range(3)))
    steps = [1, 4] if "steps" in limits else range(5)
    units = limits.get("units", range(4))
    for name, t in rec.items():
        assert "h" in t.names
        for key in t.names:
            if key in named[name][0]:
                expected = torch.stack([named[name][step][key].grad for step in steps])[:, rows]
                expected = expected[..., list(units)] if expected.shape[-1] == 4 else expected
                assert_close(t.gradient(key), expected, 1e-12)
    kept = rec["first"].gradient("h").clone()
    loss(second(first(x)[0])[0], c[0].detach(), h[0].detach()).backward()
    assert torch.equal(rec["first"].gradient("h"), kept)  # no longer recorded


def test_each_call_has_its_own_gradient() -> None:
    layer = ur.LSTM(3, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 3).double()
    with ur.record(layer, calls=2, gradients=True) as rec:
        between, state = layer(x)
        between.retain_grad()
        output, _ = layer(between, state)
        output.square().sum().backward()
    first, second = rec.calls("")
    expected = ur.trace(layer, x).backward(lambda h, state: layer(h, state)[0].square().sum()).gradient("c")
    assert_close(first.gradient("c"), expected, 1e-12)
    assert_close(second.gradient("h")[-1], 2 * output.detach()[-1], 1e-12)


def test_what_a_call_asks_for() -> None:
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
    for wrong, words in (
        ({"lengths": [0, 6, 4]}, "gave rows without a step"),
        ({"resets": torch.rand(6, 3) < 0.5}, "resets= changed its states"),
        ({"all_states": True}, "gradients=True doesn't follow"),
    ):
        with ur.record(layer, gradients=True) as rec:
            layer(x, **wrong)
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
    noisy = ur.GRU(3, 4, zoneout=0.1)
    with ur.record(noisy) as rec:
        noisy(x)
    with pytest.raises(ValueError, match="zoneout"):
        rec[""]

    class Doubled(nn.GRU):
        def forward(self, *args: Any) -> Any:
            return super().forward(args[0] * 2)

    model = nn.ModuleDict({"own": Doubled(3, 4), "usual": nn.GRU(3, 4)})
    with ur.record(model) as rec:
        model["own"](x)
        model["usual"](x)
    assert list(rec) == ["usual"]
    with pytest.raises(ValueError, match="overrides the forward of torch.nn.GRU"):
        rec["own"]


def test_checkpointed_calls_count_once() -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(6, 3, 3, requires_grad=True)
    with ur.record(layer, gradients=True) as rec:
        checkpoint(lambda x: layer(x)[0].square().square(), x, use_reentrant=False).sum().backward()
    assert "1 call," in repr(rec)
    assert_close(rec[""].gradient("h")[-1], 4 * layer(x)[0].detach()[-1] ** 3, 1e-5)


def test_blocks_within_blocks_threads_and_errors() -> None:
    model, x = Model(), torch.randn(5, 2, 3)
    outer = ur.record(model)
    with outer:
        with ur.record(model, names="h") as inner:
            model(x)
            thread = threading.Thread(target=model, args=(x,))
            thread.start()
            thread.join()
            copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
            copied(x)
            copy.copy(model.middle)(torch.randn(5, 2, 8))
        model(x)
        with pytest.raises(RuntimeError, match="running already"):
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
    words = "record of LSTM 'encoder.lstm': there is no step 7: there are 5"
    with ur.record(model, steps=[7]), pytest.raises(IndexError, match=words):
        model(x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for module in copied.modules():
        assert "_compiled_call_impl" not in vars(module)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            assert hook.__module__ == "contextlib"  # in the copy, and it does nothing
    pieces, alone, stream = torch.randn(6, 2, 5), ur.Stream(model.decoder), ur.Stream(model.decoder)
    stream(pieces[:2])
    with ur.record(model.decoder) as rec:
        output = stream(pieces[2:4])
    output = torch.cat([output, stream(pieces[4:])])
    assert torch.equal(alone(pieces)[2:], output)
    assert_close(rec[""].output, output[:2], 1e-6)


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


def test_what_differs_from_the_call_is_told() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    handle = register_module_forward_hook(
        lambda module, args, made: (made[0] * 2, made[1]) if module is layer else None
    )
    try:
        with (
            ur.record(layer),
            pytest.warns(UserWarning, match="the trace of GRU '' differs from what its call"),
        ):
            layer(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_batches_without_rows_and_the_meta_device(make: type[nn.Module]) -> None:
    layer = make(3, 4)
    for limits in ({}, {"steps": [-1]}):
        with ur.record(layer, gradients=True, **limits) as rec:
            layer(torch.randn(5, 0, 3))[0].sum().backward()
        assert "0 rows" in repr(rec)
        assert rec[""]["h"].shape == (1 if limits else 5, 0, 4)
    layer = make(3, 4, device="meta")
    with ur.record(layer, rows=[0]) as rec:
        layer(torch.randn(5, 2, 3, device="meta"))
    with pytest.raises(ValueError, match="it was on the meta device, where there are no numbers"):
        rec[""]


def test_nothing_of_it_is_in_a_captured_graph() -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        plain = make_fx(lambda x: layer(x)[0])(x)
        with ur.record(layer) as rec:
            recorded = make_fx(lambda x: layer(x)[0])(x)
    assert [node.name for node in recorded.graph.nodes] == [node.name for node in plain.graph.nodes]
    with pytest.raises(ValueError, match="inside a transform of torch"):
        rec[""]


def test_blocks_of_several_threads_end_in_any_order() -> None:
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
    failures = list[BaseException]()

    def repeatedly() -> None:
        try:
            for _ in range(30):
                with ur.record(model.decoder) as rec:
                    model.decoder(torch.randn(1, 1, 5))
                assert len(rec) == 1
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=repeatedly) for _ in range(4)]
    switches = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switches)
    assert not failures
    assert model(x).requires_grad
    assert not model.decoder._forward_hooks


@pytest.mark.parametrize(
    ("limits", "error", "words"),
    [
        ({"steps": 1.5}, TypeError, "steps should be a whole number, a slice, a range or a list.*got 1.5"),
        ({"steps": torch.tensor([True, False])}, TypeError, "steps should be a whole number.*tensor"),
        ({"steps": slice(0.5, None)}, TypeError, "steps should be a whole number, a slice"),
        ({"units": slice(0.5, None)}, TypeError, "units should be a whole number, a slice"),
        ({"rows": slice(None, None, 0)}, ValueError, "rows=slice.*can't be: slice step cannot be zero"),
        ({"names": 5}, ValueError, "names should be the names of quantities"),
        ({"rows": [True, False]}, TypeError, "rows should be a whole number"),
        ({"units": "all"}, TypeError, "units should be a whole number"),
        ({"rows": []}, ValueError, "rows is empty: nothing would be kept"),
        ({"units": [6]}, IndexError, "there is no unit 6: there are 4"),
        ({"units": slice(9, None)}, ValueError, "leaves none of 4: nothing would be kept"),
        ({"names": ["forget"]}, ValueError, "no layer has a quantity 'forget': there are .*hidden_sum"),
        ({"names": []}, ValueError, "names should be the names of quantities"),
        ({"calls": 0}, ValueError, "calls must be greater than zero, got 0"),
        ({"gradients": 1}, TypeError, "gradients should be of type bool, got 1"),
    ],
)
def test_bad_limits(limits: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ur.record(Model(), **limits)


def test_what_is_not_there() -> None:
    model, x = Model(), torch.randn(5, 2, 3)
    with ur.record(model, units=[3], names=["f", "r"], rows=range(5)) as rec:
        with pytest.raises(ValueError, match="not recorded"):
            raise ValueError(repr(rec))
        model(torch.randn(5, 9, 3))
    assert list(rec) == ["encoder.lstm", "middle"]
    for name, words in (
        ("unused", "there is no unit 3: there are 2"),
        ("decoder", "it has none of the quantities f, r"),
    ):
        with pytest.raises(ValueError, match=words):
            rec[name]
    with ur.record(model) as rec:
        model(x)
    for name, words in (
        ("unused", "GRU 'unused' wasn't called in the block; layers that were: 'encoder.lstm', 'middle'"),
        ("cell", "'cell' is a single step, which isn't recorded: what passes between their calls"),
        ("head", "'head' is a Linear: the recurrent layers are 'encoder.lstm', 'middle'"),
        ("encoder.gru", "'encoder.gru' is no module of this model"),
    ):
        with pytest.raises(KeyError, match=words):
            rec[name]
    with pytest.raises(ValueError, match="record takes a model with recurrent layers, Linear has none"):
        ur.record(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="GRUCell has none but single steps"):
        ur.record(nn.GRUCell(2, 3))
    with pytest.raises(TypeError, match="record takes a module, got int"):
        ur.record(3)  # type: ignore[arg-type]
