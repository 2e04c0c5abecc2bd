"""Translation of the torch functions of a step to the functions of a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.call_recorder import Call
from unrolled.tracing.element_moves import MOVES
from unrolled.tracing.step_functions import (
    ELEMENTWISE,
    Builder,
    UnsupportedError,
    Value,
    bind,
    dims_of,
    elementwise,
    function_name,
    vectors,
)
from unrolled.tracing.step_products import PRODUCTS

Translation = Callable[[Builder, Call, Any], Value]

_SAME_AS = {
    **{"clip": "clamp", "absolute": "abs", "negative": "neg", "fix": "trunc", "true_divide": "div"},
    **{"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne"},
    **{"arctan2": "atan2", "sgn": "sign", "vdot": "dot"},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{"linalg.norm": "norm", "ger": "outer", "linalg.matmul": "matmul", "pos": "positive"},
    **{"alpha_dropout": "dropout", "feature_dropout": "dropout"},
}
_CASTS = frozenset({"to", "type", "type_as", "float", "double", "int", "long", "bool", "short"})
_FILLED = frozenset({"pad", "tril", "triu", "diag", "diag_embed"})


def translate(builder: Builder, call: Call) -> Value:
    """Append the instructions of a call to a program.

    Args:
        builder: The program.
        call: The call.

    Returns:
        The value of the result.

    Raises:
        UnsupportedError: If programs don't have the function.
    """
    name = _SAME_AS.get(call.name, call.name)
    if name in _CASTS:
        return _emit(builder, call, "cast", [builder.value(call.args[0])])
    if name in MOVES or name in _FILLED:
        return _moved(builder, call, name)
    if name in ELEMENTWISE:
        arguments = list(vars(bind(ELEMENTWISE[name], call)).values())
        if call.is_reversed or call.function is Tensor.where:
            arguments[:2] = arguments[1::-1]
        return elementwise(builder, name, arguments, call.result)
    if name not in _TRANSLATIONS:
        raise UnsupportedError(f"it uses {function_name(call)}")
    signature, translation = _TRANSLATIONS[name]
    return translation(builder, call, bind(signature, call))


def _emit(builder: Builder, call: Call, function: str, args: list[Any]) -> Value:
    """Append an instruction whose result is that of the call."""
    return builder.emit(function, args, call.result.shape, call.result.dtype)


def _moved(builder: Builder, call: Call, name: str) -> Value:
    """Append a function that moves elements and may set others to a number."""
    sources = call.moved_tensors()
    others = call.tensor_arguments()[len(sources) :]
    if not name.endswith("_as") and not all(map(builder.is_constant, others)):
        raise UnsupportedError(f"it uses {function_name(call)} with indices that depend on its numbers")
    if name in _FILLED:
        runs, fill = _filled_runs(builder, call, name)
    else:
        runs, fill = builder.runs(call), 0.0
    return _emit(builder, call, "move", [[builder.value(tensor) for tensor in sources], runs, fill])


def _filled_runs(builder: Builder, call: Call, name: str) -> tuple[list[list[int]], float]:
    """Return the runs of a function that sets some elements to a number, and this number."""
    args, kwargs = call.args, dict(call.kwargs)
    fill = kwargs.pop("value", args[3] if name == "pad" and len(args) > 3 else None) or 0.0
    try:
        return builder.runs(replace(call, args=args[:3], kwargs=kwargs), first=1), fill
    except (RuntimeError, NotImplementedError):  # padding that torch has only for floating-point numbers
        raise UnsupportedError(
            f"it uses {function_name(call)} in a mode that isn't supported there"
        ) from None


def _identity(builder: Builder, call: Call, a: Any) -> Value:
    return builder.value(a.input)


def _dropout(builder: Builder, call: Call, a: Any) -> Value:
    if a.training and a.p:
        raise UnsupportedError(f"it uses {function_name(call)} with random numbers that weren't recorded")
    return builder.value(a.input)


def _reduction(*functions: str, extra: tuple[str, ...] = ()) -> Translation:
    """Return the translation of a reduction whose outputs are those of some functions of a vector."""

    def translation(builder: Builder, call: Call, a: Any) -> Value:
        value, sizes = vectors(builder, builder.value(a.input), a.dim)
        function = functions[call.output_index or 0]
        return _emit(builder, call, function, [value, sizes, *(getattr(a, name) for name in extra)])

    return translation


def _extremum(reduce: str, argument: str, elementwise_name: str) -> Translation:
    """Return the translation of max or min."""

    def translation(builder: Builder, call: Call, a: Any) -> Value:
        other = a.other if a.other is not None else a.dim
        if isinstance(other, Tensor):
            return elementwise(builder, elementwise_name, [a.input, other], call.result)
        return _reduction(reduce, argument)(builder, call, a)

    return translation


def _variance(function: str) -> Translation:
    """Return the translation of a variance or standard deviation, whose second output is the mean."""

    def translation(builder: Builder, call: Call, a: Any) -> Value:
        dim, unbiased = (None, a.dim) if isinstance(a.dim, bool) else (a.dim, a.unbiased)
        correction = a.correction if a.correction is not None else int(unbiased is not False)
        value, sizes = vectors(builder, builder.value(a.input), dim)
        if call.output_index:
            return _emit(builder, call, "running_mean", [value, sizes])
        return _emit(builder, call, function, [value, sizes, correction])

    return translation


def _order_of_norm(call: Call, order: Any) -> float:
    if order == "nuc" or not isinstance(order, (int, float, str, type(None))):
        raise UnsupportedError(f"it uses {function_name(call)} with the order {order}")
    return 2.0 if order in (None, "fro") else float(order)


def _norm(builder: Builder, call: Call, a: Any) -> Value:
    if call.name == "linalg.norm" and a.p is not None and len(dims_of(a.dim, a.input.dim())) != 1:
        raise UnsupportedError(f"it uses {function_name(call)} of a matrix")
    value, sizes = vectors(builder, builder.value(a.input), a.dim)
    return _emit(builder, call, "norm", [value, sizes, _order_of_norm(call, a.p)])


def _along(*functions: str, extra: tuple[str, ...] = ()) -> Translation:
    """Return the translation of a function that maps each vector along an axis to another one."""

    def translation(builder: Builder, call: Call, a: Any) -> Value:
        dim = a.dim
        if dim is None:  # as in torch.nn.functional.softmax
            dim = 0 if a.input.dim() in (0, 1, 3) else 1
        value, sizes = vectors(builder, builder.value(a.input), dim)
        function = functions[call.output_index or 0]
        return _emit(builder, call, function, [value, sizes, *(getattr(a, name) for name in extra)])

    return translation


def _topk(builder: Builder, call: Call, a: Any) -> Value:
    value, sizes = vectors(builder, builder.value(a.input), a.dim)
    function, dtype = (("sort", value.dtype), ("argsort", torch.int64))[call.output_index or 0]
    result = builder.emit(function, [value, sizes, a.largest], value.shape, dtype)
    return builder.moved(result, lambda tensor: tensor.narrow(a.dim, 0, a.k)) if value.shape else result


def _layer_norm(builder: Builder, call: Call, a: Any) -> Value:
    result, eps = call.result, a.eps
    eps = torch.finfo(result.dtype).eps if eps is None else eps
    axes = list(range(result.dim() - len(a.normalized_shape), result.dim()))
    value, sizes = vectors(builder, builder.value(a.input), axes)
    return _affine(builder, _emit(builder, call, call.name, [value, sizes, eps]), a)


def _group_norm(builder: Builder, call: Call, a: Any) -> Value:
    value = builder.value(a.input)
    rows, channels = value.shape[:2]
    length = math.prod(value.shape[1:]) // a.num_groups
    normalized = _emit(builder, call, "layer_norm", [value, [rows * a.num_groups, length, 1], a.eps])
    per_channel = (channels, *[1] * (len(value.shape) - 2))
    return _affine(builder, normalized, a, per_channel)


def _affine(builder: Builder, value: Value, a: Any, shape: tuple[int, ...] | None = None) -> Value:
    """Append the product with the weight and the sum with the bias of a normalization, if it has them."""
    for function, tensor in (("mul", a.weight), ("add", getattr(a, "bias", None))):
        if tensor is not None:
            operand = builder.value(tensor)
            if shape is not None:
                operand = Value(operand.ref, operand.shape, operand.dtype)
                operand = builder.moved(operand, lambda tensor: tensor.reshape(shape))
            args = [value, operand, 1] if function == "add" else [value, operand]
            value = builder.emit(function, args, value.shape, value.dtype)
    return value


def _normalize(builder: Builder, call: Call, a: Any) -> Value:
    value, sizes = vectors(builder, builder.value(a.input), a.dim)
    return _emit(builder, call, "normalize", [value, sizes, _order_of_norm(call, a.p), a.eps])


def _cosine_similarity(builder: Builder, call: Call, a: Any) -> Value:
    shape = torch.broadcast_shapes(a.x1.shape, a.x2.shape)  # type: ignore[no-untyped-call]
    dtype = call.result.dtype
    factors = []
    for tensor in (a.x1, a.x2):
        value = builder.moved(builder.value(tensor), lambda tensor: tensor.broadcast_to(shape))
        _, sizes = vectors(builder, value, a.dim)
        factors.append(builder.emit("normalize", [value, sizes, 2.0, a.eps], shape, dtype))
    product = builder.emit("mul", factors, shape, dtype)
    return _emit(builder, call, "sum", [*vectors(builder, product, a.dim)])


def _glu(builder: Builder, call: Call, a: Any) -> Value:
    value = builder.value(a.input)
    first = builder.moved(value, lambda tensor: tensor.chunk(2, a.dim)[0])
    second = builder.moved(value, lambda tensor: tensor.chunk(2, a.dim)[1])
    gate = builder.emit("sigmoid", [second], second.shape, second.dtype)
    return _emit(builder, call, "mul", [first, gate])


def _prelu(builder: Builder, call: Call, a: Any) -> Value:
    slope = builder.value(a.weight)
    shape = (-1, *[1] * (a.input.dim() - 2)) if a.weight.numel() > 1 else ()
    slope = builder.moved(slope, lambda tensor: tensor.reshape(shape))
    return _emit(builder, call, "leaky_relu", [builder.value(a.input), slope])


def _nan_to_num(builder: Builder, call: Call, a: Any) -> Value:
    limits = torch.finfo(call.result.dtype) if call.result.is_floating_point() else None
    positive = a.posinf if a.posinf is not None or limits is None else limits.max
    negative = a.neginf if a.neginf is not None or limits is None else limits.min
    return _emit(builder, call, "nan_to_num", [builder.value(a.input), a.nan or 0.0, positive, negative])


def _floor_divide(builder: Builder, call: Call, a: Any) -> Value:
    arguments = [a.input, a.other][:: -1 if call.is_reversed else 1]
    return elementwise(builder, "div", [*arguments, "floor"], call.result)


def _clamp_min(builder: Builder, call: Call, a: Any) -> Value:
    return elementwise(builder, "clamp", [a.input, a.min, None], call.result)


def _clamp_max(builder: Builder, call: Call, a: Any) -> Value:
    return elementwise(builder, "clamp", [a.input, None, a.max], call.result)


def _masked_fill(builder: Builder, call: Call, a: Any) -> Value:
    return elementwise(builder, "where", [a.mask, a.value, a.input], call.result)


def _bitwise(name: str) -> Translation:
    """Return the translation of an operator on booleans."""

    def translation(builder: Builder, call: Call, a: Any) -> Value:
        if call.result.dtype is not torch.bool:
            raise UnsupportedError(f"it uses {function_name(call)} of integers")
        return elementwise(builder, name, list(vars(a).values()), call.result)

    return translation


def _gather(builder: Builder, call: Call, a: Any) -> Value:
    if a.dim is None or a.input.dim() == 0:
        raise UnsupportedError(f"it uses {function_name(call)} without a dimension")
    dim = a.dim % a.input.dim()
    expected = (*a.input.shape[:dim], a.index.shape[dim], *a.input.shape[dim + 1 :])
    if a.index.shape != expected:
        raise UnsupportedError(f"it uses {function_name(call)} with an index of another shape")
    value, sizes = vectors(builder, builder.value(a.input), dim)
    return _emit(builder, call, "gather", [value, sizes, builder.value(a.index), a.index.shape[dim]])


def _one_hot(builder: Builder, call: Call, a: Any) -> Value:
    size = call.result.shape[-1]
    if a.num_classes != size:
        raise UnsupportedError(f"it uses {function_name(call)} without the number of classes")
    index = builder.moved(builder.value(a.input), lambda tensor: tensor.unsqueeze(-1))
    classes = builder.value(torch.arange(size))
    equal = builder.emit("eq", [index, classes], call.result.shape, torch.bool)
    return _emit(builder, call, "cast", [equal])


_TRANSLATIONS: dict[str, tuple[str, Translation]] = {
    **dict.fromkeys(("positive", "alias"), ("input", _identity)),
    "dropout": ("input p=0.5 training=True", _dropout),
    **{
        name: ("input dim=None keepdim=False", _reduction(name))
        for name in ("sum", "mean", "prod", "amax", "amin")
    },
    **{name: ("input dim=None keepdim=False", _reduction(name)) for name in ("any", "all", "logsumexp")},
    **{
        name: ("input dim=None keepdim=False", _reduction(name))
        for name in ("argmax", "argmin", "count_nonzero")
    },
    "median": ("input dim=None keepdim=False", _reduction("median", "argmedian")),
    "aminmax": ("input dim=None keepdim=False", _reduction("amin", "amax")),
    "max": ("input dim=None keepdim=False other=None", _extremum("amax", "argmax", "maximum")),
    "min": ("input dim=None keepdim=False other=None", _extremum("amin", "argmin", "minimum")),
    "var": ("input dim=None unbiased=None keepdim=False correction=None", _variance("var")),
    "std": ("input dim=None unbiased=None keepdim=False correction=None", _variance("std")),
    "var_mean": ("input dim=None unbiased=None keepdim=False correction=None", _variance("var")),
    "std_mean": ("input dim=None unbiased=None keepdim=False correction=None", _variance("std")),
    "norm": ("input p=None dim=None keepdim=False", _norm),
    "linalg.vector_norm": ("input p=None dim=None keepdim=False", _norm),
    **{name: ("input dim dtype=None", _along(name)) for name in ("cumsum", "cumprod", "logcumsumexp")},
    **{name: ("input dim=None", _along(name)) for name in ("softmax", "log_softmax")},
    "softmin": ("input dim=None", _along("softmin")),
    "sort": ("input dim=-1 descending=False", _along("sort", "argsort", extra=("descending",))),
    "argsort": ("input dim=-1 descending=False", _along("argsort", extra=("descending",))),
    "topk": ("input k dim=-1 largest=True", _topk),
    "layer_norm": ("input normalized_shape weight=None bias=None eps=1e-5", _layer_norm),
    "rms_norm": ("input normalized_shape weight=None eps=None", _layer_norm),
    "group_norm": ("input num_groups weight=None bias=None eps=1e-5", _group_norm),
    "normalize": ("input p=2.0 dim=1 eps=1e-12", _normalize),
    "cosine_similarity": ("x1 x2 dim=1 eps=1e-8", _cosine_similarity),
    "glu": ("input dim=-1", _glu),
    "prelu": ("input weight", _prelu),
    "nan_to_num": ("input nan=0.0 posinf=None neginf=None", _nan_to_num),
    "clamp_min": ("input min", _clamp_min),
    "clamp_max": ("input max", _clamp_max),
    "floor_divide": ("input other", _floor_divide),
    "masked_fill": ("input mask value", _masked_fill),
    "bitwise_and": ("input other", _bitwise("logical_and")),
    "bitwise_or": ("input other", _bitwise("logical_or")),
    "bitwise_xor": ("input other", _bitwise("logical_xor")),
    "bitwise_not": ("input", _bitwise("logical_not")),
    "gather": ("input dim index", _gather),
    "take_along_dim": ("input index dim=None", _gather),
    "one_hot": ("input num_classes=-1", _one_hot),
    **PRODUCTS,
}
