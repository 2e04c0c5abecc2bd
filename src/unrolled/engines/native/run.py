"""Run a cell's compiled loops, forward and backward, as one differentiable function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cell import Cell
from unrolled.engines import reference
from unrolled.engines.native.around import Around
from unrolled.engines.native.graph import capture, needed_before, split
from unrolled.engines.native.loop import Loop
from unrolled.engines.native.program import UnsupportedError

DTYPES = (torch.float32, torch.float64)


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
        needed = needed_before(self._forward.before, self._forward.reads)
        self._before = {False: Around(needed), True: Around(self._forward.before)}
        self.inference  # noqa: B018  # what the compiler can't take shows here, not in a later call

    @functools.cached_property
    def inference(self) -> Loop:
        """The forward loop that keeps nothing."""
        return Loop(dataclasses.replace(self._forward, keeps=[]), self._dtype)

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
            self.training, self.backward  # noqa: B018
        except UnsupportedError as error:
            self._no_training = error
            raise

    @functools.cached_property
    def backward(self) -> Loop:
        """The loop that goes back."""
        return Loop(self._backward, self._dtype)

    def run_forward(
        self, params: list[Tensor], x: Tensor, states: tuple[Tensor, ...], back: bool, keep: bool
    ) -> tuple[list[Tensor], dict[fx.Node, Any]]:
        """The states of all steps, and the values that the backward reads."""
        steps, batch = x.shape[:2]
        captured = self.captured
        values: dict[fx.Node, Any] = {**dict(zip(captured.params, params, strict=True)), **captured.constants}
        values[captured.x] = x.reshape(steps * batch, x.shape[2])
        loop = self.training if keep else self.inference
        self._before[keep](values, steps * batch)
        whole = loop(values, states, steps, back, batch)
        return [part.view(steps + 1, batch, part.shape[1]) for part in whole], values

    def run_backward(
        self,
        values: dict[fx.Node, Any],
        whole: list[Tensor],
        grad_output: Tensor,
        grad_final: tuple[Tensor, ...],
        back: bool,
    ) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
        """The gradients of the parameters, of x and of the initial states."""
        captured, part = self.captured, self.backward.part
        steps, batch = grad_output.shape[:2]
        for node, states in zip(captured.states, whole, strict=True):
            values[node] = (states[1:] if back else states[:-1]).flatten(0, 1)
        for node, states in zip(captured.new_states, whole, strict=True):
            values.setdefault(node, (states[:-1] if back else states[1:]).flatten(0, 1))
        values[captured.grad_output] = grad_output.flatten(0, 1)
        before_back, after_back = self._around_backward
        before_back(values, steps * batch)
        carries = self.backward(values, grad_final, steps, not back, batch)
        carries = [states.view(steps + 1, batch, states.shape[1]) for states in carries]
        for node, states in zip(captured.carries, carries, strict=True):
            values[node] = (states[:-1] if back else states[1:]).flatten(0, 1)
        for node, states in zip(part.new, carries, strict=True):
            values.setdefault(node, (states[1:] if back else states[:-1]).flatten(0, 1))
        after_back(values, steps * batch)
        gradients = [None if node is None else values[node] for node in captured.grad_params]
        grad_x = None if captured.grad_x is None else values[captured.grad_x].unflatten(0, (steps, batch))
        return gradients, grad_x, [states[-1 if back else 0] for states in carries]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: Compiled, cell: Cell, back: bool, x: Tensor, *rest: Tensor) -> Any:
        count = len(cell.state)
        states, params = rest[:count], rest[count:]
        whole, values = compiled.run_forward(list(params), x, states, back, keep=True)
        ctx.save_for_backward(x, *rest)
        ctx.made = (compiled, cell, back, whole, values)
        return _results(whole, back)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *grad_final: Tensor) -> Any:
        compiled, cell, back, whole, values = ctx.made
        x, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of these gradients are wanted: the reference has them
            return None, None, None, *_reference_gradients(cell, back, x, rest, grad_output, grad_final)
        params, grad_x, grad_states = compiled.run_backward(
            dict(values), whole, grad_output, grad_final, back
        )
        return None, None, None, grad_x, *grad_states, *params


def _results(whole: list[Tensor], back: bool) -> tuple[Tensor, ...]:
    """The output of every step, and each final state."""
    return (whole[0][:-1] if back else whole[0][1:]), *(part[0 if back else -1].clone() for part in whole)


def _reference_gradients(
    cell: Cell, back: bool, x: Tensor, rest: list[Tensor], grad_output: Tensor, grad_final: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    count = len(cell.state)
    bound = cell.bind(dict(zip(cell.shapes(), rest[count:], strict=True)))
    output, final = reference.run(bound, x, tuple(rest[:count]), None, back)
    inputs = [tensor for tensor in (x, *rest) if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(
            (output, *final), inputs, (grad_output, *grad_final), create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if tensor.requires_grad else None for tensor in (x, *rest))


def run(
    compiled: Compiled, cell: Cell, x: Tensor, state: tuple[Tensor, ...], reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a bound cell over a dense sequence; as :func:`unrolled.engines.reference.run`."""
    params = [getattr(cell, name) for name in cell.shapes()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *state, *params)):
        compiled.prepare_training()
        apply: Any = _Recurrence.apply
        output, *final = apply(compiled, cell, reverse, x, *state, *params)
    else:
        whole, _ = compiled.run_forward(params, x, state, reverse, keep=False)
        output, *final = _results(whole, reverse)
    return output, tuple(final)
