"""Random numbers from a counter: Philox 4x32-10.

Salmon et al., 2011, Parallel random numbers: as easy as 1, 2, 3. Each number depends only on the seed and on
where it is used: row, time step, layer, direction, draw and column. So it is the same in any order of
computation. This is the version in NumPy. ``native/include/philox.cpp`` computes the same bits, because both
use only integers and the basic operations of IEEE arithmetic, in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

KINDS = ("uniform", "normal", "exponential")
# Of each entry: the number of its stream, the index of its kind, its width and its first column.
Entry = tuple[int, int, int, int]

_CHUNK = 1 << 14  # numbers at a time
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

# Coefficients of the inverse of the normal distribution: Wichura, 1988, Algorithm AS 241, PPND16.
_CENTRAL = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
     1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
     3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2,
     5.3941960214247511077e3, 2.1213794301586595867e4, 3.9307895800092710610e4,
     2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_MIDDLE = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
     3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
     2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0,
     6.89767334985100004550e-1, 1.48103976427480074590e-1, 1.51986665636164571966e-2,
     5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
     2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
     2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1,
     1.48753612908506148525e-2, 7.86869131145613259100e-4, 1.84631831751005468180e-5,
     1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


def fill(out: Array, seed: int, steps: Array, rows: Array, entries: list[Entry]) -> None:
    """Fill the columns of an array with random numbers.

    Args:
        out: float32 or float64, ``(rows of all time steps, columns)``.
        seed: 64 bits.
        steps: The time step of each row of ``out``.
        rows: The row of the batch of each row of ``out``.
        entries: What to fill. A stream's columns have independent numbers, in groups of four.
    """
    for stream, kind, width, column in entries:
        length = max(1, _CHUNK // max(width, 1))
        for first in range(0, len(out), length):
            part = slice(first, first + length)
            values = _numbers(seed, steps[part], rows[part], stream, width, KINDS[kind], out.dtype)
            out[part, column : column + width] = values


def _numbers(seed: int, steps: Array, rows: Array, stream: int, width: int, kind: str, dtype: Any) -> Array:
    blocks = np.arange((width + 3) // 4, dtype=np.uint64)
    counters = np.broadcast_arrays(
        blocks, rows.astype(np.uint64)[:, None] & _MASK, steps.astype(np.uint64)[:, None], np.uint64(stream)
    )
    high = _philox(seed, *counters)[:, :width]
    single = dtype == np.float32
    if single and kind == "uniform":
        return (high >> np.uint64(8)).astype(np.float64) * 2.0**-24
    if single:
        p = (high.astype(np.float64) + 0.5) * 2.0**-32
    else:
        low = _philox(seed, counters[0] | np.uint64(1 << 31), *counters[1:])[:, :width]
        if kind == "uniform":
            return ((high << np.uint64(21)) | (low >> np.uint64(11))).astype(np.float64) * 2.0**-53
        p = (((high << np.uint64(20)) | (low >> np.uint64(12))).astype(np.float64) + 0.5) * 2.0**-52
    return _normal(p) if kind == "normal" else -_log(p)


def _philox(seed: int, c0: Array, c1: Array, steps: Array, c3: Array) -> Array:
    """Return four 32-bit numbers for each counter, as ``(rows, 4 * blocks)``."""
    c2 = steps & _MASK
    k0 = np.uint64(seed) & _MASK
    k1 = ((np.uint64(seed) >> _HALF) + (steps >> _HALF)) & _MASK
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack((c0, c1, c2, c3), -1).reshape(len(c0), -1)


def _normal(p: Array) -> Array:
    """Return the quantiles of the standard normal distribution."""
    q = p - 0.5
    values = q * _ratio(_CENTRAL, 0.180625 - q * q)
    outside = np.abs(q) > 0.425
    q, p = q[outside], p[outside]
    r = np.sqrt(-_log(np.where(q < 0, p, 1.0 - p)))
    tail = np.where(r <= 5.0, _ratio(_MIDDLE, r - 1.6), _ratio(_FAR, r - 5.0))
    values[outside] = np.where(q < 0, -tail, tail)
    return values


def _ratio(coefficients: tuple[tuple[float, ...], ...], r: Array) -> Array:
    numerator, denominator = (_polynomial(part, r) for part in coefficients)
    return numerator / denominator


def _polynomial(coefficients: tuple[float, ...], r: Array) -> Array:
    value = np.full_like(r, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * r + coefficient
    return value


def _log(p: Array) -> Array:
    """Return the logarithm of normal numbers above 0."""
    bits = p.view(np.int64) - _SQRT_HALF_BITS
    exponent = bits >> 52  # so that the mantissa m is from sqrt(1/2) to sqrt(2)
    m = (bits - (exponent << 52) + _SQRT_HALF_BITS).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = _polynomial(tuple(1.0 / k for k in range(1, 23, 2)), z)
    e = exponent.astype(np.float64)
    return e * _LN2_HIGH + (2.0 * s * series + e * _LN2_LOW)
