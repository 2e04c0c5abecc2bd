"""The compiled loops of a cell, forward and backward, and the operations around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import QuantizedWrapper
from unrolled.engines import log
from unrolled.engines.compiler.batch_layout import Layout, materialize
from unrolled.engines.compiler.bulk_ops import BulkOps, Values
from unrolled.engines.compiler.capture import capture
from unrolled.engines.compiler.dump import GraphDump, SavedDump, label_inputs
from unrolled.engines.compiler.ir import (
    BATCH_SYMBOL,
    UnsupportedError,
    is_batched,
    is_number,
    select_ancestors,
    width,
)
from unrolled.engines.compiler.kept_captures import CaptureEntry
from unrolled.engines.compiler.kernel_builder import build_kernel
from unrolled.engines.compiler.loops import GeneratedLoop, Loop, LoopBackend
from unrolled.engines.compiler.partition import LoopPartition, split
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.compiler.views import needs_copy, resolve_views
from unrolled.engines.fork_safety import lazy_property


class CompiledCell:
    """A cell, compiled for one dtype and backend: its loops, and the operations around them.

    Args:
        cell: The cell.
        dtype: Dtype of the input, the states and the parameters.
        backend: The backend that runs its loops.
        device: Their device.

    Raises:
        UnsupportedError: If the step can't be compiled.

    Attributes:
        backend: The backend.
        captured: The captured step.
        device: The device of all tensors.
        digest: Digest of the Python values that the step reads.
        dtype: Dtype of the tensors of a call.
        loop_dtype: Dtype that the loops compute in.
        widths: Widths of the states.
    """

    storage: torch.dtype | None = None  # a half-precision dtype of the tensors, if loops compute in float32

    def __init__(self, cell: Cell, dtype: torch.dtype, backend: LoopBackend, device: torch.device) -> None:
        self.backend, self.device = backend, device
        self._name = type(cell.innermost).__name__
        quantized = QuantizedWrapper.stored_name in dict(cell._wrapper_spec)
        self._training_error = "quantized weights can't be trained" if quantized else None
        self.digest = step_values(cell).digest
        entry = CaptureEntry(cell, dtype, backend.captures)
        stored = entry.load()
        try:
            self.captured = stored or capture(cell, dtype, training=not quantized)
        except UnsupportedError as error:  # perhaps only the backward is unsupported
            self._training_error = str(error)
            self.captured = capture(cell, dtype, training=False)
        self._forward, self._backward = split(self.captured)
        label_inputs(cell, self.captured)
        log.graph.info("%s", GraphDump(cell, dtype, self.captured, self._forward, self._backward))
        self.loop_dtype = self.captured.dtype  # perhaps float64
        self.dtype = self.storage if self.storage and self.loop_dtype is dtype else self.loop_dtype
        self.widths = list(cell.state_sizes().values())
        self._no_states: list[None] = [None] * len(self.widths)
        self._output_width_only = [self.widths[0], *self._no_states[1:]]
        self._ops_by_need: dict[tuple[bool, ...], BulkOps] = {}
        self._states_only = self._forward.states_only()
        if stored is None:
            self._generated_for_inference  # noqa: B018  # raises UnsupportedError now, not in a later call
            if entry.is_storable and (quantized or self._training_error is None):
                self._save(entry, quantized)

    def _save(self, entry: CaptureEntry, inference_only: bool) -> None:
        """Store the captured step for other processes, if all loops can be generated.

        If not, each process captures the step, so that the error can name the line of an operation.
        """
        try:
            inference_only or self._generated_for_training  # noqa: B018
        except UnsupportedError:
            return
        entry.save(self.captured)

    @lazy_property
    def inference(self) -> Loop:
        """The forward loop without saved values."""
        return self._generated_for_inference.load()

    @lazy_property
    def training(self) -> Loop:
        """The forward loop that saves what the backward reads."""
        return self._training_loops[0].load()

    @lazy_property
    def backward(self) -> Loop:
        """The backward loop."""
        return self._training_loops[1].load()

    @lazy_property
    def _training_loops(self) -> tuple[GeneratedLoop, GeneratedLoop]:
        """The forward and the backward loop for training. Both start compiling at the same time."""
        loops = self._generated_for_training
        for loop in loops:
            loop.start()
        return loops

    @lazy_property
    def _generated_for_inference(self) -> GeneratedLoop:
        """The code of the forward loop without saved values."""
        return self._generate(self._states_only)

    @lazy_property
    def _generated_for_training(self) -> tuple[GeneratedLoop, GeneratedLoop]:
        """The code of both loops for training."""
        forward = self._generate(self._forward, whole=self._read_by_backward)
        return forward, self._generate(self._backward, shifted=self.captured.states)

    def _generate(self, partition: LoopPartition, **options: Any) -> GeneratedLoop:
        kernel = build_kernel(partition, self.loop_dtype, storage=self.dtype, **options)
        return self.backend.generate(partition, kernel)

    def prepare_training(self) -> None:
        """Compile both loops for training.

        Raises:
            UnsupportedError: If the backward contains an unsupported operation.
        """
        if self._training_error is not None:
            raise UnsupportedError(self._training_error)
        try:
            self.training, self.backward  # noqa: B018
        except UnsupportedError as error:
            self._training_error = str(error)
            raise

    # --- forward ---

    @lazy_property
    def _read_by_backward(self) -> set[fx.Node]:
        """Nodes that the backward reads, and gradients in the forward's prologue, such as zeros."""
        backward = self._backward
        nodes = (*backward.prologue, *backward.loop, *backward.epilogue)
        operands = {n for node in nodes for n in node.all_input_nodes}
        return operands | {node for node in self._gradients if node in self._forward.prologue}

    @lazy_property
    def saved_state_widths(self) -> list[int | None]:
        """Width of each state whose values of all steps are stored, which include the output; else None."""
        captured, read = self.captured, self._read_by_backward
        states = enumerate(zip(captured.states, captured.new_states, self.widths, strict=True))
        return [size if k == 0 or old in read or new in read else None for k, (old, new, size) in states]

    @lazy_property
    def _before_inference(self) -> BulkOps:
        return self._prologue_ops(self._forward, self.inference, set())

    @lazy_property
    def _before_training(self) -> BulkOps:
        return self._prologue_ops(self._forward, self.training, self._read_by_backward)

    @lazy_property
    def _in_loops(self) -> set[fx.Node]:
        return {*self._forward.loop, *self._backward.loop}

    def _prologue_ops(self, partition: LoopPartition, loop: Loop, read_later: set[fx.Node]) -> BulkOps:
        """Return the operations before a loop that the loop needs, or that are in ``read_later``."""
        later = (node for node in partition.prologue if node in read_later and not is_number(node))
        needed = [*loop.needs, *later]
        nodes = select_ancestors(partition.prologue, needed)
        # Transposes, which only products after a loop read, are views of these.
        arrays = {node for node in needed if is_batched(node) and node.meta["val"].shape[0] == BATCH_SYMBOL}
        return self._bulk_ops(nodes, [node for node in nodes if node in arrays])

    def forward_call(
        self,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        layout: Layout,
        reverse: bool,
        threads: int,
        save_for_backward: bool,
    ) -> tuple[Any, list[Tensor | None], list[Tensor], Values]:
        """Prepare a call of the forward loop.

        Returns:
            The call; each state's values after every step; each row's final states; and the values that the
            backward reads. The call fills in these tensors. The first state is the output, and has the layout
            of x. Other states are None if they aren't stored.
        """
        values = self._input_values(params, x)
        (self._before_training if save_for_backward else self._before_inference)(values, layout.rows)
        loop = self.training if save_for_backward else self.inference
        widths = self.saved_state_widths if save_for_backward else self._output_width_only
        all_steps: list[Tensor | None] = [x.new_empty(*x.shape[:-1], self.widths[0])]
        all_steps += [None if size is None else x.new_empty(layout.rows, size) for size in widths[1:]]
        final = [x.new_empty(layout.batch, size) for size in self.widths]
        call = loop.call(values, states or self._no_states, all_steps, final, x, layout, reverse, threads)
        return call, all_steps, final, values

    def inference_call(
        self,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        layout: Layout,
        reverse: bool,
        threads: int,
    ) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
        """Prepare a call of the inference loop.

        Returns:
            The call, and the output and the final states, which it fills in.
        """
        call, all_steps, final, _ = self.forward_call(
            params, x, states, layout, reverse, threads, save_for_backward=False
        )
        assert all_steps[0] is not None
        return call, all_steps[0], tuple(final)

    def select_saved(self, values: Values) -> Values:
        """Return the values of a forward call that the backward reads."""
        return {node: values[node] for node in self.saved_for_backward}

    @lazy_property
    def saved_for_backward(self) -> list[fx.Node]:
        """Nodes whose values the forward saves for the backward, in addition to the states."""
        needs = self.backward.needs
        views = resolve_views(node for node in needs if not is_batched(node))
        read = {views[node].base if node in views else node for node in needs}
        read |= self._before_backward.inputs | self._after_backward.inputs
        read &= self._before_training.outputs
        saved = [*self._forward.saved, *(node for node in self._forward.prologue if node in read)]
        stored = zip(self.captured.states, self.saved_state_widths, strict=True)
        states = [state for state, size in stored if size is not None]
        log.saved.info("%s", SavedDump(self._name, self.dtype, states, saved))
        return saved

    @property
    def saved_tensors(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of each tensor that a forward call saves in addition to its output.

        States come first, then the values of :attr:`saved_for_backward`. A tensor with a row for each row of
        every step has ``BATCH_SYMBOL`` as its first size.
        """
        states = [(BATCH_SYMBOL, size) for size in self.saved_state_widths[1:] if size is not None]
        in_loop = [(BATCH_SYMBOL, width(node)) for node in self._forward.saved]
        outside = [(node.meta["val"], node) for node in self.saved_for_backward[len(in_loop) :]]
        return [
            *((shape, self.dtype) for shape in (*states, *in_loop)),
            # Only values without a batch dimension can have another dtype than the loop.
            *((tuple(v.shape), self.dtype if is_batched(node) else v.dtype) for v, node in outside),
        ]

    def _input_values(self, params: Iterable[Tensor], x: Tensor) -> Values:
        captured = self.captured
        values: Values = {**captured.constants, **dict(zip(captured.params, params, strict=True))}
        values[captured.x] = x.contiguous()
        return values

    # --- backward ---

    @lazy_property
    def _read_after_loop(self) -> set[fx.Node]:
        """Nodes that are read after the backward loop."""
        operands = {n for node in self._backward.epilogue for n in node.all_input_nodes}
        return operands | set(self._gradients)

    @lazy_property
    def _gradients(self) -> list[fx.Node]:
        captured = self.captured
        return [node for node in (*captured.grad_params, captured.grad_x) if node is not None]

    @lazy_property
    def _before_backward(self) -> BulkOps:
        return self._prologue_ops(self._backward, self.backward, self._read_after_loop)

    @lazy_property
    def _after_backward(self) -> BulkOps:
        return self._ops_for_gradients((True,) * (len(self.captured.grad_params) + 1))

    def _ops_for_gradients(self, needed: tuple[bool, ...]) -> BulkOps:
        """Return the operations after the backward loop; ``needed`` as in :meth:`gradients`."""
        if needed not in self._ops_by_need:
            nodes = zip((*self.captured.grad_params, self.captured.grad_x), needed, strict=True)
            gradients = [node for node, flag in nodes if flag and node is not None]
            computed = {*self._forward.prologue, *self._backward.prologue, *self._in_loops}
            required = select_ancestors(list(self.captured.graph.nodes), gradients)
            required = [n for n in required if n.op == "call_function" and n not in computed]
            self._ops_by_need[needed] = self._bulk_ops(required, gradients)
        return self._ops_by_need[needed]

    @lazy_property
    def _copied_gradients(self) -> list[bool]:
        """For each parameter, whether its gradient must be copied, because its memory would be shared."""
        return needs_copy(self.captured.grad_params, self._in_loops)

    def _bulk_ops(self, nodes: list[fx.Node], results: list[fx.Node]) -> BulkOps:
        runner = self.backend.bulk_runner(self.dtype)
        return BulkOps(nodes, results, self._in_loops, self.dtype, runner, self.device)

    @lazy_property
    def _stores_carry(self) -> list[bool]:
        """For each state, whether its gradients of all steps are read after the backward loop."""
        pairs = zip(self._backward.old_states, self._backward.new_states, strict=True)
        return [old in self._read_after_loop or new in self._read_after_loop for old, new in pairs]

    def backward_call(
        self,
        values: Values,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        all_steps: list[Tensor | None],
        grad_output: Tensor,
        grad_final: tuple[Tensor | None, ...],
        layout: Layout,
        reverse: bool,
        threads: int,
    ) -> tuple[Any, list[Tensor], Values]:
        """Prepare a call of the backward loop.

        Args:
            values: The values that the forward call saved, see :meth:`select_saved`.
            params: The parameters, each contiguous.
            x: The input of the forward call.
            states: The initial states of the forward call.
            all_steps: Each state's values after every step, from the forward call.
            grad_output: Gradient of the output.
            grad_final: Gradients of the final states; None means zeros.
            layout: Memory layout of the rows.
            reverse: Whether the forward call ran from the last time step to the first.
            threads: Maximum number of threads.

        Returns:
            The call; the gradients of the initial states, which it fills in; and the values that
            :meth:`gradients` reads.
        """
        captured, backward = self.captured, self._backward
        values = {**values, **self._input_values(params, x)}
        initial = states or self._no_states
        steps = zip(captured.states, captured.new_states, all_steps, initial, strict=True)
        for old, new, state, first in steps:
            if state is not None:
                flat = state.view(-1, state.shape[-1])
                values.setdefault(new, flat)
                if old in self._read_by_backward:
                    shifted = layout.shift(flat, first, reverse)
                    values[old] = shifted if layout.starts is None else shifted.materialize()
        values[captured.grad_output] = grad_output.contiguous()
        self._before_backward(values, layout.rows)
        carries = [
            x.new_empty(layout.rows, size) if stored else None
            for size, stored in zip(self.widths, self._stores_carry, strict=True)
        ]
        final = [x.new_empty(layout.batch, size) for size in self.widths]
        steps = zip(backward.old_states, backward.new_states, carries, grad_final, strict=True)
        for old, new, carry, first in steps:
            if carry is not None:
                values[old] = layout.shift(carry, first, not reverse)
                values.setdefault(new, carry)
        call = self.backward.call(values, grad_final, carries, final, x, layout, not reverse, threads)
        return call, final, values

    def gradients(
        self, values: Values, rows: int, needed: tuple[bool, ...]
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the gradients of the parameters, and of x as ``(rows, input)``.

        Args:
            values: Values from :meth:`backward_call`, after its call has run.
            rows: Number of rows of all time steps.
            needed: For each parameter, and then for x, whether its gradient is needed; if not, it is None.
        """
        captured = self.captured
        if captured.grad_output not in self._read_after_loop:
            del values[captured.grad_output]  # frees its copy, if there is one
        self._ops_for_gradients(needed)(values, rows)
        roles = zip((*captured.grad_params, captured.grad_x), needed, strict=True)
        *gradients, grad_x = [values[node] if node is not None and flag else None for node, flag in roles]
        grad_params = []
        for grad, copied in zip(gradients, self._copied_gradients, strict=True):
            grad = grad.clone(memory_format=torch.contiguous_format) if grad is not None and copied else grad
            grad_params.append(None if grad is None else grad.to(self.dtype))
        return grad_params, materialize(grad_x)
