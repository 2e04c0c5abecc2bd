"""A cell's compiled loops, forward and backward, and what is computed around them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines import log
from unrolled.engines.compiler.batch_layout import Layout, whole
from unrolled.engines.compiler.capture import capture
from unrolled.engines.compiler.dump import Listing
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError, ancestors, is_number, per_row, width
from unrolled.engines.compiler.partition import LoopPartition, split
from unrolled.engines.native.bulk_ops import BulkOps, Values
from unrolled.engines.native.codegen import emit
from unrolled.engines.native.kernel import Kernel, KernelCall
from unrolled.engines.native.kernel_spec import Emitted
from unrolled.engines.native.toolchain import build

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class CompiledCell:
    """A step compiled for one dtype: both loops, and what is computed around them."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        self._no_training: str | None = None  # why not
        for size in {n for shape in cell.shapes().values() for n in shape} | {*cell.state_sizes().values()}:
            if size and size % BATCH_SYMBOL == 0:  # which stands for the batch
                raise UnsupportedError(f"it has a size of {size}, a multiple of {BATCH_SYMBOL}")
        try:
            self.captured = capture(cell, dtype)
        except UnsupportedError as error:  # perhaps in the backward only
            self._no_training = str(error)
            self.captured = capture(cell, dtype, training=False)
        self._forward, self._backward = split(self.captured)
        log.graph.info("%s", Listing(cell, dtype, self.captured, self._forward, self._backward))
        self.dtype = dtype
        self.widths = list(cell.state_sizes().values())
        self._zeros: list[None] = [None] * len(self.widths)
        self._no_addresses = [0] * (len(self.widths) - 1)
        self._shapes_of_output = [self.widths[0], *self._zeros[1:]]
        self._alone = self._forward.alone()
        self._emitted = emit(
            self._alone, dtype
        )  # what the compiler can't take shows here, not in a later call

    @functools.cached_property
    def inference(self) -> Kernel:
        """The forward loop that keeps nothing."""
        return Kernel(self._alone, self._emitted, self.dtype)

    @functools.cached_property
    def training(self) -> Kernel:
        """The forward loop that keeps what the backward reads."""
        return Kernel(self._forward, self._emitted_to_train[0], self.dtype)

    @functools.cached_property
    def backward(self) -> Kernel:
        """The loop that goes back."""
        return Kernel(self._backward, self._emitted_to_train[1], self.dtype)

    @functools.cached_property
    def _emitted_to_train(self) -> tuple[Emitted, Emitted]:
        """The loops of training, that are compiled at the same time."""
        forward = emit(self._forward, self.dtype, whole=self._read_back)
        backward = emit(self._backward, self.dtype, shifted=self.captured.states)
        build.start(forward.source, backward.source)
        return forward, backward

    def prepare_training(self) -> None:
        """Compile what training needs, before anything is run.

        Raises:
            UnsupportedError: the backward holds what the compiler can't take.
        """
        if self._no_training is not None:
            raise UnsupportedError(self._no_training)
        try:
            self.training, self.backward  # noqa: B018
        except UnsupportedError as error:
            self._no_training = str(error)
            raise

    # --- forward ---

    @functools.cached_property
    def _read_back(self) -> set[fx.Node]:
        """What the backward reads of the forward, and gradients that it computes already: zeros, at times."""
        part = self._backward
        read = {n for node in (*part.before, *part.loop, *part.after) for n in node.all_input_nodes}
        return read | {node for node in self._wanted if node in self._forward.before}

    @functools.cached_property
    def states_kept(self) -> list[int | None]:
        """The width of each state that the backward reads of every step, and of the output; else None."""
        captured, read = self.captured, self._read_back
        states = enumerate(zip(captured.states, captured.new_states, self.widths, strict=True))
        return [size if k == 0 or old in read or new in read else None for k, (old, new, size) in states]

    @functools.cached_property
    def _before_inference(self) -> BulkOps:
        return self._around(self._forward, self.inference, set())

    @functools.cached_property
    def _before_training(self) -> BulkOps:
        return self._around(self._forward, self.training, self._read_back)

    @functools.cached_property
    def _looped(self) -> set[fx.Node]:
        return {*self._forward.loop, *self._backward.loop}

    def _around(self, part: LoopPartition, loop: Kernel, read_later: set[fx.Node]) -> BulkOps:
        """What is computed before a loop: what the loop reads, and what is read later."""
        wanted = [*loop.needs, *(node for node in part.before if node in read_later and not is_number(node))]
        nodes = _needed(part.before, wanted)
        arrays = {node for node in wanted if per_row(node)}
        return BulkOps(nodes, [node for node in nodes if node in arrays], self._looped, self.dtype)

    def forward(
        self,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        layout: Layout,
        back: bool,
        threads: int,
        keep: bool,
    ) -> tuple[KernelCall, list[Tensor | None], list[Tensor], Values]:
        """A call of the forward loop.

        Returns:
            The call; where it puts each state after every step (the output first, laid out as x; None:
            nowhere); where it puts each row's final states; and the values that the backward reads.
        """
        values = self._given(params, x)
        (self._before_training if keep else self._before_inference)(values, layout.rows)
        loop = self.training if keep else self.inference
        whole = self.states_kept if keep else self._shapes_of_output
        kept: list[Tensor | None] = [x.new_empty(*x.shape[:-1], self.widths[0])]
        kept += [None if size is None else x.new_empty(layout.rows, size) for size in whole[1:]]
        final = [x.new_empty(layout.batch, size) for size in self.widths]
        job = loop.job(values, states or self._zeros, kept, final, x, layout, back, threads)
        return job, kept, final, values

    @functools.cached_property
    def plain(self) -> list[int | None] | None:
        """Where the loop that keeps nothing needs no more than x and parameters: their places, x as None."""
        params = self.captured.params
        bases = self.inference.bases
        if all(base is self.captured.x or base in params for base in bases):
            return [None if base is self.captured.x else params.index(base) for base in bases]
        return None

    def infer(
        self,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        layout: Layout,
        back: bool,
        threads: int,
    ) -> tuple[KernelCall, Tensor, tuple[Tensor, ...]]:
        """A call of the forward loop that keeps nothing, where it puts the output, and the final states."""
        if self.plain is None or not x.is_contiguous():
            job, kept, final, _ = self.forward(params, x, states, layout, back, threads, keep=False)
            assert kept[0] is not None
            return job, kept[0], tuple(final)
        output = x.new_empty(*x.shape[:-1], self.widths[0])
        final = [x.new_empty(layout.batch, size) for size in self.widths]
        addresses = [x.data_ptr() if k is None else params[k].data_ptr() for k in self.plain]
        addresses += [0] * len(final) if states is None else [state.data_ptr() for state in states]
        addresses += [output.data_ptr(), *self._no_addresses]
        addresses += [state.data_ptr() for state in final]
        alive = [x, params, states, output]
        return self.inference.call(addresses, layout, back, threads, 0, alive), output, tuple(final)

    def read_back(self, values: Values) -> Values:
        """Of the values that a forward call leaves, those that the backward reads."""
        return {node: values[node] for node in self.held}

    @functools.cached_property
    def held(self) -> list[fx.Node]:
        """The values that a forward call leaves and the backward reads."""
        around = _needed(self._forward.before, self._read_back)
        made = self._before_training.makes
        return [*self._forward.keeps, *(node for node in around if node in made and not is_number(node))]

    @property
    def shapes_kept(self) -> list[tuple[int, ...]]:
        """The shapes of what a forward call keeps beside the output: states, and the values held.

        Those of every row of every step begin with :data:`ROWS`.
        """
        states = [(BATCH_SYMBOL, size) for size in self.states_kept[1:] if size is not None]
        keeps = self._forward.keeps
        held = [
            (BATCH_SYMBOL, width(node)) if node in keeps else tuple(node.meta["val"].shape)
            for node in self.held
        ]
        return [*states, *held]

    def _given(self, params: Iterable[Tensor], x: Tensor) -> Values:
        captured = self.captured
        values: Values = {**captured.constants, **dict(zip(captured.params, params, strict=True))}
        values[captured.x] = x.contiguous()
        return values

    # --- backward ---

    @functools.cached_property
    def _read_after(self) -> set[fx.Node]:
        """What is read once the backward loop is over."""
        read = {n for node in self._backward.after for n in node.all_input_nodes}
        return read | set(self._wanted)

    @functools.cached_property
    def _wanted(self) -> list[fx.Node]:
        captured = self.captured
        return [node for node in (*captured.grad_params, captured.grad_x) if node is not None]

    @functools.cached_property
    def _before_backward(self) -> BulkOps:
        return self._around(self._backward, self.backward, self._read_after)

    @functools.cached_property
    def _after_backward(self) -> BulkOps:
        part = self._backward
        made = {*self._forward.before, *part.before, *self._looped}
        nodes = _needed(list(self.captured.graph.nodes), [*part.after, *self._wanted])
        nodes = [n for n in nodes if n.op == "call_function" and n not in made]
        return BulkOps(nodes, self._wanted, self._looped, self.dtype)

    @functools.cached_property
    def keeps_carries(self) -> list[bool]:
        """For each state, whether its gradient of every step is read once the loop is over."""
        pairs = zip(self._backward.old, self._backward.new, strict=True)
        return [old in self._read_after or new in self._read_after for old, new in pairs]

    def back(
        self,
        values: Values,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        kept: list[Tensor | None],
        grad_output: Tensor,
        grad_final: tuple[Tensor | None, ...],
        layout: Layout,
        back: bool,
        threads: int,
    ) -> tuple[KernelCall, list[Tensor], Values]:
        """A call of the backward loop of a call of the forward loop that went ``back`` or not.

        Returns:
            The call; where it puts the gradients of the initial states; and the values that
            :meth:`gradients` needs.
        """
        captured, part = self.captured, self._backward
        values = {**values, **self._given(params, x)}
        initial = states or self._zeros
        for old, new, state, first in zip(captured.states, captured.new_states, kept, initial, strict=True):
            if state is not None:
                flat = state.view(-1, state.shape[-1])
                values.setdefault(new, flat)
                if old in self._read_back:
                    before = layout.before(flat, first, back)
                    values[old] = before if layout.starts is None else before.whole()
        values[captured.grad_output] = grad_output.contiguous()
        self._before_backward(values, layout.rows)
        carries = [
            x.new_empty(layout.rows, size) if wanted else None
            for size, wanted in zip(self.widths, self.keeps_carries, strict=True)
        ]
        final = [x.new_empty(layout.batch, size) for size in self.widths]
        for old, new, carry, first in zip(part.old, part.new, carries, grad_final, strict=True):
            if carry is not None:
                values[old] = layout.before(carry, first, not back)
                values.setdefault(new, carry)
        job = self.backward.job(values, grad_final, carries, final, x, layout, not back, threads)
        return job, final, values

    def gradients(self, values: Values, rows: int) -> tuple[list[Tensor | None], Tensor | None]:
        """The gradients of the parameters and of x, ``(rows, input)``, once the backward loop is over."""
        captured = self.captured
        if captured.grad_output not in self._read_after:
            del values[captured.grad_output]  # it may be a copy
        self._after_backward(values, rows)
        found: list[Tensor | None] = []
        seen: set[fx.Node] = set()
        for node in captured.grad_params:
            same = node in seen  # two parameters with the same gradient get a tensor each
            found.append(None if node is None else values[node].clone() if same else values[node])
            seen |= {node} if node is not None else set()
        return found, None if captured.grad_x is None else whole(values[captured.grad_x])


def _needed(before: list[fx.Node], reads: Iterable[fx.Node]) -> list[fx.Node]:
    """Of the nodes before a loop, those that the loop's own reads follow from."""
    wanted = ancestors(reads)
    return [node for node in before if node in wanted]
