"""An inference loop with all that stays the same from call to call made ready: shapes, and packed weights."""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native.compiled_cell import CompiledCell
from unrolled.engines.native.kernel import NO_MEMORY, KernelCall, function
from unrolled.engines.native.kernel_spec import BY_ROWS, PACKED, ROW_COUNT, THREADS

_FEW = 3  # rows up to which matrices are packed in wider strips (Phase::cut in include/loop.h)


class Weights:
    """The parameters of one bound cell, packed for its inference loop as long as they don't change.

    Args:
        compiled: the step; its loop must read no more than x and parameters.
        params: in order, next to one another in memory each.
    """

    def __init__(self, compiled: CompiledCell, params: Sequence[Tensor]) -> None:
        self.compiled = compiled
        self.params = list(params)
        self._packed: dict[tuple[Any, ...], tuple[list[Tensor], list[bool]]] = {}

    def packed(self, sizes: array.array[int]) -> tuple[list[Tensor], list[bool]]:
        """Memory for packed matrices of this layout, and in a list whether they are there."""
        key = (sizes[ROW_COUNT] <= _FEW, 1 if sizes[BY_ROWS] else sizes[THREADS])
        if key not in self._packed:
            loop = self.compiled.inference
            made = [torch.empty(many, dtype=self.compiled.dtype, device="cpu") for _, many in loop.packs()]
            self._packed[key] = made, []
        return self._packed[key]


class PrepackedKernel:
    """The way of one cell for inputs of one shape.

    Args:
        weights: of the cell.
        steps, batch: of every input.
        back: from the last step to the first.
        threads: at most.
    """

    def __init__(self, weights: Weights, steps: int, batch: int, back: bool, threads: int) -> None:
        compiled, loop = weights.compiled, weights.compiled.inference
        assert compiled.plain is not None
        self.widths = compiled.widths
        self._sizes = [batch * width * compiled.dtype.itemsize for width in compiled.widths]
        states, bases = len(compiled.widths), len(compiled.plain)
        addresses = [0 if k is None else weights.params[k].data_ptr() for k in compiled.plain]
        addresses += [0] * (3 * states)
        self._job = job = loop.call(addresses, Layout(steps, batch), back, threads, 0, [weights], packed=True)
        matrices, self._there = weights.packed(job.sizes)
        for (place, _), matrix in zip(loop.packs(), matrices, strict=True):
            job.pointers[place] = matrix.data_ptr()
        self._ready = job.sizes[:]
        self._ready[PACKED] = 1
        inputs = [k for k, base in enumerate(compiled.plain) if base is None]
        self._x = [place for k in inputs for place in loop.pointers_to(k)]
        self._initial = [loop.pointers_to(bases + k)[0] for k in range(states)]
        self._output = loop.pointers_to(bases + states)[0]
        self._final = [loop.pointers_to(bases + 2 * states + k)[0] for k in range(states)]
        self._function, self._table = function(job.run), job.table
        self._address = self._ready.buffer_info()[0]

    def run(self, x: int, initial: Sequence[int] | None, output: int, final: Sequence[int]) -> None:
        """Run the loop by itself; all arguments are addresses, see :meth:`job`.

        Raises:
            MemoryError: there is no memory for what the loop keeps for itself.
        """
        pointers = self._job.pointers[:]
        self._fill(pointers, x, initial, output, final)
        sizes = self._address if self._there else self._job.sizes.buffer_info()[0]
        if not self._function(sizes, pointers.buffer_info()[0], self._table):
            raise MemoryError(NO_MEMORY)
        if not self._there:
            self.done()

    def between(self, initial: Sequence[int], final: Sequence[int]) -> BoundKernel:
        """The calls from the same initial to the same final states; addresses as of :meth:`run`."""
        pointers = self._job.pointers[:]
        self._fill(pointers, 0, initial, 0, final)
        return BoundKernel(self, pointers)

    def job(
        self, x: int, initial: Sequence[int] | None, output: int, final: Sequence[int], lane: int
    ) -> KernelCall:
        """A call; all arguments but the last are addresses, and their elements next to one another.

        Args:
            x: ``(time, batch, input)``.
            initial: states of all lanes, each ``(lanes, batch, width)``; None: zeros.
            output: where the output goes, ``(time, batch, width)``.
            final: where the final states of all lanes go, laid out as ``initial``.
            lane: which one this is.
        """
        job = self._job
        pointers = job.pointers[:]
        if initial is not None:
            initial = [part + lane * size for part, size in zip(initial, self._sizes, strict=True)]
        final = [part + lane * size for part, size in zip(final, self._sizes, strict=True)]
        self._fill(pointers, x, initial, output, final)
        return KernelCall(
            job.run, self._ready if self._there else job.sizes, job.threads, pointers, job.table, job.alive
        )

    def _fill(
        self,
        pointers: array.array[int],
        x: int,
        initial: Sequence[int] | None,
        output: int,
        final: Sequence[int],
    ) -> None:
        for place in self._x:
            pointers[place] = x
        pointers[self._output] = output
        for place, address in zip(self._final, final):  # noqa: B905  # a keyword costs a microsecond's tenth
            pointers[place] = address
        if initial is not None:
            for place, address in zip(self._initial, initial):  # noqa: B905
                pointers[place] = address

    def done(self) -> None:
        """A call is over: the packed matrices are there."""
        if not self._there:
            self._there.append(True)


class BoundKernel:
    """Calls of a route that differ in no more than where their input and output are."""

    __slots__ = ("_address", "_function", "_output", "_pointers", "_route", "_table", "_x")

    def __init__(self, route: PrepackedKernel, pointers: array.array[int]) -> None:
        self._route, self._pointers, self._address = route, pointers, pointers.buffer_info()[0]
        self._x, self._output = route._x, route._output
        self._function, self._table = route._function, route._table

    def run(self, x: int, output: int) -> None:
        """Run the loop; both arguments are addresses, see :meth:`Route.job`. Not in two threads at once.

        Raises:
            MemoryError: there is no memory for what the loop keeps for itself.
        """
        pointers, route = self._pointers, self._route
        for place in self._x:
            pointers[place] = x
        pointers[self._output] = output
        sizes = route._address if route._there else route._job.sizes.buffer_info()[0]
        if not self._function(sizes, self._address, self._table):
            raise MemoryError(NO_MEMORY)
        route.done()
