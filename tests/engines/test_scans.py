"""Loops without a product: threads run apart or take turns, and what no step reads is computed after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import Padded, both_engines
from torch import softmax, tanh
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, team
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native import registry
from unrolled.engines.native.kernel_spec import HEADER

pytestmark = NEEDS_COMPILER


class Sum(ur.Cell):
    """Linear, with nothing to learn."""

    state = ("h",)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        kept, added = x.chunk(2, -1)
        return torch.sigmoid(kept) * h + added


class Shown(ur.Cell):
    """Two outputs that no step reads: through a product and a softmax, and a sum."""

    state = {"y": "3", "h": "hidden", "size": "1"}
    weight_ih = ur.Param("hidden", "input")
    weight_y = ur.Param("3", "hidden")
    weight_x = ur.Param("3", "input")

    def step(self, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor, size: torch.Tensor) -> Any:
        gate = torch.sigmoid(linear(x, self.weight_ih))
        h = tanh(gate * h + (1 - gate))
        y = softmax(linear(h, self.weight_y) * torch.exp(linear(x, self.weight_x)), -1)
        size = (h * gate).sum(-1, keepdim=True)
        return y, h, size


class Turned(ur.Cell):
    """Each unit sees another one's state."""

    state = ("h",)
    weight_ih = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        return tanh(linear(x, self.weight_ih) + 0.9 * h.roll(1, -1))


class Halves(ur.Cell):
    """The halves of the state change places."""

    state = ("h",)
    weight_ih = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        first, second = (linear(x, self.weight_ih) + h).chunk(2, -1)
        return torch.cat((tanh(second), first * 0.5), -1)


CELLS: dict[str, Any] = {
    name: getattr(ur.cells, name)
    for name in ("MinGRU", "MinLSTM", "QRNN", "SRU", "IndRNN", "UnICORNN", "RGLRU", "LRU", "HGRN", "LSTM")
}
CELLS |= {"Sum": Sum, "Shown": Shown, "Turned": Turned, "Halves": Halves}
APART = {"MinGRU", "MinLSTM", "QRNN", "SRU", "IndRNN", "UnICORNN", "RGLRU", "LRU", "HGRN", "Sum", "Shown"}
LATE = {"LRU", "HGRN", "Shown"}


def made(name: str, hidden: int, **arguments: Any) -> ur.Recurrent:
    """A layer; its input is as wide as its cell wants it."""
    return ur.Recurrent(CELLS[name], 2 * hidden if name == "Sum" else 6, hidden, **arguments)


@pytest.mark.parametrize("name", CELLS)
def test_what_is_seen(name: str) -> None:
    loop = registry.compiled(made(name, 4)._first, torch.float32).inference
    assert (loop.emitted.apart, loop.emitted.late) == (name in APART, name in LATE)


def test_columns_of_the_input_are_not_kept() -> None:
    """The backward reads the input again, and no copy of a part of it."""

    class Given(ur.Cell):
        state = ("h",)

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            a, b = x.chunk(2, -1)
            return a * h + b

    layer = ur.Recurrent(Given, 8, 4, dtype=torch.float64)
    assert registry.compiled(layer._first, torch.float64).held == []
    both_engines(layer, torch.randn(5, 3, 8, dtype=torch.float64).requires_grad_())


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(list(CELLS)),
    hidden=st.integers(1, 40),
    time=st.integers(1, 60),
    batch=st.integers(1, 20),
    threads=st.integers(1, 3),
    bidirectional=st.booleans(),
)
def test_any_size(name: str, hidden: int, time: int, batch: int, threads: int, bidirectional: bool) -> None:
    layer = made(name, 2 * hidden, bidirectional=bidirectional, dtype=torch.float64)
    with team(threads):
        x = torch.randn(time, batch, layer.input_size, dtype=torch.float64).requires_grad_()
        both_engines(layer, x)


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(["MinGRU", "SRU", "LRU", "HGRN", "Shown"]),
    hidden=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    threads=st.integers(1, 3),
)
def test_unequal_lengths(name: str, hidden: int, lengths: list[int], threads: int) -> None:
    layer = made(name, hidden, bidirectional=True, dtype=torch.float64)
    x = torch.randn(max(lengths), len(lengths), 6, dtype=torch.float64).requires_grad_()
    with team(threads):
        both_engines(Padded(layer, lengths), x)


@pytest.mark.parametrize(("batch", "hidden"), [(1, 1), (1, 16), (3, 40), (20, 16)])
@pytest.mark.parametrize("name", ["MinGRU", "SRU", "IndRNN", "LRU", "Shown", "Sum"])
def test_the_same_bits(name: str, batch: int, hidden: int) -> None:
    """Whatever the threads, and wherever the sequence is cut."""
    layer, time = made(name, hidden), 2400 // batch
    x = torch.randn(time, batch, layer.input_size).requires_grad_()

    def results(threads: int) -> list[torch.Tensor]:
        with team(threads), ur.engine("native"):
            output, final = layer(x)
            final = final if isinstance(final, tuple) else (final,)
            [grad] = torch.autograd.grad(output.square().sum(), x)
            return [output.detach(), *(state.detach() for state in final), grad]

    alone = results(1)
    for threads in (2, 3):
        assert all(map(torch.equal, results(threads), alone))
    state, parts = None, []
    with team(2), torch.no_grad(), ur.engine("native"):
        for piece in x.split(time // 3 + 1):
            part, state = layer(piece, state)
            parts.append(part)
    assert torch.equal(torch.cat(parts), alone[0])


def test_who_takes_turns() -> None:
    """Threads do, where there is not a panel for each of them and the sequence is long."""
    loop = registry.compiled(made("MinGRU", 4)._first, torch.float32).inference
    lanes, turns = loop._products.lanes, HEADER - 1

    def taken(loop: Any, steps: int, threads: int) -> bool:
        return bool(loop._numbers(Layout(steps, 1), False, threads, 0, False)[turns])

    assert taken(loop, 100_000, 2)
    assert not taken(loop, 100_000, 1)
    assert not taken(loop, 500, 2)
    wide = registry.compiled(made("MinGRU", 2 * lanes)._first, torch.float32).inference
    assert not taken(wide, 100_000, 2)
    assert taken(wide, 100_000, 3)
    for name in ("LSTM", "LRU", "Halves"):
        assert not taken(registry.compiled(made(name, 4)._first, torch.float32).inference, 100_000, 2)
