"""Inference kernels with prepared arguments and packed weights, for repeated calls with the same shapes."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native.backend import NativeCell
from unrolled.engines.native.call_arguments import CallArguments, Strategy
from unrolled.engines.native.kernel import NO_MEMORY, KernelCall, function
from unrolled.engines.native.tuning import constants


class Weights:
    """The parameters of a bound cell, packed for its inference kernel. They must not change.

    Args:
        compiled: The compiled cell. Its inference kernel must read only x and parameters.
        params: The parameters in order, each contiguous.
    """

    def __init__(self, compiled: NativeCell, params: Sequence[Tensor]) -> None:
        self.compiled = compiled
        self.params = list(params)
        self._packed: dict[tuple[Any, ...], tuple[list[Tensor], list[bool]]] = {}

    def packed(self, arguments: CallArguments) -> tuple[list[Tensor], list[bool]]:
        """Return the memory for packed matrices, and a list that is non-empty once they are packed.

        Args:
            arguments: The arguments of a call. Calls that pack their matrices alike share the memory.
        """
        threads = 1 if arguments.strategy == Strategy.SHARE_ROWS else arguments.threads
        key = (arguments.rows <= constants()["MAX_ROWS_WIDE_STRIPS"], threads)
        if key not in self._packed:
            buffers = self.compiled.inference.pack_buffers()
            matrices = [torch.empty(size, dtype=self.compiled.dtype, device="cpu") for _, size in buffers]
            self._packed[key] = matrices, []
        return self._packed[key]


class PrepackedKernel:
    """The inference kernel of one direction of a layer, prepared for inputs of one shape.

    Args:
        weights: The weights of the cell.
        steps: Number of time steps.
        batch: Batch size.
        reverse: Whether to run from the last time step to the first.
        threads: Maximum number of threads.
    """

    def __init__(self, weights: Weights, steps: int, batch: int, reverse: bool, threads: int) -> None:
        compiled, kernel = weights.compiled, weights.compiled.inference
        inputs = compiled.direct_inputs
        assert inputs is not None
        self.widths = compiled.widths
        self._state_bytes = [batch * width * compiled.dtype.itemsize for width in compiled.widths]
        states = len(compiled.widths)
        addresses = [0 if k is None else weights.params[k].data_ptr() for k in inputs]
        addresses += [0] * (3 * states)
        layout = Layout(steps, batch)
        self._call = call = kernel.call_addresses(
            addresses, layout, reverse, threads, 0, [weights], packed=True
        )
        matrices, self._is_packed = weights.packed(call.arguments)
        for (index, _), matrix in zip(kernel.pack_buffers(), matrices, strict=True):
            call.pointers[index] = matrix.data_ptr()
        x_addresses = [k for k, param in enumerate(inputs) if param is None]
        self._x = [index for k in x_addresses for index in kernel.pointer_indices(k)]
        first = len(inputs)  # of the initial states, followed by the outputs and the final states
        self._initial = [kernel.pointer_indices(first + k)[0] for k in range(states)]
        self._output = kernel.pointer_indices(first + states)[0]
        self._final = [kernel.pointer_indices(first + 2 * states + k)[0] for k in range(states)]
        self._packed_arguments = CallArguments.from_buffer_copy(call.arguments)
        self._packed_arguments.packed = 1
        self._function = function(call.run)

    def run(self, x: int, initial: Sequence[int] | None, output: int, final: Sequence[int]) -> None:
        """Run the kernel of a layer with one direction. The arguments are addresses, see :meth:`call`.

        Raises:
            MemoryError: If there is not enough memory for the kernel's buffers.
        """
        pointers = self._call.pointers[:]
        self._fill(pointers, x, initial, output, final)
        if not self._function(ctypes.addressof(self._arguments()), pointers.buffer_info()[0]):
            raise MemoryError(NO_MEMORY)
        if not self._is_packed:
            self.mark_packed()

    def bind(self, initial: Sequence[int], final: Sequence[int]) -> BoundKernel:
        """Return the kernel with fixed memory for initial and final states; addresses as in :meth:`run`."""
        pointers = self._call.pointers[:]
        self._fill(pointers, 0, initial, 0, final)
        return BoundKernel(self, pointers)

    def call(
        self, x: int, initial: Sequence[int] | None, output: int, final: Sequence[int], direction: int
    ) -> KernelCall:
        """Prepare a call. All arguments but the last are addresses of contiguous memory.

        After the call, :meth:`mark_packed` must be called.

        Args:
            x: The input, ``(time, batch, input)``.
            initial: Initial states of all directions of all layers, each ``(directions, batch, width)``; None
                means zeros.
            output: Memory for the output, ``(time, batch, width)``.
            final: Memory for the final states of all directions, with the shapes of ``initial``.
            direction: Index of this direction.
        """
        call = self._call
        pointers = call.pointers[:]
        if initial is not None:
            initial = [part + direction * size for part, size in zip(initial, self._state_bytes, strict=True)]
        final = [part + direction * size for part, size in zip(final, self._state_bytes, strict=True)]
        self._fill(pointers, x, initial, output, final)
        return KernelCall(call.run, self._arguments(), pointers, call.alive)

    def _arguments(self) -> CallArguments:
        return self._packed_arguments if self._is_packed else self._call.arguments

    def _fill(
        self,
        pointers: array.array[int],
        x: int,
        initial: Sequence[int] | None,
        output: int,
        final: Sequence[int],
    ) -> None:
        for index in self._x:
            pointers[index] = x
        pointers[self._output] = output
        for index, address in zip(self._final, final):  # noqa: B905  # the keyword would cost 0.1 microseconds
            pointers[index] = address
        if initial is not None:
            for index, address in zip(self._initial, initial):  # noqa: B905
                pointers[index] = address

    def mark_packed(self) -> None:
        """Record that a call has packed the matrices, so that later calls needn't."""
        if not self._is_packed:
            self._is_packed.append(True)


class BoundKernel:
    """A prepacked kernel with fixed memory for its states. Only input and output change from call to call."""

    __slots__ = ("_address", "_arguments", "_function", "_kernel", "_output", "_pointers", "_x")

    def __init__(self, kernel: PrepackedKernel, pointers: array.array[int]) -> None:
        self._kernel, self._pointers, self._address = kernel, pointers, pointers.buffer_info()[0]
        self._arguments = ctypes.addressof(kernel._packed_arguments)
        self._x, self._output, self._function = kernel._x, kernel._output, kernel._function

    def run(self, x: int, output: int) -> None:
        """Run the kernel. Don't call it from two threads at once.

        Args:
            x: Address of the input, see :meth:`PrepackedKernel.call`.
            output: Address of the memory for the output.

        Raises:
            MemoryError: If there is not enough memory for the kernel's buffers.
        """
        pointers = self._pointers
        for index in self._x:
            pointers[index] = x
        pointers[self._output] = output
        kernel = self._kernel
        arguments = self._arguments if kernel._is_packed else ctypes.addressof(kernel._arguments())
        if not self._function(arguments, self._address):
            raise MemoryError(NO_MEMORY)
        kernel.mark_packed()
