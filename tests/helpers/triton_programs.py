"""What tests run in processes of their own with Triton: in its interpreter, or its compiler without a GPU."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any
from unittest import mock

import torch

import unrolled as ur
from unrolled.engines import backends
from unrolled.engines.gpu.backend import BACKEND, GpuBackend
from unrolled.engines.gpu.kernel_source import KernelSpec
from unrolled.engines.gpu.runtime import TritonRuntime
from unrolled.engines.gpu.tuning import ROWS


class InterpreterRuntime(TritonRuntime):
    """Runs kernels on the CPU, in Triton's interpreter."""

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def is_capturing(self) -> bool:
        return False


def results(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of a layer."""
    output, state = layer(x)
    final = state if isinstance(state, tuple) else (state,)
    loss = output.sin().sum() + sum(part.cos().sum() for part in final)
    return [output.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


def interpret(names: list[str], streamed: bool) -> dict[str, float]:
    """Return how far kernels of cells in Triton's interpreter differ at most from the reference engine."""
    return {name: _interpret(name, streamed) for name in names}


def _interpret(name: str, streamed: bool) -> float:
    torch.manual_seed(1)
    layer = ur.Recurrent(getattr(ur.cells, name), 3, 20 if streamed else 5, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    with ur.engine("reference"):
        expected = results(layer, x)
    backend = GpuBackend(InterpreterRuntime())
    if streamed:
        generate = backend.generate

        def generate_streamed(*args: Any) -> Any:
            generated = generate(*args)
            generated.specs = generated.specs[-1:]
            return generated

        backend.generate = generate_streamed  # type: ignore[method-assign]
    with mock.patch.dict(backends._BY_DEVICE_TYPE, cpu=backend), ur.engine("native"):
        actual = results(layer, x)
    return max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))


def compile_for(spec: KernelSpec, dtype: torch.dtype, capability: int) -> dict[str, Any]:
    """Compile a kernel for a device that needn't be there, and return what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = TritonRuntime().load(spec.source)
    precision = "ieee" if dtype is torch.float64 else "tf32"
    constants = {"REVERSE": False, "SHIFT": 0, "PRECISION": precision, "ROWS": ROWS}
    constants |= {"starts": None, "lengths": None}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("steps", "batch"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp64" if dtype is torch.float64 else "*fp32"
            attributes[(position,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": spec.warps, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": kernel.metadata.shared, "products": kernel.asm["ptx"].count("mma")}


def compile_cells(cells: list[tuple[str, int]], dtype: str, capability: int) -> list[list[dict[str, Any]]]:
    """Compile the kernels of cells that would be tried first: inference, training and backward."""
    loop_dtype, device, kernels = getattr(torch, dtype), torch.device("cuda", 0), []
    for name, hidden in cells:
        compiled: Any = BACKEND.compile(getattr(ur.cells, name)(hidden, hidden), loop_dtype, device)
        loops = (compiled.inference, compiled.training, compiled.backward)
        kernels.append([compile_for(loop.specs[0], loop_dtype, capability) for loop in loops])
    return kernels


if __name__ == "__main__":
    action, *arguments = json.loads(sys.argv[1])
    print(json.dumps({"interpret": interpret, "compile": compile_cells}[action](*arguments)))
