"""Pairs of layers of this library and of torch.nn, and functions that compare their results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import unrolled as ur
from unrolled.engines.native.toolchain.compiler import NoCompilerError, compilers
from unrolled.engines.native.tuning import constants

LAYERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rnn-tanh": (ur.RNN, nn.RNN, {}),
    "rnn-relu": (ur.RNN, nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (ur.LSTM, nn.LSTM, {}),
    "lstm-proj": (ur.LSTM, nn.LSTM, {"proj_size": 3}),
    "gru": (ur.GRU, nn.GRU, {}),
}
CELLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rnn-tanh": (ur.RNNCell, nn.RNNCell, {}),
    "rnn-relu": (ur.RNNCell, nn.RNNCell, {"nonlinearity": "relu"}),
    "lstm": (ur.LSTMCell, nn.LSTMCell, {}),
    "gru": (ur.GRUCell, nn.GRUCell, {}),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7}


def _compiler_error() -> str:
    """Return the error message if no C++ compiler works here, otherwise an empty string."""
    try:
        next(compilers())
    except NoCompilerError as error:
        return str(error)
    return ""


COMPILER_ERROR = _compiler_error()
NEEDS_COMPILER = pytest.mark.skipif(bool(COMPILER_ERROR), reason=COMPILER_ERROR)
# Some tests unset CXX and therefore need the program c++.
NEEDS_SYSTEM_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None, reason="the program c++ is not installed"
)
# An argument for python -W. Without a compiler the warning about the reference engine is expected.
FALLBACK_FILTER = "ignore:recurrent layers run on the reference engine" if COMPILER_ERROR else "error"


class OddCell(ur.Cell):
    """Operations of every kind: elementwise, over rows, with constants, in place, without a name."""

    weight = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        product = x @ self.weight.T
        kept = torch.where(product > 0, product, -h).clamp(-1, 1)
        half = product / 2
        turned = -half * torch.exp(-x[:, :1])  # noqa: F841
        power = half**2 - (half - 1)
        norm = nn.functional.layer_norm(product, (self.hidden,))
        weights = torch.softmax(norm, -1)
        changed = half.clone()
        changed += 1.0
        return (kept - power) - (norm - weights) + torch.minimum(changed, half)


def pair(kind: str, *sizes: int, table: dict[str, Any] = LAYERS, **arguments: Any) -> tuple[Any, Any]:
    """Return a layer of this library and one of torch.nn, with the same parameters.

    Args:
        kind: A key of ``table``.
        sizes: Positional arguments of both layers.
        table: ``LAYERS`` or ``CELLS``.
        arguments: Keyword arguments of both layers.
    """
    ours, theirs, options = table[kind]
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    layer = ours(*sizes, **options, **arguments)
    torch.manual_seed(seed)
    return layer, theirs(*sizes, **options, **arguments)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of a nested value."""
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from tensors(part)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Compare nested tensors. Errors are relative to the largest magnitude of each expected tensor."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            scale, error = max(max_abs(b), 1e-30), max_abs(a.detach().double() - b.detach().double())
            assert error <= tolerance * scale, f"{what} {error:.3e} > {tolerance:.0e} × {scale:.3e}".strip()


def assert_close_within_rounding(
    actual: list[Tensor],
    expected: list[Tensor],
    recompute: Callable[[], list[Tensor]],
    leaves: list[Tensor],
    scale: float = 1e-30,
    exact: Callable[[], list[Tensor]] | None = None,
) -> None:
    """Compare tensors with a tolerance that depends on their dtype and their conditioning.

    Errors are relative to a tensor's largest magnitude. If terms cancel, a result is small compared with the
    terms, and its last digits consist of their rounding errors. Therefore errors may also be up to 20 times
    the change of the expected tensors when the leaves change by some units in the last place, or 20 times
    their error compared with ``exact``.

    Args:
        actual: The tensors to check.
        expected: The expected tensors.
        recompute: Computes the expected tensors again from the leaves.
        leaves: The tensors that the expected ones are computed from. They are changed temporarily.
        scale: Minimum magnitude that errors are relative to, for results whose terms are larger.
        exact: Computes the expected tensors in higher precision.
    """
    pairs = list(zip(actual, expected, strict=True))
    assert all(a.shape == b.shape and a.dtype is b.dtype for a, b in pairs)
    errors = [max_abs(a - b) for a, b in pairs]
    tolerances = [TOLERANCE[b.dtype] * max(max_abs(b), scale) for _, b in pairs]
    if all(error <= tolerance for error, tolerance in zip(errors, tolerances, strict=True)):
        return
    originals = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        changes = [0.0] * len(expected)
        for _ in range(3):
            for leaf, value in zip(leaves, originals, strict=True):
                leaf.copy_(value * (1 + 4 * torch.finfo(value.dtype).eps * torch.randn_like(value)))
            with torch.enable_grad():
                perturbed = recompute()
            changes = [max(c, max_abs(a - b)) for c, a, b in zip(changes, perturbed, expected, strict=True)]
        for leaf, value in zip(leaves, originals, strict=True):
            leaf.copy_(value)
    if exact is not None:
        changes = [max(c, max_abs(a - b)) for c, a, b in zip(changes, expected, exact(), strict=True)]
    for k, (error, tolerance, change) in enumerate(zip(errors, tolerances, changes, strict=True)):
        message = f"result {k}: {error:.1e} > {tolerance:.1e} + 20 × {change:.1e}"
        assert error <= tolerance + 20 * change, message


def max_abs(value: Tensor) -> float:
    """Return the largest magnitude, 0 for an empty tensor."""
    return float(value.detach().double().abs().max()) if value.numel() else 0.0


def gradients(module: nn.Module, x: Any, state: Any, weights: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a weighted sum of all results, for inputs and parameters."""
    leaves = [leaf for leaf in tensors((x, state)) if leaf.requires_grad]
    parameters = list(module.parameters())
    results = list(tensors(module(x, state)))
    loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    return list(torch.autograd.grad(loss, leaves + parameters))


def values_and_gradients(values: list[Tensor], weights: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return the values, followed by the gradients of their weighted sum. Missing gradients are zeros."""
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [*values, *map(torch.zeros_like, leaves)]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(leaves, gradients, strict=True)
    filled = [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in pairs]
    return [*(value.detach() for value in values), *filled]


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Use this number of threads, even for small inputs."""
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(constants(), "STEP_WORK_FOR_TWO_THREADS", 1)
        patch.setitem(constants(), "CALL_WORK_FOR_TWO_THREADS", 1)
        try:
            yield
        finally:
            torch.set_num_threads(previous)


def results_of_engines(layer: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights of a layer's results, and results and gradients on the reference and native engine."""
    leaves = [x, *layer.parameters()]
    with ur.engine("reference"):
        weights = [torch.randn_like(value) for value in tensors(layer(x))]
        expected = values_and_gradients(list(tensors(layer(x))), weights, leaves)
    with ur.engine("native"):
        return weights, expected, values_and_gradients(list(tensors(layer(x))), weights, leaves)
