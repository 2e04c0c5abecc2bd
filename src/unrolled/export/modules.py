"""Turn a layer, or a model that contains layers, into a program.

A model is traced with torch.fx. Each of its values has three axes: time, batch and features. Which axis is
which shows when a module needs it: a layer says where time and batch are, a convolution where features are.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from unrolled.export.builder import Builder
from unrolled.export.errors import ExportError
from unrolled.export.graph import GraphReader
from unrolled.export.program import Program, largest
from unrolled.layers.convert import convert
from unrolled.layers.module import CellModule
from unrolled.layers.recurrent import Recurrent


def read_module(module: nn.Module) -> tuple[Program, Tensor, Tensor]:
    """Return a module as a program, and a sequence with its output to test the program with.

    Args:
        module: A layer, or a model. It isn't changed.

    Returns:
        The program; an input, ``(time, features)``, or ``(time,)`` whole numbers for an embedding; and the
        module's own output for it, ``(time, features)``.

    Raises:
        TypeError: If ``module`` isn't a torch module.
        ExportError: If it can't be exported.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"export.c expects a torch.nn.Module, got {type(module).__name__}")
    _check_tensors(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what can't be converted is refused below, by name
        model: nn.Module = convert(copy.deepcopy(module)).eval()
    builder = Builder()
    if isinstance(model, Recurrent):
        model = _Output(model)
    elif not isinstance(model, (nn.Sequential, _Output)) and _is_leaf(model):
        model = nn.Sequential(model)
    reader = GraphReader(builder, model, _trace(model))
    source, result = reader.read()
    if not any(stage.has_state for stage in builder.stages):
        raise ExportError(
            f"{type(module).__name__} contains no recurrent layer and no convolution, so it has no state"
        )
    program = Program(source, builder.value("output", result), builder.stages, builder.lookup)
    x, expected = _example(program, reader)
    _check_same(type(module).__name__, program, x, expected)
    return program, x, expected


class _Output(nn.Module):
    """A layer that returns only its output."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)[0]


class _Tracer(fx.Tracer):
    record_stack_traces = True  # for the lines in errors

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (CellModule, nn.RNNBase, nn.RNNCellBase)) or (
        type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    )


def _trace(model: nn.Module) -> fx.Graph:
    parameters = list(inspect.signature(model.forward).parameters.values())
    required = [one for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    if len(required) != 1:
        raise ExportError(
            f"{type(model).__name__}.forward takes {len(required)} inputs, and C code has one: x of each step"
        )
    constants = {one.name: one.default for one in parameters if one is not required[0]}
    try:
        return _Tracer().trace(model, constants or None)
    except Exception as error:  # the forward of a model is arbitrary Python code
        raise ExportError(
            f"torch.fx can't trace {type(model).__name__} ({_first_sentence(error)}); write its "
            "forward without branches on values"
        ) from error


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]


def _check_tensors(module: nn.Module) -> None:
    """Check that all parameters are float32 numbers on the CPU."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ExportError(f"the size of {name} isn't known yet: call the module once before exporting it")
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue
        if tensor.dtype is not torch.float32:
            raise ExportError(
                f"{name} has dtype {tensor.dtype}, and C code computes in float32: call module.float() first"
            )
        if not tensor.is_cpu:
            raise ExportError(f"{name} is on {tensor.device}: call module.cpu() first")
        if not tensor.isfinite().all():
            raise ExportError(f"{name} contains NaN or infinity")


def _example(program: Program, reader: GraphReader) -> tuple[Tensor, Tensor]:
    """Return a sequence, and the output of the model for it."""
    steps, generator = 8, torch.Generator().manual_seed(0)
    if program.lookup is None:
        x = torch.randn(steps, program.input.width, generator=generator)
    else:
        x = torch.randint(len(program.lookup.table), (steps,), generator=generator)
    with torch.no_grad():
        return x, reader.run(x)


def _check_same(name: str, program: Program, x: Tensor, expected: Tensor) -> None:
    """Check that the stages compute what the model computes."""
    result, tolerance = program.run(x), program.tolerance * largest(expected)
    same = result.shape == expected.shape
    if not same or not torch.allclose(result, expected, rtol=0, atol=tolerance, equal_nan=True):
        raise ExportError(
            f"{name} doesn't give the same numbers one time step at a time: does it mix "
            "time steps outside of its layers and causal convolutions?"
        )
