"""Gradients that don't exist: the compiled loops return None where autograd does, and zeros where it does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tanh
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close, tensors
from helpers.step_batch import BatchCompiler

pytestmark = NEEDS_COMPILER

INPUT, HIDDEN = 3, 4


def sums(cell: Any, x: Tensor, h: Tensor) -> Tensor:
    return tanh(linear(x, cell.w) + linear(h, cell.u) + cell.b)


STEPS: dict[str, tuple[int, Callable[..., Any]]] = {  # number of states, and the step
    "x in a comparison": (1, lambda s, x, h: tanh(linear(h, s.u, s.b)) * (x[:, :1] > 0)),
    "x in an index": (1, lambda s, x, h: tanh(linear(h, s.u, s.b)) + x.argmax(-1, keepdim=True).to(x.dtype)),
    "h in a comparison": (1, lambda s, x, h: tanh(linear(x, s.w, s.b)) * (h > 0)),
    "h in a masked product": (1, lambda s, x, h: tanh(linear(x, s.w) + linear((h > 0).to(x.dtype), s.u))),
    "a parameter as condition": (1, lambda s, x, h: torch.where(s.b > 0, tanh(linear(x, s.w)), h)),
    "a parameter in a mask": (1, lambda s, x, h: tanh(linear(x, s.w) + linear(h, (s.u > 0).to(x.dtype)))),
    "a parameter by its shape": (1, lambda s, x, h: tanh(linear(x, s.w) + h + torch.zeros_like(s.b))),
    "nothing but a mask": (1, lambda s, x, h: (sums(s, x, h) > 0).to(x.dtype)),
    "a mask of a parameter": (1, lambda s, x, h: (sums(s, x, h) > 0) * s.b),
    "detached state": (1, lambda s, x, h: sums(s, x, h.detach())),
    "detached sum": (1, lambda s, x, h: sums(s, x, h).detach() + h),
    "zeros from floor": (1, lambda s, x, h: tanh(linear(x.floor(), s.w.round()) + linear(h, s.u) + s.b)),
    "zeros from a product": (1, lambda s, x, h: tanh(linear(h, s.u) + 0 * linear(x, s.w) + s.b)),
    "zeros from a fill": (1, lambda s, x, h: tanh(linear(x, s.w) + h + s.b.masked_fill(s.b == s.b, 0))),
    "zeros from a slice": (1, lambda s, x, h: tanh(linear(x, s.w) + linear(h, s.u) + s.b[:0].sum())),
    "swapped": (2, lambda s, x, h, c: (c, sums(s, x, h))),
    "late": (2, lambda s, x, h, c: (tanh(linear(c, s.u)), linear(x, s.w))),
    "shifted": (3, lambda s, x, h, c, d: (tanh(c + s.b), tanh(linear(d, s.u)), linear(x, s.w) + 0.5 * d)),
    "counter": (2, lambda s, x, h, c: (sums(s, x, h) / (1 + c), c + 1)),
    "counted spikes": (2, lambda s, x, h, c: (sums(s, x, h), 0.9 * c + (h > 0))),
    "gate of a state": (2, lambda s, x, h, c: (tanh(linear(x, s.w) + h) * (c > 0), c + s.b)),
    "unused state": (2, lambda s, x, h, c: (sums(s, x, h), c)),
    "constant output": (2, lambda s, x, h, c: (torch.ones_like(h), tanh(linear(x, s.w) + c))),
    "parameter as output": (2, lambda s, x, h, c: (s.b.expand_as(h), tanh(linear(x, s.w) + linear(c, s.u)))),
    "state from an index": (
        2,
        lambda s, x, h, c: (sums(s, x, h), h.argmax(-1, keepdim=True).to(x.dtype).expand(-1, HIDDEN)),
    ),
}  # fmt: skip


def make_cell(states: int, run: Callable[..., Any]) -> type[ur.Cell]:
    """Return a cell class with a step that takes the cell, x and the states."""

    class OneState(ur.Cell):
        w, u, b = ur.Param("hidden", "input"), ur.Param("hidden", "hidden"), ur.Param("hidden")

        def step(self, x: Tensor, h: Tensor) -> Any:
            return run(self, x, h)

    class TwoStates(OneState):
        state = ("h", "c")

        def step(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return run(self, x, h, c)

    class ThreeStates(OneState):
        state = ("h", "c", "d")

        def step(self, x: Tensor, h: Tensor, c: Tensor, d: Tensor) -> Any:
            return run(self, x, h, c, d)

    return [OneState, TwoStates, ThreeStates][states - 1]


SAMPLE = {
    "x in a comparison", "h in a masked product", "a parameter as condition", "nothing but a mask",
    "a mask of a parameter", "zeros from floor", "shifted", "counted spikes", "constant output",
}  # fmt: skip
EACH_STEP = pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]
)
CLASSES = {name: make_cell(*step) for name, step in STEPS.items()}


@pytest.fixture(scope="module", autouse=True)
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile the cells of the selected tests."""
    here = [item for item in request.session.items if item.path == request.path]
    with BatchCompiler() as batch:
        for name in dict.fromkeys(item.callspec.params["name"] for item in here):
            batch.prepare(CLASSES[name](INPUT, HIDDEN), torch.float64)
        batch.finish()
        yield


