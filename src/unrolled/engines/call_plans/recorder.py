"""Record the launches of a call, and where their addresses come from, without running them."""

from __future__ import annotations

import array
import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines._torch_private import EagerDispatchMode, tree_leaves
from unrolled.engines.call_plans.launches import (
    BulkLaunch,
    Copy,
    KernelLaunch,
    Launch,
    LaunchList,
    Place,
    aligned,
)
from unrolled.engines.native.launch_observer import observe_launches

aten = torch.ops.aten
_ALLOCATIONS = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
}  # fmt: skip
_ZEROS = {aten.zeros, aten.zeros_like, aten.new_zeros}
_NUMBERS = 11  # of an operation of run_bulk
_ADDRESSES = (0, 2, 5)  # which of them are addresses

MAX_SCRATCH = 16 * 2**20  # bytes; glibc asks the system for blocks above 32 MiB anew in each call


class NotRecordableError(Exception):
    """A call does something else than to allocate and copy tensors and to launch kernels."""


class CallRecorder(EagerDispatchMode):  # type: ignore[no-untyped-call]
    """Records what a call does in :meth:`recording`. Kernels are not run.

    Args:
        inputs: The inputs of the call, each contiguous in memory of its own. Their values don't matter.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = list(inputs)  # all of them stay alive, so that each address belongs to one tensor
        self._storages = sorted(map(_storage, inputs))
        self._inputs = {start for start, _ in self._storages}
        self._launches: list[KernelLaunch | BulkLaunch | tuple[int, int | None, int]] = []
        self._pointers: list[list[int]] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls in this block."""
        with torch.inference_mode(False), torch.no_grad(), self, observe_launches(self):
            yield

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in _ALLOCATIONS:
            self._add(result)
        elif packet in _ZEROS:
            self._add(result)
            self._copy(result.data_ptr(), None, result.nbytes)
        elif packet is aten.clone:
            self._concatenate(result, [args[0]])
        elif packet in (aten.cat, aten.stack) and (args[1] if len(args) > 1 else 0) == 0 and not kwargs:
            self._concatenate(result, args[0])
        elif function._schema.is_mutable or not all(map(self._is_known, tree_leaves(result))):
            raise NotRecordableError(f"it computes {function}")
        return result

    def launch(self, calls: Sequence[Any]) -> None:
        """Record a kernel call; see :class:`LaunchObserver`."""
        if len(calls) != 1:
            raise NotRecordableError("it launches several kernels at the same time")
        [call] = calls
        self._launches.append(KernelLaunch(call.run, call.arguments, (), call.alive[-1]))
        self._pointers.append(list(call.pointers))

    def run_bulk(self, function: int, operations: array.array[int]) -> None:
        """Record operations; see :class:`LaunchObserver`."""
        self._launches.append(BulkLaunch(function, tuple(operations), ()))
        self._pointers.append([])

    def finish(self, slots: Sequence[Sequence[Tensor]], max_scratch: int | None = None) -> LaunchList:
        """Return the launches so far, and begin a new list.

        Args:
            slots: The tensors in each slot but slot 0, which is null. Several tensors of a slot lie one after
                another, each at a multiple of 64 bytes. All other tensors that the launches use become
                scratch memory in another slot at the end.
            max_scratch: How many bytes of it there may be.

        Raises:
            NotRecordableError: If two slots have the same memory, a launch uses memory of another tensor, or
                there would be too much scratch memory.
        """
        places: dict[int, tuple[int, int]] = {}  # of storages, by their addresses
        for slot, tensors in enumerate(slots, 1):
            offset = 0
            for tensor in tensors:
                start, end = _storage(tensor)
                if start in places:
                    raise NotRecordableError("two of its tensors share their memory")
                places[start] = slot, offset
                offset += aligned(end - start)
        scratch_slot, scratch = 1 + len(slots), 0

        def place(index: int, address: int) -> Place:
            nonlocal scratch
            if not address:
                return Place(index, 0, 0)
            start, end = self._storage_of(address)
            if start not in places:
                places[start] = scratch_slot, scratch
                scratch += aligned(end - start)
            slot, offset = places[start]
            return Place(index, slot, offset + address - start)

        launches: list[Launch] = []
        for launch, pointers in zip(self._launches, self._pointers, strict=True):
            if isinstance(launch, KernelLaunch):
                found = tuple(place(index, address) for index, address in enumerate(pointers))
                launches.append(KernelLaunch(launch.run, launch.arguments, found, launch.owner))
            elif isinstance(launch, BulkLaunch):
                indices = [first + k for first in range(0, len(launch.numbers), _NUMBERS) for k in _ADDRESSES]
                numbers = tuple(0 if k in indices else n for k, n in enumerate(launch.numbers))
                found = tuple(place(index, launch.numbers[index]) for index in indices)
                launches.append(BulkLaunch(launch.run, numbers, found))
            else:
                target, source, size = launch
                launches.append(Copy(place(0, target), None if source is None else place(0, source), size))
        self.clear()
        if max_scratch is not None and scratch > max_scratch:
            raise NotRecordableError("it needs much scratch memory")
        return LaunchList(launches, scratch)

    def is_whole(self, tensor: Tensor) -> bool:
        """Return whether a tensor is all of the memory that the call has allocated for it."""
        start, end = _storage(tensor)
        new = start not in self._inputs
        return new and tensor.data_ptr() == start and tensor.nbytes == end - start

    def clear(self) -> None:
        """Forget the launches so far."""
        self._launches, self._pointers = [], []

    def other_allocations(self, values: Sequence[Any], known: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that the call has allocated for some values, apart from known ones.

        Args:
            values: Tensors, or views of tensors. Others are ignored.
            known: Tensors to leave out. Inputs are left out, too.
        """
        left_out = self._inputs | {_storage(tensor)[0] for tensor in known}
        wanted = dict.fromkeys(_storage(value)[0] for value in values if isinstance(value, Tensor))
        allocated = {_storage(tensor)[0]: tensor for tensor in self._tensors}
        return [allocated[start] for start in wanted if start not in left_out and start in allocated]

    @staticmethod
    def slot_size(tensors: Sequence[Tensor]) -> int:
        """Return the number of bytes of a slot with several tensors, see :meth:`finish`."""
        return sum(aligned(end - start) for start, end in map(_storage, tensors))

    def _add(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)
        bisect.insort(self._storages, _storage(tensor))

    def _concatenate(self, result: Tensor, parts: Sequence[Tensor]) -> None:
        if not all(part.is_contiguous() for part in (result, *parts)):
            raise NotRecordableError("it copies strided tensors")
        self._add(result)
        address = result.data_ptr()
        for part in parts:
            self._copy(address, part.data_ptr(), part.nbytes)
            address += part.nbytes

    def _copy(self, target: int, source: int | None, size: int) -> None:
        if size:
            self._launches.append((target, source, size))
            self._pointers.append([])

    def _is_known(self, value: Any) -> bool:
        """Return whether a value isn't a tensor, or is a view of a known tensor."""
        return not isinstance(value, Tensor) or _storage(value) in self._storages

    def _storage_of(self, address: int) -> tuple[int, int]:
        index = bisect.bisect_right(self._storages, (address, 2**64)) - 1
        if index >= 0 and address < self._storages[index][1]:
            return self._storages[index]
        raise NotRecordableError("it reads a tensor that is neither an input nor a parameter")


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's storage, and the address of its end."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
