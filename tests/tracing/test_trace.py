"""Traced quantities compared with torch.nn's outputs and equations, in float64."""

from __future__ import annotations

import cProfile
import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import unrolled as ur
from helpers.layer_pairs import LAYERS, assert_close, pair, tensors
from helpers.step_by_hand import step_by_hand
from unrolled.cli import example

NAMES = {
    "rnn-tanh": ("input_sum", "hidden_sum", "h"),
    "lstm": ("input_sum", "hidden_sum", "i", "f", "g", "o", "c", "h"),
    "gru": ("r", "z", "n", "h"),
}


@pytest.mark.parametrize("use_torch_layer", [False, True], ids=["ours", "torch.nn"])
@pytest.mark.parametrize("kind", LAYERS)
def test_quantities_of_all_layers_and_directions(kind: str, use_torch_layer: bool) -> None:
    ours, theirs = pair(kind, 4, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    module = theirs if use_torch_layer else ours
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    _, final = theirs(torch.randn(2, 3, 4, dtype=torch.float64))
    state = tuple(part.detach() for part in final) if isinstance(final, tuple) else final.detach()
    t = ur.trace(module, x, state)
    assert_close((t.output, t.final_state), theirs(x, state), 1e-12)
    initial = state if isinstance(state, tuple) else (state,)
    below, index = x, 0
    for k in range(2):
        outputs = []
        for direction in ("forward", "backward"):
            suffix = f"_l{k}" + ("_reverse" if direction == "backward" else "")
            part = t.layer(k, direction)
            assert_close(part.input, below, 1e-12)
            step_state = tuple(part[index] for part in initial)
            for step in range(6)[:: -1 if direction == "backward" else 1]:
                expected = step_by_hand(
                    kind, lambda name, s=suffix: getattr(theirs, name + s).detach(), below[step], step_state
                )
                for name, value in expected.items():
                    assert_close(part[name][step], value, 1e-12)
                step_state = (expected["h"], expected["c"]) if "c" in expected else (expected["h"],)
            outputs.append(part["h"])
            index += 1
        below = torch.cat(outputs, -1)
    assert t.check() < 1e-14
    assert set(NAMES["rnn-tanh" if "rnn" in kind else kind.split("-")[0]]) <= set(t.names)


def test_names_are_local_variables_in_code_order() -> None:
    assert ur.trace(ur.RNN(2, 3), torch.randn(4, 2)).names == NAMES["rnn-tanh"]
    assert ur.trace(nn.LSTM(2, 3), torch.randn(4, 2)).names == NAMES["lstm"]


def test_walkthrough_example(walkthrough_layer: ur.RNN, walkthrough_input: torch.Tensor) -> None:
    output = [
        [0.2529, 0.7949, -0.0466],
        [0.2971, 0.9556, 0.1416],
        [0.5706, 0.9837, 0.4186],
        [0.7589, 0.9947, 0.5448],
    ]
    sums = [
        [-0.1290, 0.5513, 0.2439],
        [0.3066, 0.9938, 0.6123],
        [0.7421, 1.4364, 0.9806],
        [1.1777, 1.8790, 1.3490],
    ]
    assert repr(walkthrough_layer) == "RNN(2, 3, batch_first=True)"
    layer, x = example.example(ur.cells.RNN, None, 0, {})
    assert torch.equal(x, walkthrough_input)
    t = ur.trace(layer, x)
    for name, rounded in walkthrough_layer.state_dict().items():
        assert torch.equal(
            torch.round(layer.state_dict()[name], decimals=4), torch.round(rounded, decimals=4)
        )
    torch.testing.assert_close(torch.round(t.output[0], decimals=4), torch.tensor(output), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.round(t["input_sum"][:, 0], decimals=4), torch.tensor(sums), atol=1e-6, rtol=0
    )
    assert t.explain("input_sum", 0, 0) == "0.54068·1 − 0.10514·1 − 0.56450 = −0.1290"
    t = ur.trace(walkthrough_layer, walkthrough_input)  # weights rounded to four decimals
    assert t.output.shape == (1, 4, 3)
    assert t.final_state.shape == (1, 1, 3)
    torch.testing.assert_close(t.output[0], torch.tensor(output), atol=2e-4, rtol=0)
    torch.testing.assert_close(
        t["input_sum"][:, 0], torch.tensor(sums), atol=2e-4 + 1e-6, rtol=0
    )  # 1e-6: float32
    torch.testing.assert_close(t.final_state[0], t.output[:, -1])
    reference = nn.RNN(2, 3, batch_first=True)
    reference.load_state_dict(walkthrough_layer.state_dict())
    assert_close((t.output, t.final_state), reference(walkthrough_input), 1e-6)
    lstm = ur.LSTM(2, 3, batch_first=True)
    result = lstm(walkthrough_input[0])
    assert [tuple(part.shape) for part in tensors(result)] == [(4, 3), (1, 3), (1, 3)]


@pytest.mark.parametrize("sorted_rows", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_input(kind: str, sorted_rows: bool) -> None:
    ours, theirs = pair(kind, 4, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    lengths = [6, 4, 1] if sorted_rows else [4, 1, 6]
    rows = [torch.randn(length, 4, dtype=torch.float64) for length in lengths]
    packed = pack_sequence(rows, enforce_sorted=sorted_rows)
    t = ur.trace(ours, packed)
    assert isinstance(t.output, PackedSequence)
    assert_close((t.output, t.final_state), theirs(packed), 1e-12)
    padded, _ = pad_packed_sequence(t.output)
    assert torch.equal(torch.cat([t.layer(1, d)["h"] for d in ("forward", "backward")], -1), padded)
    assert t.layers[0].lengths.tolist() == lengths
    for row, sequence in enumerate(rows):
        single = ur.trace(ours, sequence)
        for part, other in zip(t.layers, single.layers, strict=True):
            for name in part.names:
                assert_close(part[name][: len(sequence), row], other[name][:, 0], 1e-12)
                assert not part[name][len(sequence) :, row].any()
            assert part.explain("h", -1, 2, batch=row) == other.explain("h", -1, 2)
    with pytest.raises(IndexError, match="time step 5 is out of range: there are 4, counted from 0"):
        t.explain("h", 5, 0, batch=lengths.index(4))
    assert t.check() < 1e-14


@pytest.mark.parametrize("kind", LAYERS)
def test_module_and_random_state_are_unchanged(kind: str) -> None:
    for module in pair(kind, 4, 5, num_layers=2, dropout=0.5):
        calls: list[str] = []
        module.register_forward_hook(lambda *_: calls.append("hook"))  # noqa: B023
        module(torch.randn(3, 4))[0].sum().backward()
        del calls[:]
        gradients = [parameter.grad.clone() for parameter in module.parameters()]
        values = [parameter.clone() for parameter in module.parameters()]
        x = torch.randn(3, 2, 4, requires_grad=True)
        random_state = torch.get_rng_state()
        t = ur.trace(module, x)
        t.check()
        t.explain("h", 0, 0)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert module.training
        assert calls == []
        assert x.grad is None
        assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
        assert all(torch.equal(p, v) for p, v in zip(module.parameters(), values, strict=True))
        assert all(p.requires_grad for p in module.parameters())
        assert not any(
            value.requires_grad for value in tensors((t.output, t.final_state, *t.layers[0].values.values()))
        )
        assert_close(t.output, module(x)[0].detach(), 1e-5)  # the same dropout masks


def test_repr_of_layer_trace() -> None:
    part = ur.trace(ur.GRU(2, 3), torch.randn(4, 2)).layer(0)
    assert repr(part).startswith("<LayerTrace of GRU, layer 0, forward: 4 steps × 1 rows; ")


def test_trace_holds_copies() -> None:
    module, x = nn.LSTM(2, 3), torch.randn(4, 2)
    t = ur.trace(module, x)
    before = t.explain("input_sum", 1, 0), t.check()
    with torch.no_grad():
        module.weight_ih_l0.fill_(9.0)
        x.fill_(9.0)
    assert (t.explain("input_sum", 1, 0), t.check()) == before


def test_works_under_cprofile() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    t = ur.trace(ur.GRU(2, 3), torch.randn(4, 2))
    sorted([3, 1, 2])
    profiler.disable()
    assert "r" in t.names
    assert any("sorted" in str(entry.code) for entry in profiler.getstats())


def test_works_under_torch_profiler() -> None:
    layer, x = ur.GRU(2, 3), torch.randn(4, 2)
    expected = ur.trace(layer, x)
    with torch.profiler.profile(with_stack=True, acc_events=True):
        t = ur.trace(layer, x)
    assert t.names == expected.names
    assert all(torch.equal(t[name], expected[name]) for name in t.names)


def test_local_without_batch_axis_is_left_out() -> None:
    class ScaledParameter(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            doubled = 2 * self.weight  # (hidden, input): no batch axis, whatever the batch size
            gate = torch.sigmoid(x @ doubled.T)
            strength = gate.mean(-1)
            return gate * h + strength.unsqueeze(-1)

    for batch in (1, 3):
        t = ur.trace(ur.Recurrent(ScaledParameter, 3, 3), torch.randn(4, batch, 3))
        assert t.names == ("gate", "strength", "h")
        assert t["strength"].shape == (4, batch)
    text, result = t.explain("strength", 1, 0, batch=2).split(" = ")
    gates = [float(number) for number in text.removeprefix("mean([").removesuffix("])").split(", ")]
    assert gates == pytest.approx(t["gate"][1, 2].tolist(), abs=1e-4)
    assert float(result) == pytest.approx(sum(gates) / 3, abs=0.51 * 10.0 ** -len(result.split(".")[1]))
    with pytest.raises(IndexError, match="unit 1 is out of range: there are 1"):
        t.explain("strength", 0, 1)
    assert f"{t['strength'][1, 0]:.4f}" in str(t.table(["strength"]))


def test_local_with_changing_size_is_left_out() -> None:
    class GrowingLocal(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            read = x if not h.any() else torch.cat([x, h], -1)
            return h + read[:, :1]

    t = ur.trace(ur.Recurrent(GrowingLocal, 2, 3), torch.ones(3, 2))
    assert t.names == ("h",)
    assert t["h"][-1].tolist() == [[3, 3, 3]]


def test_layer_and_direction_arguments() -> None:
    t = ur.trace(ur.GRU(2, 3, num_layers=2, bidirectional=True), torch.randn(4, 2)).backward(torch.sum)
    place = {"layer": 1, "direction": "backward"}
    part = t.layer(1, "backward")
    assert t.explain("h", 2, 1, **place) == part.explain("h", 2, 1) != t.explain("h", 2, 1)
    assert str(t.table(["h"], **place)) == str(part.table(["h"]))
    assert "layer 1, backward" in str(t.table(**place))
    assert torch.equal(t.gradient("h", **place), part.gradient("h"))
    assert not torch.equal(t.gradient("h", **place), t.gradient("h"))
    lines, expected = (traced.plot("states", **where).lines for traced, where in ((t, place), (part, {})))
    assert [list(line.get_ydata()) for line in lines] == [list(line.get_ydata()) for line in expected]
    with pytest.raises(IndexError, match="layer 2 is out of range: there are 2"):
        t.explain("h", 2, 1, layer=2)


def test_invalid_arguments() -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    with pytest.raises(
        KeyError, match="no quantity 'z' in this trace: it has input_sum, hidden_sum, i, f, g, o, c, h"
    ):
        t["z"]
    with pytest.raises(IndexError, match="unit 3 is out of range: there are 3"):
        t.explain("h", 0, 3)
    with pytest.raises(IndexError, match="row 1 is out of range: there are 1"):
        t.explain("h", 0, 0, batch=1)
    with pytest.raises(TypeError, match="time step must be an integer, got 1.5"):
        t.explain("h", 1.5, 0)
    with pytest.raises(ValueError, match="a table needs at least one quantity"):
        t.table(names=[])
    with pytest.raises(ValueError, match="direction must be 'forward', got 'backward'"):
        t.layer(0, "backward")
    with pytest.raises(IndexError, match="layer 1 is out of range: there are 1"):
        t.layer(1)
    with pytest.raises(TypeError, match=r"a recurrent layer of unrolled, torch.nn.RNN.*, got Linear$"):
        ur.trace(nn.Linear(2, 3), torch.randn(4, 2))
    model = nn.Sequential(nn.Embedding(9, 2), nn.LSTM(2, 3))
    with pytest.raises(TypeError, match=r"got Sequential\. .*unrolled.record\(model\).*rec\['1'\]\.$"):
        ur.trace(model, torch.arange(4))
    for ids in (torch.arange(4), pack_sequence([torch.arange(4)])):
        with pytest.raises(ValueError, match=r"expects features, .* torch.int64.*unrolled.record\(model\)"):
            ur.trace(model[1], ids)
    with pytest.raises(ValueError, match="Expected 2, got 5"):
        ur.trace(nn.LSTM(2, 3), torch.randn(4, 5))

    class CustomLSTM(nn.LSTM):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(2 * x)

    with pytest.raises(
        TypeError, match="CustomLSTM overrides the forward method of torch.nn.LSTM.* what it computes$"
    ):
        ur.trace(CustomLSTM(2, 3), torch.randn(4, 2))

    class CustomUnrolledLSTM(ur.LSTM):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(2 * x)

    with pytest.raises(TypeError, match="CustomUnrolledLSTM overrides the forward method of unrolled.LSTM"):
        ur.trace(CustomUnrolledLSTM(2, 3), torch.randn(4, 2))
    assert ur.trace(type("Named", (ur.LSTM,), {})(2, 3), torch.randn(4, 2)).check() < 1e-6


def test_indices_from_argmax() -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    unit = t["h"][-1, 0].argmax()
    assert t.explain("h", -1, unit) == t.explain("h", 3, int(unit))
    assert t.explain("h", -1, unit.numpy()) == t.explain("h", 3, int(unit))


def test_warning_of_the_module_is_not_repeated() -> None:
    with pytest.warns(UserWarning, match="dropout option"):
        module = nn.LSTM(2, 3, dropout=0.5)
    assert ur.trace(module, torch.randn(4, 2)).check() < 1e-6  # any other warning is an error here


def test_check_detects_nan() -> None:
    layer = ur.LSTM(2, 3)
    t = ur.trace(layer, torch.full((4, 2), torch.nan))
    assert t.check() == 0.0  # NaN in the same places
    t.output = torch.zeros_like(t.output)
    assert math.isnan(t.check())
    t = ur.trace(layer, torch.randn(4, 2))
    t.output[3, 1] += 0.5
    assert abs(t.check() - 0.5) < 1e-6
    assert ur.trace(layer, torch.randn(4, 0, 2)).check() == 0.0


def test_parametrizations_and_nan() -> None:
    module = nn.GRU(2, 3)
    nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    with torch.no_grad():
        module.bias_ih_l0[1] = torch.nan
    t = ur.trace(module, torch.randn(4, 2))
    torch.testing.assert_close(t.output, module(t.input)[0], equal_nan=True)
    assert "nan" in t.explain("input_sum", 0, 1)
    assert t["r"][0, 0, 1].isnan()


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_later_changes_of_the_module_do_not_matter(make: type[nn.Module]) -> None:
    module, x = make(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    t = ur.trace(module, x)
    expected = t.backward(torch.sum).gradient("h").clone()
    module.eval()
    module.double()
    module.dropout = 0.1
    assert torch.equal(t.backward(torch.sum).gradient("h"), expected)
    assert t.check() < 1e-6
    assert t.recurrent.training


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_forward_replaced_on_an_instance(make: type[nn.Module]) -> None:
    module = make(3, 4)
    module.forward = functools.partial(lambda module, x: type(module).forward(module, 2 * x), module)
    with pytest.raises(TypeError, match="replaces the forward method"):
        ur.trace(module, torch.randn(4, 3))
    del module.forward
    module.forward = module.forward  # the method of its class
    assert ur.trace(module, torch.randn(4, 3)).check() < 1e-6


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_parametrization_that_changes_with_every_use(make: type[nn.Module]) -> None:
    module, x = make(3, 4), torch.randn(5, 2, 3)
    nn.utils.parametrizations.spectral_norm(module, "weight_hh_l0", n_power_iterations=1)
    module.parametrizations.weight_hh_l0[0]._u.copy_(torch.eye(16)[0])  # far from the value it converges to
    before = {name: value.clone() for name, value in module.state_dict().items()}
    t = ur.trace(module, x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert_close(t.output, module.eval()(x)[0].detach(), 1e-6)


def test_step_that_accepts_only_one_batch_size() -> None:
    class FixedBatch(ur.Cell):
        weight_hh = ur.Param("hidden", "hidden")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            sums = x + linear(h, self.weight_hh)
            mask = torch.ones(2, 3)
            scale = sums.abs().mean(0)
            h = torch.tanh(sums / scale) * mask
            return h

    layer, x = ur.Recurrent(FixedBatch, 3, 3), torch.randn(4, 2, 3)
    with ur.engine("reference"):
        output = layer(x)[0].detach()
    t = ur.trace(layer, x)
    assert t.names == ("sums", "mask", "h")
    assert torch.equal(t["h"], output)
