"""Learned initial states, dropout over time, zoneout and single steps, against loops over torch's cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close, tensors
from unrolled.layers.convert import to_torch

INPUT, HIDDEN = 3, 4
ENGINES = pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])


def layer_of(cell: str, **options: Any) -> Any:
    return getattr(ur, cell)(INPUT, HIDDEN, dtype=torch.float64, **options)


def torch_cell(layer: Any) -> Any:
    """Return torch's cell with the parameters of layer 0."""
    cell = getattr(nn, type(layer).__name__ + "Cell")(INPUT, HIDDEN, dtype=torch.float64)
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name, _ in cell.named_parameters()})
    return cell


def random_input(time: int = 5, batch: int = 3) -> Tensor:
    return torch.randn(time, batch, INPUT, dtype=torch.float64)


# --- initial states ---


@pytest.mark.slow
@ENGINES
def test_learned_initial_states(engine: str) -> None:
    layer = ur.Recurrent(
        ur.LSTM.cell_class, INPUT, HIDDEN, 2, bidirectional=True, initial_state="learned", dtype=torch.float64
    )
    names = [name for name, _ in layer.named_parameters() if name.startswith("initial_")]
    assert names == [f"initial_{s}_l{k}{d}" for k in "01" for d in ("", "_reverse") for s in "hc"]
    assert "initial_state=learned" in repr(layer)
    parameters = [getattr(layer, name) for name in names]
    assert not any(parameter.any() for parameter in parameters)
    for parameter in parameters:
        nn.init.normal_(parameter)
    x = random_input()
    state = tuple(torch.stack([p.expand(3, -1) for p in parameters[k::2]]) for k in range(2))
    with ur.engine(engine):
        for options in ({}, {"lengths": [2, 5, 0]}, {"resets": torch.rand(5, 3) < 0.4}):
            results, expected = layer(x, **options), layer(x, state, **options)
            assert_close(results, expected, 1e-12)
            loss = sum(part.sum() for part in tensors(results))
            for gradient in torch.autograd.grad(loss, parameters):
                assert gradient.any()
        with torch.no_grad(), ur.frozen(layer):
            assert_close(layer(x), layer(x, state), 1e-12)
    layer.reset_parameters()
    assert not any(parameter.any() for parameter in parameters)
    with pytest.raises(ValueError, match="initial_state should be 'zeros' or 'learned', got 'ones'"):
        layer_of("GRU", initial_state="ones")


def test_a_stream_starts_from_the_learned_state() -> None:
    layer = layer_of("GRU", initial_state="learned")
    nn.init.normal_(layer.initial_h_l0)
    x = random_input()
    stream = ur.Stream(layer)
    with torch.no_grad():
        assert torch.equal(torch.cat([stream(step) for step in x.split(1)]), layer(x)[0])


# --- zoneout ---


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_zoneout_in_eval_mode_is_the_expected_value(engine: str, cell: str) -> None:
    layer = layer_of(cell, zoneout={"h": 0.25}).eval()
    reference, x = torch_cell(layer), random_input()
    h, others = torch.zeros(3, HIDDEN, dtype=torch.float64), ()
    if cell == "LSTM":
        others = (torch.zeros_like(h),)
    expected = []
    for step in x:
        new_h, *new_others = tensors(reference(step, (h, *others) if others else h))
        h, others = 0.25 * h + 0.75 * new_h, tuple(new_others)
        expected.append(h)
    with ur.engine(engine):
        assert_close(layer(x)[0], torch.stack(expected), 1e-12)


@pytest.mark.slow
@ENGINES
def test_zoneout_in_training_keeps_values_at_the_given_rate(engine: str) -> None:
    layer, x = layer_of("LSTM", zoneout={"h": 0.3, "c": 0.6}), random_input(200, 20)
    with ur.engine(engine):
        output, _, states = layer(x, all_states=True)
        for name, rate in (("h", 0.3), ("c", 0.6)):
            values = states[name][0]
            kept = (values[1:] == values[:-1]).double().mean()
            assert abs(float(kept) - rate) < 0.02
        assert torch.equal(output, states["h"][0])
        state = tuple(torch.randn(1, 20, HIDDEN, dtype=torch.float64) for _ in range(2))
        layer = layer_of("LSTM", zoneout=1.0)
        assert_close(layer(x, state)[1], state, 0)


