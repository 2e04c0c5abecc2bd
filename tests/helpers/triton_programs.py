"""What tests run in processes of their own with Triton: in its interpreter, or its compiler without a GPU."""

from __future__ import annotations

import contextlib
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import unrolled as ur
from unrolled.engines import backends
from unrolled.engines.gpu.backend import GpuBackend
from unrolled.engines.gpu.runtime import TritonRuntime


class InterpreterRuntime(TritonRuntime):
    """Runs kernels on the CPU, in Triton's interpreter."""

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def is_capturing(self) -> bool:
        return False

    def multiprocessors(self, device: torch.device) -> int:
        return 1  # the interpreter runs one program after another


def results(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of a layer."""
    output, state = layer(x)
    final = state if isinstance(state, tuple) else (state,)
    loss = output.sin().sum() + sum(part.cos().sum() for part in final)
    return [output.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


def interpret(names: list[str], strategy: str) -> dict[str, float]:
    """Return how far kernels of cells in Triton's interpreter differ at most from the reference engine.

    Cells that have no such kernels are left out.
    """
    differences = {}
    for name in names:
        try:
            differences[name] = _interpret(name, strategy)
        except RuntimeError as error:
            if "none of its kernels has the strategy" not in str(error):
                raise
    return differences


def _interpret(name: str, strategy: str) -> float:
    torch.manual_seed(1)
    hidden = 5 if strategy == "registers" else 20
    layer = ur.Recurrent(getattr(ur.cells, name), 3, hidden, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    with ur.engine("reference"):
        expected = results(layer, x)
    with backends.replaced("cpu", GpuBackend(InterpreterRuntime(), strategy)), ur.engine("native"):
        actual = results(layer, x)
    return max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))


def compile_cells(cells: list[tuple[str, int]], dtype: str, capability: int) -> list[list[dict[str, Any]]]:
    """Compile the kernels of cells that would be tried first: inference, training and backward."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    table, kernels = import_module("gpu_kernels"), []
    for name, hidden in cells:
        specs = table.specs_of(name, hidden, getattr(torch, dtype)).values()
        kernels.append([table.compile_for(spec, getattr(torch, dtype), capability) for spec in specs])
    return kernels


if __name__ == "__main__":
    action, *arguments = json.loads(sys.argv[1])
    print(json.dumps({"interpret": interpret, "compile": compile_cells}[action](*arguments)))
