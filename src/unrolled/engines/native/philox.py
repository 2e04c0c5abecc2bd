"""The compiled random number generator."""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.native.matmul import run_in_parallel
from unrolled.engines.native.toolchain import build, cpp_files


def fill(
    out: Tensor, seed: int, steps: Tensor, rows: Tensor, entries: Sequence[tuple[int, int, int, int]]
) -> None:
    """Fill the columns of a contiguous tensor with random numbers, see :func:`unrolled.engines.philox.fill`.

    Raises:
        NoCompilerError: If there is no C++ compiler.
    """
    count, stride = out.shape
    sizes = int(out.dtype is torch.float64), count, stride
    addresses = steps.data_ptr(), rows.data_ptr()
    flat = [number for entry in entries for number in entry]
    numbers = array.array("q", [out.data_ptr(), *sizes, seed, len(entries), *addresses, *flat])
    _function()(numbers.buffer_info()[0], torch.get_num_threads())


@functools.cache
def _function() -> Any:
    library = build.load(cpp_files.read("philox.cpp"))
    run = run_in_parallel()
    function = library.fill_draws
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return lambda numbers, threads: function(numbers, run, threads)
