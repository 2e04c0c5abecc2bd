"""The training monitor's figures beside loops by hand, traces and closed forms; training untouched."""

from __future__ import annotations

import contextlib
import copy
import csv
import gc
import math
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_record import Coupled, Drawing
from test_trace import by_hand
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from unrolled.tracing.health import FIELDS, flat_parts
from unrolled.tracing.hooks import LayerCall


def train(model: nn.Module, x: Any, steps: int = 1, loss: Any = None) -> None:
    """Some steps of Adam on the first thing that the model returns."""
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        output = model(x)
        (loss or (lambda made: made[0].square().mean()))(output).backward()
        optimiser.step()


def by_name(watch: ur.Watch, **where: Any) -> dict[str, dict[str, Any]]:
    """Of the records for which all of this holds, each by its quantity."""
    return {
        record["quantity"]: record
        for record in watch.records
        if all(record[key] == value for key, value in where.items())
    }


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-relu"])
def test_the_figures_by_hand(kind: str) -> None:
    make = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn-relu": nn.RNN}[kind]
    layer = make(3, 4, dtype=torch.float64, **({"nonlinearity": "relu"} if "rnn" in kind else {}))
    with torch.no_grad():
        layer.weight_ih_l0 *= 6
    x, weights = torch.randn(6, 5, 3).double(), torch.randn(6, 5, 4).double()
    with ur.watch(layer, every=1, rows=2, share=None) as watch:
        output, final = layer(x)
        last = final[1] if kind == "lstm" else final
        ((output * weights).sum().sin() + last.sum()).backward()
    found = by_name(watch)

    states = tuple(torch.zeros(5, 4).double() for _ in range(1 + (kind == "lstm")))
    named: list[dict[str, Tensor]] = []
    for step in range(6):
        made = by_hand(kind, lambda name: getattr(layer, name + "_l0"), x[step], states)
        for tensor in made.values():
            tensor.retain_grad()
        states = (made["h"], made["c"]) if "c" in made else (made["h"],)
        named.append(made)
    ((torch.stack([made["h"] for made in named]) * weights).sum().sin() + states[-1].sum()).backward()
    for name in set(named[0]) & set(found):
        values = torch.stack([made[name] for made in named])[:, :2].detach()
        record = found[name]
        assert record["mean"] == pytest.approx(values.mean().item(), rel=1e-9)
        assert record["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-9)
        assert record["call"] == 1
        assert record["module"] == ""
        squashed = {"g": "tanh", "n": "tanh", "h": "relu" if "rnn" in kind else None}
        function = squashed.get(name, "sigmoid" if name in "ifoqrz" else None)
        assert record["function"] == function
        if function is not None:
            slope = {
                "sigmoid": values * (1 - values) * 4,
                "tanh": 1 - values**2,
                "relu": (values > 0).double(),
            }
            assert record["saturated"] == (slope[function] < 0.05).double().mean().item()
        assert (record["dead"] is None) == (name not in ("h", "c"))
        if name in ("h", "c"):
            gradients = torch.stack([made[name].grad for made in named])[:, :2]
            norms, slopes = values.norm(dim=-1), gradients.norm(dim=-1)
            assert record["norm_first"] == pytest.approx(norms[0].mean().item(), rel=1e-9)
            assert record["norm_last"] == pytest.approx(norms[-1].mean().item(), rel=1e-9)
            growth = ((norms[-1] / norms[0]) ** (1 / 5)).log().mean().exp()
            assert record["norm_growth"] == pytest.approx(growth.item(), rel=1e-9)
            assert record["gradient_first"] == pytest.approx(slopes[0].mean().item(), rel=1e-9)
            assert record["gradient_last"] == pytest.approx(slopes[-1].mean().item(), rel=1e-9)
            growth = ((slopes[0] / slopes[-1]) ** (1 / 5)).log().mean().exp()
            assert record["gradient_growth"] == pytest.approx(growth.item(), rel=1e-9)
    assert found["h" if "rnn" in kind else "z" if kind == "gru" else "f"]["saturated"] > 0
    for k, block in enumerate(layer.weight_hh_l0.detach().split(4)):
        name = "weight_hh" if "rnn" in kind else f"weight_hh[{k}]"
        assert found[name]["radius"] == pytest.approx(torch.linalg.eigvals(block).abs().max().item())
    assert all(set(record) == set(FIELDS) for record in watch.records)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("case", ["stacked", "packed", "lengths", "batch first", "drawing", "coupled"])
def test_the_figures_beside_recorded_traces(case: str, rows: int) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "dropout": 0.4, "bidirectional": True, "dtype": torch.float64}
    layer: nn.Module = nn.GRU(3, 4, batch_first=case == "batch first", **sizes)
    x: Any = torch.randn(6, 6, 3).double()
    arguments: dict[str, Any] = {}
    if case == "packed":
        x = pack_sequence([torch.randn(n, 3).double() for n in (3, 1, 6, 2)], enforce_sorted=False)
    elif case == "lengths":
        layer, arguments = ur.GRU(3, 4, **sizes), {"lengths": [4, 6, 1, 3, 6, 5]}
    elif case in ("drawing", "coupled"):
        layer = ur.Recurrent(Drawing if case == "drawing" else Coupled, 3, 4, **sizes)
        rows = 9  # they can't run alone
    with ur.engine("reference"), ur.record(layer, rows=slice(rows), gradients=True) as rec:
        watch = ur.watch(layer, every=1, rows=rows, share=None)
        output, state = layer(x, **arguments)
        data = output if isinstance(output, Tensor) else output.data
        (data.square().sum() + state.sin().sum()).backward()
    for part in rec[""].layers:
        found = by_name(watch, layer=part.layer, direction=part.direction)
        there = torch.arange(len(part.input)).unsqueeze(1) < part.lengths
        for name in part.names:
            values = part[name][there]
            assert found[name]["mean"] == pytest.approx(values.mean().item(), rel=1e-6)
            assert found[name]["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-6)
        for key, held, turned in (("norm", part["h"], False), ("gradient", part.gradient("h"), True)):
            norms = held.norm(dim=-1)
            along = [norms[:n, row] for row, n in enumerate(part.lengths.tolist())]
            along = [one.flip(0) for one in along] if part.direction == "backward" else along
            assert found["h"][f"{key}_first"] == pytest.approx(
                sum(one[0].item() for one in along) / len(along)
            )
            assert found["h"][f"{key}_last"] == pytest.approx(
                sum(one[-1].item() for one in along) / len(along)
            )
            growths = [((one[0] / one[-1] if turned else one[-1] / one[0]).log() / (len(one) - 1)).item()
                       for one in along if len(one) > 1]  # fmt: skip
            assert found["h"][f"{key}_growth"] == pytest.approx(math.exp(sum(growths) / len(growths)))


def test_which_rows_are_looked_at() -> None:
    with ur.engine("reference"):
        for layer, x, rows in (
            (ur.Recurrent(Coupled, 3, 4), torch.randn(1, 5, 3), 5),  # they can't run alone
            (nn.RNN(3, 4), torch.randn(1400, 3, 3), 2),  # fewer of a long sequence
            (nn.RNN(3, 4), torch.randn(9, 3, 3), 3),
        ):
            with ur.watch(layer, every=1, share=None) as watch:
                output, _ = layer(x)
                output.square().sum().backward()
            mean = output[:, :rows].mean().item()
            assert by_name(watch)["h"]["mean"] == pytest.approx(mean, rel=1e-4, abs=1e-7)


def test_training_is_as_without_it() -> None:
    def model() -> nn.Module:
        torch.manual_seed(4)
        layers = {"a": nn.LSTM(3, 6, 2, dropout=0.5), "b": ur.GRU(6, 5), "c": nn.Linear(5, 2)}
        return nn.ModuleDict(layers)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self["c"](F.dropout(self["b"](self["a"](x)[0])[0], 0.1)).square()

    results = []
    for watched in (False, True):
        made, x = model(), torch.randn(7, 8, 3, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(9)
        watch = ur.watch(made, every=3, share=None) if watched else None
        train(nn.Sequential(made), x, 0)
        optimiser = torch.optim.Adam(made.parameters(), 1e-2)
        for _ in range(20):
            optimiser.zero_grad()
            forward(made, x).mean().backward()
            optimiser.step()
        results.append([*made.state_dict().values(), torch.get_rng_state()])
        if watch is not None:
            assert sorted({record["call"] for record in watch.records}) == [3, 6, 9, 12, 15, 18]
            assert {record["module"] for record in watch.records} == {"a", "b"}
            watch.close()
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_which_calls_are_looked_at() -> None:
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
    assert not watch.records  # no backward has come here
    loss = output.square().sum()
    loss.backward(retain_graph=True)
    new = list(watch)
    assert {record["call"] for record in new} == {2}
    loss.backward()  # a second one
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
    output.sum().backward()  # reached after it was closed
    train(model, x, 2)
    assert len(watch.records) == 3 * len(new)
    assert repr(watch).startswith("<Watch, closed;")

    with ur.watch(model, every=2, share=1e-7) as rare:  # the first look takes the time of all
        train(model, x, 10)
    assert {record["call"] for record in rare.records} == {2}
    assert "10 training calls, looks put off for the share of time: 4; " in repr(rare)
    begun, looks = time.perf_counter(), 0
    with ur.watch(model, every=1, share=0.3) as modest:
        while looks < 4:
            before = modest.seconds
            train(model, x, 1)
            if modest.seconds > before:  # what was spent by then was no more than that share
                assert before <= 0.3 * (time.perf_counter() - begun)
                looks += 1
    with ur.watch(model, every=1, share=None) as watch, ur.watch(model, every=1, share=None) as other:
        rare.close()
        with ur.record(model) as rec:
            train(model, x, 2)
    assert len(watch.records) == len(other.records) > 0
    assert list(rec) == [""]
    scripted = ur.watch(nn.ModuleDict({"a": model, "b": model}), every=1, share=None)
    train(model, x, 1)
    assert {record["module"] for record in scripted.records} == {"a"}
    scripted.close()


def test_one_that_ends_empty_says_why() -> None:
    model, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    for mode, backward, every, words in (
        (False, True, 1, "0 training calls, 2 in eval mode or .* training mode with gradients, and none was"),
        (True, True, 5, "2 training calls; 0 records>: the first look is at call 5: give a smaller every"),
        (True, False, 1, "no backward reached the calls that were looked at"),
    ):
        model.train(mode)
        warned = pytest.warns(UserWarning, match=f"nothing was recorded by <Watch, closed; .*{words}")
        with warned, ur.watch(model, every=every, share=None):
            for _ in range(2):
                output = model(x)[0].sum()
                if backward:
                    output.backward()
    with pytest.raises(KeyError), ur.watch(model):  # to an error in the block nothing is added
        raise KeyError


@pytest.mark.parametrize("reached", [False, True])
def test_nothing_of_a_call_is_held(reached: bool) -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3) * 1
    gc.collect()  # what other tests left
    gc.disable()
    try:
        with (
            contextlib.nullcontext() if reached else pytest.warns(UserWarning, match="no backward"),
            ur.watch(layer, every=1, share=None) as watch,
            ur.record(layer, steps=[0], gradients=True) as rec,
        ):
            output, state = layer(x)
            held = weakref.ref(x), weakref.ref(output), weakref.ref(state[0])
            if reached:
                output.sum().backward()
            del x, output, state
            assert bool(watch.records) == reached
            assert all(reference() is None for reference in held)
            assert not any(type(one) is LayerCall for one in gc.get_objects())
            assert rec.nbytes < 4000
    finally:
        gc.enable()


def test_what_is_wrong_with_a_layer_shows() -> None:
    x = torch.randn(30, 4, 3)
    layer = nn.RNN(3, 4, nonlinearity="relu", dtype=torch.float32)
    with torch.no_grad():
        layer.bias_ih_l0[:3] = -100.0
    with ur.watch(layer, every=1, share=None) as watch:
        train(layer, x)
    h = by_name(watch)["h"]
    assert h["dead"] == 3
    assert 0.75 <= h["saturated"] < 1
    gates = nn.LSTM(3, 4)
    with torch.no_grad():
        gates.bias_ih_l0[4:8] = 50.0
    with ur.watch(gates, every=1, share=None) as watch:
        train(gates, x)
    assert by_name(watch)["f"]["saturated"] == 1
    assert by_name(watch)["i"]["saturated"] == 0
    assert by_name(watch)["h"]["dead"] == 0
    for scale in (0.5, 1.5):  # of a step's map, where tanh is nearly linear
        turning = nn.RNN(3, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            turning.weight_hh_l0.copy_(torch.linalg.qr(torch.randn(4, 4).double())[0] * scale)
            turning.weight_ih_l0 *= 1e-9
        with ur.watch(turning, every=1, share=None) as watch:
            turning(x.double())[1].sum().backward()
        assert by_name(watch)["h"]["gradient_growth"] == pytest.approx(scale, rel=1e-4)
        assert by_name(watch)["weight_hh"]["radius"] == pytest.approx(scale, rel=1e-6)
    broken = nn.GRU(3, 4)
    with torch.no_grad():
        broken.weight_ih_l0[0, 0] = math.nan
        broken.weight_ih_l0[4, 1] = math.inf
    with ur.watch(broken, every=1, share=None) as watch:
        train(broken, x)
    found = by_name(watch)
    assert math.isnan(found["r"]["mean"])
    assert math.isnan(found["h"]["gradient_first"])
    once = nn.GRU(3, 4)
    with ur.watch(once, every=1, share=None) as watch:
        train(once, x[:1, :1])
    assert by_name(watch)["h"]["dead"] is by_name(watch)["h"]["norm_growth"] is None


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (torch.sigmoid, 0.5 - math.sqrt(0.95) / 2, 0.5 + math.sqrt(0.95) / 2),
        (torch.tanh, -math.sqrt(0.95), math.sqrt(0.95)),
        (torch.relu, 0, math.inf),
        (F.relu6, 0, 6),
        (F.hardsigmoid, 0, 1),
        (lambda x: F.hardtanh(x, -0.5, 2), -0.5, 2),
        (F.elu, -0.95, math.inf),
        (F.softsign, -1 + math.sqrt(0.05), 1 - math.sqrt(0.05)),
        (lambda x: x.clamp(max=3), -math.inf, 3),
    ],
)
def test_where_functions_are_flat(function: Any, low: float, high: float) -> None:
    assert flat_parts(function) == pytest.approx((low, high), abs=2e-3)


