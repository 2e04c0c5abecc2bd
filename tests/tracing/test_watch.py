"""Which calls `watch` samples, its warnings and errors, and its output to CSV and TensorBoard."""

from __future__ import annotations

import contextlib
import copy
import csv
import gc
import math
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrolled as ur
from helpers.watched_training import train
from unrolled.tracing.hooks import LayerCall


def test_which_calls_are_sampled() -> None:
    model, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    watch = ur.watch(model, every=2, share=None)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)[0].sum().backward()
    model.train()
    assert "'': 0 training calls, 2 in eval mode or without gradients; 0 records" in repr(watch)
    model(x)
    output, _ = model(x)
    assert not watch.records  # no backward pass yet
    loss = output.square().sum()
    loss.backward(retain_graph=True)
    new = list(watch)
    assert {record["call"] for record in new} == {2}
    loss.backward()  # a second backward pass
    assert not list(watch)
    train(model, x, 4)
    assert {record["call"] for record in watch} == {4, 6}
    assert {call for _, _, call in watch.scalars()} == {2, 4, 6}
    assert not list(watch.scalars())
    copied = copy.deepcopy(model)
    train(copied, x, 4)
    assert "'': 6 training calls" in repr(watch)
    output = model(x)[0]
    output = model(x)[0]
    watch.close()
    watch.close()
    output.sum().backward()  # the backward pass comes after close
    train(model, x, 2)
    assert len(watch.records) == 3 * len(new)
    assert repr(watch).startswith("<Watch, closed;")

    with ur.watch(model, every=2, share=1e-7) as rare:  # the first sample uses up the time budget
        train(model, x, 10)
    assert {record["call"] for record in rare.records} == {2}
    assert "10 training calls, 4 samples skipped (time budget); " in repr(rare)
    start, samples = time.perf_counter(), 0
    with ur.watch(model, every=1, share=0.3) as modest:
        while samples < 4:
            before = modest.seconds
            train(model, x, 1)
            if modest.seconds > before:  # the time spent before was within the budget
                assert before <= 0.3 * (time.perf_counter() - start)
                samples += 1
    with ur.watch(model, every=1, share=None) as watch, ur.watch(model, every=1, share=None) as other:
        rare.close()
        with ur.record(model) as rec:
            train(model, x, 2)
    assert len(watch.records) == len(other.records) > 0
    assert list(rec) == [""]
    shared = ur.watch(nn.ModuleDict({"a": model, "b": model}), every=1, share=None)
    train(model, x, 1)
    assert {record["module"] for record in shared.records} == {"a"}
    shared.close()


def test_warning_without_records() -> None:
    model, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    no_calls = "'': 0 training calls; 0 records> has no records: watch samples calls in training mode"
    expected = pytest.warns(UserWarning, match=f"{no_calls} with gradients, but there was none")
    with expected, ur.watch(model):
        pass
    with ur.watch(model.eval()) as watch:  # health() reports on these calls, so there is no warning
        model(x)
    assert "1 in eval mode or without gradients; 0 records" in repr(watch)
    model.train()
    for backward, every, words in (
        (True, 5, "2 training calls; 0 records> has no records: the first sample is call 5, so use a"),
        (False, 1, "> has no records: no backward pass reached the sampled calls"),
    ):
        expected_warning = pytest.warns(UserWarning, match=f"<Watch, closed; .*{words}")
        with expected_warning, ur.watch(model, every=every, share=None):
            for _ in range(2):
                output = model(x)[0].sum()
                if backward:
                    output.backward()
    with pytest.raises(KeyError), ur.watch(model):  # an error in the block gives no warning
        raise KeyError


@pytest.mark.slow
@pytest.mark.parametrize("reached", [False, True])
def test_no_tensor_of_a_call_is_kept_alive(reached: bool) -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3) * 1
    gc.collect()  # objects of other tests
    gc.disable()
    try:
        with (
            contextlib.nullcontext() if reached else pytest.warns(UserWarning, match="no backward pass"),
            ur.watch(layer, every=1, share=None) as watch,
            ur.record(layer, steps=[0], gradients=True) as rec,
        ):
            output, state = layer(x)
            references = weakref.ref(x), weakref.ref(output), weakref.ref(state[0])
            if reached:
                output.sum().backward()
            del x, output, state
            assert bool(watch.records) == reached
            assert all(reference() is None for reference in references)
            assert not any(type(one) is LayerCall for one in gc.get_objects())
            assert rec.nbytes < 4000
    finally:
        gc.enable()


