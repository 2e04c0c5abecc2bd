"""All states, transforms and errors of forward calls with options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur
from helpers.call_options import ENGINES, HIDDEN, INPUT, assert_same_with_gradients, weighted_sum
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, assert_close, pair, tensors

# --- all states ---


@pytest.mark.slow
@ENGINES
def test_all_states_match_torchs_cells(engine: str) -> None:
    layer = ur.LSTM(INPUT, HIDDEN, 2, dtype=torch.float64)
    x = torch.randn(5, 2, INPUT, dtype=torch.float64, requires_grad=True)
    expected: list[list[list[Tensor]]] = [[], []]
    steps = list(x)
    for number in range(2):
        cell = nn.LSTMCell(INPUT if number == 0 else HIDDEN, HIDDEN, dtype=torch.float64)
        for name, _ in list(cell.named_parameters()):
            delattr(cell, name)
            setattr(cell, name, getattr(layer, f"{name}_l{number}"))
        h = c = torch.zeros(2, HIDDEN, dtype=torch.float64)
        cell_states = []
        for step in steps:
            h, c = cell(step, (h, c))
            cell_states.append((h, c))
        steps = [h for h, _ in cell_states]
        for k in range(2):
            expected[k].append(torch.stack([states[k] for states in cell_states]))
    with ur.engine(engine):
        output, (h, c), states = layer(x, all_states=True)
    assert list(states) == ["h", "c"]
    assert_same_with_gradients(layer, list(states.values()), [torch.stack(parts) for parts in expected], [x])
    assert torch.equal(output, states["h"][-1])
    assert torch.equal(c, states["c"][:, -1])
    assert torch.equal(h, states["h"][:, -1])


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("kind", LAYERS)
def test_all_states_have_the_layout_of_the_input(engine: str, kind: str) -> None:
    layer, _ = pair(kind, INPUT, HIDDEN, batch_first=True, bidirectional=True)
    with ur.engine(engine):
        output, final, states = layer(torch.randn(2, 5, INPUT), all_states=True)
        sizes = layer._first.state_sizes()
        assert {name: tuple(part.shape) for name, part in states.items()} == {
            name: (2, 2, 5, size) for name, size in sizes.items()
        }
        assert torch.equal(output, torch.cat(list(states["h"]), -1))
        last = [torch.stack((part[0, :, -1], part[1, :, 0])) for part in states.values()]
        assert all(torch.equal(a, b) for a, b in zip(last, tensors(final), strict=True))
        unbatched = layer(torch.randn(5, INPUT), all_states=True)[2]["h"]
        assert unbatched.shape[:2] == (2, 5)


@pytest.mark.slow
def test_results_with_all_states_may_be_changed_in_place() -> None:
    layer, x, gradients = ur.LSTM(INPUT, HIDDEN), torch.randn(4, 2, INPUT), []
    for all_states in (True, False):
        output, (h, c) = layer(x, all_states=all_states)[:2]
        output, h, c = (part.mul_(2) for part in (output, h, c))
        gradients.append(torch.autograd.grad(weighted_sum((output, h, c)), list(layer.parameters())))
    assert_close(gradients[0], gradients[1], 1e-6)


# --- transforms ---


@pytest.mark.slow
@NEEDS_COMPILER
def test_compile_and_vmap() -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN, bidirectional=True), torch.randn(6, 5, INPUT)
    lengths, resets = torch.tensor([4, 6, 2, 0, 1]), torch.rand(6, 5) < 0.3

    def run(x: Tensor, lengths: Tensor, resets: Tensor) -> Any:
        return layer(x, lengths=lengths, resets=resets, all_states=True)

    with ur.engine("native"):
        expected = run(x, lengths, resets)
        torch._dynamo.reset()
        actual = torch.compile(run, backend="aot_eager", fullgraph=True)(x, lengths, resets)
        leaves = torch.utils._pytree.tree_leaves
        assert_close(leaves(actual), leaves(expected), 1e-6)
        rows = torch.vmap(run, (1, 0, 1), 1)(x.unsqueeze(2), lengths.unsqueeze(1), resets.unsqueeze(2))
        assert_close(rows[0].squeeze(2), expected[0], 1e-6)


# --- invalid arguments ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [1, 2, 3]}, ValueError, r"LSTM: Expected lengths of shape \(2,\), got \(3,\)"),
        (
            {"lengths": [1, 6]},
            ValueError,
            "Expected lengths from 0 to 5, the number of time steps, got 6 for row 1",
        ),
        ({"lengths": [-1, 5]}, ValueError, "got -1 for row 0"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths should be integers, got torch.float32"),
        ({"lengths": "ab"}, TypeError, "lengths should be integers, got 'ab'"),
        (
            {"resets": torch.zeros(2, 5).bool()},
            ValueError,
            r"Expected resets of shape \(5, 2\), got \(2, 5\)",
        ),
        (
            {"resets": torch.zeros(5, 2)},
            TypeError,
            "resets should be a tensor of booleans, got torch.float32",
        ),
        ({"reset_state": "initial"}, ValueError, "reset_state has no effect without resets: pass resets too"),
        (
            {"resets": torch.zeros(5, 2).bool(), "reset_state": "zeros"},
            ValueError,
            "reset_state should be a state or 'initial', got 'zeros'",
        ),
        (
            {"resets": torch.zeros(5, 2).bool(), "reset_state": torch.zeros(1, 2, HIDDEN)},
            TypeError,
            r"reset_state: LSTM: Expected the state \(h, c\) to be a tuple",
        ),
        ({"resets": [0]}, TypeError, "resets should be a tensor of booleans, got a list"),
    ],
)
def test_invalid_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN), torch.randn(5, 2, INPUT)
    for checkpoint in (None, 2):
        with pytest.raises(error, match=message):
            layer(x, **options, checkpoint=checkpoint)


@pytest.mark.slow
def test_lengths_and_resets_in_compiled_code() -> None:
    layer, x, resets = ur.LSTM(INPUT, HIDDEN), torch.randn(5, 2, INPUT), torch.rand(5, 2) < 0.3
    compiled = torch.compile(
        lambda x, lengths: layer(x, lengths=lengths, resets=resets), backend="aot_eager", fullgraph=True
    )
    assert_close(compiled(x, torch.tensor([2, 5])), layer(x, lengths=[2, 5], resets=resets), 1e-6)
    with pytest.raises(RuntimeError, match="LSTM: Expected lengths from 0 to the number of time steps"):
        compiled(x, torch.tensor([2, 6]))


def test_options_without_support_for_unbatched_and_packed_sequences() -> None:
    layer = ur.LSTM(INPUT, HIDDEN)
    with pytest.raises(ValueError, match="lengths needs an input with a batch dimension"):
        layer(torch.randn(5, INPUT), lengths=[5])
    packed = pack_padded_sequence(torch.randn(5, 2, INPUT), torch.tensor([5, 3]))
    for options in ({"lengths": [5, 3]}, {"resets": torch.zeros(5, 2).bool()}, {"all_states": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} doesn't support packed sequences"):
            layer(packed, **options)


@pytest.mark.slow
@ENGINES
def test_all_states_of_streams_and_frozen_layers(engine: str) -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN), torch.randn(4, 2, INPUT)
    with ur.engine(engine), torch.no_grad():
        expected = layer(x, all_states=True)[2]
        stream = ur.Stream(layer)
        pieces = [stream(piece, all_states=True)[1] for piece in x.split(1)]
        with ur.frozen(layer):
            frozen = layer(x, all_states=True)[2]
    for name, values in expected.items():
        assert_close(torch.cat([piece[name] for piece in pieces], 1), values, 1e-6)
        assert torch.equal(frozen[name], values)