def test_the_function_is_found_through_moves_and_no_further() -> None:
    class Packed(ur.Cell):
        weight = ur.Param("2*hidden", "input + hidden")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            gates = F.hardsigmoid(F.linear(torch.cat([x, h], -1), self.weight))
            keep, take = gates.chunk(2, -1)
            offered = torch.clamp(take - 0.2, min=0)
            changed = F.hardtanh(offered)
            changed += 1
            h = keep * h + changed
            return h

    layer = ur.Recurrent(Packed, 3, 4)
    with ur.engine("reference"), ur.watch(layer, every=1, share=None) as watch:
        train(layer, torch.randn(5, 2, 3))
    functions = {name: record["function"] for name, record in by_name(watch).items()}
    assert functions == {
        "gates": "hardsigmoid", "keep": "hardsigmoid", "take": "hardsigmoid", "offered": "clamp",
        "changed": None, "h": None,
    }  # fmt: skip


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
        (there,) = [event.value for event in events.Scalars(tag) if event.step == call]
        assert there == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert "encoder/l0_forward/f/saturated" in events.Tags()["scalars"]
    assert math.isnan(events.Scalars("encoder/l0_backward/i/mean")[0].value)


def test_what_can_not_be_watched() -> None:
    model, x = ur.GRU(3, 4, zoneout=0.1), torch.randn(5, 2, 3)
    with (
        ur.watch(model, every=1) as watch,
        pytest.warns(UserWarning, match="can't tell the health of ''.*zone"),
    ):
        train(model, x, 3)
    assert not watch.records

    class Own(Tensor):
        pass

    spread = ur.GRU(3, 4)
    spread.weight_hh_l0 = nn.Parameter(torch.randn(12, 4).as_subclass(Own))
    with (
        ur.engine("reference"),
        ur.watch(spread, every=1) as watch,
        pytest.warns(UserWarning, match="subclass of"),
    ):
        train(spread, x, 2)
    assert not watch.records
    early = nn.GRU(3, 4)

    def shrink(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.mul_(0.9)

    for parameter in early.parameters():
        parameter.register_post_accumulate_grad_hook(shrink)
    words = "its parameters change before a backward ends"
    with ur.watch(early, every=1) as watch, pytest.warns(UserWarning, match=words):
        early(x)[0].sum().backward()
    assert not watch.records
    for wrong, error, words in (
        ((nn.Linear(2, 3),), ValueError, "watch takes a model with recurrent layers"),
        ((model, 0), ValueError, "every must be greater than zero, got 0"),
        ((model, 2.5), TypeError, "every should be of type int"),
        (
            (torch.compile(model, backend="eager"),),
            ValueError,
            "watch can't see calls inside of what torch.compile made",
        ),
    ):
        with pytest.raises(error, match=words):
            ur.watch(*wrong)
    for share in (0, 5, True, "5 %"):
        with pytest.raises(ValueError, match="share should be a number above 0 and up to 1, or None"):
            ur.watch(model, share=share)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows must be greater than zero"):
        ur.watch(model, rows=0)
    assert not model._forward_hooks


def test_compiled_later_it_sees_nothing() -> None:
    model, x = nn.ModuleDict({"r": ur.GRU(3, 4)}), torch.randn(5, 2, 3)
    with ur.watch(model, every=1, share=None) as watch:
        fast = torch.compile(lambda x: model["r"](x)[0].square().mean(), backend="aot_eager", fullgraph=True)
        fast(x).backward()
        assert not watch.records
        train(model["r"], x)
    assert watch.records


@pytest.mark.parametrize("make", [nn.GRU, ur.GRU])
def test_what_is_done_between_a_call_and_its_backward(make: type[nn.Module]) -> None:
    layer, x = make(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    found = []
    for between in (lambda: None, layer.eval):
        torch.manual_seed(3)
        with ur.watch(layer, every=1, share=None) as watch:
            made = layer(x)[0].square().sum()
            between()
            with torch.autocast("cpu", torch.bfloat16):
                made.backward()
        found.append(watch.records)
    assert found[0] == found[1]
    assert {record["layer"] for record in found[0]} == {0, 1}
    with (
        ur.watch(layer.train(), every=1, share=None) as watch,
        pytest.warns(UserWarning, match="without rows"),
    ):
        layer(torch.randn(5, 0, 3))[0].sum().backward()
    assert not watch.records


def test_what_ran_again_and_differs_is_told() -> None:
    class RecurrentDropoutWrapper(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return F.dropout(weight, 0.5, self.training)

    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", RecurrentDropoutWrapper())
    torch.manual_seed(3)
    layer(x)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    words = "watch may be wrong about '': what ran again differs from what its call returned"
    with ur.watch(layer, every=1, share=None) as watch, pytest.warns(UserWarning, match=words):
        layer(x)[0].sum().backward()
    assert watch.records
    assert torch.equal(torch.get_rng_state(), expected)
