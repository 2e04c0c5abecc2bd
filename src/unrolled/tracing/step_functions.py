"""The elementwise functions of a program, and what all translations of torch functions have in common."""

from __future__ import annotations

import ast
import contextlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import resolve_name

from unrolled.tracing.call_recorder import Call


class UnsupportedError(Exception):
    """A step can't be given as a program. The message is a clause such as ``it uses torch.poisson``."""


@dataclass(frozen=True)
class Value:
    """A tensor in a program.

    Attributes:
        ref: Its position among the nodes.
        shape: Its shape.
        dtype: Its dtype.
    """

    ref: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Builder(Protocol):
    """What a translation needs to append to a program."""

    def value(self, tensor: Tensor) -> Value:
        """Return the value of a tensor of the step."""

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on no input, state or parameter."""

    def emit(self, function: str, args: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> Value:
        """Append an instruction. Values among the arguments become references."""

    def runs(self, call: Call, first: int = 0) -> list[list[int]]:
        """Return the runs of elements that a call moves, as :func:`find_runs` does."""

    def moved(self, value: Value, move: Callable[[Tensor], Tensor]) -> Value:
        """Append a function that only moves elements."""


_UNARY = """
    sigmoid tanh relu relu6 silu mish selu softsign logsigmoid hardswish hardsigmoid tanhshrink
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square abs neg sign
    sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc sinc
    floor ceil trunc frac
    isnan isinf isfinite signbit logical_not
"""
_BINARY = """
    mul maximum minimum fmax fmin atan2 pow remainder fmod hypot logaddexp copysign heaviside xlogy
    eq ne lt le gt ge logical_and logical_or logical_xor
"""
# The parameters of elementwise functions, in the order in which the evaluator takes them.
ELEMENTWISE = {
    **dict.fromkeys(_UNARY.split(), "input"),
    **dict.fromkeys(_BINARY.split(), "input other"),
    **dict.fromkeys(("add", "sub"), "input other alpha=1"),
    **{"div": "input other rounding_mode=None", "where": "condition input other", "lerp": "input end weight"},
    **dict.fromkeys(("addcmul", "addcdiv"), "input tensor1 tensor2 value=1"),
    **{"clamp": "input min=None max=None", "threshold": "input threshold value"},
    **dict.fromkeys(("elu", "celu"), "input alpha=1.0"),
    **{"leaky_relu": "input negative_slope=0.01", "softplus": "input beta=1.0 threshold=20.0"},
    **{"gelu": "input approximate='none'", "hardtanh": "input min_val=-1.0 max_val=1.0"},
    **dict.fromkeys(("hardshrink", "softshrink"), "input lambd=0.5"),
    **{"logit": "input eps=None", "round": "input decimals=0"},
}


# Other names of the parameters.
_SAME_NAME = {
    "axis": "dim",
    "keepdims": "keepdim",
    "self": "input",
    "A": "input",
    "a": "input",
    "b": "other",
    "ord": "p",
    "indices": "index",
    "batch1": "mat1",
    "batch2": "mat2",
    "mat": "mat1",
    "vec": "mat2",
    "vec2": "other",
    "tensor": "other",
    "train": "training",
}
_IGNORED = frozenset({"inplace", "dtype", "_stacklevel", "stable", "sorted", "keepdim", "non_blocking"})


def bind(signature: str, call: Call) -> Any:
    """Return the arguments of a call by name.

    Args:
        signature: The parameters with their defaults, separated by spaces. ``*name`` takes all others.
        call: The call.

    Raises:
        UnsupportedError: If the call has other arguments.
    """
    names: list[str] = []
    defaults: dict[str, Any] = {}
    for part in signature.split():
        name, has_default, default = part.partition("=")
        names.append(name)
        if has_default:
            defaults[name] = ast.literal_eval(default)
    args, kwargs = call.args, {_SAME_NAME.get(name, name): value for name, value in call.kwargs.items()}
    if names[-1].startswith("*"):
        rest = names.pop().removeprefix("*")
        defaults[rest], args = args[len(names) :], args[: len(names)]
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if name in names or (name not in _IGNORED and value is not None)
    }
    extra = args[len(names) :]  # such as inplace=False of torch.nn.functional.relu
    bound = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    order = list(dict.fromkeys([*names, *defaults]))
    if bound.keys() != set(order) or any(value is not False for value in extra):
        raise UnsupportedError(f"it calls {function_name(call)} with arguments that aren't supported there")
    return SimpleNamespace(**{name: bound[name] for name in order})


def function_name(call: Call) -> str:
    """Return the name of a call's function for a message, such as ``torch.topk``."""
    with contextlib.suppress(AttributeError):
        if callable(operator.attrgetter(call.name)(torch)):
            return f"torch.{call.name}"
    return str(resolve_name(call.function) or call.name).removesuffix(".__get__")


def elementwise(builder: Builder, name: str, arguments: Sequence[Any], result: Tensor) -> Value:
    """Append an elementwise function of tensors and numbers, whose result has the dtype of ``result``."""
    dtype = result.dtype
    if not dtype.is_floating_point and len(arguments) >= 2:  # such as a comparison
        dtype = torch.result_type(*arguments[:2])
    args: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            value = builder.value(argument)
            narrower = dtype is torch.float32 and value.dtype is torch.float64  # of a tensor without axes
            args.append(builder.emit("cast", [value], value.shape, dtype) if narrower else value)
        elif isinstance(argument, float) and dtype is torch.float32 and math.isfinite(argument):
            args.append(torch.tensor(argument, dtype=dtype).item())
        else:
            args.append(argument)
    return builder.emit(name, args, result.shape, result.dtype)


def dims_of(dim: Any, rank: int) -> list[int]:
    """Return axes as sorted numbers from 0; all of them if ``dim`` is None or empty."""
    if dim is None or dim == () or dim == []:
        return list(range(rank))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return sorted(d % max(1, rank) for d in dims)


def vectors(builder: Builder, value: Value, dim: Any) -> tuple[Value, list[int]]:
    """Return a value, and how to read it as vectors along some axes.

    Returns:
        The value, with its axes permuted if those of ``dim`` aren't adjacent, and three sizes: those of the
        axes before, of the vectors, and of the axes after.
    """
    rank = len(value.shape)
    dims = dims_of(dim, rank) if rank else []
    if dims and dims != list(range(dims[0], dims[-1] + 1)):
        order = [d for d in range(rank) if d not in dims] + dims
        value = builder.moved(value, lambda tensor: tensor.permute(order))
        dims = list(range(rank - len(dims), rank))
    first, last = (dims[0], dims[-1] + 1) if dims else (0, 0)
    shape = value.shape
    return value, [math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])]
