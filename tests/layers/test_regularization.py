"""Learned initial states, dropout over time and zoneout, against loops over torch's cells; single steps."""

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


def cell_of(layer: Any) -> Any:
    """torch's cell with the parameters of a layer's first cell."""
    cell = getattr(nn, type(layer).__name__ + "Cell")(INPUT, HIDDEN, dtype=torch.float64)
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name, _ in cell.named_parameters()})
    return cell


def sequence(time: int = 5, batch: int = 3) -> Tensor:
    return torch.randn(time, batch, INPUT, dtype=torch.float64)


# --- initial states ---


@ENGINES
def test_learned_initial_states(engine: str) -> None:
    layer = ur.Recurrent(
        ur.LSTM.cell_class, INPUT, HIDDEN, 2, bidirectional=True, initial_state="learned", dtype=torch.float64
    )
    names = [name for name, _ in layer.named_parameters() if name.startswith("initial_")]
    assert names == [f"initial_{s}_l{k}{d}" for k in "01" for d in ("", "_reverse") for s in "hc"]
    assert "initial_state=learned" in repr(layer)
    starts = [getattr(layer, name) for name in names]
    assert not any(start.any() for start in starts)
    for start in starts:
        nn.init.normal_(start)
    x = sequence()
    state = tuple(torch.stack([s.expand(3, -1) for s in starts[k::2]]) for k in range(2))
    with ur.engine(engine):
        for asked in ({}, {"lengths": [2, 5, 0]}, {"resets": torch.rand(5, 3) < 0.4}):
            found, expected = layer(x, **asked), layer(x, state, **asked)
            assert_close(found, expected, 1e-12)
            loss = sum(part.sum() for part in tensors(found))
            for grad in torch.autograd.grad(loss, starts):
                assert grad.any()
        with torch.no_grad(), ur.frozen(layer):
            assert_close(layer(x), layer(x, state), 1e-12)
    layer.reset_parameters()
    assert not any(start.any() for start in starts)
    with pytest.raises(ValueError, match="initial_state should be 'zeros' or 'learned', got 'ones'"):
        layer_of("GRU", initial_state="ones")


def test_a_stream_starts_from_what_is_learned() -> None:
    layer = layer_of("GRU", initial_state="learned")
    nn.init.normal_(layer.initial_h_l0)
    x = sequence()
    stream = ur.Stream(layer)
    with torch.no_grad():
        assert torch.equal(torch.cat([stream(step) for step in x.split(1)]), layer(x)[0])


# --- zoneout ---


@ENGINES
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_zoneout_outside_of_training_is_what_is_expected(engine: str, cell: str) -> None:
    layer = layer_of(cell, zoneout={"h": 0.25}).eval()
    single, x = cell_of(layer), sequence()
    h, rest = torch.zeros(3, HIDDEN, dtype=torch.float64), ()
    if cell == "LSTM":
        rest = (torch.zeros_like(h),)
    expected = []
    for step in x:
        new, *left = tensors(single(step, (h, *rest) if rest else h))
        h, rest = 0.25 * h + 0.75 * new, tuple(left)
        expected.append(h)
    with ur.engine(engine):
        assert_close(layer(x)[0], torch.stack(expected), 1e-12)


@ENGINES
def test_zoneout_in_training_keeps_values_at_its_rate(engine: str) -> None:
    layer, x = layer_of("LSTM", zoneout={"h": 0.3, "c": 0.6}), sequence(200, 20)
    with ur.engine(engine):
        output, _, every = layer(x, all_states=True)
        for name, rate in (("h", 0.3), ("c", 0.6)):
            values = every[name][0]
            kept = (values[1:] == values[:-1]).double().mean()
            assert abs(float(kept) - rate) < 0.02
        assert torch.equal(output, every["h"][0])
        state = tuple(torch.randn(1, 20, HIDDEN, dtype=torch.float64) for _ in range(2))
        layer = layer_of("LSTM", zoneout=1.0)
        assert_close(layer(x, state)[1], state, 0)


# --- dropout that stays the same ---


@ENGINES
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_recurrent_dropout_is_of_products_alone(engine: str, cell: str) -> None:
    layer, x = layer_of(cell, recurrent_dropout=0.5), sequence()
    torch.manual_seed(5)
    mask = layer._noise.mask(x, 0.5, 3, HIDDEN)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    h = c = torch.zeros(3, HIDDEN, dtype=torch.float64)
    expected = []
    for step in x:
        sums = linear(step, layer.weight_ih_l0, layer.bias_ih_l0)
        old = linear(h * mask, layer.weight_hh_l0, layer.bias_hh_l0)
        if cell == "RNN":
            h = torch.tanh(sums + old)
        elif cell == "GRU":
            (xr, xz, xn), (hr, hz, hn) = sums.chunk(3, 1), old.chunk(3, 1)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        else:
            i, f, g, o = (sums + old).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        expected.append(h)
    with ur.engine(engine):
        torch.manual_seed(5)
        found = layer(x)[0]
        assert_close(found, torch.stack(expected), 1e-12)
        weights = [layer.weight_hh_l0, layer.weight_ih_l0]
        assert_close(
            torch.autograd.grad(found.sum(), weights, retain_graph=True),
            torch.autograd.grad(torch.stack(expected).sum(), weights),
            1e-10,
        )
        layer.eval()
        assert_close(layer(x), layer_of_same(layer)(x), 1e-12)


