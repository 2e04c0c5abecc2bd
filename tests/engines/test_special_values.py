"""Steps with special values on the native engine: zeros, subnormal numbers, infinities and NaN."""

from __future__ import annotations

import pytest
import torch

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER


@pytest.mark.slow
def test_cumsum_of_infinity_and_nan() -> None:
    class Cumsum(ur.Cell):
        def step(self, x, h):
            return x.cumsum(-1)

    x = torch.tensor(
        [
            [1.0, 2, 3, 4, 5],
            [1, torch.inf, 3, 4, 5],
            [1, -torch.inf, 3, 4, 5],
            [1, torch.inf, 3, -torch.inf, 5],
            [1, 2, torch.nan, 4, torch.inf],
            [torch.inf, torch.inf, 1, torch.nan, 1],
        ]
    )
    with ur.engine("native"):
        for dtype in (torch.float32, torch.float64):
            output = ur.Recurrent(Cumsum, 5, 5, dtype=dtype)(x[None].to(dtype))[0][0]
            torch.testing.assert_close(output, x.to(dtype).cumsum(-1), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entr_of_special_values(dtype: torch.dtype) -> None:
    class Entropy(ur.Cell):
        def step(self, x, h):
            return torch.special.entr(x + 0 * h)

    tiny = torch.finfo(dtype).smallest_normal
    numbers = [0.0, tiny / 4, tiny, 0.2, 1.0, 3.0, torch.finfo(dtype).max, torch.inf]
    x = torch.tensor([*numbers, *(-number for number in numbers), torch.nan], dtype=dtype)
    with ur.engine("native"):
        layer = ur.Recurrent(Entropy, len(x), len(x), dtype=dtype)
        ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
        output = layer(ours.view(1, 1, -1))[0].flatten()
        output.sum().backward()
    expected = torch.special.entr(theirs)
    expected.sum().backward()
    torch.testing.assert_close(output, expected.to(dtype), equal_nan=True)
    torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), equal_nan=True)
