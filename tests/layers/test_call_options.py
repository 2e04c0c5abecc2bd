"""Lengths, resets, every state: against torch.nn, episodes run one by one, and torch's cells."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, assert_close, pair, tensors

INPUT, HIDDEN = 3, 4
ENGINES = pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
KINDS = pytest.mark.parametrize("kind", LAYERS)
SHAPED = pytest.mark.parametrize(
    ("kind", "shape", "stateful"),
    [
        ("lstm-proj", {"num_layers": 2, "bidirectional": True, "batch_first": True}, True),
        ("gru", {"num_layers": 2, "batch_first": True}, False),
        ("rnn-relu", {"bidirectional": True}, True),
        ("lstm", {}, False),
    ],
)


def weighed(values: Any) -> Tensor:
    """A sum of all numbers, each with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for value in tensors(values):
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
        total = total + (value.double() * weights).sum()
    return total


def same(
    layer: nn.Module, found: Any, expected: Any, leaves: list[Tensor], other: nn.Module | None = None
) -> None:
    """Values, and gradients of the leaves and the parameters, in float64."""
    assert_close(found, expected, 1e-10)
    theirs = list((other or layer).parameters())
    mine = torch.autograd.grad(weighed(found), [*leaves, *layer.parameters()], retain_graph=True)
    assert_close(mine, torch.autograd.grad(weighed(expected), [*leaves, *theirs], retain_graph=True), 1e-9)