def layer_of_same(layer: Any) -> Any:
    """The layer without its options."""
    plain = layer_of(type(layer).__name__)
    plain.load_state_dict(layer.state_dict())
    return plain


@ENGINES
@pytest.mark.parametrize("lengths", [None, [2, 5, 3]])
def test_variational_dropout_leaves_out_the_same_features_in_every_step(engine: str, lengths: Any) -> None:
    layer, x = layer_of("GRU", num_layers=2, variational_dropout=0.4), sequence()
    with ur.engine(engine):
        x.requires_grad_()
        layer(x, lengths=lengths)[0].sum().backward()
        gone = x.grad == 0
        for row, length in enumerate(lengths or [5] * 3):
            assert (gone[:length, row] == gone[:1, row]).all()
            assert gone[length:, row].all()
        layer.eval()
        assert_close(layer(x, lengths=lengths), layer_of_two(layer)(x, lengths=lengths), 1e-12)


def layer_of_two(layer: Any) -> Any:
    plain = layer_of("GRU", num_layers=2)
    plain.load_state_dict(layer.state_dict())
    return plain


@NEEDS_COMPILER
@pytest.mark.parametrize("bidirectional", [False, True])
def test_all_of_it_is_the_same_on_both_engines(bidirectional: bool) -> None:
    options = {
        "zoneout": 0.2,
        "recurrent_dropout": 0.3,
        "variational_dropout": 0.3,
        "initial_state": "learned",
    }
    layer = layer_of("LSTM", num_layers=2, bidirectional=bidirectional, **options)
    x, resets = sequence(), torch.rand(5, 3) < 0.3
    found = []
    for engine in ("native", "reference"):
        with ur.engine(engine):
            torch.manual_seed(1)
            results = list(
                torch.utils._pytree.tree_leaves(layer(x, lengths=[3, 5, 1], resets=resets, all_states=True))
            )
            loss = sum((part**2).sum() for part in results)
            found.append([*results, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert_close(found[0], found[1], 1e-10)
    torch._dynamo.reset()
    with ur.engine("native"):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert compiled(x)[0].shape == (5, 3, (1 + bidirectional) * HIDDEN)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"zoneout": 1.5}, "zoneout should be a probability, a number from 0 to 1, got 1.5"),
        ({"zoneout": {"m": 0.1}}, "zoneout names a state 'm', the cell's states are h, c"),
        ({"recurrent_dropout": "much"}, "recurrent_dropout should be a probability.*got 'much'"),
        ({"variational_dropout": True}, "variational_dropout should be a probability.*got True"),
    ],
)
def test_what_is_no_probability(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        layer_of("LSTM", **options)


def test_what_is_about_the_cells_own_steps() -> None:
    layer = layer_of("LSTM", zoneout=0.1)
    with pytest.raises(ValueError, match="LSTM: trace is of the cell's own steps"):
        ur.trace(layer, sequence())
    with pytest.raises(ValueError, match=r"torch\.nn has no LSTM with learned initial states"):
        to_torch(layer)


# --- single steps ---


@ENGINES
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_step_has_the_bits_of_the_whole(engine: str, batch_first: bool) -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN, 2, batch_first=batch_first), torch.randn(4, 3, INPUT)
    with ur.engine(engine), torch.no_grad():
        whole, last = layer(x.transpose(0, 1) if batch_first else x)
        state = None
        for k, row in enumerate(x):
            output, state = layer.step(row, state)
            assert torch.equal(output, whole[:, k] if batch_first else whole[k])
        assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))
        one, (h, _) = layer.step(x[0, 0])
        assert (one.shape, h.shape) == ((HIDDEN,), (2, HIDDEN))
    for given, why in ((torch.randn(1, 2, INPUT), "got 3D"), ([1.0], "got a list")):
        with pytest.raises(ValueError, match=f"LSTM: step takes x of shape .*{why}"):
            layer.step(given)
    with pytest.raises(ValueError, match="LSTM: a bidirectional layer has no step"):
        layer_of("LSTM", bidirectional=True).step(x[0])
