"""Columnwise loops, whose threads needn't synchronize or take turns, and deferred values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare_engines import PackedLayer, assert_engines_agree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import softmax, tanh
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, use_threads
from unrolled.engines import registry
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native.call_arguments import Strategy

pytestmark = NEEDS_COMPILER


class GatedSum(ur.Cell):
    """A gated sum of the input, without parameters."""

    state = ("h",)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        gate, added = x.chunk(2, -1)
        return torch.sigmoid(gate) * h + added


class Readout(ur.Cell):
    """Two states that no step reads: one with a product and a softmax, and a sum."""

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


class Rolled(ur.Cell):
    """Each unit reads the state of its neighbor."""

    state = ("h",)
    weight_ih = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        return tanh(linear(x, self.weight_ih) + 0.9 * h.roll(1, -1))


class SwappedHalves(ur.Cell):
    """The two halves of the state swap places in each step."""

    state = ("h",)
    weight_ih = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        first, second = (linear(x, self.weight_ih) + h).chunk(2, -1)
        return torch.cat((tanh(second), first * 0.5), -1)


CELLS: dict[str, Any] = {
    name: getattr(ur.cells, name)
    for name in ("MinGRU", "MinLSTM", "QRNN", "SRU", "IndRNN", "UnICORNN", "RGLRU", "LRU", "HGRN", "LSTM")
}
CELLS |= {"GatedSum": GatedSum, "Readout": Readout, "Rolled": Rolled, "SwappedHalves": SwappedHalves}
COLUMNWISE = {"MinGRU", "MinLSTM", "QRNN", "SRU", "IndRNN", "UnICORNN", "RGLRU", "LRU", "HGRN"}
COLUMNWISE |= {"GatedSum", "Readout"}
DEFERRED = {"LRU", "HGRN", "Readout"}


def layer_of(name: str, hidden: int, **arguments: Any) -> ur.Recurrent:
    """Return a layer with one of the cells, and an input size that the cell accepts."""
    return ur.Recurrent(CELLS[name], 2 * hidden if name == "GatedSum" else 6, hidden, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_columnwise_and_deferred_loops_are_detected(name: str) -> None:
    spec = registry.compiled(layer_of(name, 4)._first, torch.float32).inference.spec
    assert (spec.columnwise, spec.deferred) == (name in COLUMNWISE, name in DEFERRED)


@pytest.mark.slow
def test_columns_of_the_input_are_not_saved() -> None:
    """The backward reads the input itself instead of copies of its columns."""

    class GivenCoefficients(ur.Cell):
        state = ("h",)

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            a, b = x.chunk(2, -1)
            return a * h + b

    layer = ur.Recurrent(GivenCoefficients, 8, 4, dtype=torch.float64)
    assert registry.compiled(layer._first, torch.float64).saved_for_backward == []
    assert_engines_agree(layer, torch.randn(5, 3, 8, dtype=torch.float64).requires_grad_())


@pytest.mark.slow
@settings(max_examples=15)
@given(
    name=st.sampled_from(list(CELLS)),
    hidden=st.integers(1, 40),
    time=st.integers(1, 60),
    batch=st.integers(1, 20),
    threads=st.integers(1, 3),
    bidirectional=st.booleans(),
)
def test_any_size(name: str, hidden: int, time: int, batch: int, threads: int, bidirectional: bool) -> None:
    layer = layer_of(name, 2 * hidden, bidirectional=bidirectional, dtype=torch.float64)
    with use_threads(threads):
        x = torch.randn(time, batch, layer.input_size, dtype=torch.float64).requires_grad_()
        assert_engines_agree(layer, x)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    name=st.sampled_from(["MinGRU", "SRU", "LRU", "HGRN", "Readout"]),
    hidden=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    threads=st.integers(1, 3),
)
def test_unequal_lengths(name: str, hidden: int, lengths: list[int], threads: int) -> None:
    layer = layer_of(name, hidden, bidirectional=True, dtype=torch.float64)
    x = torch.randn(max(lengths), len(lengths), 6, dtype=torch.float64).requires_grad_()
    with use_threads(threads):
        assert_engines_agree(PackedLayer(layer, lengths), x)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "hidden"), [(1, 1), (1, 16), (3, 40), (20, 16)])
@pytest.mark.parametrize("name", ["MinGRU", "SRU", "IndRNN", "LRU", "Readout", "GatedSum"])
def test_results_are_bit_identical_for_all_threads_and_splits(name: str, batch: int, hidden: int) -> None:
    """Results don't depend on the number of threads, or on where a sequence is split into calls."""
    layer, time = layer_of(name, hidden), 2400 // batch
    x = torch.randn(time, batch, layer.input_size).requires_grad_()

    def results(threads: int) -> list[torch.Tensor]:
        with use_threads(threads), ur.engine("native"):
            output, final = layer(x)
            final = final if isinstance(final, tuple) else (final,)
            [grad] = torch.autograd.grad(output.square().sum(), x)
            return [output.detach(), *(state.detach() for state in final), grad]

    single_threaded = results(1)
    for threads in (2, 3):
        assert all(map(torch.equal, results(threads), single_threaded))
    state, outputs = None, []
    with use_threads(2), torch.no_grad(), ur.engine("native"):
        for piece in x.split(time // 3 + 1):
            output, state = layer(piece, state)
            outputs.append(output)
    assert torch.equal(torch.cat(outputs), single_threaded[0])


@pytest.mark.slow
def test_when_threads_take_turns() -> None:
    """They do if there are fewer panels than threads and the sequence is long."""
    kernel = registry.compiled(layer_of("MinGRU", 4)._first, torch.float32).inference
    lanes = kernel._products.lanes

    def take_turns(kernel: Any, steps: int, threads: int) -> bool:
        return bool(
            kernel.arguments(Layout(steps, 1), False, threads, 0, False).strategy == Strategy.TAKE_TURNS
        )

    assert take_turns(kernel, 100_000, 2)
    assert not take_turns(kernel, 100_000, 1)
    assert not take_turns(kernel, 500, 2)
    two_panels = registry.compiled(layer_of("MinGRU", 2 * lanes)._first, torch.float32).inference
    assert not take_turns(two_panels, 100_000, 2)
    assert take_turns(two_panels, 100_000, 3)
    for name in ("LSTM", "LRU", "SwappedHalves"):
        kernel = registry.compiled(layer_of(name, 4)._first, torch.float32).inference
        assert not take_turns(kernel, 100_000, 2)