def given(layer: Any, batch: int) -> Any:
    """Initial states that want gradients."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    state = tuple(
        torch.randn(count, batch, size, dtype=torch.float64, requires_grad=True)
        for size in layer._first.state_sizes().values()
    )
    return state if len(state) > 1 else state[0]


# --- lengths ---


@ENGINES
@SHAPED
def test_lengths_are_as_packed_sequences_in_torch(
    engine: str, kind: str, shape: dict[str, Any], stateful: bool
) -> None:
    layer, theirs = pair(kind, INPUT, HIDDEN, **shape, dtype=torch.float64)
    x = torch.randn(4, 4, INPUT, dtype=torch.float64, requires_grad=True)  # as many rows as steps
    lengths = torch.tensor([2, 4, 1, 3])
    state = given(layer, 4) if stateful else None
    first = layer.batch_first
    packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    output, final = theirs(packed, state)
    expected = pad_packed_sequence(output, batch_first=first, total_length=4)[0], final
    leaves = [x, *tensors(state)]
    with ur.engine(engine):
        for kept in (layer(x, state, lengths=lengths), layer(x, state, lengths=[2, 4, 1, 3], checkpoint=3)):
            same(layer, kept, expected, leaves, theirs)


@ENGINES
def test_rows_without_a_step_and_rows_with_all(engine: str) -> None:
    layer = ur.LSTM(INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    x, state = torch.randn(3, 4, INPUT, dtype=torch.float64), given(layer, 4)
    with ur.engine(engine):
        output, final = layer(x, state, lengths=[0, 3, 0, 2])
        assert_close(final[1][:, ::2], state[1][:, ::2], 0)
        assert not output[:, ::2].any()
        alone = layer(x[:, 1:2], tuple(part[:, 1:2] for part in state))
        assert_close((output[:, 1:2], *(part[:, 1:2] for part in final)), (alone[0], *alone[1]), 1e-12)
        nothing = layer(x, state, lengths=torch.zeros(4, dtype=torch.int64))
        assert not nothing[0].any()
        assert_close(nothing[1], state, 0)
        assert_close(layer(x, lengths=torch.full((4,), 3)), layer(x), 0)
        assert layer(x[:, :0], lengths=[])[0].shape == (3, 0, 2 * HIDDEN)


@ENGINES
def test_what_lies_past_the_end_reaches_nothing(engine: str) -> None:
    layer, lengths = ur.GRU(INPUT, HIDDEN, 2, bidirectional=True), torch.tensor([2, 0, 3])
    clean = torch.randn(3, 3, INPUT)
    past = torch.arange(3).view(3, 1, 1) >= lengths.view(1, 3, 1)
    with ur.engine(engine):
        for asked in ({}, {"checkpoint": 2}, {"all_states": True}):
            found = []
            for filling in (0.0, float("nan")):
                x = torch.where(past, filling, clean).requires_grad_()
                results = layer(x, lengths=lengths, **asked)[:2]
                gradients = torch.autograd.grad(weighed(results), [x, *layer.parameters()])
                found.append((results, gradients))
            assert_close(found[1], found[0], 0)
        alone = torch.func.grad(lambda w: weighed(layer(w, lengths=lengths)))(x.detach())
        assert_close(alone, gradients[0], 1e-5)


# --- resets ---


@ENGINES
@SHAPED
def test_resets_are_as_episodes_run_one_by_one(
    engine: str, kind: str, shape: dict[str, Any], stateful: bool
) -> None:
    """Of one layer: in a second one, the episodes meet in the outputs of the first alone."""
    layer, _ = pair(kind, INPUT, HIDDEN, **{**shape, "num_layers": 1}, dtype=torch.float64)
    time, batch = 7, 3
    x = torch.randn(batch, time, INPUT, dtype=torch.float64, requires_grad=True)
    state = given(layer, batch) if stateful else None
    resets = torch.zeros(batch, time, dtype=torch.bool)
    for row, step in ((0, 3), (1, 0), (1, 2), (1, 3), (2, 6)):
        resets[row, step] = True
    borders = {0: [0, 3, 7], 1: [0, 2, 3, 7], 2: [0, 6, 7]}

    def rows(value: Any, row: int) -> Any:
        if value is None:
            return None
        parts = tuple(part[:, row : row + 1] for part in tensors(value))
        return parts if len(parts) > 1 else parts[0]

    outputs, finals = [], []
    for row, ends in borders.items():
        pieces, last = [], []
        for begin, end in itertools.pairwise(ends):
            piece = x[row : row + 1, begin:end]
            piece = piece if layer.batch_first else piece.transpose(0, 1)
            output, final = layer(piece, rows(state, row))
            pieces.append(output if layer.batch_first else output.transpose(0, 1))
            last.append(list(tensors(final)))
        outputs.append(torch.cat(pieces, 1))
        # forward: of the last episode; back: of the first
        finals.append([torch.cat((a[:1], b[1:])) for a, b in zip(last[-1], last[0], strict=True)])
    expected = torch.cat(outputs), [torch.cat(parts, 1) for parts in zip(*finals, strict=True)]
    leaves = [x, *tensors(state)]
    with ur.engine(engine):
        if layer.batch_first:
            found = layer(x, state, resets=resets)
        else:
            output, final = layer(x.transpose(0, 1), state, resets=resets.T)
            found = output.transpose(0, 1), final
        same(layer, (found[0], list(tensors(found[1]))), expected, leaves)


@ENGINES
@pytest.mark.parametrize("start", ["zeros", "learned"])
def test_resets_in_a_sequence_that_comes_in_pieces(engine: str, start: str) -> None:
    layer = ur.Recurrent(ur.cells.LSTM, INPUT, HIDDEN, 2, initial_state=start, batch_first=True)
    with torch.no_grad():
        for parts in layer._starts() if start == "learned" else ():
            for part in parts:
                part.normal_()
    x, resets = torch.randn(3, 9, INPUT), torch.rand(3, 9) < 0.4
    resets[:, 4] = torch.tensor([True, False, True])  # the first step of a piece, and others
    pieces = list(zip(x.split(4, 1), resets.split(4, 1), strict=True))
    with ur.engine(engine), torch.no_grad():
        whole, _ = layer(x, resets=resets)
        stream, state, carried = ur.Stream(layer), None, []
        streamed = [stream(part, resets=marks) for part, marks in pieces]
        assert_close(torch.cat(streamed, 1), whole, 0)
        for part, marks in pieces:
            output, state = layer(part, state, resets=marks, reset_state="initial")
            carried.append(output)
        assert_close(torch.cat(carried, 1), whole, 0)
        stream = ur.Stream(Called(layer))
        streamed = [stream(part, marks) for part, marks in pieces]
        assert_close(torch.cat(streamed, 1), whole, 0)
        stream.reset(torch.tensor([True, False, True]))
        again = stream(x, torch.zeros_like(resets))
        assert_close(again[::2], layer(x[::2])[0], 1e-6)
        first = tuple(torch.randn(2, 3, HIDDEN) for _ in range(2))
        every = torch.ones_like(resets)
        found, _ = layer(x, state, resets=every, reset_state=first)
        one = [layer(x[:, t : t + 1], first)[0] for t in range(9)]
        assert_close(found, torch.cat(one, 1), 1e-6)


class Called(nn.Module):
    """A model that hands resets to its layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, resets: Tensor) -> Tensor:
        return self.layer(x, resets=resets)[0]


