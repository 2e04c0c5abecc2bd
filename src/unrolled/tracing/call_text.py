"""Calls of torch functions as Python code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def call_text(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], scalars: bool) -> str:
    """Return a call as Python code, with ``{}`` for each tensor: ``"leaky_relu({}, 0.2)"``.

    Args:
        name: Name of the function.
        args: The positional arguments.
        kwargs: The keyword arguments.
        scalars: Whether tensors without dimensions count as operands.

    Returns:
        The code. Empty if a tensor isn't an operand, or is in a list.
    """

    def text(value: Any) -> str:
        return "{}" if isinstance(value, Tensor) else repr(value).replace("{", "{{").replace("}", "}}")

    arguments = [*args, *kwargs.values()]
    operands = [value for value in arguments if isinstance(value, Tensor) and (scalars or value.dim())]
    if len(operands) < sum(1 for _ in tensors_in(arguments)):
        return ""
    texts = [*map(text, args), *(f"{key}={text(value)}" for key, value in kwargs.items())]
    return f"{name}({', '.join(texts)})"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor among the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