def test_csv_and_tensorboard(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(3, 4, bidirectional=True)})
    with torch.no_grad():
        model["encoder"].weight_ih_l0_reverse[0, 0] = math.nan
    watch = ur.watch(model, every=1, share=None)
    for _ in range(2):
        train(model["encoder"], torch.randn(5, 2, 3))
    watch.to_csv(tmp_path / "health.csv")
    with open(tmp_path / "health.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(watch.records)
    for line, record in zip(lines, watch.records, strict=True):
        assert {name: "" if value is None else str(value) for name, value in record.items()} == line
    with pytest.raises(OSError, match="No such file"):
        watch.to_csv(tmp_path / "missing" / "health.csv")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    scalars = list(watch.scalars())
    with SummaryWriter(tmp_path / "runs") as writer:
        for tag, value, call in scalars:
            writer.add_scalar(tag, value, call)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    for tag, value, call in scalars:
        (logged,) = [event.value for event in events.Scalars(tag) if event.step == call]
        assert logged == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert "encoder/l0_forward/f/saturated" in events.Tags()["scalars"]
    assert math.isnan(events.Scalars("encoder/l0_backward/i/mean")[0].value)


def test_unsupported_layers_and_arguments() -> None:
    model, x = ur.GRU(3, 4, zoneout=0.1), torch.randn(5, 2, 3)
    with (
        ur.watch(model, every=1) as watch,
        pytest.warns(UserWarning, match="can't compute the health of ''.*zone"),
    ):
        train(model, x, 3)
    assert not watch.records

    class TensorSubclass(Tensor):
        pass

    distributed = ur.GRU(3, 4)
    distributed.weight_hh_l0 = nn.Parameter(torch.randn(12, 4).as_subclass(TensorSubclass))
    with (
        ur.engine("reference"),
        ur.watch(distributed, every=1) as watch,
        pytest.warns(UserWarning, match="subclass of"),
    ):
        train(distributed, x, 2)
    assert not watch.records
    changing = nn.GRU(3, 4)

    def shrink(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.mul_(0.9)

    for parameter in changing.parameters():
        parameter.register_post_accumulate_grad_hook(shrink)
    words = "its parameters change before the backward pass ends"
    with ur.watch(changing, every=1) as watch, pytest.warns(UserWarning, match=words):
        changing(x)[0].sum().backward()
    assert not watch.records
    for arguments, error, words in (
        ((nn.Linear(2, 3),), ValueError, "watch needs a model with recurrent layers"),
        ((model, 0), ValueError, "every must be greater than zero, got 0"),
        ((model, 2.5), TypeError, "every should be of type int"),
        (
            (torch.compile(model, backend="eager"),),
            ValueError,
            "watch can't see calls inside a compiled module",
        ),
    ):
        with pytest.raises(error, match=words):
            ur.watch(*arguments)
    for share in (0, 5, True, "5 %"):
        with pytest.raises(ValueError, match="share must be a number above 0 and up to 1, or None"):
            ur.watch(model, share=share)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows must be greater than zero"):
        ur.watch(model, rows=0)
    assert not model._forward_hooks


def test_compiled_calls_are_not_sampled() -> None:
    model, x = nn.ModuleDict({"r": ur.GRU(3, 4)}), torch.randn(5, 2, 3)
    with ur.watch(model, every=1, share=None) as watch:
        fast = torch.compile(lambda x: model["r"](x)[0].square().mean(), backend="aot_eager", fullgraph=True)
        fast(x).backward()
        assert not watch.records
        train(model["r"], x)
    assert watch.records


def test_mismatch_gives_a_warning() -> None:
    class RandomMask(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return F.dropout(weight, 0.5, self.training)

    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", RandomMask())
    torch.manual_seed(3)
    layer(x)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    words = "watch may be wrong about '': the rerun of the call differs from what the call returned"
    with ur.watch(layer, every=1, share=None) as watch, pytest.warns(UserWarning, match=words):
        layer(x)[0].sum().backward()
    assert watch.records
    assert torch.equal(torch.get_rng_state(), expected)
