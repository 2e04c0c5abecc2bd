"""A compiled loop over time, and how it is called."""

from __future__ import annotations

import array
import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines import log
from unrolled.engines.compiler.batch_layout import Layout, ShiftedState
from unrolled.engines.compiler.ir import is_batched, width
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.views import resolve_views
from unrolled.engines.native.call_arguments import CallArguments, Strategy
from unrolled.engines.native.kernel_spec import WEIGHT_FORMATS, KernelSpec
from unrolled.engines.native.launch_observer import current_observer
from unrolled.engines.native.matmul import launch_pair, products
from unrolled.engines.native.toolchain import build
from unrolled.engines.native.tuning import constants
from unrolled.engines.threads import thread_count

NO_MEMORY = "not enough memory for the temporary buffers of a compiled loop"


@dataclass(slots=True)
class KernelCall:
    """A kernel with its arguments.

    Attributes:
        run: Address of the kernel.
        arguments: Its arguments, which calls with the same shapes share.
        pointers: Its pointers.
        alive: Objects that keep the memory behind the pointers alive.
    """

    run: int
    arguments: CallArguments
    pointers: array.array[int]
    alive: list[Any]

    def addresses(self) -> tuple[int, int, int]:
        """Return the addresses of the kernel, its arguments and its pointers."""
        return self.run, ctypes.addressof(self.arguments), self.pointers.buffer_info()[0]

    def on_one_thread(self) -> KernelCall:
        """Return the same call on one thread."""
        if self.arguments.threads == 1:
            return self
        arguments = CallArguments.from_buffer_copy(self.arguments)
        arguments.threads, arguments.strategy = 1, Strategy.SHARE_COLUMNS
        return KernelCall(self.run, arguments, self.pointers, self.alive)


_kernel_type = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)


def launch(calls: Sequence[KernelCall]) -> None:
    """Run independent kernels: two at the same time if each needs few threads, otherwise one by one.

    Raises:
        MemoryError: If there is not enough memory for a kernel's buffers.
    """
    observer = current_observer.get()
    if observer is not None:
        observer.launch(calls)
        return
    if run_at_once([call.arguments for call in calls], thread_count()):
        first, second = (call.on_one_thread() for call in calls)
        succeeded = launch_pair(first.addresses(), second.addresses())
    else:
        succeeded = True
        for call in calls:
            run, arguments, pointers = call.addresses()
            succeeded = function(run)(arguments, pointers) and succeeded
    if not succeeded:
        raise MemoryError(NO_MEMORY)


def run_at_once(arguments: Sequence[CallArguments], threads: int) -> bool:
    """Return whether calls should run at the same time, on one thread each, instead of one after another.

    Args:
        arguments: Their arguments.
        threads: The number of threads that there are.
    """
    # In the model of _useful_threads, both take as long if each is worth four threads.
    most = max(2, min(threads - 1, 3))
    return len(arguments) == 2 and threads > 1 and all(call.threads <= most for call in arguments)


@functools.cache
def function(address: int) -> Any:
    """Return the kernel at an address. It takes the addresses of its arguments and its pointers."""
    return _kernel_type(address)