# --- dropout with one mask for all time steps ---


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_recurrent_dropout_only_affects_products(engine: str, cell: str) -> None:
    layer, x = layer_of(cell, recurrent_dropout=0.5), random_input()
    torch.manual_seed(5)
    mask = layer._noise.dropout_mask(x, 0.5, 3, HIDDEN)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    h = c = torch.zeros(3, HIDDEN, dtype=torch.float64)
    expected = []
    for step in x:
        input_sum = linear(step, layer.weight_ih_l0, layer.bias_ih_l0)
        hidden_sum = linear(h * mask, layer.weight_hh_l0, layer.bias_hh_l0)
        if cell == "RNN":
            h = torch.tanh(input_sum + hidden_sum)
        elif cell == "GRU":
            (xr, xz, xn), (hr, hz, hn) = input_sum.chunk(3, 1), hidden_sum.chunk(3, 1)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        else:
            i, f, g, o = (input_sum + hidden_sum).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        expected.append(h)
    with ur.engine(engine):
        torch.manual_seed(5)
        output = layer(x)[0]
        assert_close(output, torch.stack(expected), 1e-12)
        weights = [layer.weight_hh_l0, layer.weight_ih_l0]
        assert_close(
            torch.autograd.grad(output.sum(), weights, retain_graph=True),
            torch.autograd.grad(torch.stack(expected).sum(), weights),
            1e-10,
        )
        layer.eval()
        assert_close(layer(x), without_regularization(layer)(x), 1e-12)


def without_regularization(layer: Any) -> Any:
    """Return a layer with the same weights, without dropout and zoneout."""
    plain = layer_of(type(layer).__name__, num_layers=layer.num_layers)
    plain.load_state_dict(layer.state_dict())
    return plain


@ENGINES
@pytest.mark.parametrize("lengths", [None, [2, 5, 3]])
def test_variational_dropout_zeroes_the_same_features_in_every_step(engine: str, lengths: Any) -> None:
    layer, x = layer_of("GRU", num_layers=2, variational_dropout=0.4), random_input()
    with ur.engine(engine):
        x.requires_grad_()
        layer(x, lengths=lengths)[0].sum().backward()
        zeroed = x.grad == 0
        for row, length in enumerate(lengths or [5] * 3):
            assert (zeroed[:length, row] == zeroed[:1, row]).all()
            assert zeroed[length:, row].all()
        layer.eval()
        assert_close(layer(x, lengths=lengths), without_regularization(layer)(x, lengths=lengths), 1e-12)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("bidirectional", [False, True])
def test_both_engines_agree_with_all_options(bidirectional: bool) -> None:
    options = {
        "zoneout": 0.2,
        "recurrent_dropout": 0.3,
        "variational_dropout": 0.3,
        "initial_state": "learned",
    }
    layer = layer_of("LSTM", num_layers=2, bidirectional=bidirectional, **options)
    x, resets = random_input(), torch.rand(5, 3) < 0.3
    by_engine = []
    for engine in ("native", "reference"):
        with ur.engine(engine):
            torch.manual_seed(1)
            results = list(
                torch.utils._pytree.tree_leaves(layer(x, lengths=[3, 5, 1], resets=resets, all_states=True))
            )
            loss = sum((part**2).sum() for part in results)
            by_engine.append([*results, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert_close(by_engine[0], by_engine[1], 1e-10)
    torch._dynamo.reset()
    with ur.engine("native"):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert compiled(x)[0].shape == (5, 3, (1 + bidirectional) * HIDDEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoneout": 1.5}, "zoneout should be a probability, a number from 0 to 1, got 1.5"),
        (
            {"zoneout": {"m": 0.1}},
            "zoneout has a probability for the state 'm', but the cell's states are h, c",
        ),
        ({"recurrent_dropout": "much"}, "recurrent_dropout should be a probability.*got 'much'"),
        ({"variational_dropout": True}, "variational_dropout should be a probability.*got True"),
    ],
)
def test_invalid_probabilities(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of("LSTM", **options)


def test_operations_that_need_a_layer_without_regularization() -> None:
    layer = layer_of("LSTM", zoneout=0.1)
    with pytest.raises(ValueError, match="LSTM: trace doesn't support dropout over time or zoneout"):
        ur.trace(layer, random_input())
    with pytest.raises(ValueError, match=r"torch\.nn has no LSTM with learned initial states"):
        to_torch(layer)


# --- single steps ---


@ENGINES
@pytest.mark.parametrize("batch_first", [False, True])
def test_single_steps_are_bit_identical_to_a_sequence(engine: str, batch_first: bool) -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN, 2, batch_first=batch_first), torch.randn(4, 3, INPUT)
    with ur.engine(engine), torch.no_grad():
        expected, last = layer(x.transpose(0, 1) if batch_first else x)
        state = None
        for k, row in enumerate(x):
            output, state = layer.step(row, state)
            assert torch.equal(output, expected[:, k] if batch_first else expected[k])
        assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))
        output, (h, _) = layer.step(x[0, 0])
        assert (output.shape, h.shape) == ((HIDDEN,), (2, HIDDEN))
    for invalid, message in ((torch.randn(1, 2, INPUT), "got 3D"), ([1.0], "got a list")):
        with pytest.raises(ValueError, match=f"LSTM: step takes x of shape .*{message}"):
            layer.step(invalid)
    with pytest.raises(ValueError, match="LSTM: a bidirectional layer can't run step by step"):
        layer_of("LSTM", bidirectional=True).step(x[0])
