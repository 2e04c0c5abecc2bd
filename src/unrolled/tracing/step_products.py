"""Translation of torch's matrix products to sums of products over labeled axes, as in einsum."""

from __future__ import annotations

import string
from typing import Any

from torch import Tensor

from unrolled.tracing.call_recorder import Call
from unrolled.tracing.step_functions import Builder, UnsupportedError, Value, function_name


def _product(
    builder: Builder,
    operands: list[Tensor],
    labels: list[list[int]],
    out: list[int],
    result: Tensor,
    bias: Any = None,
) -> Value:
    """Append a sum of products.

    Args:
        builder: The program.
        operands: The factors.
        labels: A label for each axis of each factor.
        out: The labels of the result's axes. The products are summed over all others.
        result: The result, for its shape and dtype.
        bias: What to add along the last axis, one number or one for each column; or None.
    """
    values = [builder.value(operand) for operand in operands]
    args = [values, labels, out, None if bias is None else builder.value(bias)]
    return builder.emit("einsum", args, result.shape, result.dtype)


def _linear(builder: Builder, call: Call, a: Any) -> Value:
    rank, vector = a.input.dim(), a.weight.dim() == 1
    batch = list(range(rank - 1))
    weight = [rank] if vector else [rank + 1, rank]
    out = batch if vector else [*batch, rank + 1]
    if a.bias is not None and (vector or a.bias.dim() > 1):
        raise UnsupportedError(f"it uses {function_name(call)} with a bias of an unusual shape")
    return _product(builder, [a.input, a.weight], [[*batch, rank], weight], out, call.result, a.bias)


def _matmul_labels(left: int, right: int) -> tuple[list[list[int]], list[int]]:
    """Return the labels of a product of tensors with some numbers of axes."""
    batch_count = max(left, right, 2) - 2
    row, inner, column = batch_count, batch_count + 1, batch_count + 2
    batch = list(range(batch_count))
    first = [*batch[len(batch) - max(0, left - 2) :], row, inner] if left > 1 else [inner]
    second = [*batch[len(batch) - max(0, right - 2) :], inner, column] if right > 1 else [inner]
    return [first, second], [*batch, *([row] if left > 1 else []), *([column] if right > 1 else [])]


def _matmul(builder: Builder, call: Call, a: Any) -> Value:
    operands = [a.other, a.input] if call.function.__name__ == "__rmatmul__" else [a.input, a.other]
    labels, out = _matmul_labels(operands[0].dim(), operands[1].dim())
    return _product(builder, operands, labels, out, call.result)


def _add_matmul(builder: Builder, call: Call, a: Any) -> Value:
    """Append beta · input + alpha · (a @ b)."""
    result = call.result
    labels, out = _matmul_labels(a.mat1.dim(), a.mat2.dim())
    product = _product(builder, [a.mat1, a.mat2], labels, out, result)
    scaled = builder.emit("mul", [builder.value(a.input), a.beta], a.input.shape, result.dtype)
    if a.beta == 0:  # then torch ignores NaN in the input
        return builder.emit("mul", [product, a.alpha], result.shape, result.dtype)
    return builder.emit("add", [scaled, product, a.alpha], result.shape, result.dtype)


def _outer(builder: Builder, call: Call, a: Any) -> Value:
    return _product(builder, [a.input, a.other], [[0], [1]], [0, 1], call.result)


def _inner(builder: Builder, call: Call, a: Any) -> Value:
    left, right = a.input.dim(), a.other.dim()
    if not left or not right:
        raise UnsupportedError(f"it uses {function_name(call)} with a number")
    first, second = list(range(1, left)), list(range(left, left + right - 1))
    return _product(builder, [a.input, a.other], [[*first, 0], [*second, 0]], [*first, *second], call.result)


def _bilinear(builder: Builder, call: Call, a: Any) -> Value:
    rank = a.input1.dim() - 1
    batch, left, right, out = list(range(rank)), rank, rank + 1, rank + 2
    labels = [[*batch, left], [*batch, right], [out, left, right]]
    return _product(builder, [a.input1, a.input2, a.weight], labels, [*batch, out], call.result, a.bias)


def _tensordot(builder: Builder, call: Call, a: Any) -> Value:
    left, right = a.input.dim(), a.other.dim()
    if isinstance(a.dims, int):
        pairs = [(left - a.dims + k, k) for k in range(a.dims)]
    elif isinstance(a.dims, (tuple, list)):
        pairs = [(i % left, j % right) for i, j in zip(*a.dims, strict=True)]
    else:
        raise UnsupportedError(f"it uses {function_name(call)} with such dimensions")
    first, second = list(range(left)), list(range(left, left + right))
    for i, j in pairs:
        second[j] = first[i]
    summed = {first[i] for i, _ in pairs}
    out = [label for label in (*first, *second) if label not in summed]
    return _product(builder, [a.input, a.other], [first, second], out, call.result)


def _einsum(builder: Builder, call: Call, a: Any) -> Value:
    operands = list(a.operands[0]) if isinstance(a.operands[0], (tuple, list)) else list(a.operands)
    if not isinstance(a.equation, str):
        raise UnsupportedError(f"it uses {function_name(call)} without an equation in letters")
    left, arrow, right = a.equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # the letters that occur once, in alphabetical order
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    labels = [_einsum_labels(term, operand.dim()) for term, operand in zip(terms, operands, strict=True)]
    ellipsis = max(
        operand.dim() - len(term.replace("...", "")) if "..." in term else 0
        for term, operand in zip(terms, operands, strict=True)
    )
    rank = len(right.replace("...", "")) + ellipsis * ("..." in right)
    return _product(builder, operands, labels, _einsum_labels(right, rank), call.result)


def _einsum_labels(term: str, rank: int) -> list[int]:
    """Return the labels of a term of an equation. The axes of ``...`` are numbered from the last one."""
    before, dots, after = term.partition("...")
    letters = [string.ascii_letters.index(letter) for letter in before + after]
    others = [len(string.ascii_letters) + k for k in reversed(range(rank - len(letters)))] if dots else []
    return [*letters[: len(before)], *others, *letters[len(before) :]]


PRODUCTS = {
    "linear": ("input weight bias=None", _linear),
    "matmul": ("input other", _matmul),
    "bmm": ("input other", _matmul),
    "mv": ("input other", _matmul),
    "dot": ("input other", _matmul),
    "outer": ("input other", _outer),
    "inner": ("input other", _inner),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), ("input mat1 mat2 beta=1 alpha=1", _add_matmul)),
    "bilinear": ("input1 input2 weight bias=None", _bilinear),
    "tensordot": ("input other dims=2", _tensordot),
    "einsum": ("equation *operands", _einsum),
}