@ENGINES
def test_no_gradient_flows_past_a_reset(engine: str) -> None:
    layer, x = ur.GRU(INPUT, HIDDEN, 2), torch.randn(6, INPUT, requires_grad=True)
    resets = torch.arange(6) == 4
    with ur.engine(engine):
        layer(x, resets=resets)[0][4:].sum().backward()
    assert not x.grad[:4].any()
    assert x.grad[4:].all()


@NEEDS_COMPILER
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_second_gradients_with_resets(checkpoint: int | None) -> None:
    layer = ur.GRU(INPUT, HIDDEN, bidirectional=True, dtype=torch.float64)
    x, resets = torch.randn(4, 2, INPUT, dtype=torch.float64, requires_grad=True), torch.rand(4, 2) < 0.4
    found = []
    for engine in ("native", "reference"):
        with ur.engine(engine):
            output = layer(x, resets=resets, checkpoint=checkpoint)[0]
            [first] = torch.autograd.grad(weighed(output), [x], create_graph=True)
            found.append(
                torch.autograd.grad(first.square().sum(), [x, *layer.parameters()], allow_unused=True)
            )
    assert_close(
        [grad for grad in found[0] if grad is not None], [g for g in found[1] if g is not None], 1e-10
    )


@ENGINES
def test_lengths_resets_and_every_state_together(engine: str) -> None:
    layer = ur.LSTM(INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 3, INPUT, dtype=torch.float64, requires_grad=True)
    state, lengths = given(layer, 3), torch.tensor([4, 6, 2])
    resets = torch.rand(6, 3) < 0.3
    with ur.engine(engine):
        output, final, every = layer(x, state, lengths=lengths, resets=resets, all_states=True)
        for row, length in enumerate(lengths.tolist()):
            alone = layer(
                x[:length, row : row + 1],
                tuple(part[:, row : row + 1] for part in state),
                resets=resets[:length, row : row + 1],
                all_states=True,
            )
            assert_close(output[:length, row : row + 1], alone[0], 1e-10)
            assert not output[length:, row].any()
            for part, one in zip(final, alone[1], strict=True):
                assert_close(part[:, row : row + 1], one, 1e-10)
            for name, values in every.items():
                assert_close(values[:, :length, row : row + 1], alone[2][name], 1e-10)
                assert not values[:, length:, row].any()
        kept = layer(x, state, lengths=lengths, resets=resets, all_states=True, checkpoint=2)
        same(layer, (kept[0], *kept[1], *kept[2].values()), (output, *final, *every.values()), [x, *state])


# --- every state ---


@ENGINES
def test_every_cell_state_is_that_of_torchs_cells(engine: str) -> None:
    layer = ur.LSTM(INPUT, HIDDEN, 2, dtype=torch.float64)
    x = torch.randn(5, 2, INPUT, dtype=torch.float64, requires_grad=True)
    expected: list[list[list[Tensor]]] = [[], []]
    steps = list(x)
    for k in range(2):
        cell = nn.LSTMCell(INPUT if k == 0 else HIDDEN, HIDDEN, dtype=torch.float64)
        for name, _ in list(cell.named_parameters()):
            delattr(cell, name)
            setattr(cell, name, getattr(layer, f"{name}_l{k}"))
        h = c = torch.zeros(2, HIDDEN, dtype=torch.float64)
        made = []
        for step in steps:
            h, c = cell(step, (h, c))
            made.append((h, c))
        steps = [h for h, _ in made]
        for number in range(2):
            expected[number].append(torch.stack([states[number] for states in made]))
    with ur.engine(engine):
        output, (h, c), every = layer(x, all_states=True)
    assert list(every) == ["h", "c"]
    same(layer, list(every.values()), [torch.stack(parts) for parts in expected], [x])
    assert torch.equal(output, every["h"][-1])
    assert torch.equal(c, every["c"][:, -1])
    assert torch.equal(h, every["h"][:, -1])


@ENGINES
@KINDS
def test_every_state_is_laid_out_as_the_input(engine: str, kind: str) -> None:
    layer, _ = pair(kind, INPUT, HIDDEN, batch_first=True, bidirectional=True)
    with ur.engine(engine):
        output, final, every = layer(torch.randn(2, 5, INPUT), all_states=True)
        size = layer._first.state_sizes()
        assert {name: tuple(part.shape) for name, part in every.items()} == {
            name: (2, 2, 5, wide) for name, wide in size.items()
        }
        assert torch.equal(output, torch.cat(list(every["h"]), -1))
        last = [torch.stack((part[0, :, -1], part[1, :, 0])) for part in every.values()]
        assert all(torch.equal(a, b) for a, b in zip(last, tensors(final), strict=True))
        one = layer(torch.randn(5, INPUT), all_states=True)[2]["h"]
        assert one.shape[:2] == (2, 5)


