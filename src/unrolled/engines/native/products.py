"""Matrix products over all time steps at once, and what the loops take from the same library."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from unrolled.engines.native import build

_SCALARS = {torch.float32: "float", torch.float64: "double"}


class Products:
    """The compiled products of one dtype.

    Attributes:
        table: the address of the functions that a loop calls.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        library = build.load(_source(dtype))
        self.team = ctypes.cast(_team().team_run, ctypes.c_void_p)
        self.table = ctypes.create_string_buffer(64)
        library.products(self.table, self.team)
        self._whole = library.whole_product
        pointer, number = ctypes.c_void_p, ctypes.c_long
        self._whole.argtypes = [
            *(pointer, pointer, pointer, number, number, pointer, number, number, number, number, number),
            *(ctypes.c_int, pointer),
        ]

    def mm(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right``, the same bits for a row in whatever rows it stands among.

        Args:
            left: ``(rows, depth)``, of any strides.
            right: ``(depth, columns)``, of any strides.
        """
        (rows, depth), columns = left.shape, right.shape[1]
        out = left.new_zeros(rows, columns) if depth == 0 else left.new_empty(rows, columns)
        threads = torch.get_num_threads() if rows * depth * columns > 100_000 else 1
        failed = self._whole(
            *(out.data_ptr(), None, left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride()),
            *(rows, columns, depth, threads, self.team),
        )
        if failed:
            raise MemoryError(f"no memory for the product of {tuple(left.shape)} and {tuple(right.shape)}")
        return out


@functools.cache
def products(dtype: torch.dtype) -> Products:
    """The products of a dtype, compiled at their first use."""
    return Products(dtype)


def start(dtype: torch.dtype) -> None:
    """Begin to compile the products of a dtype in the background."""
    build.start(_source(dtype), _team_source())


def _source(dtype: torch.dtype) -> str:
    return f"using T = {_SCALARS[dtype]};\n{(build.INCLUDE / 'products.cpp').read_text()}"


@functools.cache
def _team() -> ctypes.CDLL:
    return build.load(_team_source())


def _team_source() -> str:
    return (build.INCLUDE / "team.cpp").read_text()
