"""A stand-in for the part of Triton that kernels of the GPU engine use, on torch's CPU tensors.

It runs the emitted source itself, one program after another. It checks what Triton or a GPU would not
forgive: reads and writes out of bounds, sizes that are no powers of two, products of tiles that are too
small, stores that broadcast their address, and tensors on more than one device.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from helpers.triton_grid import (
    Pointer,
    arrivals,
    pointer_to,
    program,
    run_in_processes,
    run_in_threads,
    wait_for_change,
)

_SMALLEST_FACTOR = 16  # of a tl.dot


class TooLargeError(Exception):
    """A kernel is too large for a device."""


class OutOfBoundsError(AssertionError):
    """A kernel reads or writes outside of a tensor."""


def _indices(pointer: Pointer, mask: Any, what: str) -> tuple[Tensor, Tensor]:
    """Return the indices of a pointer, and a mask of the same shape, after a check of the bounds."""
    index = torch.as_tensor(pointer.index)
    keep = torch.as_tensor(True if mask is None else mask)
    shape = index.shape
    index, keep = torch.broadcast_tensors(index, keep)
    if what == "write" and index.shape != shape:
        raise AssertionError(f"a store broadcasts its address from {tuple(shape)} to {tuple(index.shape)}")
    used = index[keep]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= pointer.base.numel()):
        raise OutOfBoundsError(
            f"{what} of elements {int(used.min())} to {int(used.max())} of {pointer.base.numel()}"
        )
    return index, keep


def load(pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Tensor:
    assert cache_modifier in ("", ".cg")
    index, keep = _indices(pointer, mask, "read")
    filled = torch.full((), torch.nan if other is None else other).to(pointer.base.dtype)
    if pointer.base.is_meta:
        return filled.expand(index.shape).clone()
    return torch.where(keep, pointer.base[torch.where(keep, index, 0)], filled)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    index, keep = _indices(pointer, mask, "write")
    value = torch.as_tensor(value, dtype=pointer.base.dtype).broadcast_to(index.shape)
    if not pointer.base.is_meta:
        pointer.base[index[keep]] = value[keep]


def atomic_add(pointer: Pointer, value: int, sem: str) -> Tensor:
    """Add a number to one element, and return what it was. Adding 0 waits until it changes."""
    assert sem in ("acquire", "acq_rel")
    _indices(pointer, None, "write")
    with arrivals:
        if not value:
            return wait_for_change(pointer)
        old = pointer.base[pointer.index].clone()
        pointer.base[pointer.index] += value
        arrivals.notify_all()
        return old


def dot(
    a: Tensor, b: Tensor, acc: Tensor | None = None, input_precision: str | None = None, out_dtype: Any = None
) -> Tensor:
    assert a.dim() == b.dim() == 2, f"a product of {tuple(a.shape)} and {tuple(b.shape)}"
    assert min(*a.shape, *b.shape) >= _SMALLEST_FACTOR, f"a product of {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype
    assert out_dtype == (torch.float32 if a.dtype in (torch.float16, torch.bfloat16) else a.dtype)
    assert input_precision in ("tf32", "tf32x3", "ieee")
    product = a.to(out_dtype) @ b.to(out_dtype)
    if acc is None:
        return product
    assert acc.shape == product.shape
    return acc + product


def arange(start: int, end: int) -> Tensor:
    _check_size(end - start)
    return torch.arange(start, end, dtype=torch.int32)


def _check_size(size: int) -> None:
    assert size > 0, f"a tile has {size} columns"
    assert size & (size - 1) == 0, f"{size} is no power of two"


def full(shape: tuple[int, ...], value: Any, dtype: torch.dtype) -> Tensor:
    for size in shape:
        _check_size(size)
    return torch.full(shape, value, dtype=dtype)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    dtypes = {value.dtype for value in (a, b) if isinstance(value, Tensor)} or {torch.float32}
    assert len(dtypes) == 1, f"a choice between {dtypes}"
    dtype = dtypes.pop()
    return torch.where(condition, torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype))


def _reduce(x: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor], keep_dims: bool) -> Tensor:
    result = functools.reduce(combine, x.unbind(axis))
    return result.unsqueeze(axis) if keep_dims else result


def _greatest(x: Tensor, axis: int, keep_dims: bool = False) -> Tensor:
    return _of_numbers(x, -1).amax(axis, keepdim=keep_dims)


def _least(x: Tensor, axis: int, keep_dims: bool = False) -> Tensor:
    return _of_numbers(x, 1).amin(axis, keepdim=keep_dims)


def _of_numbers(x: Tensor, sign: int) -> Tensor:
    """Return a tensor without NaN, which a GPU's maximum and minimum ignore."""
    return torch.where(x != x, sign * torch.inf, x) if x.is_floating_point() else x


def _elementwise(function: Any) -> Callable[..., Tensor]:
    def apply(*operands: Any) -> Tensor:
        dtype = next(one.dtype for one in operands if isinstance(one, Tensor))
        result: Tensor = function(*(torch.as_tensor(one, dtype=dtype) for one in operands))
        return result

    return apply