def test_what_comes_with_every_state_may_be_changed_in_place() -> None:
    layer, x, found = ur.LSTM(INPUT, HIDDEN), torch.randn(4, 2, INPUT), []
    for every in (True, False):
        output, (h, c) = layer(x, all_states=every)[:2]
        output, h, c = (part.mul_(2) for part in (output, h, c))
        found.append(torch.autograd.grad(weighed((output, h, c)), list(layer.parameters())))
    assert_close(found[0], found[1], 1e-6)


# --- under transforms ---


@NEEDS_COMPILER
def test_compiled_and_vectorised() -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN, bidirectional=True), torch.randn(6, 5, INPUT)
    lengths, resets = torch.tensor([4, 6, 2, 0, 1]), torch.rand(6, 5) < 0.3

    def run(x: Tensor, lengths: Tensor, resets: Tensor) -> Any:
        return layer(x, lengths=lengths, resets=resets, all_states=True)

    with ur.engine("native"):
        expected = run(x, lengths, resets)
        torch._dynamo.reset()
        found = torch.compile(run, backend="aot_eager", fullgraph=True)(x, lengths, resets)
        leaves = torch.utils._pytree.tree_leaves
        assert_close(leaves(found), leaves(expected), 1e-6)
        rows = torch.vmap(run, (1, 0, 1), 1)(x.unsqueeze(2), lengths.unsqueeze(1), resets.unsqueeze(2))
        assert_close(rows[0].squeeze(2), expected[0], 1e-6)


# --- bad input ---


@pytest.mark.parametrize(
    ("asked", "error", "why"),
    [
        ({"lengths": [1, 2, 3]}, ValueError, r"LSTM: Expected lengths of shape \(2,\), got \(3,\)"),
        (
            {"lengths": [1, 6]},
            ValueError,
            "Expected lengths from 0 to 5, the number of time steps, got 6 for row 1",
        ),
        ({"lengths": [-1, 5]}, ValueError, "got -1 for row 0"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths should be whole numbers, got torch.float32"),
        ({"lengths": "ab"}, TypeError, "lengths should be whole numbers, got 'ab'"),
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
        ({"reset_state": "initial"}, ValueError, "reset_state says what resets go back to: give resets too"),
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
def test_what_cannot_be_asked(asked: dict[str, Any], error: type[Exception], why: str) -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN), torch.randn(5, 2, INPUT)
    for more in ({}, {"checkpoint": 2}):
        with pytest.raises(error, match=why):
            layer(x, **asked, **more)


def test_lengths_that_are_too_long_when_compiled() -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN), torch.randn(5, 2, INPUT)
    fast = torch.compile(lambda x, lengths: layer(x, lengths=lengths), backend="aot_eager", fullgraph=True)
    assert_close(fast(x, torch.tensor([2, 5])), layer(x, lengths=[2, 5]), 1e-6)
    with pytest.raises(RuntimeError, match="LSTM: Expected lengths from 0 to the number of time steps"):
        fast(x, torch.tensor([2, 6]))


def test_what_cannot_be_asked_of_one_sequence_and_of_packed_ones() -> None:
    layer = ur.LSTM(INPUT, HIDDEN)
    with pytest.raises(ValueError, match="lengths needs an input with a batch axis"):
        layer(torch.randn(5, INPUT), lengths=[5])
    packed = pack_padded_sequence(torch.randn(5, 2, INPUT), torch.tensor([5, 3]))
    for asked in ({"lengths": [5, 3]}, {"resets": torch.zeros(5, 2).bool()}, {"all_states": True}):
        with pytest.raises(ValueError, match=f"{next(iter(asked))} takes no packed sequence"):
            layer(packed, **asked)


@ENGINES
def test_a_stream_and_a_frozen_layer_give_every_state_too(engine: str) -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN), torch.randn(4, 2, INPUT)
    with ur.engine(engine), torch.no_grad():
        whole = layer(x, all_states=True)[2]
        stream = ur.Stream(layer)
        parts = [stream(piece, all_states=True)[1] for piece in x.split(1)]
        with ur.frozen(layer):
            again = layer(x, all_states=True)[2]
    for name, values in whole.items():
        assert_close(torch.cat([part[name] for part in parts], 1), values, 1e-6)
        assert torch.equal(again[name], values)
