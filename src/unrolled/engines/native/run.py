"""Run a cell's compiled loops, forward and backward, as one differentiable function."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cell import Cell
from unrolled.engines import reference
from unrolled.engines.native import build
from unrolled.engines.native.emit import emit
from unrolled.engines.native.graph import (
    Split,
    UnsupportedError,
    capture,
    needed_before,
    per_row,
    run_rows,
    split,
)
from unrolled.engines.native.program import Emitted, Product, width

DTYPES = (torch.float32, torch.float64)


class Loop:
    """One compiled loop: its split, its source and its library."""

    def __init__(self, part: Split, dtype: torch.dtype) -> None:
        self.part = part
        self.emitted: Emitted = emit(part, dtype)
        library = build.load(self.emitted.source)
        self.lanes = int(library.lanes())
        self.run = library.run
        self.run.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self.run.restype = None

    def __call__(
        self, values: dict[fx.Node, Any], initial: tuple[Tensor, ...], steps: int, back: bool, rows: Tensor
    ) -> list[Tensor]:
        """Run over all steps; what is kept goes into ``values``.

        Args:
            values: the arrays of what the loop reads: of every row of every step, or of parameters.
            initial: the states before the first step, each ``(batch, width)``.
            steps: how many.
            back: from the last step to the first.
            rows: any tensor with the rows of a step.

        Returns:
            For each state ``(steps + 1, batch, width)``: the initial one first, or last going back.
        """
        emitted, batch, like = self.emitted, len(rows), rows
        arrays = [values[node].contiguous() for node in emitted.arrays]
        arrays += [self._packed(values, products, columns) for products, columns in emitted.packs]
        for node in self.part.keeps:
            values[node] = like.new_empty(steps * batch, width(node))
            arrays.append(values[node])
        arrays += [like.new_empty(batch, width(node)) for node in emitted.scratch]
        states = []
        for part in initial:
            whole = part.new_empty(steps + 1, *part.shape)
            whole[-1 if back else 0] = part
            states.append(whole)
        arrays += states
        sizes = (ctypes.c_int64 * (3 + len(emitted.sizes)))(steps, batch, back, *emitted.sizes)
        pointers = (ctypes.c_void_p * len(arrays))(*(array.data_ptr() for array in arrays))
        if batch:
            self.run(ctypes.addressof(sizes), ctypes.addressof(pointers))
        return states

    def _packed(self, values: dict[fx.Node, Any], products: list[Product], columns: int) -> Tensor:
        """The panels that a phase multiplies with: ``(panels, k, products, lanes)``."""
        panels = -(-columns // self.lanes)
        parts = []
        for product in products:
            part = values[product.matrix][:, product.offset : product.offset + columns]
            parts.append(torch.nn.functional.pad(part, (0, panels * self.lanes - columns)))
        whole = torch.stack(parts, 1).view(-1, len(parts), panels, self.lanes)
        return whole.permute(2, 0, 1, 3).contiguous()


class Compiled:
    """A step compiled for one dtype: both loops, and what torch computes around them."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        self.captured = capture(cell, dtype)
        self._forward, self._backward = split(self.captured)
        self._dtype = dtype
        self._no_training: UnsupportedError | None = None
        self._needed = {
            False: needed_before(self._forward.before, self._forward.reads),
            True: self._forward.before,
        }
        self.inference.run  # noqa: B018  # what the compiler can't take shows here, not in a later call

    @functools.cached_property
    def inference(self) -> Loop:
        """The forward loop that keeps nothing."""
        return Loop(dataclasses.replace(self._forward, keeps=[]), self._dtype)

    @functools.cached_property
    def prologue(self) -> Loop | None:
        """What stands before the inference loop, as a loop of one step over all rows.

        torch's products give a row other bits in another batch; these don't. None where there is
        nothing to do, or something that the compiler can't take: then torch computes it.
        """
        before = self._needed[False]
        rows = [node for node in before if per_row(node)]
        inside = set(rows)
        reads = {n for node in rows for n in node.all_input_nodes if n not in inside}
        keeps = [node for node in self.inference.part.reads if node in inside]
        if not keeps:
            return None
        part = Split(
            before=[n for n in before if n not in inside],
            loop=rows,
            after=[],
            reads=[node for node in self.captured.graph.nodes if node in reads],
            keeps=keeps,
            old=[],
            new=[],
        )
        try:
            return Loop(part, self._dtype)
        except UnsupportedError:
            return None

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
            self.training.run, self.backward.run  # noqa: B018
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
        values: dict[fx.Node, Any] = dict(zip(captured.params, params, strict=True))
        values[captured.x] = x.reshape(steps * batch, x.shape[2])
        loop = self.training if keep else self.inference
        if keep or self.prologue is None:
            run_rows(self._needed[keep], values, steps * batch)
        else:
            run_rows(self.prologue.part.before, values, steps * batch)
            self.prologue(values, (), 1, False, rows=values[captured.x])
        whole = loop(values, states, steps, back, rows=states[0])
        return whole, values

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
            values[node] = (states[1:] if back else states[:-1]).reshape(steps * batch, -1)
        for node, states in zip(captured.new_states, whole, strict=True):
            values.setdefault(node, (states[:-1] if back else states[1:]).reshape(steps * batch, -1))
        values[captured.grad_output] = grad_output.reshape(steps * batch, -1)
        run_rows(part.before, values, steps * batch)
        carries = self.backward(values, grad_final, steps, not back, rows=grad_final[0])
        for node, states in zip(captured.carries, carries, strict=True):
            values[node] = (states[:-1] if back else states[1:]).reshape(steps * batch, -1)
        for node, states in zip(part.new, carries, strict=True):
            values.setdefault(node, (states[1:] if back else states[:-1]).reshape(steps * batch, -1))
        run_rows(part.after, values, steps * batch)
        gradients = [None if node is None else values[node] for node in captured.grad_params]
        grad_x = None if captured.grad_x is None else values[captured.grad_x].view(steps, batch, -1)
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
