"""Cells whose captured steps are stored in a folder, and processes that read them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unrolled as ur
from helpers import processes
from unrolled.engines import registry
from unrolled.engines.compiler.capture import CapturedStep, capture
from unrolled.engines.compiler.compiled_cell import CompiledCell

# A program that runs cells and prints digests of their outputs and gradients, and what it has imported.
PRINT_DIGESTS = """
import sys, hashlib, json, pathlib, torch
imported_with_torch = set(sys.modules)
import unrolled as ur
from unrolled.engines.compiler import compiled_cell
from unrolled.engines.native.toolchain import kept_files
kept_files._folder = lambda: pathlib.Path({folder!r})
captured, original = [], compiled_cell.capture
def capture(cell, *arguments, **options):
    captured.append(type(cell).__name__)
    return original(cell, *arguments, **options)
compiled_cell.capture = capture
for name in {names}:
    torch.manual_seed(3)
    layer = ur.Recurrent(getattr(ur.cells, name), 5, 7)
    x = torch.randn(4, 3, 5, requires_grad=True)
    for _ in range(3):  # the second call makes a call plan, and the third one runs it
        output, state = layer(x)
    gradients = torch.autograd.grad((output * torch.randn_like(output)).sum(), [x, *layer.parameters()])
    tensors = [output, *gradients]
    content = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
    print(name, hashlib.sha256(content).hexdigest())
late = {{"torch._dynamo", "torch.fx.experimental.proxy_tensor", "sympy"}}
print(json.dumps([captured, sorted(late & set(sys.modules) - imported_with_torch)]))
"""


class Plain(ur.Cell):
    """A small cell of the user."""

    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")
    gain: float = 1.0

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.gain * (x @ self.w.T + h @ self.u.T))


def define(
    body: str, *, before: str = "", module: str = "cells_of_a_test", members: str = ""
) -> type[ur.Cell]:
    """Define a cell by running code that has no source file, as a notebook does.

    Args:
        body: The new state, an expression of ``z``.
        before: Code before the class.
        module: The name of the module.
        members: Code in the class.
    """
    scope: dict[str, Any] = {"__name__": module}
    code = f"""
import torch, unrolled as ur
{textwrap.dedent(before)}
class Own(ur.Cell):
    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")
{textwrap.indent(textwrap.dedent(members), "    ")}
    def step(self, x, h):
        z = x @ self.w.T + h @ self.u.T
        return {body}
"""
    sys.modules[module] = types.ModuleType(module)
    exec(code, scope)
    cls: type[ur.Cell] = scope["Own"]
    return cls


def new_process() -> None:
    """Forget all compiled cells."""
    registry._cells.clear()


def fresh_layer(cell: type[ur.Cell]) -> ur.Recurrent:
    """Return a layer as a new process would create it."""
    new_process()
    torch.manual_seed(5)
    return ur.Recurrent(cell, 2, 3)


def compile_cell(cell: ur.Cell) -> CompiledCell:
    """Compile a cell as a new process would."""
    new_process()
    vars(cell.innermost)["_engine_cache"].clear()
    return registry.compiled(cell, torch.float32)


@functools.cache
def captured_plain_step() -> CapturedStep:
    """Return the captured step of ``Plain(2, 3)``."""
    return capture(Plain(2, 3), torch.float32)


def results(layer: ur.Recurrent, engine: str = "native") -> list[Tensor]:
    """Return the output and all gradients of a layer."""
    torch.manual_seed(7)
    x = torch.randn(4, 3, layer.input_size, requires_grad=True)
    with ur.engine(engine):
        output, _ = layer(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    return [output.detach(), *gradients]


def assert_as_by_reference(layer: ur.Recurrent) -> None:
    for actual, expected in zip(results(layer), results(layer, "reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.capture"))


def run_cells(names: tuple[str, ...], folder: Path, warm: bool) -> tuple[list[str], list[list[str]]]:
    """Run cells in a new process, and return the lines that it prints about them, and about itself."""
    code = PRINT_DIGESTS.format(folder=str(folder), names=list(names))
    if warm:  # nothing is imported before
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
    else:
        done = processes.run("-c", code)
    assert done.returncode == 0, done.stderr
    *lines, about = done.stdout.splitlines()
    return lines, json.loads(about)
