"""The compiled loops as one differentiable function of torch: one direction of a layer, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from unrolled.cells.base import Cell
from unrolled.engines import reference
from unrolled.engines.compiler.batch_layout import Layout, ShiftedState
from unrolled.engines.compiler.ir import per_row
from unrolled.engines.native.bulk_ops import Values
from unrolled.engines.native.compiled_cell import CompiledCell
from unrolled.engines.native.kernel import launch

States = tuple[Tensor, ...]

has_storage = torch._C._has_storage
keep_graph = torch._C._autograd._get_current_graph_task_keep_graph


@dataclass(frozen=True)
class DirectionSpec:
    """A cell that runs over a sequence in one direction, without its tensors.

    Attributes:
        compiled: its loops.
        cell: bound to its parameters.
        stateful: whether initial states are given; else they are zeros.
        back: from the last step to the first.
    """

    compiled: CompiledCell
    cell: Cell
    stateful: bool
    back: bool

    @property
    def states(self) -> int:
        """How many initial states are given."""
        return len(self.cell.state) if self.stateful else 0

    @property
    def columns(self) -> int:
        """How many tensors it takes of columns beside x, that variants read: one or none."""
        return int(self.cell.features > self.cell.input)

    @property
    def tensors(self) -> int:
        """How many tensors it takes: initial states, parameters, columns beside x."""
        return self.states + len(self.cell.shapes()) + self.columns


def threads_of(lanes: Sequence[object]) -> int:
    """For each of the lanes: two that run at the same time have one each."""
    threads = torch.get_num_threads()
    return 1 if len(lanes) == 2 and threads == 2 else threads


def split_by_direction(
    kinds: Sequence[DirectionSpec], tensors: Sequence[Tensor]
) -> list[tuple[States | None, list[Tensor]]]:
    """The initial states of each lane; and its parameters, with the columns beside x after them."""
    split_by_direction, at = [], 0
    for kind in kinds:
        mine = tensors[at : at + kind.tensors]
        at += kind.tensors
        states = tuple(mine[: kind.states]) if kind.stateful else None
        split_by_direction.append((states, list(mine[kind.states :])))
    return split_by_direction


def group_by_direction(
    flat: Sequence[Any], lanes: Sequence[DirectionSpec]
) -> list[tuple[Any, tuple[Any, ...]]]:
    """The output and the final states of each lane, or their gradients."""
    found, at = [], 0
    for lane in lanes:
        count = len(lane.cell.state)
        found.append((flat[at], tuple(flat[at + 1 : at + 1 + count])))
        at += 1 + count
    return found


class Recurrence(torch.autograd.Function):
    """The lanes as one function of x and of their initial states and parameters."""

    @staticmethod
    def forward(
        ctx: Any, kinds: tuple[DirectionSpec, ...], sizes: list[int] | None, x: Tensor, *tensors: Tensor
    ) -> Any:
        """The output and the final states of each lane, one after another."""
        layout = Layout.of(x, sizes)
        ctx.set_materialize_grads(False)  # of states that nothing reads
        made = forward(kinds, layout, x, tensors)
        results: list[Tensor] = []
        versions = []
        for kept, final, _ in made:
            output = kept[0]
            results += (output, *final)
            versions.append(output._version)
            kept[0] = output.detach()  # the output itself would hold what holds it
        reads = [(kept, values) for kept, _, values in made]
        saved: list[Any] = []
        structure = None
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            saved, structure = tree_flatten(reads)  # to be kept elsewhere, or made anew
        ctx.save_for_backward(x, *tensors, *saved)
        ctx.made = (kinds, sizes, layout, len(tensors), structure or reads, versions)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradients of x and of the tensors."""
        kinds, sizes, layout, count, made, versions = ctx.made
        x, *tensors = ctx.saved_tensors
        tensors, saved = tensors[:count], tensors[count:]
        if isinstance(made, TreeSpec):
            made = tree_unflatten(saved, made)
            versions = [kept[0]._version for kept, _ in made]  # which torch has checked
        if not keep_graph():  # nothing is read again: not to stay as long as a loss that is kept
            ctx.made = None
        if by_reference(grads):
            return None, None, *reference_gradients(kinds, sizes, x, tensors, grads)
        if any(kept[0]._version != version for (kept, _), version in zip(made, versions, strict=True)):
            made = [(kept, values) for kept, _, values in forward(kinds, layout, x, tensors)]
        return None, None, *gradients(kinds, layout, x, tensors, made, grads)


