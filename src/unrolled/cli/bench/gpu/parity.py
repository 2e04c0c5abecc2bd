"""Compare the kernels of a cell with the reference engine in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import unrolled
from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.cli.bench.gpu.custom import COMPARED, COMPARED_BY_STRATEGY
from unrolled.engines import backends
from unrolled.engines.gpu.backend import GpuBackend
from unrolled.layers.recurrent import Recurrent

SHAPE = (6, 19, 5)  # steps, batch (two tiles of rows), input size
HIDDEN = 24  # with padding in each tile of columns
CELLS = tuple(
    name
    for name in cells.__all__
    if isinstance(getattr(cells, name), type) and issubclass(getattr(cells, name), Cell)
)
_DTYPES = ("float64", "bfloat16", "float16")

# The largest accepted difference of a result, relative to its largest value. In float32, torch rounds the
# factors of products to TF32 numbers, whose spacing near 1 is 2⁻¹⁰, unless it computes them exactly.
_TF32 = 2.0**-10
_ROUNDINGS = 16
TOLERANCES = {
    "float64": 1e-11,
    "float32": 1e-4,
    "tf32": _ROUNDINGS * _TF32,
    "float16": _ROUNDINGS * 2.0**-10,
    "bfloat16": _ROUNDINGS * 2.0**-7,
}


@dataclass(frozen=True)
class ParityTask:
    """A cell whose kernels are compared.

    Attributes:
        cell: Its name in ``unrolled.cells``.
        kind: A key of :data:`TOLERANCES`: the dtype, or ``"tf32"`` for float32 with TF32 products.
        strategy: The strategy of the kernels. If empty, the default one.
        hidden: Its hidden size.
    """

    cell: str
    kind: str
    strategy: str = ""
    hidden: int = HIDDEN

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        dtype: torch.dtype = getattr(torch, "float32" if self.kind == "tf32" else self.kind)
        return dtype


def tasks() -> list[ParityTask]:
    """Return all tasks: every cell in float32, and some in the other dtypes and strategies."""
    chosen = [ParityTask(cell, kind) for kind in ("tf32", *_DTYPES) for cell in COMPARED]
    strategies = [
        ParityTask(cell, "float32", strategy)
        for strategy, names in COMPARED_BY_STRATEGY.items()
        for cell in names
    ]
    wide = [ParityTask(cell, kind, hidden=200) for kind in ("float32", "bfloat16") for cell in COMPARED]
    return [*(ParityTask(cell, "float32") for cell in CELLS), *strategies, *chosen, *wide]


def compare(task: ParityTask, device: torch.device) -> float:
    """Return the largest difference between the kernels' results and those of the reference engine.

    The layer is bidirectional. Its results are the output, the final states, and the gradients of the input
    and of all parameters. The difference is relative to the largest value of each result.

    Raises:
        RuntimeError: If a kernel can't run.
    """
    torch.manual_seed(0)
    layer = Recurrent(getattr(cells, task.cell), SHAPE[-1], task.hidden, bidirectional=True)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.4, 0.4)
    layer, x = layer.to(task.dtype), torch.randn(SHAPE).to(task.dtype)
    with unrolled.engine("reference"):
        expected = _results(layer.double(), x.double())
    layer = layer.to(task.dtype).to(device)
    with (
        _strategy(task.strategy, device),
        products_in("tf32" if task.kind == "tf32" else "ieee"),
        unrolled.engine("native"),
    ):
        actual = _results(layer, x.to(device))
    return max(_difference(a, b) for a, b in zip(actual, expected, strict=True))


def _results(layer: Any, x: Tensor) -> list[Tensor]:
    """Return the results of a layer, and the gradients of a sum in which each element has its own weight."""
    x = x.clone().requires_grad_()
    output, state = layer(x)
    values = [output, *(state if isinstance(state, tuple) else (state,))]
    weights = [torch.linspace(-1, 1.5, v.numel()).view(v.shape).to(v) for v in values]
    grads = torch.autograd.grad(values, [x, *layer.parameters()], weights, allow_unused=True)
    with torch.no_grad():
        values.append(layer(x)[0])
    return [*(value.detach() for value in values), *(grad for grad in grads if grad is not None)]


def _difference(actual: Tensor, expected: Tensor) -> float:
    actual = actual.detach().cpu().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


@contextlib.contextmanager
def _strategy(name: str, device: torch.device) -> Iterator[None]:
    """Run only kernels of one strategy, if a name is given."""
    if not name:
        yield
        return
    backend: Any = backends.backend_for(device)
    with backends.replaced(device.type, GpuBackend(backend.runtime, name)):
        yield


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Compute products of float32 matrices in a precision: ``"ieee"`` or ``"tf32"``."""
    settings: Sequence[Any] = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [one.fp32_precision for one in settings]
    for one in settings:
        one.fp32_precision = precision
    try:
        yield
    finally:
        for one, value in zip(settings, before, strict=True):
            one.fp32_precision = value