def initial_states(name: str, layer: Any, batch: int) -> tuple[Tensor, ...]:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(count, batch, HIDDEN, dtype=torch.float64) for _ in range(STEPS[name][0])]
    return tuple(state.requires_grad_() for state in states)


def gradients(layer: Any, x: Tensor, state: Any, used: list[int], **options: Any) -> Any:
    """Return the results, which of them require a gradient, and the gradients of the used ones' sum."""
    given = None if state is None else state if len(state) > 1 else state[0]
    results = list(tensors(layer(x, given, **options)))
    loss = sum(((results[k] * (1 + k)) ** 2).sum() for k in used)
    requires_grad = [result.requires_grad for result in results]
    if not loss.requires_grad:
        return results, requires_grad, None
    leaves = [leaf for leaf in (*tensors((x, state)), *layer.parameters()) if leaf.requires_grad]
    return results, requires_grad, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(layer: Any, x: Any, state: Any, used: list[int], **options: Any) -> None:
    with ur.engine("reference"):
        results, requires_grad, expected = gradients(layer, x, state, used, **options)
    with ur.engine("native"):
        native_results, native_requires_grad, actual = gradients(layer, x, state, used, **options)
    assert native_requires_grad == requires_grad
    assert_close(native_results, results, 1e-12)
    if expected is not None:
        assert [grad is None for grad in actual] == [grad is None for grad in expected]
        assert_close(actual, expected, 1e-11)
    else:
        assert actual is None


@EACH_STEP
def test_each_result(name: str) -> None:
    layer = ur.Recurrent(CLASSES[name], INPUT, HIDDEN, dtype=torch.float64)
    numbers = range(1 + STEPS[name][0])
    for steps, stateful, used in itertools.product(
        (1, 4), (False, True), [list(numbers), *([k] for k in numbers)]
    ):
        x = torch.randn(steps, 2, INPUT, dtype=torch.float64, requires_grad=True)
        assert_same(layer, x, initial_states(name, layer, 2) if stateful else None, used)


@EACH_STEP
def test_some_inputs_require_gradients(name: str) -> None:
    layer = ur.Recurrent(CLASSES[name], INPUT, HIDDEN, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    for required in ({"x"}, {"state"}, *({parameter} for parameter in parameters)):
        x = torch.randn(3, 2, INPUT, dtype=torch.float64, requires_grad="x" in required)
        state = tuple(part.requires_grad_("state" in required) for part in initial_states(name, layer, 2))
        for parameter, tensor in parameters.items():
            tensor.requires_grad_(parameter in required)
        assert_same(layer, x, state, [0])
        assert_same(layer, x, state, [STEPS[name][0]])


@pytest.mark.parametrize("lengths", [(5, 3, 1), (3, 2, 2)], ids=str)
@EACH_STEP
def test_packed_sequences(name: str, lengths: tuple[int, ...]) -> None:
    layer = ur.Recurrent(CLASSES[name], INPUT, HIDDEN, bidirectional=True, dtype=torch.float64)
    rows = [torch.randn(length, INPUT, dtype=torch.float64, requires_grad=True) for length in lengths]
    x = nn.utils.rnn.pack_sequence([row.detach() for row in rows])
    x = nn.utils.rnn.PackedSequence(x.data.requires_grad_(), *x[1:])
    for k in range(1 + STEPS[name][0]):
        assert_same(layer, x, initial_states(name, layer, len(lengths)), [k])


@EACH_STEP
def test_layers_directions_and_checkpoints(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    layer = ur.Recurrent(CLASSES[name], INPUT, HIDDEN, **options)
    x = torch.randn(5, 2, INPUT, dtype=torch.float64, requires_grad=True)
    for k in range(1 + STEPS[name][0]):
        assert_same(layer, x, initial_states(name, layer, 2), [k])
        assert_same(layer, x, initial_states(name, layer, 2), [k], checkpoint=2)
