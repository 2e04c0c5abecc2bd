"""Matrix products with quantized weights: their definition, and the mode that uses them in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

FORMATS = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_TERMS = 133_000  # of a sum: more products of 127 by 127 could overflow int32
LARGEST = 127
SMALLEST = 2.0**-100  # rows with smaller values count as zeros, so that the inverse of a scale is finite
LARGEST_FLOAT16 = 65504.0
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_SPARE_BITS = 0x7F  # of the float32 of a scale


def row_scales(x: Tensor, scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the scale of each row of values in int8, and its inverse.

    Args:
        x: Values in float32, ``(batch, features)``.
        scale: A fixed scale. If 0, each row has its own, so that its largest value becomes 127.

    Returns:
        Two tensors ``(batch, 1)``. The scale is NaN in rows with an infinity or NaN.
    """
    largest = x.abs().amax(1, keepdim=True)
    if scale:
        scales = torch.full_like(largest, scale)
        inverse = 1 / scales
    else:
        is_zero = largest < SMALLEST
        scales = torch.where(is_zero, 0.0, largest / LARGEST)
        # A number divided by a tensor would be multiplied by the tensor's reciprocal, and rounded twice.
        inverse = torch.where(is_zero, 0.0, torch.full_like(largest, LARGEST) / largest)
    finite = largest < torch.inf
    return torch.where(finite, scales, torch.nan), torch.where(finite, inverse, 0.0)


def weight_scales(weights: Tensor, dim: int) -> Tensor:
    """Return the scales of weights in int8: the largest value along a dimension becomes 127.

    A scale is rounded up to 17 bits. Its products with integers up to 127 are then exact in float32, and
    quantizing such products again gives the same integers and the same scales.

    Args:
        weights: Values in float32.
        dim: The dimension that a product sums over.

    Returns:
        A tensor with size 1 in this dimension. NaN where a weight is not finite.
    """
    largest = weights.abs().amax(dim, keepdim=True)
    bits = (largest / LARGEST).contiguous().view(torch.int32)
    rounded = ((bits + _SPARE_BITS) & ~_SPARE_BITS).view(torch.float32)
    scales = torch.where(largest < SMALLEST, 0.0, rounded)
    return torch.where(largest < torch.inf, scales, torch.nan)


def quantize_weights(weights: Tensor, scales: Tensor) -> Tensor:
    """Return weights divided by their scales, as int8 from -127 to 127."""
    quotients = torch.where(scales > 0, weights / scales, 0.0)
    return quotients.round().clamp(-LARGEST, LARGEST).to(torch.int8)


def round_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights in float32, rounded to bfloat16 or float16, where values beyond ±65504 become ±65504."""
    return saturated(weights, dtype).to(dtype).to(torch.float32)


def saturated(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights without values that float16 doesn't reach. For other dtypes, return them as they are."""
    return weights.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16) if dtype is torch.float16 else weights


@torch.library.custom_op("unrolled::quantized_mm", mutates_args=())
def quantized_mm(x: Tensor, matrix: Tensor, weights: str, scale: float) -> Tensor:
    """Multiply values by a quantized matrix.

    In int8, both factors are rounded to integers from -127 to 127: the matrix with a scale for each column,
    the values with a scale for each row. The integer sums are exact. If a row contains infinity or NaN, its
    result is NaN. In bfloat16 or float16, only the matrix is rounded, and the product is computed in float32.

    Args:
        x: The values, ``(batch, k)``. They and the matrix are converted to float32.
        matrix: The matrix, ``(k, n)``.
        weights: ``"int8"``, ``"bfloat16"`` or ``"float16"``.
        scale: A fixed scale of the values, for int8. If 0, each row has its own.
    """
    dtype, x, matrix = x.dtype, x.float(), matrix.float()
    if weights != "int8":
        return (x @ round_weights(matrix, FORMATS[weights])).to(dtype)
    x_scales, inverse = row_scales(x, scale)
    rows = torch.nan_to_num(x * inverse).round().clamp(-LARGEST, LARGEST)
    scales = weight_scales(matrix, 0)
    # Integer sums are exact in float64.
    sums = rows.double() @ quantize_weights(matrix, scales).double()
    return (sums.float() * scales * x_scales).to(dtype)


@quantized_mm.register_fake
def _(x: Tensor, matrix: Tensor, weights: str, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], matrix.shape[1])


class ProductMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Call :meth:`product` for each matrix product of values of the batch by weights.

    A product counts if its first factor depends on the input or a state, and its second one doesn't.

    Args:
        x: The input of the step.
        states: Its states.
    """

    _INPUT, _STATE = 1, 2

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes more than a second

    def __init__(self, x: Tensor, states: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources: dict[int, int] = {}
        self._alive: list[Any] = []  # as long as the tensors exist, Python can't reuse their ids
        for tensor, source in ((x, self._INPUT), *((state, self._STATE) for state in states)):
            self._add_source(tensor, source)
            while is_functorch_wrapped_tensor(tensor):  # in torch.vmap, operations get the inner tensors
                tensor = get_unwrapped(tensor)
                self._add_source(tensor, source)

    def product(self, x: Tensor, matrix: Tensor, from_state: bool) -> Tensor:
        """Return the product of values and a matrix. Each subclass defines it.

        Args:
            x: The values, ``(batch, k)``.
            matrix: The matrix, ``(k, n)``.
            from_state: Whether the values depend on a state, and not only on the input.
        """
        raise NotImplementedError(f"{type(self).__name__} should define product")

    def _source(self, values: Any) -> int:
        source = 0
        for leaf in tree_leaves(values):
            source |= self._sources.get(id(leaf), 0)
        return source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_composite(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        result = self._multiply(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        source = self._source((args, kwargs))
        if source:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._add_source(leaf, source)
        return result

    @staticmethod
    def _is_composite(func: Any) -> bool:
        """Return whether a function, such as linear, consists of others that torch hasn't called instead.

        torch doesn't call them before this mode in inference mode, and in an export to ONNX.
        """
        if not isinstance(func, OpOverload) or not (torch.is_inference_mode_enabled() or func.py_kernels):
            return False
        return torch._C._dispatch_has_kernel_for_dispatch_key(str(func._name), _COMPOSITE)

    def _add_source(self, tensor: Tensor, source: int) -> None:
        self._sources[id(tensor)] = self._sources.get(id(tensor), 0) | source
        self._alive.append(tensor)

    def _multiply(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Return the result of a matrix product with weights, or None for any other operation."""
        factors = args[1:3] if func in (aten.addmm.default, aten.baddbmm.default) else args[:2]
        if func not in _PRODUCTS or not self._source(factors[0]) or self._source(factors[1]):
            return None
        left, right = factors
        if not right.numel():
            return None
        from_state = bool(self._source(left) & self._STATE)
        if left.dim() == 3 and right.stride(0) == 0:  # one matrix, perhaps for each row of the batch
            product = self.product(left.reshape(-1, left.shape[2]), right[0], from_state)
            product = product.view(*left.shape[:2], right.shape[2])
        elif left.dim() == 3:
            heads = zip(left.unbind(), right.unbind(), strict=True)
            product = torch.stack([self.product(x, matrix, from_state) for x, matrix in heads])
        else:
            product = self.product(left, right, from_state)
        if len(args) < 3:
            return product
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        added: Tensor = args[0] if beta == 1 else args[0] * beta
        return added + (product if alpha == 1 else product * alpha)


_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class QuantizedProducts(ProductMode):  # type: ignore[no-untyped-call]
    """Compute the matrix products of a step with quantized weights.

    Args:
        x: The input of the step.
        states: Its states.
        weights: The format of the weights, one of ``FORMATS``.
        quantize_input: Whether products that depend only on the input are included.
        scales: For int8: fixed scales of the activations, in the order of the products. Empty: none.
    """

    def __init__(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: str,
        quantize_input: bool,
        scales: tuple[float, ...],
    ) -> None:
        super().__init__(x, states)
        self._weights, self._quantize_input, self._scales = weights, quantize_input, iter(scales)

    def product(self, x: Tensor, matrix: Tensor, from_state: bool) -> Tensor:
        """Return the product, with the quantized matrix if this product is included."""
        scale = next(self._scales, 0.0)
        if not from_state and not self._quantize_input:
            return x @ matrix
        return self.quantized_product(x, matrix, scale)

    def quantized_product(self, x: Tensor, matrix: Tensor, scale: float) -> Tensor:
        """Return ``x @ matrix`` with the matrix in the format of the weights.

        Args:
            x: The activations.
            matrix: The matrix in float.
            scale: For int8: the fixed scale of the activations, or 0.
        """
        product: Tensor = quantized_mm(x, matrix, self._weights, scale)
        return product
