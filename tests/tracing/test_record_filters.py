"""Selection of what `record` keeps, and the memory that it takes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.layer_pairs import assert_close
from helpers.recorded_models import Model, PeakMemory
from unrolled import plot
from unrolled.tracing.gradient_flow import gradient_flow


def test_selected_steps_units_and_names() -> None:
    model, x = Model(), torch.randn(9, 4, 3)
    model.eval()
    with ur.record(model) as rec:
        model(x)
    with ur.record(model, steps=[-1, 3, 0]) as steps:
        model(x)
    with ur.record(model, units=slice(1, 3), names=("h", "hidden_sum", "x"), rows=slice(2)) as some:
        model(x)
    for name in rec:
        for full, some_steps, part in zip(
            rec[name].layers, steps[name].layers, some[name].layers, strict=True
        ):
            assert some_steps.steps == (0, 3, 8)
            hidden = full.cell.hidden
            gates = full["hidden_sum"].shape[-1] // hidden
            columns = [block * hidden + unit for block in range(gates) for unit in (1, 2)]
            assert part.columns["hidden_sum"] == tuple(columns)
            assert_close(part["x"], full.input[:, :2], 1e-6)
            assert_close(part["h"], full["h"][:, :2, 1:3], 1e-6)
            assert_close(part["hidden_sum"], full["hidden_sum"][:, :2, columns], 1e-6)
            assert set(part.names) == {"h", "hidden_sum"}
            for quantity in full.names:
                assert torch.equal(some_steps[quantity], full[quantity][[0, 3, 8]])
            for step in (0, 3, -1):
                assert some_steps.explain("h", step, 2, batch=1) == full.explain("h", step, 2, batch=1)
            with pytest.raises(IndexError, match="step 4 wasn't recorded: this trace has the steps 0, 3, 8"):
                some_steps.explain("h", 4, 2)
            with pytest.raises(
                ValueError, match="has only hidden_sum, h of units 1, 2: select steps or rows"
            ):
                part.explain("h", 4, 1)
            with pytest.raises(KeyError, match="no quantity 'n'"):
                part["n"]
    t = steps["middle"]
    assert "3 of 9 steps × 4 rows" in repr(t)
    assert t.input is None
    for rerun in (lambda: t.backward(torch.sum), lambda: t.check()):
        with pytest.raises(ValueError, match="doesn't have the whole call: select only rows"):
            rerun()
    for what, draw in (
        ("a plot", lambda: plot.gates(t)),
        ("a page", lambda: t.to_html("page.html")),
        ("the gradient flow", lambda: gradient_flow(some["middle"].layers[0], "h")),
    ):
        with pytest.raises(ValueError, match=f"{what} needs all steps, quantities and units"):
            draw()
    # Tables and frames show the original numbers of steps and units.
    frame, full_frame = some["middle"].to_pandas(), rec["middle"].to_pandas()
    keys = ["layer", "direction", "step", "batch", "name", "unit"]
    both = frame.merge(full_frame, on=keys, how="left")
    assert len(both) == len(frame) > 0
    assert (both.value_x - both.value_y).abs().max() < 1e-6
    frame = t.to_pandas().merge(full_frame, on=keys, how="left")
    assert (frame.value_x == frame.value_y).all()
    assert sorted(set(frame.step)) == [0, 3, 8]
    assert (
        str(t.table(names=["h"], steps=[3, -1])).split("\n")[3:]
        == (str(rec["middle"].table(names=["h"], steps=[3, -1])).split("\n")[3:])
    )
    with pytest.raises(IndexError, match="step 5 wasn't recorded"):
        t.table(steps=[5])
    lines = str(some["middle"].table(names=["hidden_sum", "h"], units=9)).splitlines()
    assert lines[2].split() == ["step", "quantity", "1", "2", "6", "7", "11", "12"]
    assert len(lines[5].split()) == len(lines[4].split()) - 1 - 4


def test_selected_steps_of_rows_with_different_lengths() -> None:
    model = nn.GRU(3, 4, bidirectional=True)
    x = pack_sequence([torch.randn(n, 3) for n in (2, 6, 4)], enforce_sorted=False)
    with ur.record(model) as rec:
        model(x)
    with ur.record(model, steps=[3, 1, 4]) as some:
        model(x)
    for full, some_steps in zip(rec[""].layers, some[""].layers, strict=True):
        assert some_steps.steps == (1, 3, 4)
        for name in full.names:
            assert torch.equal(some_steps[name], full[name][[1, 3, 4]])
        assert some_steps.explain("h", -1, 0, batch=2) == full.explain("h", 3, 0, batch=2)
        assert some_steps.explain("h", 1, 0, batch=0) == full.explain("h", 1, 0, batch=0)
    with ur.record(model, steps=-1) as last:
        model(x)
    with pytest.raises(ValueError, match="row 0 has 2 steps, but none of them was recorded"):
        last[""].table()


@pytest.fixture
def _fast_garbage_collection() -> Iterator[None]:
    """Exclude existing objects from garbage collection, so that it is fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("_fast_garbage_collection")
