"""Random expressions of a step as text, and what is known about each of them: its shape and dtype."""

from __future__ import annotations

import ast
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzz.functions import FUNCTIONS

T = TypeVar("T")

# The names that the text of a step uses. The step of a cell runs with the same ones.
NAMES: dict[str, Any] = {"torch": torch, "F": F, "linear": F.linear, "math": math, **FUNCTIONS}
BATCH_SIZES = (2, 3)  # each expression is evaluated for both, so that the batch dimension can be recognized
MAX_ELEMENTS = 24  # of a value, without its batch dimension
NUMBERS = ("-1.5", "-1", "-0.5", "-0.1", "0", "0.0", "0.1", "0.3", "0.5", "1", "1.0", "2", "3")


class Invalid(Exception):
    """An expression that torch rejects, or whose value a step can't use."""


class Dice:
    """Random choices that are the same for a seed on every machine and in every version of Python."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random  # the only method that Python promises never to change

    def integer(self, low: int, high: int) -> int:
        """Return an integer from ``low`` to ``high``."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.integer(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        """Return True with some probability."""
        return self._random() < probability


@dataclass(frozen=True)
class Value:
    """An expression.

    Attributes:
        text: Its source.
        shape: Its shape, without the batch dimension.
        batched: Whether it has a batch dimension.
        dtype: Its dtype.
    """

    text: str
    shape: tuple[int, ...]
    batched: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.text

    @property
    def width(self) -> int:
        """The size of the last dimension."""
        return self.shape[-1]


@dataclass(frozen=True)
class Line:
    """A local variable of a step.

    Attributes:
        name: Its name.
        text: The expression that it is assigned.
        changes: Statements that change it in place.
    """

    name: str
    text: str
    changes: tuple[str, ...] = ()


class Builder(Dice):
    """Build the lines of a step.

    Args:
        seed: Seed of the random choices.
        widths: Width of the input and of each state, by name.
        dtype: The dtype that the step computes in.
        bias: Whether there are parameters whose names begin with ``bias``.
    """

    def __init__(self, seed: str, widths: dict[str, int], dtype: torch.dtype, bias: bool) -> None:
        super().__init__(seed)
        self.lines: list[Line] = []
        self.params: dict[str, tuple[int, ...]] = {}
        self.dtype = dtype
        self._bias = bias
        self._depth = 0
        self.nested: Callable[[Builder], str] = lambda builder: builder.value().text
        self._cells = [SimpleNamespace() for _ in BATCH_SIZES]
        self._scopes: list[dict[str, Any]] = [{"self": cell} for cell in self._cells]
        for name, width in widths.items():
            for scope, batch in zip(self._scopes, BATCH_SIZES, strict=True):
                scope[name] = torch.linspace(-1.1, 1.3, batch * width, dtype=dtype).view(batch, width)
        self.values = [self.evaluate(name) for name in widths]

    def set_attribute(self, name: str, value: Any) -> None:
        """Give the cell an attribute, such as an option."""
        for cell in self._cells:
            setattr(cell, name, value)

    def evaluate(self, text: str, *changes: str, name: str = "_new") -> Value:
        """Return what is known about an expression.

        Args:
            text: The expression.
            changes: Statements that then change it in place.
            name: The name of the variable in these statements.

        Raises:
            Invalid: If torch rejects it, or the result is too large or no batch of rows.
        """
        source = "\n".join([f"{name} = {text}", *changes])
        results = []
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for scope in self._scopes:
                local = {**NAMES, **scope}
                try:
                    exec(source, local)
                except Exception as error:
                    raise Invalid(f"{source}: {error}") from None
                results.append(local[name])
        if not all(isinstance(result, Tensor) for result in results):
            raise Invalid(f"{source} is no tensor")
        first, second = (tuple(result.shape) for result in results)
        batched = first != second
        if batched and (first[:1], second[:1]) != tuple((batch,) for batch in BATCH_SIZES):
            raise Invalid(f"{source} has no batch dimension in front")
        shape = first[1:] if batched else first
        if not 0 < math.prod(shape) <= MAX_ELEMENTS or (batched and first[1:] != second[1:]):
            raise Invalid(f"{source} has the shape {shape}")
        for scope, result in zip(self._scopes, results, strict=True):
            if name != "_new":
                scope[name] = result
        return Value(text, shape, batched, results[0].dtype)

    def let(self, text: str, *changes: str) -> Value:
        """Assign an expression to a new local variable, which later expressions can use."""
        name = f"v{len(self.lines)}"
        changes = tuple(change.replace("_new", name) for change in changes)
        text = ast.unparse(ast.parse(text))
        value = self.evaluate(text, *changes, name=name)
        self.lines.append(Line(name, text, changes))
        value = Value(name, value.shape, value.batched, value.dtype)
        self.values.append(value)
        return value

    # --- operands ---

    def value(self, rank: int | None = None) -> Value:
        """Return a floating-point operand: a variable or, sometimes, an expression.

        Args:
            rank: Number of its dimensions, without the batch dimension. If None, one or more.
        """
        if self._depth < 2 and self.chance(0.3):
            self._depth += 1
            try:
                value = self.evaluate(self.nested(self))
                if self._is_operand(value, rank):
                    return value
            except Invalid:
                pass
            finally:
                self._depth -= 1
        candidates = [value for value in self.values if self._is_operand(value, rank)]
        recent = candidates[-3:] if self.chance(0.5) else candidates
        return self.pick(recent)

    def _is_operand(self, value: Value, rank: int | None) -> bool:
        return (
            value.batched
            and value.dtype is self.dtype
            and (len(value.shape) == rank if rank is not None else len(value.shape) > 0)
        )

    def param(self, *shape: int, prefix: str = "p") -> str:
        """Return a parameter, ``self.<name>``: a new one, or sometimes one that was used before."""
        same = [name for name, other in self.params.items() if other == shape and name.startswith(prefix)]
        if same and self.chance(0.25):
            return f"self.{self.pick(same)}"
        if math.prod(shape) > 200:
            raise Invalid(f"a parameter of shape {shape} is too large")
        name = f"{prefix}{len(self.params)}"
        self.params[name] = shape
        exists = prefix != "bias" or self._bias
        count = math.prod(shape)
        tensor = torch.linspace(-0.9, 1.2, count, dtype=self.dtype).view(shape) if exists else None
        self.set_attribute(name, tensor)
        return f"self.{name}"

    def number(self) -> str:
        """Return a number."""
        return self.pick(NUMBERS)

    def fit(self, value: Value, shape: tuple[int, ...]) -> str:
        """Return the text of a value with another shape, made of its elements."""
        if value.shape == shape:
            return value.text
        count = math.prod(shape)
        text = value.text if len(value.shape) == 1 else f"{value}.flatten(1)"
        size = math.prod(value.shape)
        if size < count:
            text = f"{text}.repeat(1, {-(-count // size)})"
        if size != count:
            text = f"{text}[:, :{count}]"
        return text if len(shape) == 1 else f"{text}.reshape(-1, {', '.join(map(str, shape))})"