class Kernel:
    """A compiled loop over time.

    Args:
        partition: The partition that contains the loop.
        spec: The generated source and its arguments.
        dtype: Dtype of all values.

    Attributes:
        needs: Values that the loop reads, in the order of their first use.
        bases: The same without views: the base of each parameter's view instead.
    """

    def __init__(
        self,
        partition: LoopPartition,
        spec: KernelSpec,
        dtype: torch.dtype,
    ) -> None:
        self.partition = partition
        self.spec = spec
        log.emit.info("a loop in %s\n%s", dtype, spec.source)
        self._library = library = build.load(spec.source)  # keep it loaded for as long as the kernel exists
        self._products = products(dtype)  # after the loop: both may have to be compiled, at the same time
        formats = {WEIGHT_FORMATS[pack.dtype] for pack in spec.packs if pack.dtype in WEIGHT_FORMATS}
        for number in formats:
            self._products.load_format(number)
        self._has_formats = bool(formats)
        self._address = ctypes.cast(library.run, ctypes.c_void_p).value or 0
        self._dtype = dtype
        self._saved = [(node, width(node)) for node in partition.saved]
        is_hoisted = [pack.products[0].row in spec.hoisted_rows for pack in spec.packs]
        sums = [len(pack.products) * pack.width for pack in spec.packs]
        weights = [count * pack.work for pack, count in zip(spec.packs, sums, strict=True)]
        self._hoisted_sums = sum(n for n, hoisted in zip(sums, is_hoisted, strict=True) if hoisted)
        sizes = [count * pack.lines * dtype.itemsize for pack, count in zip(spec.packs, sums, strict=True)]
        self._weight_bytes = sum(n for n, hoisted in zip(sizes, is_hoisted, strict=True) if not hoisted)
        # Multiply-adds per row and step, with and without input products that are computed before. An element
        # counts as five.
        elements = 5 * sum(width(node) for node in partition.loop if is_batched(node))
        step_weights = sum(n for n, hoisted in zip(weights, is_hoisted, strict=True) if not hoisted)
        self._work, self._step_work = sum(weights) + elements, step_weights + elements
        self._arguments_cache: dict[tuple[Any, ...], CallArguments] = {}
        arrays = [target for kind, target in spec.pointers if kind == "array"]
        matrices = [target.matrix for kind, target in spec.pointers if kind == "matrix"]
        self.needs = list(dict.fromkeys([*arrays, *matrices]))
        self._views = resolve_views(node for node in self.needs if not is_batched(node))
        self._sizes = array.array("q", spec.sizes)  # keep it for as long as the kernel exists
        for node, index in spec.strides:
            self._sizes[index], self._sizes[index + 1] = self._views[node].strides
        self.bases = list(dict.fromkeys(self._base(node) for node in self.needs))
        self._shifted = [node for kind, node in spec.pointers if kind == "shifted_initial"]
        self._pointer_sources = [self._pointer_source(kind, target) for kind, target in spec.pointers]

    def _base(self, node: fx.Node) -> fx.Node:
        return node if is_batched(node) else self._views[node].base

    def _pointer_source(self, kind: str, target: Any) -> tuple[int, int]:
        """Return where a pointer comes from: the index of an address, and an offset in bytes.

        Index 0 is null, 1 is the layout's ``starts``, and the addresses of :meth:`call_addresses` follow.
        """
        bases, states = len(self.bases), len(self.partition.old_states)
        match kind:
            case "starts":
                return 1, 0
            case "array":
                offset = 0 if is_batched(target) else self._views[target].offset
                return 2 + self.bases.index(self._base(target)), offset * self._dtype.itemsize
            case "matrix":
                view = self._views[target.matrix]
                offset = view.offset + target.offset * view.strides[1]
                return 2 + self.bases.index(view.base), offset * self._dtype.itemsize
            case "initial" | "all_steps" | "final":
                number = ("initial", "all_steps", "final").index(kind)
                return 2 + bases + number * states + target, 0
            case "saved":
                return 2 + bases + 3 * states + self.partition.saved.index(target), 0
            case "shifted_initial":
                return 2 + bases + 3 * states + len(self._saved) + self._shifted.index(target), 0
        return 0, 0  # a pack: null, so that the kernel packs its matrices in every call

    def call(
        self,
        values: dict[fx.Node, Any],
        initial: Sequence[Tensor | None],
        all_steps: Sequence[Tensor | None],
        final: Sequence[Tensor | None],
        like: Tensor,
        layout: Layout,
        reverse: bool,
        threads: int,
    ) -> KernelCall:
        """Prepare a call. Allocate the values that it saves, and add them to ``values``.

        Args:
            values: Values that the loop reads: of all rows of all time steps, or of parameters.
            initial: States before the first step, each ``(batch, width)``; None means zeros.
            all_steps: Memory for each state's values after every step, ``(all rows, width)``, or None.
            final: Memory for each row's last state, ``(batch, width)``, or None.
            like: A tensor of the right dtype and device.
            layout: Memory layout of the rows.
            reverse: Whether to run from the last time step to the first.
            threads: Maximum number of threads.
        """
        addresses = []
        alive: list[Any] = [values, initial, all_steps, final]
        for node in self.bases:
            value = values[node]
            if type(value) is ShiftedState:
                value = value.state
            elif value.dtype is not self._dtype or not value.is_contiguous():
                value = value.to(self._dtype).contiguous()
                alive.append(value)
            addresses.append(value.data_ptr())
        states = (*initial, *all_steps, *final)
        addresses += [0 if state is None else state.data_ptr() for state in states]
        for node, columns in self._saved:
            saved = values[node] = like.new_empty(layout.rows, columns)
            addresses.append(saved.data_ptr())
        shift = 0
        for node in self._shifted:
            value = values[node]
            if type(value) is ShiftedState:
                shift = 1 if value.reverse else -1
                shifted_initial = value.initial_or_zeros()
                alive.append(shifted_initial)
                addresses.append(shifted_initial.data_ptr())
            else:
                addresses.append(0)
        return self.call_addresses(addresses, layout, reverse, threads, shift, alive)

    def call_addresses(
        self,
        addresses: list[int],
        layout: Layout,
        reverse: bool,
        threads: int,
        shift: int,
        alive: list[Any],
        packed: bool = False,
    ) -> KernelCall:
        """Prepare a call from addresses.

        Args:
            addresses: Addresses of the bases; of the initial states; of the memory for states of all steps,
                for final states and for saved values; and of the initial values of shifted states.
            layout: Memory layout of the rows.
            reverse: Whether to run from the last time step to the first.
            threads: Maximum number of threads.
            shift: Distance of shifted states, in time steps: -1, 0 or 1.
            alive: Objects that keep the memory at the addresses alive.
            packed: Whether the caller provides memory for packed matrices, see :meth:`pack_buffers`.
        """
        regular = layout.starts is None
        key = (layout.steps, layout.batch, regular, reverse, threads, shift, packed)
        if not regular:
            alive.append(layout)
        arguments = self._arguments_cache.get(key)
        if arguments is None:
            if len(self._arguments_cache) > 1000:  # sequence lengths that keep changing
                self._arguments_cache.clear()
            arguments = self.arguments(layout, reverse, threads, shift, packed)
            self._arguments_cache[key] = arguments
        starts = 0 if layout.starts is None else layout.starts.data_ptr()
        sources = [0, starts, *addresses]
        pointers = array.array("q", [sources[k] + offset for k, offset in self._pointer_sources])
        alive.append(self)  # the arguments point to its sizes
        return KernelCall(self._address, arguments, pointers, alive)

    def pointer_indices(self, address: int) -> list[int]:
        """Return the indices of the pointers that are derived from an address of :meth:`call_addresses`."""
        return [index for index, (k, _) in enumerate(self._pointer_sources) if k == 2 + address]

    def pack_buffers(self) -> list[tuple[int, int]]:
        """Return for each group of packed matrices the index of its pointer, and its number of elements."""
        lanes = self._products.lanes
        return [
            (index, -(-pack.width // lanes) * lanes * len(pack.products) * pack.lines)
            for index, (kind, pack) in enumerate(self.spec.pointers)
            if kind == "pack"
        ]

    def arguments(
        self, layout: Layout, reverse: bool, threads: int, shift: int, packed: bool
    ) -> CallArguments:
        """Return the arguments of a call, and choose how its threads share the work."""
        steps, rows, tuning = layout.steps, layout.batch, constants()
        # Scales of columns depend on all of their terms, but in each step blocks of terms are packed.
        pack_per_step = steps <= tuning["MAX_STEPS_UNPACKED"] and not packed and not self._has_formats
        threads = _useful_threads(threads, self._work * rows * steps, tuning["CALL_WORK_FOR_TWO_THREADS"])
        synchronized = _useful_threads(threads, self._step_work * rows, tuning["STEP_WORK_FOR_TWO_THREADS"])
        columnwise = layout.starts is None and self.spec.columnwise
        by_rows, threads = self._share(layout, threads, threads if columnwise else synchronized)
        panels = -(-max(map(width, self.partition.new_states)) // self._products.lanes)
        turns = (
            columnwise
            and panels < threads
            and rows * steps >= 2 * threads * tuning["BLOCK_ROWS"]
            and not (by_rows or packed or self.spec.deferred)
        )
        best = 1 if by_rows else min(steps, -(-tuning["BLOCK_ROWS"] // max(rows, 1)))
        sums = max(1, rows * self._hoisted_sums * self._dtype.itemsize)  # bytes of a step
        most = tuning["MAX_HOISTED_SUMS"] * threads // sums
        strategy = (
            Strategy.SHARE_ROWS if by_rows else Strategy.TAKE_TURNS if turns else Strategy.SHARE_COLUMNS
        )
        block_steps = steps if pack_per_step and not by_rows else max(1, min(best, most))
        return CallArguments(
            steps=steps,
            rows=rows,
            reverse=reverse,
            shift=shift,
            threads=threads,
            block_steps=block_steps,
            pack_per_step=pack_per_step,
            strategy=strategy,
            sizes=self._sizes.buffer_info()[0],
            products=self._products.table,
        )

    def _share(self, layout: Layout, threads: int, by_columns: int) -> tuple[bool, int]:
        """Return whether threads share the rows, and the number of threads.

        Args:
            layout: Memory layout of the rows.
            threads: The number of threads that pay off if they don't synchronize.
            by_columns: The number of threads that pay off if they share the columns.
        """
        tuning, most = constants(), 0
        if layout.starts is None and self._weight_bytes <= tuning["MAX_SHARED_WEIGHTS"]:
            most = min(threads, layout.batch // (tuning["MIN_ROWS_PER_THREAD"] if self.spec.packs else 1))
        return (True, most) if most > 1 and most >= by_columns else (False, by_columns)


def _useful_threads(threads: int, work: int, work_for_two: int) -> int:
    """Return the number of threads that pay off.

    With ``n`` threads the work takes ``work / n``, and starting or synchronizing them a time in proportion to
    ``n``. The sum is lowest for an ``n`` that grows with the square root of the work.

    Args:
        threads: The number of threads that there are.
        work: The number of multiply-adds.
        work_for_two: The number of multiply-adds from which two threads pay off.
    """
    return max(1, min(threads, math.isqrt(4 * work // work_for_two)))
