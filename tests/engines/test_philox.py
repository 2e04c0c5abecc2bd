"""The random number generator: known answers, distributions, independence, equal bits in NumPy and C++."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.engines import philox
from unrolled.engines.native import philox as compiled_philox

stats = pytest.importorskip("scipy.stats")
CDFS = {"uniform": stats.uniform.cdf, "normal": stats.norm.cdf, "exponential": stats.expon.cdf}


def draw(
    kind: str, steps: Tensor, rows: Tensor, width: int, seed: int = 5, stream: int = 0, dtype: str = "float32"
) -> np.ndarray:
    out = np.empty((len(steps), width), dtype)
    entries = [(stream, philox.KINDS.index(kind), width, 0)]
    philox.fill(out, seed, steps.numpy(), rows.numpy(), entries)
    return out


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # from kat_vectors of Random123
        ([0] * 4, [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    c0, c1, c2, c3 = (np.array([[number]], np.uint64) for number in counter)
    numbers = philox._philox(key[0] | key[1] << 32, c0, c1, c2, c3)
    assert " ".join(f"{int(number):08x}" for number in numbers[0]) == expected


def test_normal_quantiles_and_logarithm() -> None:
    p = np.concatenate(
        [np.linspace(0.001, 0.999, 999), 2.0 ** -np.arange(2, 54), 1 - 2.0 ** -np.arange(2, 53)]
    )
    expected = np.array([statistics.NormalDist().inv_cdf(x) for x in p])
    np.testing.assert_allclose(philox._normal(p), expected, rtol=2e-15, atol=1e-16)
    np.testing.assert_allclose(philox._log(p), np.log(p), rtol=1e-15)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_generator_has_the_same_bits(dtype: torch.dtype) -> None:
    steps, rows = torch.randint(0, 2**40, (1500,)), torch.randint(0, 2**31, (1500,))
    entries = [(0, 0, 37, 1), (7 << 16 | 3, 1, 130, 40), (2**32 - 1, 2, 1, 0), (1, 1, 0, 0)]
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        expected = torch.zeros(1500, 171, dtype=dtype)
        philox.fill(expected.numpy(), seed % 2**64, steps.numpy(), rows.numpy(), entries)
        assert expected[:, 38:40].eq(0).all()
        for threads in (1, 2):
            actual = torch.zeros_like(expected)
            before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
            compiled_philox.fill(actual, seed, steps, rows, entries)
            torch.set_num_threads(before)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", philox.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distribution(kind: str, dtype: str) -> None:
    steps = torch.arange(500)
    values = draw(kind, steps, torch.zeros_like(steps), 400, dtype=dtype).astype(np.float64)
    assert stats.kstest(values.ravel(), CDFS[kind]).pvalue > 1e-3
    reference = {"uniform": (0.5, 12**-0.5), "normal": (0, 1), "exponential": (1, 1)}[kind]
    assert values.mean() == pytest.approx(reference[0], abs=5 * reference[1] / 200_000**0.5)
    assert values.std() == pytest.approx(reference[1], rel=0.01)
    assert 0 <= values.min() < values.max() < 1 if kind == "uniform" else np.isfinite(values).all()
    # Rounding to float32 aside, both dtypes have the same numbers.
    other = draw(kind, steps, torch.zeros_like(steps), 400, dtype="float32")
    np.testing.assert_allclose(values, other, atol=2**-24 if kind == "uniform" else 1e-4)


def test_numbers_are_independent() -> None:
    """No number occurs twice, and neighbors along every axis have no correlation."""
    time, batch, width = 40, 30, 24
    steps, rows = torch.arange(time).repeat_interleave(batch), torch.arange(batch).repeat(time)
    values = np.stack(
        [
            draw("normal", steps, rows, width, seed, stream, "float64")
            for seed in (1, 2)
            for stream in range(4)
        ]
    ).reshape(2, 4, time, batch, width)
    assert len(np.unique(values)) == values.size
    for axis in range(5):
        for distance in (1, 2, 4):
            if distance < values.shape[axis]:
                first, second = (
                    np.take(values, range(start, start + values.shape[axis] - distance), axis).ravel()
                    for start in (0, distance)
                )
                for a, b in ((first, second), (first**2, second**2), (np.abs(first), np.abs(second))):
                    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / len(a) ** 0.5


def test_far_steps_and_rows_have_other_numbers() -> None:
    steps = torch.tensor([0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 0, 0])
    rows = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2**31])
    assert len(np.unique(draw("uniform", steps, rows, 8, dtype="float64"))) == 64
