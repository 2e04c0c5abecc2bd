"""The arithmetic behind one number of a step, as text with the numbers put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SUM, _PRODUCT, _ATOM = range(3)  # how tightly a text holds together
_INFIX = {"add": (" + ", _SUM), "sub": (" - ", _SUM), "mul": ("·", _PRODUCT), "div": (" / ", _PRODUCT)}
_SAME_AS = {"truediv": "div", "subtract": "sub", "multiply": "mul", "divide": "div", "mm": "matmul"}
_MOVES = frozenset(  # functions that only move elements
    {"chunk", "split", "tensor_split", "unbind", "getitem", "narrow", "select", "index_select", "flip"}
    | {"cat", "concat", "concatenate", "hstack", "stack", "expand", "expand_as", "repeat", "roll", "clone"}
    | {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
    | {"transpose", "swapaxes", "permute", "movedim", "t", "T", "mT"}
)


def number(value: float | complex) -> str:
    """A number to four decimal places; in scientific form where that would hide it."""
    if isinstance(value, complex):
        return f"({number(value.real)} + {number(value.imag)}i)"
    if not math.isfinite(value) or value == 0 or 5e-5 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"


@dataclass(frozen=True)
class _Made:
    """How a tensor came to be: a call and, where it returned several tensors, which one."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    which: int | None
    versions: tuple[tuple[Tensor, int], ...]

    def holds(self) -> bool:
        """Whether nothing of it was changed in place since."""
        return all(_version(tensor) == version for tensor, version in self.versions)


class Recording(TorchFunctionMode):
    """While active, notes for every new tensor the torch function that made it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, _Made | None] = {}
        self._alive: list[Any] = []  # an id stays valid as long as its tensor lives

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__setitem__:
            self._made[id(args[0])] = None
        several = isinstance(result, (tuple, list))
        for which, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor):
                seen = tuple((part, _version(part)) for part in (tensor, *_parts((args, kwargs))))
                made = _Made(_name(func), func, args, kwargs or {}, which if several else None, seen)
                known = id(tensor) in self._made or any(tensor is argument for argument in args)
                self._made[id(tensor)] = None if known else made  # None: changed in place, no one call
                self._alive.append(tensor)
        return result

    def explain(self, tensor: Tensor, index: tuple[int, ...], named: Mapping[str, Tensor], terms: int) -> str:
        """The arithmetic that made ``tensor[index]``, down to the named tensors.

        Args:
            tensor: made while this was active, from one row.
            index: of an element of ``tensor``.
            named: tensors that have a name in the step and are shown as numbers.
            terms: a longer sum shows its largest terms, this many, and what the others add up to.
        """
        names = {id(value): name for name, value in named.items() if value is not tensor}
        made = {key: how if how and how.holds() else None for key, how in self._made.items()}
        writer = _Writer(made, names, terms)
        source, index = writer.source(tensor, index)
        if id(source) in names:  # a part of another quantity
            return f"{names[id(source)]}{_place(source, index)}"
        return writer.write(source, index)[0]


@dataclass(frozen=True)
class _Writer:
    made: dict[int, _Made | None]
    names: Mapping[int, str]
    terms: int

    def write(self, tensor: Any, index: tuple[int, ...]) -> tuple[str, int]:
        """The text of one element, and how tightly it holds together."""
        if not isinstance(tensor, Tensor):
            return (f"{tensor:g}" if isinstance(tensor, float) else str(tensor)), _ATOM
        made = self.made.get(id(tensor))
        if made is None or id(tensor) in self.names:
            return number(tensor[index].item()), _ATOM
        if made.name in _INFIX and len(made.args) == 2 and not made.kwargs:
            return self._infix(made, tensor, index)
        if made.name == "neg" and len(made.args) == 1:
            text = self._held(made.args[0], index, _ATOM)
            return f"-({text})" if text.startswith("-") else f"-{text}", _PRODUCT
        if made.name in ("linear", "matmul") and _is_matrix(made):
            return self._products(made, index)
        if made.name in _MOVES:
            return self.write(*self.source(tensor, index))
        return self._call(made, tensor, index)

    def _held(self, tensor: Any, index: tuple[int, ...], strength: int) -> str:
        text, own = self.write(tensor, _broadcast(tensor, index))
        return text if own >= strength else f"({text})"

    def _infix(self, made: _Made, tensor: Tensor, index: tuple[int, ...]) -> tuple[str, int]:
        sign, strength = _INFIX[made.name]
        left, right = made.args
        if made.function.__name__.strip("_") in ("rsub", "rdiv", "rtruediv"):
            left, right = right, left
        right_strength = strength if made.name in ("add", "mul") else strength + 1
        return self._held(left, index, strength) + sign + self._held(right, index, right_strength), strength

    def _products(self, made: _Made, index: tuple[int, ...]) -> tuple[str, int]:
        """A weighted sum: every weight times what it weighs, and the bias."""
        *rows, unit = index
        given = dict(zip(("input", "weight", "bias"), made.args, strict=False)) | made.kwargs
        if made.name == "linear":
            left, right, bias = given["input"], given["weight"][unit], given.get("bias")
        else:
            left, right, bias = made.args[0], made.args[1][..., unit], None
        weighed, weights = left[tuple(rows)].tolist(), right.tolist()
        size = [
            abs(w * v) if math.isfinite(w * v) else math.inf for w, v in zip(weights, weighed, strict=True)
        ]
        largest = sorted(sorted(range(len(size)), key=lambda k: -size[k])[: self.terms])
        parts = [f"{number(weights[k])}·{number(weighed[k])}" for k in largest]
        others = set(range(len(size))) - set(largest)
        if others:
            rest = math.fsum(weights[k] * weighed[k] for k in others)
            parts.append(f"({len(others)} more terms: {number(rest)})")
        if bias is not None:
            parts.append(number(bias[unit].item()))
        return " + ".join(parts), _SUM if len(parts) > 1 else _PRODUCT

    def source(self, tensor: Tensor, index: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """Where an element came from through functions that only move elements: move their numbers."""
        made = self.made.get(id(tensor))
        if made is None or made.name not in _MOVES or id(tensor) in self.names:
            return tensor, index
        sources: list[Tensor] = []

        def numbered(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(numbered(part) for part in value)
            start = sum(source.numel() for source in sources)
            sources.append(value)
            return torch.arange(start, start + value.numel(), device=value.device).reshape(value.shape)

        first = len(made.args) > 0  # what is moved stands first; the rest says how
        args = (numbered(made.args[0]), *made.args[1:]) if first else ()
        moves = ("input", "tensors", "tensor")
        kwargs = {k: numbered(v) if not first and k in moves else v for k, v in made.kwargs.items()}
        moved = made.function(*args, **kwargs)
        place = int((moved if made.which is None else moved[made.which])[index])
        for source in sources:
            if place < source.numel():
                where = torch.unravel_index(torch.tensor(place), source.shape)
                return self.source(source, tuple(int(axis) for axis in where))
            place -= source.numel()
        raise AssertionError("an element came from nowhere")

    def _call(self, made: _Made, tensor: Tensor, index: tuple[int, ...]) -> tuple[str, int]:
        """Any other function: of the element's own numbers, or of whole rows."""
        arguments = [*made.args, *made.kwargs.values()]
        if made.which is None and self._is_elementwise(made, tensor, index):
            texts = [self.write(value, _broadcast(value, index))[0] for value in arguments]
            return f"{made.name}({', '.join(texts)})", _ATOM

        def own(value: Tensor) -> Tensor:
            """The row of a tensor that has as many rows as the result."""
            rows = tensor.shape[0] if tensor.dim() > 1 else None
            return value[index[0]] if value.dim() > 1 and value.shape[0] == rows else value

        rows = [
            _shortened(own(value).flatten().tolist(), self.terms)
            for value in arguments
            if isinstance(value, Tensor) and value.dim() > 0
        ]
        return f"{made.name}({', '.join(rows)}){_place(tensor, index)}", _ATOM

    @staticmethod
    def _is_elementwise(made: _Made, tensor: Tensor, index: tuple[int, ...]) -> bool:
        def one(value: Any) -> Any:
            return value[_broadcast(value, index)].reshape(1, 1) if isinstance(value, Tensor) else value

        try:
            alone = made.function(*map(one, made.args), **{k: one(v) for k, v in made.kwargs.items()})
            return torch.allclose(alone.reshape(()), tensor[index], equal_nan=True)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False


