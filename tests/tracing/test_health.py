"""The statistics of `watch` compared with loops by hand, traces and closed forms; training is unchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.recorded_models import CoupledRows, RandomStep
from helpers.step_by_hand import step_by_hand
from helpers.watched_training import records_by_quantity, train
from unrolled.tracing.health import FIELDS
from unrolled.tracing.saturation import saturation_bounds


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn-relu"])
def test_records_match_a_loop_by_hand(kind: str) -> None:
    make = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn-relu": nn.RNN}[kind]
    layer = make(3, 4, dtype=torch.float64, **({"nonlinearity": "relu"} if "rnn" in kind else {}))
    with torch.no_grad():
        layer.weight_ih_l0 *= 6
    x, weights = torch.randn(6, 5, 3).double(), torch.randn(6, 5, 4).double()
    with ur.watch(layer, every=1, rows=2, share=None) as watch:
        output, final = layer(x)
        last = final[1] if kind == "lstm" else final
        ((output * weights).sum().sin() + last.sum()).backward()
    records = records_by_quantity(watch)

    states = tuple(torch.zeros(5, 4).double() for _ in range(1 + (kind == "lstm")))
    named: list[dict[str, Tensor]] = []
    for step in range(6):
        quantities = step_by_hand(kind, lambda name: getattr(layer, name + "_l0"), x[step], states)
        for tensor in quantities.values():
            tensor.retain_grad()
        states = (quantities["h"], quantities["c"]) if "c" in quantities else (quantities["h"],)
        named.append(quantities)
    ((torch.stack([step["h"] for step in named]) * weights).sum().sin() + states[-1].sum()).backward()
    for name in set(named[0]) & set(records):
        values = torch.stack([step[name] for step in named])[:, :2].detach()
        record = records[name]
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
            gradients = torch.stack([step[name].grad for step in named])[:, :2]
            norms, slopes = values.norm(dim=-1), gradients.norm(dim=-1)
            assert record["norm_first"] == pytest.approx(norms[0].mean().item(), rel=1e-9)
            assert record["norm_last"] == pytest.approx(norms[-1].mean().item(), rel=1e-9)
            growth = ((norms[-1] / norms[0]) ** (1 / 5)).log().mean().exp()
            assert record["norm_growth"] == pytest.approx(growth.item(), rel=1e-9)
            assert record["gradient_first"] == pytest.approx(slopes[0].mean().item(), rel=1e-9)
            assert record["gradient_last"] == pytest.approx(slopes[-1].mean().item(), rel=1e-9)
            growth = ((slopes[0] / slopes[-1]) ** (1 / 5)).log().mean().exp()
            assert record["gradient_growth"] == pytest.approx(growth.item(), rel=1e-9)
    assert records["h" if "rnn" in kind else "z" if kind == "gru" else "f"]["saturated"] > 0
    gates = (
        ["weight_hh[r]", "weight_hh[z]", "weight_hh[n]"]
        if kind == "gru"
        else ["weight_hh[i]", "weight_hh[f]", "weight_hh[g]", "weight_hh[o]"]
    )
    for name, block in zip(
        ["weight_hh"] if "rnn" in kind else gates, layer.weight_hh_l0.detach().split(4), strict=True
    ):
        assert records[name]["radius"] == pytest.approx(torch.linalg.eigvals(block).abs().max().item())
    assert all(set(record) == set(FIELDS) for record in watch.records)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize(
    "case", ["stacked", "packed", "lengths", "batch first", "random step", "coupled rows"]
)
def test_records_match_recorded_traces(case: str, rows: int) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "dropout": 0.4, "bidirectional": True, "dtype": torch.float64}
    layer: nn.Module = nn.GRU(3, 4, batch_first=case == "batch first", **sizes)
    x: Any = torch.randn(6, 6, 3).double()
    arguments: dict[str, Any] = {}
    if case == "packed":
        x = pack_sequence([torch.randn(n, 3).double() for n in (3, 1, 6, 2)], enforce_sorted=False)
    elif case == "lengths":
        layer, arguments = ur.GRU(3, 4, **sizes), {"lengths": [4, 6, 1, 3, 6, 5]}
    elif case in ("random step", "coupled rows"):
        layer = ur.Recurrent(RandomStep if case == "random step" else CoupledRows, 3, 4, **sizes)
        rows = 9  # the rows can't run alone
    with ur.engine("reference"), ur.record(layer, rows=slice(rows), gradients=True) as rec:
        watch = ur.watch(layer, every=1, rows=rows, share=None)
        output, state = layer(x, **arguments)
        data = output if isinstance(output, Tensor) else output.data
        (data.square().sum() + state.sin().sum()).backward()
    for part in rec[""].layers:
        records = records_by_quantity(watch, layer=part.layer, direction=part.direction)
        mask = torch.arange(len(part.input)).unsqueeze(1) < part.lengths
        for name in part.names:
            values = part[name][mask]
            assert records[name]["mean"] == pytest.approx(values.mean().item(), rel=1e-6)
            assert records[name]["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-6)
        for key, values, is_gradient in (("norm", part["h"], False), ("gradient", part.gradient("h"), True)):
            norms = values.norm(dim=-1)
            by_row = [norms[:n, row] for row, n in enumerate(part.lengths.tolist())]
            by_row = [row.flip(0) for row in by_row] if part.direction == "backward" else by_row
            assert records["h"][f"{key}_first"] == pytest.approx(
                sum(row[0].item() for row in by_row) / len(by_row)
            )
            assert records["h"][f"{key}_last"] == pytest.approx(
                sum(row[-1].item() for row in by_row) / len(by_row)
            )
            growths = [
                ((row[0] / row[-1] if is_gradient else row[-1] / row[0]).log() / (len(row) - 1)).item()
                for row in by_row
                if len(row) > 1
            ]
            assert records["h"][f"{key}_growth"] == pytest.approx(math.exp(sum(growths) / len(growths)))


def test_number_of_rows() -> None:
    with ur.engine("reference"):
        for layer, x, rows in (
            (ur.Recurrent(CoupledRows, 3, 4), torch.randn(1, 5, 3), 5),  # the rows can't run alone
            (nn.RNN(3, 4), torch.randn(1400, 3, 3), 2),  # fewer rows of a long sequence
            (nn.RNN(3, 4), torch.randn(9, 3, 3), 3),
        ):
            with ur.watch(layer, every=1, share=None) as watch:
                output, _ = layer(x)
                output.square().sum().backward()
            mean = output[:, :rows].mean().item()
            assert records_by_quantity(watch)["h"]["mean"] == pytest.approx(mean, rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_training_is_unchanged() -> None:
    def create_model() -> nn.Module:
        torch.manual_seed(4)
        layers = {"a": nn.LSTM(3, 6, 2, dropout=0.5), "b": ur.GRU(6, 5), "c": nn.Linear(5, 2)}
        return nn.ModuleDict(layers)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self["c"](F.dropout(self["b"](self["a"](x)[0])[0], 0.1)).square()

    results = []
    for watched in (False, True):
        model, x = create_model(), torch.randn(7, 8, 3, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(9)
        watch = ur.watch(model, every=3, share=None) if watched else None
        train(nn.Sequential(model), x, 0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            forward(model, x).mean().backward()
            optimizer.step()
        results.append([*model.state_dict().values(), torch.get_rng_state()])
        if watch is not None:
            assert sorted({record["call"] for record in watch.records}) == [3, 6, 9, 12, 15, 18]
            assert {record["module"] for record in watch.records} == {"a", "b"}
            watch.close()
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unhealthy_layers() -> None:
    x = torch.randn(30, 4, 3)
    layer = nn.RNN(3, 4, nonlinearity="relu", dtype=torch.float32)
    with torch.no_grad():
        layer.bias_ih_l0[:3] = -100.0
    with ur.watch(layer, every=1, share=None) as watch:
        train(layer, x)
    h = records_by_quantity(watch)["h"]
    assert h["dead"] == 3
    assert 0.75 <= h["saturated"] < 1
    gates = nn.LSTM(3, 4)
    with torch.no_grad():
        gates.bias_ih_l0[4:8] = 50.0
    with ur.watch(gates, every=1, share=None) as watch:
        train(gates, x)
    assert records_by_quantity(watch)["f"]["saturated"] == 1
    assert records_by_quantity(watch)["i"]["saturated"] == 0
    assert records_by_quantity(watch)["h"]["dead"] == 0
    for scale in (0.5, 1.5):  # of the recurrent map; tanh is nearly linear for such small values
        rotation = nn.RNN(3, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            rotation.weight_hh_l0.copy_(torch.linalg.qr(torch.randn(4, 4).double())[0] * scale)
            rotation.weight_ih_l0 *= 1e-9
        with ur.watch(rotation, every=1, share=None) as watch:
            rotation(x.double())[1].sum().backward()
        assert records_by_quantity(watch)["h"]["gradient_growth"] == pytest.approx(scale, rel=1e-4)
        assert records_by_quantity(watch)["weight_hh"]["radius"] == pytest.approx(scale, rel=1e-6)
    broken = nn.GRU(3, 4)
    with torch.no_grad():
        broken.weight_ih_l0[0, 0] = math.nan
        broken.weight_ih_l0[4, 1] = math.inf
    with ur.watch(broken, every=1, share=None) as watch:
        train(broken, x)
    records = records_by_quantity(watch)
    assert math.isnan(records["r"]["mean"])
    assert math.isnan(records["h"]["gradient_first"])
    once = nn.GRU(3, 4)
    with ur.watch(once, every=1, share=None) as watch:
        train(once, x[:1, :1])
    assert records_by_quantity(watch)["h"]["dead"] is records_by_quantity(watch)["h"]["norm_growth"] is None


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
def test_saturation_bounds(function: Any, low: float, high: float) -> None:
    assert saturation_bounds(function) == pytest.approx((low, high), abs=2e-3)


def test_saturating_function_is_found_through_moves_only() -> None:
    class StackedGates(ur.Cell):
        weight = ur.Param("2*hidden", "input + hidden")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            gates = F.hardsigmoid(F.linear(torch.cat([x, h], -1), self.weight))
            keep, take = gates.chunk(2, -1)
            candidate = torch.clamp(take - 0.2, min=0)
            changed = F.hardtanh(candidate)
            changed += 1
            h = keep * h + changed
            return h

    layer = ur.Recurrent(StackedGates, 3, 4)
    with ur.engine("reference"), ur.watch(layer, every=1, share=None) as watch:
        train(layer, torch.randn(5, 2, 3))
    functions = {name: record["function"] for name, record in records_by_quantity(watch).items()}
    assert functions == {
        "gates": "hardsigmoid", "keep": "hardsigmoid", "take": "hardsigmoid", "candidate": "clamp",
        "changed": None, "h": None,
    }  # fmt: skip


@pytest.mark.parametrize("make", [nn.GRU, ur.GRU])
def test_changes_between_a_call_and_its_backward_pass(make: type[nn.Module]) -> None:
    layer, x = make(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    all_records = []
    for between in (lambda: None, layer.eval):
        torch.manual_seed(3)
        with ur.watch(layer, every=1, share=None) as watch:
            loss = layer(x)[0].square().sum()
            between()
            with torch.autocast("cpu", torch.bfloat16):
                loss.backward()
        all_records.append(watch.records)
    assert all_records[0] == all_records[1]
    assert {record["layer"] for record in all_records[0]} == {0, 1}
    with (
        ur.watch(layer.train(), every=1, share=None) as watch,
        pytest.warns(UserWarning, match="without rows"),
    ):
        layer(torch.randn(5, 0, 3))[0].sum().backward()
    assert not watch.records
