"""The limits of this machine: the speed of a matrix product, and of reading weights from cache and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from unrolled.cli.bench.rows import Row
from unrolled.cli.bench.timing import shortest

_MIB = 2**20
_MATRIX_SIZE = 1024  # large enough for full speed; a product takes milliseconds
_SECONDS = 0.3  # for each measurement


@dataclass
class Limits:
    """The limits, measured with torch's own kernels and its number of threads.

    Args:
        flops: Operations per second of a float32 matrix product, counting multiplications and additions.
        cache_bytes: The size of the matrix for the cache measurement.
        cache_rate: Bytes per second when reading the matrix that fits into the cache.
        memory_bytes: The size of the matrix for the memory measurement.
        memory_rate: Bytes per second when reading the matrix that doesn't fit into the cache.
    """

    flops: float
    cache_bytes: int
    cache_rate: float
    memory_bytes: int
    memory_rate: float
    _rates: dict[int, float] = field(default_factory=dict, repr=False)

    @classmethod
    def measure(cls, seconds: float = _SECONDS) -> Limits:
        """Measure the limits, with this many seconds for each of the three measurements."""
        cache, memory = _MIB, _bytes_beyond_cache()
        limits = cls(product_rate(_MATRIX_SIZE, seconds), cache, 0.0, memory, 0.0)
        limits.cache_rate, limits.memory_rate = reading_rate(cache, seconds), reading_rate(memory, seconds)
        limits._rates |= {cache: limits.cache_rate, memory: limits.memory_rate}
        return limits

    def lower_bound(self, row: Row) -> tuple[float, str]:
        """Return the smallest possible time for a row in seconds, and its reason: "compute" or "reading".

        Weights are read at the rate measured for a matrix of their size, at least 1 MiB. Reading the input,
        writing the output and elementwise operations count as free.
        """
        size = self._matrix_bytes(row)
        if size not in self._rates:
            self._rates[size] = self.memory_rate if size > self.memory_bytes else reading_rate(size)
        compute, reading = row.operations() / self.flops, row.weight_traffic() / self._rates[size]
        return (compute, "compute") if compute >= reading else (reading, "reading")

    def _matrix_bytes(self, row: Row) -> int:
        """Return the size of the matrix whose reading rate is that of a row's weights."""
        return max(self.cache_bytes, 1 << (row.weight_bytes() - 1).bit_length())

    def measure_again(self, row: Row) -> None:
        """Measure again what limits a row, and keep the faster rate: something disturbed the first try."""
        if self.lower_bound(row)[1] == "compute":
            self.flops = max(self.flops, product_rate(_MATRIX_SIZE))
            return
        size = self._matrix_bytes(row)
        self._rates[size] = max(self._rates[size], reading_rate(min(size, self.memory_bytes)))

    def as_data(self) -> dict[str, float]:
        """Return the limits for JSON. The keys contain the units."""
        return {
            "operations_per_second": self.flops,
            "cache_bytes": self.cache_bytes,
            "cache_bytes_per_second": self.cache_rate,
            "memory_bytes": self.memory_bytes,
            "memory_bytes_per_second": self.memory_rate,
        }


def product_rate(side: int, seconds: float = _SECONDS) -> float:
    """Measure the operations per second of a product of two square float32 matrices.

    torch has two libraries for matrix products: one for ``torch.mm``, and oneDNN for its recurrent layers.
    Either can be twice as fast as the other, depending on the processor, so use the faster one.
    """
    a, b = torch.randn(side, side), torch.randn(side, side)
    out = torch.empty(side, side)
    best = shortest(lambda: torch.mm(a, b, out=out), seconds)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        blocked_a, blocked_b = a.to_mkldnn(), b.to_mkldnn()
        best = min(best, shortest(lambda: torch.nn.functional.linear(blocked_a, blocked_b), seconds))
    return 2 * side**3 / best


def reading_rate(size: int, seconds: float = _SECONDS) -> float:
    """Measure the bytes per second of reading a float32 matrix of this size repeatedly, as torch sums it."""
    matrix = torch.ones(size // 4)
    return size / shortest(matrix.sum, seconds)


def _bytes_beyond_cache() -> int:
    """Return a size that no cache holds: four times the largest cache, between 256 MiB and 1 GiB."""
    try:
        largest = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # not available on this system
        largest = 0
    return min(max(256 * _MIB, 4 * largest), 1024 * _MIB)
