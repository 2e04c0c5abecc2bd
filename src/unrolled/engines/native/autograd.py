"""The compiled loops as one differentiable function of torch: one direction of a layer, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cell import Cell
from unrolled.engines import reference
from unrolled.engines.native.layout import Layout
from unrolled.engines.native.loop import execute
from unrolled.engines.native.step import Compiled

States = tuple[Tensor, ...]


@dataclass
class Lane:
    """A cell that runs over a sequence in one direction.

    Attributes:
        compiled: its loops.
        cell: bound to its parameters.
        params: its parameters, in order, next to one another in memory each.
        state: its initial states, each ``(batch, size)``; None: zeros.
        back: from the last step to the first.
    """

    compiled: Compiled
    cell: Cell
    params: list[Tensor]
    state: States | None
    back: bool


def run(lanes: Sequence[Lane], x: Tensor, sizes: list[int] | None) -> list[tuple[Tensor, States]]:
    """The output and the final states of every lane; see :func:`unrolled.engines.reference.run`.

    bfloat16 is computed in float32: it is widened before and narrowed after.
    """
    given = x.dtype
    if given is torch.bfloat16:
        x, lanes = x.float(), [_widened(lane) for lane in lanes]
    tensors: list[Tensor] = []
    for lane in lanes:
        tensors += (*(lane.state or ()), *lane.params)
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors)):
        for lane in lanes:
            lane.compiled.prepare_training()
        apply: Any = _Recurrence.apply
        flat = apply(tuple(_Kind.of(lane) for lane in lanes), sizes, x, *tensors)
        results = _unflattened(flat, lanes)
    else:
        results = _infer(lanes, x, Layout.of(x, sizes))
    if given is torch.bfloat16:
        return [(output.to(given), tuple(part.to(given) for part in final)) for output, final in results]
    return results


def _widened(lane: Lane) -> Lane:
    params = [param.float() for param in lane.params]
    state = None if lane.state is None else tuple(part.float() for part in lane.state)
    cell = lane.cell.bind(dict(zip(lane.cell.shapes(), params, strict=True)))
    return Lane(lane.compiled, cell, params, state, lane.back)


def _threads(lanes: Sequence[object]) -> int:
    """For each of the lanes: two that run at the same time have one each."""
    threads = torch.get_num_threads()
    return 1 if len(lanes) == 2 and threads == 2 else threads


def _infer(lanes: Sequence[Lane], x: Tensor, layout: Layout) -> list[tuple[Tensor, States]]:
    jobs, results, threads = [], list[tuple[Tensor, States]](), _threads(lanes)
    for lane in lanes:
        state = None if lane.state is None else tuple(part.contiguous() for part in lane.state)
        job, output, final = lane.compiled.infer(lane.params, x, state, layout, lane.back, threads)
        jobs.append(job)
        results.append((output, final))
    if layout.rows:
        execute(jobs)
    return results


@dataclass(frozen=True)
class _Kind:
    """A lane without its tensors."""

    compiled: Compiled
    cell: Cell
    stateful: bool
    back: bool

    @classmethod
    def of(cls, lane: Lane) -> _Kind:
        return cls(lane.compiled, lane.cell, lane.state is not None, lane.back)

    @property
    def states(self) -> int:
        return len(self.cell.state) if self.stateful else 0

    @property
    def tensors(self) -> int:
        return self.states + len(self.cell.shapes())


def _dealt(kinds: Sequence[_Kind], tensors: Sequence[Tensor]) -> list[tuple[States | None, list[Tensor]]]:
    """The initial states and the parameters of each lane."""
    dealt, at = [], 0
    for kind in kinds:
        mine = tensors[at : at + kind.tensors]
        at += kind.tensors
        states = tuple(mine[: kind.states]) if kind.stateful else None
        dealt.append((states, list(mine[kind.states :])))
    return dealt


def _unflattened(flat: Sequence[Tensor], lanes: Sequence[Lane | _Kind]) -> list[tuple[Tensor, States]]:
    found, at = [], 0
    for lane in lanes:
        count = len(lane.cell.state)
        found.append((flat[at], tuple(flat[at + 1 : at + 1 + count])))
        at += 1 + count
    return found


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kinds: tuple[_Kind, ...], sizes: list[int] | None, x: Tensor, *tensors: Tensor) -> Any:
        layout = Layout.of(x, sizes)
        ctx.save_for_backward(x, *tensors)
        made = _forward(kinds, layout, x, tensors)
        results: list[Tensor] = []
        outputs = []
        for kept, final, _ in made:
            outputs.append((kept[0].detach(), kept[0]._version))
            results += (kept[0], *final)
        for kept, _, _ in made:
            kept[0] = kept[0].detach()  # the output itself would hold what holds it
        ctx.made = (kinds, sizes, layout, [(kept, values) for kept, _, values in made], outputs)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kinds, sizes, layout, made, outputs = ctx.made
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of these gradients are wanted: the reference has them
            return None, None, *_reference_gradients(kinds, sizes, x, tensors, grads)
        if any(output._version != version for output, version in outputs):  # computed anew
            made = [(kept, values) for kept, _, values in _forward(kinds, layout, x, tensors)]
        jobs, ends = [], []
        threads = _threads(kinds)
        dealt = _dealt(kinds, tensors)
        for kind, (states, params), (kept, values), (grad, last) in zip(
            kinds, dealt, made, _unflattened(grads, kinds), strict=True
        ):
            states = None if states is None else tuple(part.contiguous() for part in states)
            last = tuple(part.contiguous() for part in last)
            job, final, found = kind.compiled.back(
                values, params, x, states, kept, grad, last, layout, kind.back, threads
            )
            jobs.append(job)
            ends.append((final, found))
        if layout.rows:
            execute(jobs)
        of_x: Tensor | None = None
        results: list[Tensor | None] = []
        for kind, (final, found) in zip(kinds, ends, strict=True):
            params, grad_x = kind.compiled.gradients(found, layout.rows)
            results += (*(final if kind.stateful else ()), *params)
            if grad_x is not None:
                of_x = grad_x if of_x is None else of_x.add_(grad_x)
        return None, None, None if of_x is None else of_x.view(x.shape), *results


def _forward(kinds: Sequence[_Kind], layout: Layout, x: Tensor, tensors: Sequence[Tensor]) -> list[Any]:
    jobs, made, threads = [], [], _threads(kinds)
    for kind, (states, params) in zip(kinds, _dealt(kinds, tensors), strict=True):
        states = None if states is None else tuple(part.contiguous() for part in states)
        job, kept, final, values = kind.compiled.forward(
            params, x, states, layout, kind.back, threads, keep=True
        )
        jobs.append(job)
        made.append((kept, final, kind.compiled.read_back(values)))
    if layout.rows:
        execute(jobs)
    return made


def _reference_gradients(
    kinds: Sequence[_Kind], sizes: list[int] | None, x: Tensor, tensors: list[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    outputs: list[Tensor] = []
    for kind, (states, params) in zip(kinds, _dealt(kinds, tensors), strict=True):
        bound = kind.cell.bind(dict(zip(kind.cell.shapes(), params, strict=True)))
        output, final = reference.run(bound, x, states, sizes, kind.back)
        outputs += (output, *final)
    inputs = [tensor for tensor in (x, *tensors) if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in (x, *tensors)]
