"""What this machine can do at most: a matrix product, and reading weights from cache and from memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from unrolled.cli.bench.grid import Row
from unrolled.cli.bench.timing import shortest

_MIB = 2**20
_SIDE = 1024  # of the matrices of the product: large enough for full speed, milliseconds a product
_SECONDS = 0.3  # for each measurement


@dataclass
class Limits:
    """The two limits, measured with torch's own kernels on its threads.

    Args:
        flops: operations/s of a product of float32 matrices, a multiplication and an addition as two.
        cache_bytes, memory_bytes: the size of the matrix that stays in cache, and of the one that doesn't.
        cache_rate, memory_rate: bytes/s of reading them, summed up as fast as torch can.
    """

    flops: float
    cache_bytes: int
    cache_rate: float
    memory_bytes: int
    memory_rate: float
    _rates: dict[int, float] = field(default_factory=dict, repr=False)

    @classmethod
    def measured(cls, seconds: float = _SECONDS) -> Limits:
        """Measure, in this many seconds for each of the three."""
        cache, memory = _MIB, _beyond_cache()
        limits = cls(product_rate(_SIDE, seconds), cache, 0.0, memory, 0.0)
        limits.cache_rate, limits.memory_rate = reading_rate(cache, seconds), reading_rate(memory, seconds)
        limits._rates |= {cache: limits.cache_rate, memory: limits.memory_rate}
        return limits

    def of(self, row: Row) -> tuple[float, str]:
        """The seconds below which no call of a row can get, and why: ``"compute"`` or ``"reading"``.

        Weights count as read at the rate of a matrix of their size, 1 MiB at least. Input, output and
        everything elementwise count as free.
        """
        size = max(self.cache_bytes, 1 << (row.resident() - 1).bit_length())
        if size not in self._rates:
            self._rates[size] = self.memory_rate if size > self.memory_bytes else reading_rate(size)
        compute, reading = row.operations() / self.flops, row.reading() / self._rates[size]
        return (compute, "compute") if compute >= reading else (reading, "reading")

    def as_data(self) -> dict[str, float]:
        """For JSON; the units are in the names."""
        return {
            "operations_per_second": self.flops,
            "cache_bytes": self.cache_bytes,
            "cache_bytes_per_second": self.cache_rate,
            "memory_bytes": self.memory_bytes,
            "memory_bytes_per_second": self.memory_rate,
        }


def product_rate(side: int, seconds: float = _SECONDS) -> float:
    """Operations/s of a product of two square float32 matrices with this side.

    torch holds two libraries for it, of which either may be twice as fast as the other on a processor:
    the one behind ``torch.mm`` and oneDNN, behind its recurrent layers. The faster one counts.
    """
    a, b = torch.randn(side, side), torch.randn(side, side)
    into = torch.empty(side, side)
    took = shortest(lambda: torch.mm(a, b, out=into), seconds)
    if torch._C._has_mkldnn:
        blocked_a, blocked_b = a.to_mkldnn(), b.to_mkldnn()
        took = min(took, shortest(lambda: torch.nn.functional.linear(blocked_a, blocked_b), seconds))
    return 2 * side**3 / took


def reading_rate(size: int, seconds: float = _SECONDS) -> float:
    """Bytes/s of reading a float32 matrix of this many bytes again and again."""
    matrix = torch.ones(size // 4)
    return size / shortest(matrix.sum, seconds)


def _beyond_cache() -> int:
    """Bytes that no cache holds: four times the largest one, 256 MiB to 1 GiB."""
    try:
        largest = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        largest = 0
    return min(max(256 * _MIB, 4 * largest), 1024 * _MIB)
