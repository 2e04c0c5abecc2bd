"""Find the weights of a cell that can be quantized, and convert them in state dicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.quantized_products import (
    FORMATS,
    ProductMode,
    quantize_weights,
    round_weights,
    weight_scales,
)
from unrolled.engines._torch_private import tree_leaves


@dataclass
class Storage:
    """How the weights of a module are stored.

    Attributes:
        weights: The format of the weights.
        dims: The parameters that are stored in this format, each with the dimension that products sum over.
    """

    weights: str
    dims: dict[str, int]

    def is_stored(self, name: str) -> bool:
        """Return whether a parameter is stored in this format."""
        return name in self.dims

    def rounded(self, name: str, weights: Tensor) -> Tensor:
        """Return a parameter in float32, rounded to the values of the format."""
        if self.weights != "int8":
            return round_weights(weights, FORMATS[self.weights])
        scales = weight_scales(weights, self.dims[name])
        return quantize_weights(weights, scales) * scales

    def save(self, state_dict: Any, prefix: str) -> None:
        """Convert the weights of a state dict to their format. In int8, add their scales."""
        for key, name in self._keys(state_dict, prefix):
            weights = state_dict[key]
            if self.weights == "int8":
                weights = weights.float()
                scales = weight_scales(weights, self.dims[name])
                state_dict[key], state_dict[f"{key}_scale"] = quantize_weights(weights, scales), scales
            else:
                state_dict[key] = weights.to(FORMATS[self.weights])

    def load(self, state_dict: Any, prefix: str) -> None:
        """Convert the weights of a state dict to float32. Float32 weights are rounded to the format."""
        for key, name in self._keys(state_dict, prefix):
            weights, scales = state_dict[key], state_dict.pop(f"{key}_scale", None)
            if weights.dtype is not torch.int8:
                state_dict[key] = self.rounded(name, weights.float())
            elif scales is None:
                raise ValueError(f"the state dict contains {key} in int8, but {key}_scale is missing")
            else:
                state_dict[key] = weights * scales

    def _keys(self, state_dict: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for name in self.dims:
            if prefix + name in state_dict:
                yield prefix + name, name


def stored_dims(cell: Cell, quantize_input: bool) -> tuple[dict[str, int], int]:
    """Find the parameters of a cell that only matrix products read, by running its step.

    Args:
        cell: The cell with its parameters.
        quantize_input: Whether products that depend only on the input are quantized.

    Returns:
        For each parameter that can be quantized, the dimension that the products sum over. And the number of
        quantized products, including those with matrices that are computed from parameters.
    """
    # Copies have memory of their own, by which a view of a parameter is recognized.
    params = {name: getattr(cell, name).detach().clone() for name in cell.shapes()}
    if not params:
        return {}, 0
    like = next(iter(params.values()))
    x, states = like.new_zeros(2, cell.features), [like.new_zeros(2, n) for n in cell.state_sizes().values()]
    uses = _WeightUses(x, tuple(states), params, quantize_input)
    with torch.no_grad(), uses:
        cell.bind(params).step(x, *states)
    return {name: dim for name, dim in uses.dims.items() if name not in uses.others}, uses.products


class _WeightUses(ProductMode):  # type: ignore[no-untyped-call]
    """Record how a step uses its parameters.

    Args:
        x: The input of the step.
        states: Its states.
        params: Its parameters, each with memory of its own.
        quantize_input: Whether products that depend only on the input are quantized.

    Attributes:
        dims: The dimension of each parameter that quantized products sum over.
        others: Parameters that other operations read, too.
        products: The number of products that are quantized.
    """

    def __init__(
        self, x: Tensor, states: tuple[Tensor, ...], params: dict[str, Tensor], quantize_input: bool
    ) -> None:
        super().__init__(x, states)
        self._params, self._quantize_input = params, quantize_input
        self._names = {_memory(tensor): name for name, tensor in params.items()}
        self.dims: dict[str, int] = {}
        self.others: set[str] = set()
        self.products = 0
        self._read: set[str] = set()  # by the products of the current operation

    def product(self, x: Tensor, matrix: Tensor, from_state: bool) -> Tensor:
        """Return the product, and note which dimension of a parameter it sums over."""
        if from_state or self._quantize_input:
            self.products += 1
            name = self._names.get(_memory(matrix))
            dim = None if name is None else self._dim(name, matrix)
            if name is not None and dim is not None and self.dims.setdefault(name, dim) == dim:
                self._read.add(name)
        return x @ matrix

    def _dim(self, name: str, matrix: Tensor) -> int | None:
        """Return which dimension of a parameter is the first one of a matrix that is a view of it, if any."""
        parameter = self._params[name]
        dims = [d for d in range(parameter.dim()) if parameter.stride(d) == matrix.stride(0)]
        return next((d for d in dims if parameter.shape[d] == matrix.shape[0]), dims[0] if dims else None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._read = set()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        read, results = (
            self._read,
            [_memory(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)],
        )
        for leaf in tree_leaves((args, kwargs or {})):
            name = self._names.get(_memory(leaf)) if isinstance(leaf, Tensor) else None
            is_view = bool(results) and all(self._names.get(memory) == name for memory in results)
            if name is not None and not is_view and name not in read:
                self.others.add(name)
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