def _broadcast_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    for size in shape:
        _check_size(size)
    return x.broadcast_to(shape)


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x.double() * y.double() + z.double()).to(x.dtype)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) else x


def _language() -> types.ModuleType:
    """Return what stands for ``triton.language``."""
    module = types.ModuleType("triton.language")
    functions = {
        "maximum": torch.fmax, "minimum": torch.fmin,
        **{name: getattr(torch, name) for name in ("exp", "exp2", "log", "log2", "sqrt", "sin", "cos")},
        **{name: getattr(torch, name) for name in ("erf", "abs", "floor", "ceil")},
    }  # fmt: skip
    vars(module).update({name: _elementwise(function) for name, function in functions.items()})
    vars(module).update(
        load=load,
        store=store,
        dot=dot,
        arange=arange,
        full=full,
        where=where,
        zeros=lambda shape, dtype: full(shape, 0, dtype),
        broadcast_to=_broadcast_to,
        cast=_cast,
        fma=_fma,
        sum=lambda x, axis, keep_dims=False: x.sum(axis, keepdim=keep_dims),
        max=_greatest,
        min=_least,
        reduce=_reduce,
        # With dimensions, because tensors without any don't count in torch's choice of a dtype.
        program_id=lambda axis: torch.tensor([[program.part if axis else program.number]], dtype=torch.int32),
        atomic_add=atomic_add,
        debug_barrier=lambda: None,
        range=lambda end, num_stages: _range(end),
        constexpr=lambda value: value,
        **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")},
        **{name: getattr(torch, name) for name in ("int32", "int64")},
    )
    return module


class Kernel:
    """A function with ``triton.jit``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(
        self,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int,
        enable_fp_fusion: bool,
        launch_cooperative_grid: bool = False,
        **constants: Any,
    ) -> None:
        """Run the programs of a grid. If tensors are on the meta device, only the last one.

        Programs that share columns run in threads, at the same time.
        """
        tensors = [value for value in args if isinstance(value, Tensor)]
        devices = {tensor.device for tensor in tensors}
        assert len(devices) == 1, f"a launch with tensors on {devices}"
        pointers = [pointer_to(value) if isinstance(value, Tensor) else value for value in args]
        is_meta = any(tensor.is_meta for tensor in tensors)
        if program.runtime is not None and program.runtime.processes and launch_cooperative_grid:
            run_in_processes(self.function, grid, args, constants)
            return
        for number in range(grid[0] - 1 if is_meta else 0, grid[0]):
            if launch_cooperative_grid:
                run_in_threads(self.function, number, grid[1], pointers, constants)
                continue
            for part in range(*grid[1:] or (1,)):
                program.number, program.part = number, part
                self.function(*pointers, **constants)


def jit(function: Callable[..., Any] | None = None, do_not_specialize: Any = None) -> Any:
    return Kernel if function is None else Kernel(function)


def _range(*bounds: Any) -> range:
    """Return a range, and record its length if it is that of the time steps."""
    if len(bounds) == 1 and program.runtime is not None:
        program.runtime.steps.append(int(bounds[0]))
    return range(*(int(bound) for bound in bounds))


@functools.cache
def modules() -> dict[str, types.ModuleType]:
    """Return the modules that kernels import."""
    triton, language = types.ModuleType("triton"), _language()
    vars(triton).update(jit=jit, language=language)
    return {"triton": triton, "triton.language": language}


@functools.cache
def namespace(source: str) -> dict[str, Any]:
    """Run a source, and return its functions."""
    result: dict[str, Any] = {"range": _range}
    with mock.patch.dict(sys.modules, modules()):
        exec(compile(source, "<kernel>", "exec"), result)
    return result


@dataclass
class StandIn:
    """A runtime, see :class:`unrolled.engines.gpu.launch.Runtime`.

    Attributes:
        sources: The sources of the kernels that were launched.
        devices: The device of each launch.
        steps: The number of time steps of each program.
        refused: Sources that contain this text are too large for the device.
        capturing: Whether a CUDA graph is being captured.
        programs: The number of multiprocessors of the device.
        processes: Whether programs that share columns run in processes of their own. Otherwise in threads.
    """

    sources: list[str] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    refused: str = "nothing"
    capturing: bool = False
    programs: int = 3
    processes: bool = False

    def reset(self) -> None:
        """Forget all launches."""
        vars(self).update(vars(StandIn()))

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def load(self, source: str) -> _Recorded:
        return _Recorded(self, source)

    def is_capturing(self) -> bool:
        return self.capturing

    def multiprocessors(self, device: torch.device) -> int:
        return self.programs

    def is_too_large(self, error: Exception) -> bool:
        return isinstance(error, TooLargeError)

    def compilation_error(self, error: Exception) -> str | None:
        return "Triton can't compile its kernel" if isinstance(error, TooLargeError) else None

    @contextlib.contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        yield


@dataclass
class _Recorded:
    """A kernel whose launches are recorded."""

    runtime: StandIn
    source: str

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        if self.runtime.refused in self.source:
            raise TooLargeError
        self.runtime.sources.append(self.source)
        program.runtime = self.runtime
        kernel: Kernel = namespace(self.source)["kernel"]
        return kernel[grid]
