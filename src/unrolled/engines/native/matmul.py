"""The compiled products of a dtype: what the loops call, and the work on all time steps at once."""

from __future__ import annotations

import array
import ctypes
import functools

import torch

from unrolled.engines.native.toolchain import build
from unrolled.engines.native.toolchain.compiler import INCLUDE

_SCALARS = {torch.float32: "float", torch.float64: "double"}


class Products:
    """The compiled products of one dtype.

    Attributes:
        table: the address of the functions that a loop calls.
        lanes: how many elements a vector has.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        library = build.load(_source(dtype))
        team = _team()
        library.products.restype = ctypes.c_void_p
        library.products.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.table = library.products(
            *(ctypes.cast(f, ctypes.c_void_p) for f in (team.team_run, team.team_room))
        )
        self.lanes: int = library.lanes()
        self._time_parallel = library.at_once
        self._time_parallel.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]

    def at_once(self, pieces: array.array[int]) -> None:
        """Products and sums of columns, one after another; what the numbers are: ``products.cpp``.

        A row of a product gets the same bits in whatever rows it stands among.

        Raises:
            MemoryError: there is no memory for packed matrices.
        """
        if self._time_parallel(pieces.buffer_info()[0], len(pieces) // 11, torch.get_num_threads()):
            raise MemoryError("no memory for the packed matrices of a product")


@functools.cache
def products(dtype: torch.dtype) -> Products:
    """The products of a dtype, compiled at their first use."""
    return Products(dtype)


def start(dtype: torch.dtype) -> None:
    """Begin to compile the products of a dtype in the background."""
    build.start(_source(dtype), _team_source())


def _source(dtype: torch.dtype) -> str:
    return f"using T = {_SCALARS[dtype]};\n{(INCLUDE / 'products.cpp').read_text()}"


@functools.cache
def _team() -> ctypes.CDLL:
    """The team of threads; it takes the workers of torch's OpenMP runtime, where that can be found."""
    library = build.load(_team_source())
    try:
        loaded = ctypes.CDLL(None)
        entries = [loaded.GOMP_parallel, loaded.omp_get_thread_num, loaded.omp_get_num_threads]
    except (AttributeError, OSError, TypeError):  # another runtime, or a system that has no such look-up
        return library
    library.team_join(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries))
    return library


def _team_source() -> str:
    return (INCLUDE / "team.cpp").read_text()


def both(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    """Run two loops at the same time, each on one thread; whether there was memory."""
    return bool(_team().team_both((ctypes.c_int64 * 8)(*first, *second)))
