"""Checks of the arguments of the operators. They also take fake tensors, whose sizes may be symbolic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from unrolled.engines import memory
from unrolled.engines._torch_private import check
from unrolled.engines.compiler.batch_layout import batch_sizes_error
from unrolled.engines.compiler.ir import BATCH_SYMBOL

INVALID_TEXT = (
    "the last argument of unrolled's operators should be the text that a layer has put into the graph, which "
    "describes one or two directions, got {!r}"
)
_DTYPES = (torch.float32, torch.float64)

_Expected = tuple[str, tuple[Any, ...]]  # what a tensor is, and its shape; None is a size that isn't known


def check_dtype(dtype: torch.dtype) -> None:
    """Raise RuntimeError if the operators don't support the dtype of x."""
    _check(dtype in _DTYPES, lambda: f"expected x of dtype float32 or float64, got {dtype}")


def check_count(what: str, tensors: Sequence[Any], count: int) -> None:
    """Raise RuntimeError if the number of tensors is wrong."""
    _check(len(tensors) == count, lambda: f"expected {count} {what}, got {len(tensors)}")


def check_memory(tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a tensor has no values in memory on the CPU."""
    if memory.all_readable(tensors):
        return
    memory.check_not_freed(tensors)
    for tensor in tensors:
        _check(tensor.is_cpu, lambda: f"expected tensors on the CPU, got one on {tensor.device}")  # noqa: B023


def read_sizes(sizes: Tensor, x: Tensor) -> list[int]:
    """Return batch sizes as a list.

    Raises:
        RuntimeError: If they don't fit the rows of the packed data ``x``.
    """
    _check_sizes_tensor(sizes, x)
    values: list[int] = sizes.tolist()
    error = batch_sizes_error(values, x.shape[0] if x.dim() else 0)
    _check(not error, lambda: error)
    return values


def check_forward(directions: Sequence[Any], x: Tensor, sizes: Tensor | None, batch: Any) -> None:
    """Check the arguments of a forward pass.

    Args:
        directions: The directions with their tensors, each a :class:`operators.SerializedDirection`.
        x: Input of shape ``(time, batch, features)``, or ``(sum of sizes, features)``.
        sizes: The batch sizes if the input is packed, else None.
        batch: If the input is packed, the number of rows of the states. None if it isn't known.

    Raises:
        ValueError: If the text doesn't have the names of the cell's tensor attributes.
        RuntimeError: If a tensor has the wrong shape, dtype or device.
    """
    check_dtype(x.dtype)
    features = directions[0].cell.features
    if sizes is None:
        _check_tensors([x], [("x", (None, None, features))], x)
        _check(x.shape[0] > 0, lambda: "expected x with at least one time step, got none")
        batch = x.shape[1]
    else:
        _check_tensors([x], [("the packed x", (None, features))], x)
        _check_sizes_tensor(sizes, x)
    for direction in directions:
        captured = direction.compiled(x).captured
        attributes: dict[str, Any] = {
            name: node.meta["val"] for name, node in captured.tensor_attributes.items()
        }
        if direction.tensor_attributes != tuple(attributes):
            raise ValueError(INVALID_TEXT.format(direction.tensor_attributes))
        expected: list[_Expected] = []
        if direction.stateful:
            states = direction.cell.state_sizes().items()
            expected += [(f"the state {name}", (batch, size)) for name, size in states]
        expected += [(f"the parameter {name}", shape) for name, shape in direction.cell.shapes().items()]
        count = len(direction.differentiable)
        _check_tensors(direction.tensors[:count], expected, x)
        for (name, value), tensor in zip(attributes.items(), direction.tensors[count:], strict=True):
            _check_tensor(tensor, f"the attribute {name}", tuple(value.shape), value.dtype, x.device)


def check_backward(
    directions: Sequence[Any],
    grads: Sequence[Tensor],
    outputs_and_saved: Sequence[Tensor],
    x: Tensor,
    sizes: Tensor | None,
    groups: int,
    batch: Any = None,
) -> None:
    """Check the arguments that only a backward pass has.

    Raises:
        RuntimeError: If a tensor has the wrong shape, dtype or device, or their number is wrong.
    """
    batch, rows = x.shape[1] if sizes is None else batch, x.shape[:-1]
    expected: list[_Expected] = []
    for direction in directions:
        expected.append(("the gradient of an output", (*rows, direction.widths[0])))
        expected += [("the gradient of a final state", (batch, size)) for size in direction.widths]
    check_count("gradients of outputs and final states", grads, len(expected))
    _check_tensors(grads, expected, x)
    expected = [("an output", (*rows, direction.widths[0])) for direction in directions]
    dtypes = [x.dtype for _ in directions]
    for direction in directions:
        for shape, dtype in direction.compiled(x).saved_tensors:
            expected.append(("a saved value", (*rows, shape[-1]) if BATCH_SYMBOL in shape else shape))
            dtypes.append(dtype)
    check_count("outputs and saved values", outputs_and_saved, len(expected))
    _check_tensors(outputs_and_saved, expected, x, dtypes)
    is_valid = groups == 1 or (groups > 1 and sizes is None and batch % groups == 0)
    _check(
        is_valid, lambda: f"expected groups to divide the batch, and 1 if the input is packed, got {groups}"
    )


def check_draw(x: Tensor, seed: Tensor, sizes: Tensor | None, order: Tensor | None) -> None:
    """Check the arguments of the operator that draws random numbers for each row of x.

    Raises:
        RuntimeError: If a tensor has the wrong shape, dtype or values, or its memory was freed.
    """
    check_dtype(x.dtype)
    memory.check_not_freed([part for part in (x, seed, sizes, order) if part is not None])
    dims = 3 if sizes is None else 2
    _check(x.dim() == dims, lambda: f"expected x with {dims} dimensions, got {x.dim()}")
    _check_tensor(seed, "the seed", (), torch.int64, seed.device)
    batch = x.shape[1] if sizes is None else read_sizes(sizes, x)[0]
    if order is not None:
        _check_tensor(order, "the order", (batch,), torch.int64, order.device)
        is_in_range = not batch or 0 <= int(order.min()) <= int(order.max()) < batch
        _check(is_in_range, lambda: f"expected the order to contain rows from 0 to {batch - 1}")


def _check_tensors(
    tensors: Sequence[Tensor],
    expected: Sequence[_Expected],
    like: Tensor,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Check the shapes and dtypes of tensors, and that they are on the device of ``like``.

    Args:
        tensors: The tensors.
        expected: What each tensor is, and its shape.
        like: A tensor with the right device.
        dtypes: The dtype of each tensor. If None, that of ``like``.
    """
    for tensor, (name, shape), dtype in zip(tensors, expected, dtypes or repeat(like.dtype), strict=False):
        _check_tensor(tensor, name, shape, dtype, like.device)


def _check_tensor(
    tensor: Tensor, name: str, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> None:
    def message() -> str:
        kind = f"{dtype} tensor on {device}"
        sizes = ", ".join("any size" if size is None else str(size) for size in shape)
        got = f"{tensor.dtype} on {tensor.device} with shape {tuple(tensor.shape)}"
        return f"expected {name} to be a {kind}, with shape ({sizes}), got {got}"

    _check(tensor.dtype is dtype and tensor.device == device and tensor.dim() == len(shape), message)
    for actual, size in zip(tensor.shape, shape, strict=True):
        _check(size is None or actual == size, message)


def _check_sizes_tensor(sizes: Tensor, x: Tensor) -> None:

    def message() -> str:
        got = f"{sizes.dtype} with {sizes.dim()} dimensions on {sizes.device}"
        return f"expected sizes to be a one-dimensional int64 tensor on the CPU, got {got}"

    has_place = sizes.is_cpu or (sizes.is_meta and x.is_meta)
    _check(has_place and sizes.dtype is torch.int64 and sizes.dim() == 1, message)


def _check(condition: Any, message: Callable[[], str]) -> None:
    """Raise RuntimeError if a condition doesn't hold; a symbolic one becomes a check of the graph."""
    if condition is not True:
        check(condition, message)  # type: ignore[no-untyped-call]
