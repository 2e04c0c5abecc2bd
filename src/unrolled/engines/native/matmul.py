"""The compiled matrix products of a dtype, which kernels and bulk operations call, and the thread pool."""

from __future__ import annotations

import array
import ctypes
import functools

import torch

from unrolled.engines.fork_safety import renew_after_fork
from unrolled.engines.native.launch_observer import current_observer
from unrolled.engines.native.toolchain import build, cpp_files
from unrolled.engines.threads import thread_count

_in_forked_child = False
_SCALARS = {torch.float32: "float", torch.float64: "double"}


class Products:
    """The compiled matrix products of one dtype.

    Attributes:
        table: Address of the table of functions that kernels call.
        lanes: Number of elements of a vector.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        library = build.load(_source(dtype))
        pool = _thread_pool()
        library.products.restype = ctypes.c_void_p
        library.products.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.table = library.products(
            *(ctypes.cast(f, ctypes.c_void_p) for f in (pool.thread_pool_run, pool.thread_pool_scratch))
        )
        self.lanes: int = library.lanes()
        self._library, self._formats = library, set[int]()
        self._run_bulk = library.run_bulk
        self._run_bulk.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]

    def load_format(self, number: int) -> None:
        """Load the products for a format of quantized weights, ``WeightFormat`` in products.h."""
        if number in self._formats:
            return
        library = build.load(_format_source(number))
        library.quantized_products.restype = ctypes.c_void_p
        self._library.set_format(number, ctypes.c_void_p(library.quantized_products()))
        self._formats.add(number)

    def run_bulk(self, operations: array.array[int]) -> None:
        """Run matrix products and sums of columns, one after another.

        A row of a product has the same bits, whatever the other rows are.

        Args:
            operations: Eleven numbers for each operation, see ``run_bulk`` in ``products.cpp``.

        Raises:
            MemoryError: If there is not enough memory for packed matrices.
        """
        observer = current_observer.get()
        if observer is not None:
            observer.run_bulk(ctypes.cast(self._run_bulk, ctypes.c_void_p).value or 0, operations)
            return
        if self._run_bulk(operations.buffer_info()[0], len(operations) // 11, thread_count()):
            raise MemoryError("not enough memory for the packed matrices of a matrix product")


@functools.cache
def products(dtype: torch.dtype) -> Products:
    """Return the matrix products of a dtype. They are compiled at the first call."""
    return Products(dtype)


def start(dtype: torch.dtype) -> None:
    """Start compiling the matrix products of a dtype in the background."""
    build.start(_source(dtype), _thread_pool_source())


def start_format(number: int) -> None:
    """Start compiling the products for a format of quantized weights in the background."""
    build.start(_format_source(number))


def _format_source(number: int) -> str:
    return f"using T = float;\nconstexpr int FORMAT = {number};\n{cpp_files.read('quantized_products.cpp')}"


def _source(dtype: torch.dtype) -> str:
    return f"using T = {_SCALARS[dtype]};\n{cpp_files.read('products.cpp')}"


@functools.cache
def _thread_pool() -> ctypes.CDLL:
    """Return the thread pool. It uses the workers of torch's OpenMP runtime if that can be found.

    A forked child doesn't have these workers: there, the pool starts its own.
    """
    library = build.load(_thread_pool_source())
    if _in_forked_child:
        return library
    try:
        process = ctypes.CDLL(None)
        entry_points = [process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads]
    except (AttributeError, OSError, TypeError):  # another runtime, or a system without such a look-up
        return library
    library.thread_pool_use_openmp(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entry_points))
    return library


@renew_after_fork
def _use_own_threads() -> None:
    global _in_forked_child
    _in_forked_child = True


def run_in_parallel() -> ctypes.c_void_p:
    """Return the address of the function that runs a task on the thread pool, for other libraries."""
    return ctypes.cast(_thread_pool().thread_pool_run, ctypes.c_void_p)


def _thread_pool_source() -> str:
    return cpp_files.read("thread_pool.cpp")


def launch_pair(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
    """Run two kernels at the same time, each on one thread, and return whether there was enough memory.

    Args:
        first: Addresses of a kernel, its arguments and its pointers.
        second: The same for the other kernel.
    """
    return bool(_thread_pool().thread_pool_run_pair((ctypes.c_void_p * 6)(*first, *second)))