def by_reference(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward is the reference engine's: its gradients are wanted too, or many come at once."""
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return not all(grad is None or has_storage(grad) for grad in grads)  # of is_grads_batched=True


def forward(
    kinds: Sequence[DirectionSpec], layout: Layout, x: Tensor, tensors: Sequence[Tensor]
) -> list[Any]:
    """For each lane its states after every step, its final states, and the values that the backward reads."""
    jobs, made, threads = [], [], threads_of(kinds)
    for kind, (states, params) in zip(kinds, split_by_direction(kinds, tensors), strict=True):
        states = None if states is None else tuple(part.contiguous() for part in states)
        job, kept, final, values = kind.compiled.forward(
            params, x, states, layout, kind.back, threads, keep=True
        )
        jobs.append(job)
        made.append((kept, final, kind.compiled.read_back(values)))
    if layout.rows:
        launch(jobs)
    return made


def gradients(
    kinds: Sequence[DirectionSpec],
    layout: Layout,
    x: Tensor,
    tensors: Sequence[Tensor],
    made: Sequence[tuple[list[Tensor | None], Values]],
    grads: Sequence[Tensor | None],
    groups: int = 1,
) -> list[Tensor | None]:
    """The gradients of x and of the tensors.

    Args:
        kinds: the lanes.
        layout: of the rows of x.
        x: the input.
        tensors: the initial states, parameters and columns beside x of every lane.
        made: for each lane the states after every step and the values that it gives.
        grads: the gradients of outputs and final states, lane by lane; None: zeros.
        groups: above 1, those of parameters for each of so many groups of rows: a first axis of them.
    """
    jobs, ends = [], []
    threads = threads_of(kinds)
    for kind, (states, params), (kept, values), (grad, last) in zip(
        kinds, split_by_direction(kinds, tensors), made, group_by_direction(grads, kinds), strict=True
    ):
        states = None if states is None else tuple(part.contiguous() for part in states)
        if grad is None:
            grad = x.new_zeros(*x.shape[:-1], kind.compiled.widths[0])
        last = tuple([None if part is None else part.contiguous() for part in last])
        job, final, found = kind.compiled.back(
            values, params, x, states, kept, grad, last, layout, kind.back, threads
        )
        jobs.append(job)
        ends.append((final, found))
    if layout.rows:
        launch(jobs)
    jobs.clear()  # they hold what the gradients don't need
    of_x: Tensor | None = None
    results: list[Tensor | None] = []
    for kind, (final, found) in zip(kinds, ends, strict=True):
        if groups == 1:
            of_params, grad_x = kind.compiled.gradients(found, layout.rows)
        else:
            of_params, grad_x = _of_groups(kind.compiled, found, layout, groups)
        results += (*(final if kind.stateful else ()), *of_params, *[None] * kind.columns)
        if grad_x is not None:
            of_x = grad_x if of_x is None else of_x.add_(grad_x)
    return [None if of_x is None else of_x.view(x.shape), *results]


def _of_groups(
    compiled: CompiledCell, values: Values, layout: Layout, groups: int
) -> tuple[list[Tensor | None], Tensor | None]:
    """As :meth:`Compiled.gradients`, those of parameters for each group of rows."""
    size = layout.batch // groups
    each: list[list[Tensor | None]] = []
    of_x: list[Tensor] = []
    for k in range(groups):
        rows = slice(k * size, (k + 1) * size)
        mine = {n: _of_rows(value, layout, rows) if per_row(n) else value for n, value in values.items()}
        params, grad_x = compiled.gradients(mine, layout.steps * size)
        each.append(params)
        if grad_x is not None:
            of_x.append(grad_x.view(layout.steps, size, -1))
    found = [[part for part in parts if part is not None] for parts in zip(*each, strict=True)]
    return [torch.stack(parts) if parts else None for parts in found], torch.cat(of_x, 1) if of_x else None


def _of_rows(value: Any, layout: Layout, rows: slice) -> Any:
    """Of a value that has every row of every step, some rows of the batch."""
    if isinstance(value, ShiftedState):
        initial = None if value.initial is None else value.initial[rows].contiguous()
        return ShiftedState(_of_rows(value.state, layout, rows), initial, rows.stop - rows.start, value.back)
    steps = value.view(layout.steps, layout.batch, value.shape[-1])[:, rows]
    return (steps if value.dim() == 3 else steps.flatten(0, 1)).contiguous()


def reference_gradients(
    kinds: Sequence[DirectionSpec],
    sizes: list[int] | None,
    x: Tensor,
    tensors: list[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients by the reference engine, which can be differentiated again."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs: list[Tensor] = []
        for kind, (states, params) in zip(kinds, split_by_direction(kinds, tensors), strict=True):
            bound = kind.cell.bind(dict(zip(kind.cell.shapes(), params, strict=False)))
            joined = torch.cat((x, params[-1]), -1) if kind.columns else x
            output, final = reference.run(bound, joined, states, sizes, kind.back)
            outputs += (output, *final)
    inputs = [tensor for tensor in (x, *tensors) if tensor.requires_grad]
    read = [output for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    given = [grad for grad in grads if grad is not None]
    found = iter(torch.autograd.grad(read, inputs, given, create_graph=twice, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in (x, *tensors)]
