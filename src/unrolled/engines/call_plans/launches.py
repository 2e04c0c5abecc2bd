"""The launches of a recorded call, with places for the addresses of its tensors."""

from __future__ import annotations

import array
import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unrolled.engines.native.kernel import NO_MEMORY, function
from unrolled.engines.threads import thread_count

_ALIGNMENT = 64  # bytes, a cache line
_SMALL = 2**16  # bytes; scratch memory of this size is kept for the next call of the thread
_bulk_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
_thread = threading.local()


@dataclass(frozen=True)
class Place:
    """A number of a launch that is an address.

    Attributes:
        index: Index of the number.
        slot: Index among the addresses of a call. Slot 0 is null.
        offset: Distance from the address in the slot, in bytes.
    """

    index: int
    slot: int
    offset: int


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel; ``places`` are all of its pointers.

    Attributes:
        run: Address of the kernel.
        arguments: Its arguments, apart from its pointers.
        places: Its pointers.
        owner: The object that the memory of the arguments belongs to.
    """

    run: int
    arguments: Any
    places: tuple[Place, ...]
    owner: Any

    def prepared(self) -> Callable[[list[int]], None]:
        """Return a function that runs it, given the addresses of a call."""
        run, arguments = function(self.run), ctypes.addressof(self.arguments)
        sources = [(place.slot, place.offset) for place in self.places]

        def launch(addresses: list[int]) -> None:
            pointers = array.array("q", [addresses[slot] + offset for slot, offset in sources])
            if not run(arguments, pointers.buffer_info()[0]):
                raise MemoryError(NO_MEMORY)

        return launch


@dataclass(frozen=True)
class BulkLaunch:
    """Matrix products and sums of columns.

    Attributes:
        run: Address of ``run_bulk`` in ``products.cpp``.
        numbers: Its operations, with 0 for addresses.
        places: The addresses.
    """

    run: int
    numbers: tuple[int, ...]
    places: tuple[Place, ...]

    def prepared(self) -> Callable[[list[int]], None]:
        """Return a function that runs them, given the addresses of a call."""
        run, template, count = _bulk_type(self.run), array.array("q", self.numbers), len(self.numbers) // 11
        sources = [(place.index, place.slot, place.offset) for place in self.places]
        threads = thread_count()  # a plan is for one number of threads

        def launch(addresses: list[int]) -> None:
            numbers = template[:]
            for index, slot, offset in sources:
                numbers[index] = addresses[slot] + offset
            if run(numbers.buffer_info()[0], count, threads):
                raise MemoryError(NO_MEMORY)

        return launch


@dataclass(frozen=True)
class Copy:
    """A copy of bytes, or zeros.

    Attributes:
        target: Where to.
        source: Where from. None: zeros.
        size: Number of bytes.
    """

    target: Place
    source: Place | None
    size: int

    def prepared(self) -> Callable[[list[int]], None]:
        """Return a function that copies, given the addresses of a call."""
        target, source, size = self.target, self.source, self.size

        def copy(addresses: list[int]) -> None:
            address = addresses[target.slot] + target.offset
            if source is None:
                ctypes.memset(address, 0, size)
            else:
                ctypes.memmove(address, addresses[source.slot] + source.offset, size)

        return copy


Launch = KernelLaunch | BulkLaunch | Copy


class LaunchList:
    """Launches that run one after another.

    Args:
        launches: The launches. Slot 0 is null. The last slot is the scratch memory.
        scratch: Number of bytes of scratch memory.

    Attributes:
        launches: The launches.
        scratch: Number of bytes of scratch memory.
    """

    def __init__(self, launches: Sequence[Launch], scratch: int) -> None:
        self.launches, self.scratch = tuple(launches), scratch
        self._prepared = [launch.prepared() for launch in launches]

    def run(self, addresses: list[int]) -> None:
        """Run the launches.

        Args:
            addresses: The addresses of all slots but the last.

        Raises:
            MemoryError: If there is not enough memory.
        """
        if not self.scratch:
            for launch in self._prepared:
                launch(addresses)
            return
        if self.scratch > _SMALL:
            memory = torch.empty(self.scratch, dtype=torch.uint8, device="cpu")
            addresses.append(memory.data_ptr())
            for launch in self._prepared:
                launch(addresses)
            return
        # Taken away meanwhile, so that a call inside this one, by a finalizer, doesn't write to it.
        scratch = _thread.__dict__.pop("scratch", None) or _Scratch()
        addresses.append(scratch.address)
        for launch in self._prepared:
            launch(addresses)
        _thread.scratch = scratch


@dataclass(frozen=True)
class RecordedFunction:
    """Recorded launches as a function of tensors.

    Attributes:
        dtype: Dtype of all tensors.
        inputs: Shapes of the inputs.
        results: Shapes of the results.
        launches: The launches. Their slots are null, the inputs, the results and scratch memory.
    """

    dtype: torch.dtype
    inputs: Sequence[torch.Size]
    results: Sequence[torch.Size]
    launches: LaunchList


class _Scratch:
    """Scratch memory of one thread.

    Attributes:
        address: Its address.
    """

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_SMALL + _ALIGNMENT)
        self.address = -(-ctypes.addressof(self._memory) // _ALIGNMENT) * _ALIGNMENT


def aligned(size: int) -> int:
    """Return a number of bytes, rounded up to whole cache lines."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
