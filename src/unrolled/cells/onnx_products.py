"""The quantized products of a step in operators of ONNX, such as MatMulInteger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.quantized_products import (
    FORMATS,
    LARGEST,
    SMALLEST,
    ProductMode,
    QuantizedProducts,
    quantize_weights,
    row_scales,
    saturated,
)
from unrolled.cells.wrappers import QuantizedWrapper, wrapped_cells

Factor = tuple[Tensor, ...]  # a matrix in int8 and the scales of its columns, or a matrix in 16 bits


def float_equivalent(cell: Cell) -> Cell:
    """Return a cell without quantization that computes the same from parameters that are rounded already.

    A cell with weights in bfloat16 or float16 has one. Others are returned as they are.
    """
    if isinstance(cell, QuantizedWrapper) and cell.arguments[0] != "int8":
        return cell.inner
    return cell


def is_quantized(cell: Cell) -> bool:
    """Return whether a cell or one that it wraps has quantized products."""
    return any(isinstance(one, QuantizedWrapper) for one in wrapped_cells(cell))


def quantized_factors(cell: Cell, x: Tensor, states: Sequence[Tensor]) -> list[Factor]:
    """Return the quantized matrices of all products of a step, in their order.

    Args:
        cell: The cell, bound to its parameters.
        x: An input of the step.
        states: Its states. Their values don't matter.
    """
    factors: list[Factor] = []
    _set_mode(cell, partial(_Matrices, factors))
    cell.step(x, *states)
    return factors


def use_factors(cell: Cell, factors: Sequence[Factor]) -> None:
    """Let the step of a bound cell compute products with these matrices, by operators of ONNX."""
    _set_mode(cell, partial(_OnnxProducts, factors))


def column_scales(matrix: Tensor) -> Tensor:
    """Return what :func:`unrolled.cells.quantized_products.weight_scales` does for finite weights below 2e36.

    Unlike that function, it only calls operators that ONNX has.

    Args:
        matrix: The matrix, ``(k, n)``.
    """
    largest = matrix.abs().amax(0, keepdim=True)
    exact = largest / LARGEST
    nearest = _rounded_to_17_bits(exact)
    above = _rounded_to_17_bits(nearest + nearest * _HALF_TO_WHOLE_UNIT)
    return torch.where(largest < SMALLEST, 0.0, torch.where(nearest < exact, above, nearest))


_HALF_TO_WHOLE_UNIT = 1.25 * 2.0**-17  # times a number: between 0.6 and 1.3 units in the last of 17 bits


def _rounded_to_17_bits(values: Tensor) -> Tensor:
    """Return float32 numbers rounded to 17 bits, by Veltkamp's method."""
    scaled = values * (2.0**7 + 1)
    return scaled - (scaled - values)


def _set_mode(cell: Cell, mode: Callable[..., ProductMode]) -> None:
    for one in wrapped_cells(cell):
        if isinstance(one, QuantizedWrapper):
            one.__dict__["_product_mode"] = mode


class _Matrices(QuantizedProducts):  # type: ignore[no-untyped-call]
    """Quantize the matrices of all quantized products of a step, and add them to a list."""

    def __init__(self, factors: list[Factor], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._factors = factors

    def quantized_product(self, x: Tensor, matrix: Tensor, scale: float) -> Tensor:
        """Return the product in float, and add the matrix."""
        matrix_32 = matrix.float()
        if self._weights == "int8":
            scales = column_scales(matrix_32)
            self._factors.append((quantize_weights(matrix_32, scales), scales))
        else:
            dtype = FORMATS[self._weights]
            self._factors.append((saturated(matrix_32, dtype).to(dtype),))
        return x @ matrix


class _OnnxProducts(QuantizedProducts):  # type: ignore[no-untyped-call]
    """Compute the products of a step with matrices that are quantized already."""

    def __init__(self, factors: Sequence[Factor], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._factors = iter(factors)

    def quantized_product(self, x: Tensor, matrix: Tensor, scale: float) -> Tensor:
        """Return the product, see :func:`unrolled.cells.quantized_products.quantized_mm`."""
        factor, values = next(self._factors), x.float()
        if self._weights != "int8":
            return (values @ factor[0].float()).to(x.dtype)
        whole, scales = factor
        x_scales, inverse = row_scales(values, scale)
        x_scales = x_scales + (values * 0).sum(1, keepdim=True)  # runtimes may skip NaN in a maximum
        rows = (values * inverse).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        shape = [x.shape[0], whole.shape[1]]
        sums = torch.onnx.ops.symbolic("MatMulInteger", [rows, whole], dtype=torch.int32, shape=shape)
        return (sums.float() * scales * x_scales).to(x.dtype)
