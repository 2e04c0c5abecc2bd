"""Matrix products outside of loops, and which of them a backward pass computes."""

from __future__ import annotations

import array
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.sampling import sample
from unrolled.engines.native import matmul

pytestmark = NEEDS_COMPILER


def product(left: Tensor, right: Tensor, add_to: Tensor | None = None) -> Tensor:
    out = torch.full((left.shape[0], right.shape[1]), torch.nan, dtype=left.dtype)
    if add_to is not None:
        out.copy_(add_to)
    operands = (left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride())
    sizes = (*out.shape, left.shape[1])
    numbers = array.array("q", [out.data_ptr(), add_to is not None, *operands, *sizes])
    matmul.products(left.dtype).run_bulk(numbers)
    return out


@pytest.mark.parametrize("dtype", sample([torch.float32, torch.float64]))
@pytest.mark.parametrize("depth", [1, 2, 4, 5, 33, 300])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 12, 13, 50])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_their_bits(rows: int, depth: int, transposed: bool, dtype: torch.dtype) -> None:
    """Each row has the same bits alone, among others, and added to what was there."""
    for width in (1, 7, 70, 301):
        left, right = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, width, dtype=dtype)
        if transposed:  # in memory
            left, right = left.T.contiguous().T, right.T.contiguous().T
        result = product(left, right)
        exact = left.double() @ right.double()
        scale = left.double().abs() @ right.double().abs()
        assert ((result - exact).abs() <= 4 * torch.finfo(dtype).eps * scale).all()
        for row in {0, rows - 1}:
            assert torch.equal(product(left[row : row + 1], right)[0], result[row])
        if depth <= 32:  # a single block of terms
            before = torch.randn(rows, width, dtype=dtype)
            assert torch.equal(product(left, right, before), before + result)


@pytest.fixture
def products(monkeypatch: Any) -> list[tuple[int, ...]]:
    """The rows, columns and terms of the products that are computed outside of loops."""
    computed: list[tuple[int, ...]] = []
    library = type(matmul.products(torch.float64))
    original = library.run_bulk

    def run_bulk(self: Any, numbers: array.array[int]) -> None:
        operations = [tuple(numbers[k : k + 11]) for k in range(0, len(numbers), 11)]
        computed.extend(one[8:] for one in operations if one[1] != 2)
        original(self, numbers)

    monkeypatch.setattr(library, "run_bulk", run_bulk)
    return computed


@pytest.mark.parametrize("checkpoint", sample([None, 2]))
@pytest.mark.parametrize("frozen", [[], ["weight_ih"], ["weight_hh", "bias"], ["weight"]])
@pytest.mark.parametrize("needs_x", [False, True])
def test_only_needed_gradients_are_computed(
    needs_x: bool, frozen: list[str], checkpoint: int | None, products: list[tuple[int, ...]]
) -> None:
    ours, theirs = ur.RNN(6, 7, dtype=torch.float64), nn.RNN(6, 7, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen)))
    x, gradients = torch.randn(5, 3, 6, dtype=torch.float64), []
    for layer, options in ((ours, {"checkpoint": checkpoint}), (theirs, {})):
        given = x.clone().requires_grad_(needs_x)
        layer(given, **options)[0].square().sum().backward()
        gradients.append([*(parameter.grad for parameter in layer.parameters()), given.grad])
    for ours_grad, theirs_grad in zip(*gradients, strict=True):
        assert (ours_grad is None) == (theirs_grad is None)
        if theirs_grad is not None:
            assert_close(ours_grad, theirs_grad, 1e-12)
    kinds = {(rows, columns) for rows, columns, _ in products}
    assert ((7, 6) in kinds) == (theirs.weight_ih_l0.grad is not None)
    assert ((7, 7) in kinds) == (theirs.weight_hh_l0.grad is not None)
    assert any(columns == 6 and rows != 7 for rows, columns in kinds) == needs_x
