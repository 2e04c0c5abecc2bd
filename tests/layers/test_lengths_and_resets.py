"""Lengths and resets of forward calls, against torch.nn and against rows and episodes run separately."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unrolled as ur
from helpers.call_options import (
    ENGINES,
    HIDDEN,
    INPUT,
    assert_same_with_gradients,
    random_state,
    weighted_sum,
)
from helpers.layer_pairs import NEEDS_COMPILER, assert_close, pair, tensors
from unrolled.layers import initial_states

SHAPED = pytest.mark.parametrize(
    ("kind", "shape", "stateful"),
    [
        ("lstm-proj", {"num_layers": 2, "bidirectional": True, "batch_first": True}, True),
        ("gru", {"num_layers": 2, "batch_first": True}, False),
        ("rnn-relu", {"bidirectional": True}, True),
        ("lstm", {}, False),
    ],
)

# --- lengths ---


@pytest.mark.slow
@ENGINES
@SHAPED
def test_lengths_match_packed_sequences_in_torch(
    engine: str, kind: str, shape: dict[str, Any], stateful: bool
) -> None:
    layer, theirs = pair(kind, INPUT, HIDDEN, **shape, dtype=torch.float64)
    x = torch.randn(4, 4, INPUT, dtype=torch.float64, requires_grad=True)  # as many rows as steps
    lengths = torch.tensor([2, 4, 1, 3])
    state = random_state(layer, 4) if stateful else None
    first = layer.batch_first
    packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    output, final = theirs(packed, state)
    expected = pad_packed_sequence(output, batch_first=first, total_length=4)[0], final
    leaves = [x, *tensors(state)]
    with ur.engine(engine):
        for options in ({"lengths": lengths}, {"lengths": [2, 4, 1, 3], "checkpoint": 3}):
            actual = layer(x, state, **options)
            assert_same_with_gradients(layer, actual, expected, leaves, theirs)


@ENGINES
def test_empty_rows_and_full_rows(engine: str) -> None:
    layer = ur.LSTM(INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    x, state = torch.randn(3, 4, INPUT, dtype=torch.float64), random_state(layer, 4)
    with ur.engine(engine):
        output, final = layer(x, state, lengths=[0, 3, 0, 2])
        assert_close(final[1][:, ::2], state[1][:, ::2], 0)
        assert not output[:, ::2].any()
        alone = layer(x[:, 1:2], tuple(part[:, 1:2] for part in state))
        assert_close((output[:, 1:2], *(part[:, 1:2] for part in final)), (alone[0], *alone[1]), 1e-12)
        output, final = layer(x, state, lengths=torch.zeros(4, dtype=torch.int64))
        assert not output.any()
        assert_close(final, state, 0)
        assert_close(layer(x, lengths=torch.full((4,), 3)), layer(x), 0)
        assert layer(x[:, :0], lengths=[])[0].shape == (3, 0, 2 * HIDDEN)


@pytest.mark.slow
@ENGINES
def test_padding_has_no_effect(engine: str) -> None:
    layer, lengths = ur.GRU(INPUT, HIDDEN, 2, bidirectional=True), torch.tensor([2, 0, 3])
    clean = torch.randn(3, 3, INPUT)
    padding = torch.arange(3).view(3, 1, 1) >= lengths.view(1, 3, 1)
    with ur.engine(engine):
        for options in ({}, {"checkpoint": 2}, {"all_states": True}):
            by_padding = []
            for value in (0.0, float("nan")):
                x = torch.where(padding, value, clean).requires_grad_()
                results = layer(x, lengths=lengths, **options)[:2]
                gradients = torch.autograd.grad(weighted_sum(results), [x, *layer.parameters()])
                by_padding.append((results, gradients))
            assert_close(by_padding[1], by_padding[0], 0)
        functional = torch.func.grad(lambda x: weighted_sum(layer(x, lengths=lengths)))(x.detach())
        assert_close(functional, gradients[0], 1e-5)


# --- resets ---


@pytest.mark.slow
@ENGINES
@SHAPED
def test_resets_match_separate_episodes(
    engine: str, kind: str, shape: dict[str, Any], stateful: bool
) -> None:
    """One layer suffices: a second layer sees the episodes only through the outputs of the first."""
    layer, _ = pair(kind, INPUT, HIDDEN, **{**shape, "num_layers": 1}, dtype=torch.float64)
    time, batch = 7, 3
    x = torch.randn(batch, time, INPUT, dtype=torch.float64, requires_grad=True)
    state = random_state(layer, batch) if stateful else None
    resets = torch.zeros(batch, time, dtype=torch.bool)
    for row, step in ((0, 3), (1, 0), (1, 2), (1, 3), (2, 6)):
        resets[row, step] = True
    boundaries = {0: [0, 3, 7], 1: [0, 2, 3, 7], 2: [0, 6, 7]}

    def rows(value: Any, row: int) -> Any:
        if value is None:
            return None
        parts = tuple(part[:, row : row + 1] for part in tensors(value))
        return parts if len(parts) > 1 else parts[0]

    outputs, finals = [], []
    for row, steps in boundaries.items():
        row_outputs, row_finals = [], []
        for begin, end in itertools.pairwise(steps):
            episode = x[row : row + 1, begin:end]
            episode = episode if layer.batch_first else episode.transpose(0, 1)
            output, final = layer(episode, rows(state, row))
            row_outputs.append(output if layer.batch_first else output.transpose(0, 1))
            row_finals.append(list(tensors(final)))
        outputs.append(torch.cat(row_outputs, 1))
        # The forward direction ends in the last episode, the backward direction in the first.
        finals.append([torch.cat((a[:1], b[1:])) for a, b in zip(row_finals[-1], row_finals[0], strict=True)])
    expected = torch.cat(outputs), [torch.cat(parts, 1) for parts in zip(*finals, strict=True)]
    leaves = [x, *tensors(state)]
    with ur.engine(engine):
        if layer.batch_first:
            output, final = layer(x, state, resets=resets)
        else:
            output, final = layer(x.transpose(0, 1), state, resets=resets.T)
            output = output.transpose(0, 1)
        assert_same_with_gradients(layer, (output, list(tensors(final))), expected, leaves)


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("initial_state", ["zeros", "learned"])
def test_resets_in_a_sequence_in_pieces(engine: str, initial_state: str) -> None:
    layer = ur.Recurrent(ur.cells.LSTM, INPUT, HIDDEN, 2, initial_state=initial_state, batch_first=True)
    with torch.no_grad():
        for parts in initial_states.learned_parameters(layer) if initial_state == "learned" else ():
            for part in parts:
                part.normal_()
    x, resets = torch.randn(3, 9, INPUT), torch.rand(3, 9) < 0.4
    resets[:, 4] = torch.tensor([True, False, True])  # at the first step of the second piece
    pieces = list(zip(x.split(4, 1), resets.split(4, 1), strict=True))
    with ur.engine(engine), torch.no_grad():
        expected, _ = layer(x, resets=resets)
        stream, state, outputs = ur.Stream(layer), None, []
        streamed = [stream(part, resets=marks) for part, marks in pieces]
        assert_close(torch.cat(streamed, 1), expected, 0)
        for part, marks in pieces:
            output, state = layer(part, state, resets=marks, reset_state="initial")
            outputs.append(output)
        assert_close(torch.cat(outputs, 1), expected, 0)
        stream = ur.Stream(Model(layer))
        streamed = [stream(part, marks) for part, marks in pieces]
        assert_close(torch.cat(streamed, 1), expected, 0)
        stream.reset(torch.tensor([True, False, True]))
        after_reset = stream(x, torch.zeros_like(resets))
        assert_close(after_reset[::2], layer(x[::2])[0], 1e-6)
        reset_state = tuple(torch.randn(2, 3, HIDDEN) for _ in range(2))
        every_step = torch.ones_like(resets)
        output, _ = layer(x, state, resets=every_step, reset_state=reset_state)
        separate_steps = [layer(x[:, t : t + 1], reset_state)[0] for t in range(9)]
        assert_close(output, torch.cat(separate_steps, 1), 1e-6)


class Model(nn.Module):
    """A model that passes resets to its layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, resets: Tensor) -> Tensor:
        return self.layer(x, resets=resets)[0]


