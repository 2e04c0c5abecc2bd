"""torch.nn's recurrent layers and cells beside ours, and how two results are compared."""

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
from unrolled.engines.native import kernel
from unrolled.engines.native.toolchain.compiler import NoCompilerError, compilers

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


def lack() -> str:
    """Why nothing can be compiled here, in the words of the engine; empty where it can."""
    try:
        next(compilers())
    except NoCompilerError as error:
        return str(error)
    return ""


LACK = lack()
NEEDS_COMPILER = pytest.mark.skipif(bool(LACK), reason=LACK)
# Without CXX, which some tests take away: they look at what else decides.
NEEDS_SYSTEMS_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None, reason="there is no program c++ here"
)
# As an argument of -W: what the engine says once where nothing can be compiled, and there alone.
QUIET = "ignore:recurrent layers run on the reference engine" if LACK else "error"


class OddCell(ur.Cell):
    """Functions of every kind: of elements, of rows, with constants, changed in place, without a name."""

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
    """Ours and torch.nn's, drawn with the same seed."""
    made, theirs, special = table[kind]
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    first = made(*sizes, **special, **arguments)
    torch.manual_seed(seed)
    return first, theirs(*sizes, **special, **arguments)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of an output and its states."""
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from tensors(part)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Every tensor within ``tolerance`` times the largest magnitude of what is expected."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            scale, error = max(largest(b), 1e-30), largest(a.detach().double() - b.detach().double())
            assert error <= tolerance * scale, f"{what} {error:.3e} > {tolerance:.0e} × {scale:.3e}".strip()


def assert_as_near(
    actual: list[Tensor],
    expected: list[Tensor],
    again: Callable[[], list[Tensor]],
    leaves: list[Tensor],
    terms: float = 1e-30,
    exact: Callable[[], list[Tensor]] | None = None,
) -> None:
    """Every tensor as close as its dtype and its own condition allow.

    Errors are taken beside a tensor's largest magnitude, or ``terms``: the size of what is summed up inside.

    Where terms cancel, a result is small beside what it is summed up from, and its last digits are the terms'
    rounding. So an error may also be some times what ``again``, which makes the expected tensors, changes by
    when the leaves that they are made from change by some units in the last place; or what ``expected`` is
    itself away from ``exact``, where what the terms are rounded to hides such changes.
    """
    pairs = list(zip(actual, expected, strict=True))
    assert all(a.shape == b.shape and a.dtype is b.dtype for a, b in pairs)
    errors = [largest(a - b) for a, b in pairs]
    allowed = [TOLERANCE[b.dtype] * max(largest(b), terms) for _, b in pairs]
    if all(error <= most for error, most in zip(errors, allowed, strict=True)):
        return
    kept = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        moved = [0.0] * len(expected)
        for _ in range(3):
            for leaf, value in zip(leaves, kept, strict=True):
                leaf.copy_(value * (1 + 4 * torch.finfo(value.dtype).eps * torch.randn_like(value)))
            with torch.enable_grad():
                found = again()
            moved = [max(m, largest(a - b)) for m, a, b in zip(moved, found, expected, strict=True)]
        for leaf, value in zip(leaves, kept, strict=True):
            leaf.copy_(value)
    if exact is not None:
        moved = [max(m, largest(a - b)) for m, a, b in zip(moved, expected, exact(), strict=True)]
    for k, (error, most, noise) in enumerate(zip(errors, allowed, moved, strict=True)):
        assert error <= most + 20 * noise, f"result {k}: {error:.1e} > {most:.1e} + 20 × {noise:.1e}"


def largest(value: Tensor) -> float:
    """The largest magnitude."""
    return float(value.detach().double().abs().max()) if value.numel() else 0.0


def gradients(module: nn.Module, x: Any, state: Any, weights: list[Tensor]) -> list[Tensor]:
    """Run, weigh every output with fixed random numbers, and return every gradient."""
    leaves = [leaf for leaf in tensors((x, state)) if leaf.requires_grad]
    parameters = list(module.parameters())
    results = list(tensors(module(x, state)))
    loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    return list(torch.autograd.grad(loss, leaves + parameters))


def with_gradients(values: list[Tensor], weights: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Values, and every gradient of their weighted sum: zeros where there is none."""
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [*values, *map(torch.zeros_like, leaves)]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    zipped = zip(leaves, found, strict=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zipped]
    return [*(value.detach() for value in values), *grads]


@contextmanager
def team(threads: int) -> Iterator[None]:
    """So many threads, for the smallest work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_WORTH", 0)
        patch.setattr(kernel, "_WORTH_APART", 0)
        try:
            yield
        finally:
            torch.set_num_threads(before)
