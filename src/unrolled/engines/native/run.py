"""Run a cell's compiled loops, forward and backward, as one differentiable function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cell import Cell
from unrolled.engines import log, reference
from unrolled.engines.native import build
from unrolled.engines.native.around import Around
from unrolled.engines.native.emit import emit
from unrolled.engines.native.graph import Split, capture, needed_before, split
from unrolled.engines.native.layout import Layout
from unrolled.engines.native.listing import Listing
from unrolled.engines.native.loop import Loop
from unrolled.engines.native.program import UnsupportedError

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Compiled:
    """A step compiled for one dtype: both loops, and what torch computes around them."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        self._no_training: UnsupportedError | None = None
        try:
            self.captured = capture(cell, dtype)
        except UnsupportedError as error:  # perhaps in the backward only
            self._no_training = error
            self.captured = capture(cell, dtype, training=False)
        self._forward, self._backward = split(self.captured)
        self._dtype = dtype
        log.graph.info("%s", Listing(cell, dtype, self.captured, self._forward, self._backward))
        self._read_back = [*self._forward.keeps, *self._forward.before]
        needed = needed_before(self._forward.before, self._forward.reads)
        self._before = {False: Around(needed), True: Around(self._forward.before)}
        emit(self._forward_alone, dtype)  # what the compiler can't take shows here, not in a later call

    @property
    def _forward_alone(self) -> Split:
        return dataclasses.replace(self._forward, keeps=[])

    @functools.cached_property
    def inference(self) -> Loop:
        """The forward loop that keeps nothing."""
        return Loop(self._forward_alone, self._dtype)

    @functools.cached_property
    def _around_backward(self) -> tuple[Around, Around]:
        return Around(self._backward.before), Around(self._backward.after)

    @functools.cached_property
    def training(self) -> Loop:
        """The forward loop that keeps what the backward reads."""
        return Loop(self._forward, self._dtype)

    def prepare_training(self) -> None:
        """Compile what training needs, before anything is run.

        Raises:
            UnsupportedError: the backward holds what the compiler can't take.
        """
        if self._no_training is not None:
            raise self._no_training
        try:
            if "backward" not in vars(self):  # the first time: both are compiled at once
                build.start(*(emit(part, self._dtype).source for part in (self._forward, self._backward)))
            self.training, self.backward  # noqa: B018
        except UnsupportedError as error:
            self._no_training = error
            raise

    @functools.cached_property
    def backward(self) -> Loop:
        """The loop that goes back."""
        return Loop(self._backward, self._dtype)

    def run_forward(
        self,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...],
        layout: Layout,
        back: bool,
        keep: bool,
    ) -> tuple[list[Tensor], dict[fx.Node, Any]]:
        """The states of all steps, and the values that the backward reads."""
        captured = self.captured
        values: dict[fx.Node, Any] = {**dict(zip(captured.params, params, strict=True)), **captured.constants}
        values[captured.x] = x.flatten(0, -2)
        self._before[keep](values, layout.rows)
        loop = self.training if keep else self.inference
        whole = loop(values, states, layout.steps, back, layout.batch, layout.starts)
        if keep:
            values = {node: values[node] for node in self._read_back if node in values}
        return whole, values

    def run_backward(
        self,
        values: dict[fx.Node, Any],
        whole: list[Tensor],
        grad_output: Tensor,
        grad_final: tuple[Tensor, ...],
        layout: Layout,
        back: bool,
    ) -> tuple[list[Tensor | None], Tensor | None, list[Tensor]]:
        """The gradients of the parameters, of x and of the initial states."""
        captured, part = self.captured, self._backward
        for node, states in zip(captured.states, whole, strict=True):
            values[node] = layout.before(states, back)
        for node, states in zip(captured.new_states, whole, strict=True):
            values.setdefault(node, layout.after(states, back))
        values[captured.grad_output] = grad_output.flatten(0, -2)
        before, after = self._around_backward
        before(values, layout.rows)
        carries = self.backward(values, grad_final, layout.steps, not back, layout.batch, layout.starts)
        for node, states in zip(captured.carries, carries, strict=True):
            values[node] = layout.before(states, not back)
        for node, states in zip(part.new, carries, strict=True):
            values.setdefault(node, layout.after(states, not back))
        after(values, layout.rows)
        gradients = [None if node is None else values[node] for node in captured.grad_params]
        grad_x = None if captured.grad_x is None else values[captured.grad_x]
        return gradients, grad_x, [layout.last(states, not back) for states in carries]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: Compiled,
        cell: Cell,
        sizes: list[int] | None,
        back: bool,
        x: Tensor,
        *rest: Tensor,
    ) -> Any:
        count = len(cell.state)
        states, params = rest[:count], rest[count:]
        layout = Layout.of(x, sizes)
        whole, values = compiled.run_forward(list(params), x, states, layout, back, keep=True)
        ctx.save_for_backward(x, *rest)
        output, *final = _results(whole, layout, x, back)
        output = output.data  # no view, so that it may be changed in place; then it is computed anew
        ctx.made = (compiled, cell, sizes, layout, back, whole, values, output.detach(), output._version)
        return output, *final

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *grad_final: Tensor) -> Any:
        compiled, cell, sizes, layout, back, whole, values, output, version = ctx.made
        x, *rest = ctx.saved_tensors
        count = len(cell.state)
        if torch.is_grad_enabled():  # gradients of these gradients are wanted: the reference has them
            gradients = _reference_gradients(cell, sizes, back, x, rest, grad_output, grad_final)
            return None, None, None, None, *gradients
        if output._version != version:
            states, params = tuple(rest[:count]), rest[count:]
            whole, values = compiled.run_forward(params, x, states, layout, back, keep=True)
        captured = compiled.captured
        kept = {**values, **captured.constants, **dict(zip(captured.params, rest[count:], strict=True))}
        kept[captured.x] = x.flatten(0, -2)
        params, grad_x, grad_states = compiled.run_backward(
            kept, whole, grad_output, grad_final, layout, back
        )
        return None, None, None, None, None if grad_x is None else grad_x.view(x.shape), *grad_states, *params