@pytest.mark.slow
@ENGINES
def test_no_gradient_flows_past_a_reset(engine: str) -> None:
    layer, x = ur.GRU(INPUT, HIDDEN, 2), torch.randn(6, INPUT, requires_grad=True)
    resets = torch.arange(6) == 4
    with ur.engine(engine):
        layer(x, resets=resets)[0][4:].sum().backward()
    assert not x.grad[:4].any()
    assert x.grad[4:].all()


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_second_gradients_with_resets(checkpoint: int | None) -> None:
    layer = ur.GRU(INPUT, HIDDEN, bidirectional=True, dtype=torch.float64)
    x, resets = torch.randn(4, 2, INPUT, dtype=torch.float64, requires_grad=True), torch.rand(4, 2) < 0.4
    by_engine = []
    for engine in ("native", "reference"):
        with ur.engine(engine):
            output = layer(x, resets=resets, checkpoint=checkpoint)[0]
            [first] = torch.autograd.grad(weighted_sum(output), [x], create_graph=True)
            second = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()], allow_unused=True)
            by_engine.append([gradient for gradient in second if gradient is not None])
    assert_close(by_engine[0], by_engine[1], 1e-10)


@pytest.mark.slow
@ENGINES
def test_lengths_resets_and_all_states_together(engine: str) -> None:
    layer = ur.LSTM(INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 3, INPUT, dtype=torch.float64, requires_grad=True)
    state, lengths = random_state(layer, 3), torch.tensor([4, 6, 2])
    resets = torch.rand(6, 3) < 0.3
    with ur.engine(engine):
        output, final, states = layer(x, state, lengths=lengths, resets=resets, all_states=True)
        for row, length in enumerate(lengths.tolist()):
            alone = layer(
                x[:length, row : row + 1],
                tuple(part[:, row : row + 1] for part in state),
                resets=resets[:length, row : row + 1],
                all_states=True,
            )
            assert_close(output[:length, row : row + 1], alone[0], 1e-10)
            assert not output[length:, row].any()
            for part, expected in zip(final, alone[1], strict=True):
                assert_close(part[:, row : row + 1], expected, 1e-10)
            for name, values in states.items():
                assert_close(values[:, :length, row : row + 1], alone[2][name], 1e-10)
                assert not values[:, length:, row].any()
        masked = layer(x, state, lengths=lengths, resets=resets, all_states=True, checkpoint=2)
        actual, expected = (masked[0], *masked[1], *masked[2].values()), (output, *final, *states.values())
        assert_same_with_gradients(layer, actual, expected, [x, *state])