def _version(tensor: Tensor) -> int:
    """How often a tensor, or what it is a view of, was changed in place, where torch counts it."""
    return -1 if tensor.is_inference() else tensor._version


def _parts(value: Any) -> Iterator[Tensor]:
    """Every tensor among the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)


def _name(function: Any) -> str:
    """``add`` for torch.add, Tensor.add, Tensor.__add__ and Tensor.__radd__ alike."""
    name = str(function.__name__).strip("_")
    if name == "get":  # a property such as Tensor.T
        return str(function.__self__.__name__)
    if function.__name__.startswith("__r") and name[1:] in (*_INFIX, "truediv", "matmul"):
        name = name[1:]
    name = {"rsub": "sub"}.get(name, name)
    return _SAME_AS.get(name, name)


def _broadcast(value: Any, index: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the element of ``value`` that meets ``index`` under broadcasting."""
    if not isinstance(value, Tensor):
        return index
    tail = index[len(index) - value.dim() :]
    return tuple(0 if size == 1 else k for size, k in zip(value.shape, tail, strict=True))


def _is_matrix(made: _Made) -> bool:
    """Whether a product is one with a matrix, so that each number is one weighted sum."""
    if made.name == "linear":
        given = dict(zip(("input", "weight"), made.args, strict=False)) | made.kwargs
        return bool(given["weight"].dim() == 2)
    return len(made.args) == 2 and all(isinstance(a, Tensor) and a.dim() == 2 for a in made.args)


def _place(tensor: Tensor, index: tuple[int, ...]) -> str:
    """Where an element stands in its row, in brackets; nothing where it is the only one."""
    inside = index[1:] if tensor.dim() > 1 and len(tensor) == 1 else index
    return f"[{', '.join(map(str, inside))}]" if tensor.numel() > 1 else ""


def _shortened(values: list[float], count: int) -> str:
    texts = [number(value) for value in values[:count]]
    return f"[{', '.join([*texts, '…'] if len(values) > count else texts)}]"
