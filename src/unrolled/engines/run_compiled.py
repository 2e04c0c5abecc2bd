"""Calls of the native engine: one or two directions of a layer, with their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines import registry
from unrolled.engines.autograd import Recurrence
from unrolled.engines.checkpointing import CheckpointedRecurrence
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.directions import DirectionSpec, States, group_by_direction, threads_per_direction


@dataclass
class DirectionCall:
    """A cell that runs over a sequence in one direction.

    Attributes:
        compiled: The compiled loops of the cell.
        cell: The cell, bound to its parameters.
        params: The parameters in order, each contiguous, followed by the extra inputs that wrappers read.
        state: Initial states, each of shape ``(batch, size)``. Zeros if None.
        reverse: Whether it runs from the last time step to the first.
    """

    compiled: CompiledCell
    cell: Cell
    params: list[Tensor]
    state: States | None
    reverse: bool


def run_directions(
    directions: Sequence[DirectionCall], x: Tensor, sizes: list[int] | None, checkpoint: int | None = None
) -> list[tuple[Tensor, States]]:
    """Return the output and the final states of each direction; see :func:`unrolled.engines.dispatch.run`.

    If the loops take another dtype, the input is converted before, and the results after: on CPUs, bfloat16
    becomes float32, and everywhere, a float32 step that uses float64 values is computed in float64.
    """
    dtype, loop_dtype = x.dtype, directions[0].compiled.dtype
    if dtype is not loop_dtype:
        x, directions = x.to(loop_dtype), [_converted(direction) for direction in directions]
    tensors: list[Tensor] = []
    for direction in directions:
        tensors += (*(direction.state or ()), *direction.params)
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors)):
        for direction in directions:
            direction.compiled.prepare_training()
        specs = tuple(
            DirectionSpec(direction.compiled, direction.cell, direction.state is not None, direction.reverse)
            for direction in directions
        )
        if checkpoint is not None and checkpoint < len(x):
            flat: Any = CheckpointedRecurrence.apply(  # type: ignore[no-untyped-call]
                specs, checkpoint, x, *tensors
            )
        else:
            flat = Recurrence.apply(specs, sizes, x, *tensors)  # type: ignore[no-untyped-call]
        results = group_by_direction(flat, specs)
    else:
        results = infer(directions, x, Layout.of(x, sizes))
    if dtype is not loop_dtype:
        return [(output.to(dtype), tuple(part.to(dtype) for part in final)) for output, final in results]
    return results


def _converted(direction: DirectionCall) -> DirectionCall:
    """Return a direction with its tensors in the dtype that its loops take."""
    dtype = direction.compiled.dtype
    params = [param.to(dtype) for param in direction.params]
    state = None if direction.state is None else tuple(part.to(dtype) for part in direction.state)
    cell = direction.cell.bind(dict(zip(direction.cell.shapes(), params, strict=False)))
    return DirectionCall(direction.compiled, cell, params, state, direction.reverse)


def infer(directions: Sequence[DirectionCall], x: Tensor, layout: Layout) -> list[tuple[Tensor, States]]:
    """Return the output and the final states of each direction, saving nothing for a backward pass."""
    calls, results = [], list[tuple[Tensor, States]]()
    threads = threads_per_direction(directions)
    for direction in directions:
        state = None if direction.state is None else tuple(part.contiguous() for part in direction.state)
        call, output, final = direction.compiled.inference_call(
            direction.params, x, state, layout, direction.reverse, threads
        )
        calls.append(call)
        results.append((output, final))
    if layout.rows:
        directions[0].compiled.backend.launch(calls)
    return results


def run(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[tuple[Tensor, ...] | None],
    sizes: list[int] | None,
    checkpoint: int | None = None,
    extra_inputs: Tensor | None = None,
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Run bound cells over a sequence, the first forward, a second in reverse; see :func:`dispatch.run`.

    Raises:
        UnsupportedError: If the compiler doesn't support a step.
        UnavailableError: If there is no C++ compiler.
    """
    directions = []
    for cell, state, reverse in zip(cells, states, (False, True), strict=False):
        attributes = cell.__dict__
        params = [attributes[name] for name in cell.shapes()]
        params += [] if extra_inputs is None else [extra_inputs]
        params = [param if param.is_contiguous() else param.contiguous() for param in params]
        compiled = registry.compiled(cell, x.dtype, x.device)
        directions.append(DirectionCall(compiled, cell, params, state, reverse))
    return run_directions(directions, x, sizes, checkpoint)