def test_memory() -> None:
    time, batch, hidden = 24, 6, 32
    layer, x = ur.Recurrent(PeakMemory, 4, hidden), torch.randn(time, batch, 4)

    def peak(calls: int = 1, **filters: Any) -> tuple[int, ur.Record]:
        with torch.no_grad(), ur.engine("reference"):
            layer(x)
            gc.collect()
            PeakMemory.peak = 1
            layer(x)
            baseline, PeakMemory.peak = PeakMemory.peak, 1
            with ur.record(layer, **filters) as rec:
                for _ in range(calls):
                    layer(x)
            extra, PeakMemory.peak = PeakMemory.peak - baseline, 0
        return extra, rec

    value_bytes, state = 4, hidden
    parameters = value_bytes * (hidden * 4 + hidden * hidden)
    output = value_bytes * time * batch * hidden
    everything, rec = peak()
    # Every step has inside, wide and h; then come input, output and states.
    assert everything >= value_bytes * time * batch * 10 * hidden
    assert rec.nbytes >= value_bytes * time * batch * (10 * hidden + 4)
    assert peak(calls=2)[0] <= everything + parameters + output  # the trace of the first call was freed
    slack = 2 * torch.get_rng_state().nbytes + value_bytes * batch * 12 * hidden  # for the current step
    for filters, count in (
        ({"steps": [-1]}, batch * (10 * hidden + 4 + state)),
        ({"steps": range(10)}, 10 * batch * (10 * hidden + 4 + state)),
        ({"names": ["h"]}, time * batch * hidden),
        ({"names": ["wide"], "units": [0, 3]}, time * batch * 8 * 2),
        ({"rows": 2, "names": ["wide"]}, time * 8 * hidden),
    ):
        extra, rec = peak(**filters)
        assert (
            value_bytes * count
            <= rec.nbytes
            <= value_bytes * count + parameters + value_bytes * 4 * batch * hidden
        )
        assert extra <= value_bytes * count + parameters + output + slack
    with torch.no_grad(), ur.record(layer, calls=5, steps=[0]) as rec:
        for _ in range(7):
            layer(x)
    assert len(rec.calls("")) == 5
    assert rec.nbytes < 5 * rec.calls("")[0].nbytes - 3 * parameters  # one copy of the parameters
    assert (
        f"7 calls, 5 recorded, {rec.nbytes / 1000:.3g} KB; 1 of {time} steps × 6 rows; inside, wide, h"
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


@pytest.mark.slow
@pytest.mark.usefixtures("_fast_garbage_collection")
@pytest.mark.parametrize("filters", [None, {}, {"steps": [1], "rows": [0]}])
def test_memory_is_freed_without_the_garbage_collector(filters: dict[str, Any] | None) -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(6, 2, 3)

    def train() -> None:
        if filters is None:
            recorder: Any = ur.watch(layer, every=1, share=None)
        else:
            recorder = ur.record(layer, gradients=True, **filters)
        with recorder:
            layer(x)[0].sum().backward()

    def count_tensors() -> int:
        return sum(type(one) in (Tensor, nn.Parameter) for one in gc.get_objects())

    train()
    gc.collect()
    gc.disable()
    try:
        before = count_tensors()
        train()
        assert count_tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("filters", "error", "words"),
    [
        ({"steps": 1.5}, TypeError, "steps must be an integer, a slice, a range or a list.*got 1.5"),
        ({"steps": torch.tensor([True, False])}, TypeError, "steps must be an integer.*tensor"),
        ({"steps": slice(0.5, None)}, TypeError, "steps must be an integer, a slice"),
        ({"units": slice(0.5, None)}, TypeError, "units must be an integer, a slice"),
        ({"rows": slice(None, None, 0)}, ValueError, "rows=slice.*is invalid: slice step cannot be zero"),
        ({"names": 5}, ValueError, "names must be a list of quantities"),
        ({"rows": [True, False]}, TypeError, "rows must be an integer"),
        ({"units": "all"}, TypeError, "units must be an integer"),
        ({"rows": []}, ValueError, "rows is empty, so nothing would be recorded"),
        ({"units": [6]}, IndexError, "unit 6 is out of range: there are 4"),
        ({"units": slice(9, None)}, ValueError, "selects none of 4, so nothing would be recorded"),
        ({"names": ["forget"]}, ValueError, "no layer has a quantity 'forget': choose from .*hidden_sum"),
        ({"names": []}, ValueError, "names must be a list of quantities"),
        ({"calls": 0}, ValueError, "calls must be greater than zero, got 0"),
        ({"gradients": 1}, TypeError, "gradients must be of type bool, got 1"),
    ],
)
def test_invalid_filters(filters: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ur.record(Model(), **filters)