def _results(whole: list[Tensor], layout: Layout, x: Tensor, back: bool) -> tuple[Tensor, ...]:
    """The output of every step, and each final state."""
    output = layout.after(whole[0], back).view(*x.shape[:-1], whole[0].shape[1])
    return output, *(layout.last(part, back).clone() for part in whole)


def _reference_gradients(
    cell: Cell,
    sizes: list[int] | None,
    back: bool,
    x: Tensor,
    rest: list[Tensor],
    grad_output: Tensor,
    grad_final: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    count = len(cell.state)
    bound = cell.bind(dict(zip(cell.shapes(), rest[count:], strict=True)))
    output, final = reference.run(bound, x, tuple(rest[:count]), sizes, back)
    inputs = [tensor for tensor in (x, *rest) if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(
            (output, *final), inputs, (grad_output, *grad_final), create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if tensor.requires_grad else None for tensor in (x, *rest))


def run(
    compiled: Compiled,
    cell: Cell,
    x: Tensor,
    state: tuple[Tensor, ...],
    sizes: list[int] | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a bound cell over a sequence; as :func:`unrolled.engines.reference.run`.

    bfloat16 is computed in float32: it is widened before and narrowed after.
    """
    params = [getattr(cell, name) for name in cell.shapes()]
    given = x.dtype
    if given is torch.bfloat16:
        x, *rest = (tensor.float() for tensor in (x, *state, *params))
        state, params = tuple(rest[: len(state)]), rest[len(state) :]
        cell = cell.bind(dict(zip(cell.shapes(), params, strict=True)))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *state, *params)):
        compiled.prepare_training()
        apply: Any = _Recurrence.apply
        output, *final = apply(compiled, cell, sizes, reverse, x, *state, *params)
    else:
        layout = Layout.of(x, sizes)
        whole, _ = compiled.run_forward(params, x, state, layout, reverse, keep=False)
        output, *final = _results(whole, layout, x, reverse)
    if given is torch.bfloat16:
        return output.to(given), tuple(part.to(given) for part in final)
    return output, tuple(final)
