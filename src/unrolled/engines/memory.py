"""Whether tensors have memory that compiled code can read."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.engines._torch_private import has_storage, is_functional_tensor

LOW_ADDRESS = 2**40  # more bytes than any tensor has, and lower than most addresses


def all_readable(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors, none of a subclass, have their elements in memory, or have no elements.

    Sparse tensors, tensors wrapped by a transform, and zeros as autograd represents them have none.
    """
    try:
        if min([tensor.data_ptr() for tensor in tensors], default=LOW_ADDRESS) > LOW_ADDRESS:
            return True
    except RuntimeError:
        return False
    # Without memory, the address is the offset in the storage.
    return all(
        tensor.data_ptr() > tensor.storage_offset() * tensor.itemsize or not tensor.numel()
        for tensor in tensors
    )


def memory_of(tensor: Tensor) -> bytes | None:
    """Return a copy of a CPU tensor's memory, from its first to its last element. None if it has none.

    It shows changes through ``.data`` and NumPy, which have no version. It calls no operation that a graph
    would record.
    """
    if type(tensor) not in (Tensor, Parameter) or not tensor.is_cpu or not all_readable([tensor]):
        return None
    steps = (stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = 1 + sum(steps) if tensor.numel() else 0
    return ctypes.string_at(tensor.data_ptr(), count * tensor.itemsize)


def check_not_freed(tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError if the memory of a tensor was freed. torch's own operations would crash."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if (
            type(tensor) in (Tensor, Parameter)
            and has_storage(tensor)
            and not (tensor.is_meta or is_functional_tensor(tensor) or tensor._is_zerotensor())
            and tensor.untyped_storage().nbytes() == 0 < tensor.numel()
        ):
            raise RuntimeError(
                "the memory of a tensor was freed (untyped_storage().resize_(0)): restore it before the call"
            )


def check_dense(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError, beginning with a name, if a tensor is nested or sparse or has another layout."""
    for tensor in tensors:
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested tensor" if tensor.is_nested else f"tensor with layout {tensor.layout}"
            raise RuntimeError(f"{name}: Expected the input and the states to be dense, got a {kind}")


def check_meta(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError, beginning with a name, if only some tensors are on the meta device.

    torch's own operations would return uninitialized memory.
    """
    if len({tensor.is_meta for tensor in tensors}) > 1:
        raise RuntimeError(
            f"{name}: Expected all of the input, the states and the parameters to be on the meta device, or "
            "none of them: move them with .to(), or parameters with .to_empty()"
        )


def materialize(tensor: Tensor) -> Tensor:
    """Return a tensor with its values in memory if it is lazily zero or lazily negated, else the tensor."""
    if tensor.is_neg():
        return tensor.resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor
