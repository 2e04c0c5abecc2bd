"""Random numbers in a step: torch's functions that draw them, computed from the numbers of a source."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# The kind of the numbers, "uniform", "normal" or "exponential", and their shape. A size of -m stands for m
# times the batch size.
Draw = tuple[str, tuple[int, ...]]
Draws = tuple[Draw, ...]
Source = Callable[[str, tuple[int, ...]], Tensor | None]

_DTYPES = (torch.float32, torch.float64)
_BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def draw_width(draw: Draw) -> int:
    """Return how many numbers of a draw there are for each row of the batch."""
    width = 1
    for size in draw[1]:
        width *= abs(size)
    return width


class ColumnSource:
    """Provide the numbers of a step's draws from columns of its input.

    Args:
        draws: The draws in the order of the step.
        x: The input, ``(batch, features)``.
        column: The first column. Each draw has the number of columns that :func:`draw_width` returns.
    """

    def __init__(self, draws: Draws, x: Tensor, column: int) -> None:
        self._draws, self._x, self._column = list(draws), x, column

    def __call__(self, kind: str, shape: tuple[int, ...]) -> Tensor | None:
        """Return the numbers of the next draw in a new tensor, or None if it is another draw."""
        batch = self._x.shape[0]
        if not self._draws or self._draws[0][0] != kind:
            return None
        sizes = self._draws[0][1]
        if shape != tuple([-size * batch if size < 0 else size for size in sizes]):
            return None
        first, width = self._column, draw_width(self._draws.pop(0))
        self._column += width
        values = self._x[:, first : first + width]
        axis = next(k for k, size in enumerate(sizes) if size < 0)
        if axis > 0:
            values = values.reshape(batch, *sizes[:axis], *sizes[axis + 1 :]).movedim(0, axis)
        return values.reshape(shape).clone()


class ReplaceDraws(TorchFunctionMode):
    """Compute torch's functions that draw random numbers from the numbers of a source.

    Functions that aren't in the table below, or that have a generator of their own, and draws for which the
    source returns None, use torch's generator.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is None or kwargs.get("generator") is not None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        others = {name: value for name, value in kwargs.items() if name not in ("generator", "out")}
        result = replacement(self._source, *args, **others)
        return func(*args, **kwargs) if result is None else result


# Each replacement takes the source and the arguments of the function. It returns None to call the function.


def _draw(
    source: Source, kind: str, shape: Any, dtype: torch.dtype | None, device: Any = None
) -> Tensor | None:
    dtype = dtype or torch.get_default_dtype()
    values = source(kind, tuple(shape)) if dtype in _DTYPES else None
    if values is None or (values.dtype is dtype and device is None):
        return values
    narrower = values.to(device=device, dtype=dtype)
    if kind == "uniform" and dtype is torch.float32 and values.dtype is not dtype:
        return narrower.clamp(max=_BELOW_ONE)  # rounding may give 1
    return narrower


def _new(kind: str) -> Callable[..., Tensor | None]:
    """Return the replacement of torch.rand or torch.randn."""

    def replacement(
        source: Source,
        *size: Any,
        dtype: torch.dtype | None = None,
        device: Any = None,
        layout: Any = torch.strided,
        requires_grad: bool = False,
        pin_memory: bool = False,
        **others: Any,
    ) -> Tensor | None:
        if requires_grad or pin_memory or layout not in (torch.strided, None) or others.keys() - {"size"}:
            return None
        shape: Any = others.get("size", size)
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        return _draw(source, kind, shape, dtype, device)

    return replacement


def _like(kind: str) -> Callable[..., Tensor | None]:
    """Return the replacement of torch.rand_like or torch.randn_like."""
    new = _new(kind)

    def replacement(source: Source, input: Tensor, **options: Any) -> Tensor | None:
        options.pop("memory_format", None)
        return new(source, input.shape, **{"dtype": input.dtype, **options})

    return replacement


def _uniform_(source: Source, tensor: Tensor, *bounds: float, **named: float) -> Tensor | None:
    lower, upper = (*bounds, *(0.0, 1.0)[len(bounds) :])
    lower, upper = named.get("from", lower), named.get("to", upper)
    values = _draw(source, "uniform", tensor.shape, tensor.dtype) if lower <= upper else None
    return None if values is None else tensor.copy_(values * (upper - lower) + lower)


def _normal_(source: Source, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor | None:
    values = _draw(source, "normal", tensor.shape, tensor.dtype) if std >= 0 else None
    return None if values is None else tensor.copy_(values * std + mean)


def _exponential_(source: Source, tensor: Tensor, lambd: float = 1.0) -> Tensor | None:
    values = _draw(source, "exponential", tensor.shape, tensor.dtype) if lambd > 0 else None
    return None if values is None else tensor.copy_(values / lambd)


def _normal(source: Source, mean: Any, std: Any = 1.0, size: Any = None, **options: Any) -> Tensor | None:
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    if not tensors:
        values = _new("normal")(source, size, **options) if size is not None and std >= 0 else None
        return None if values is None else values * std + mean
    if size is not None or options or len({tensor.dtype for tensor in tensors}) > 1:
        return None
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    values = _draw(source, "normal", shape, tensors[0].dtype)
    if values is None:
        return None
    mean, std = (value.detach() if isinstance(value, Tensor) else value for value in (mean, std))
    return _with_zero_gradients(_nan_unless(std >= 0, values * std + mean), tensors)


def _bernoulli(source: Source, input: Tensor, p: float | None = None) -> Tensor | None:
    if p is not None and not 0 <= p <= 1:
        return None
    values = _draw(source, "uniform", input.shape, input.dtype)
    return None if values is None else _below(values, input.detach() if p is None else p, [input])


def _bernoulli_(source: Source, tensor: Tensor, p: Any = 0.5) -> Tensor | None:
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        return None
    dtype = p.dtype if isinstance(p, Tensor) else tensor.dtype
    values = _draw(source, "uniform", tensor.shape, dtype if dtype in _DTYPES else None)
    return None if values is None else tensor.copy_(_below(values, p, [p] if isinstance(p, Tensor) else []))


def _below(values: Tensor, p: Any, inputs: list[Tensor]) -> Tensor:
    """Return 1 with probability p, else 0; NaN if p is no probability. Gradients are zeros, as in torch."""
    p = p.detach() if isinstance(p, Tensor) else p
    drawn = (values < p).to(values.dtype)
    return _with_zero_gradients(_nan_unless((p >= 0) & (p <= 1), drawn), inputs)


def _nan_unless(condition: Any, values: Tensor) -> Tensor:
    return values if isinstance(condition, bool) else torch.where(condition, values, math.nan)


def _with_zero_gradients(values: Tensor, inputs: list[Tensor]) -> Tensor:
    """Return the values as a function of some inputs whose gradients are zeros."""
    for tensor in inputs:
        values = torch.where(torch.ones_like(values, dtype=torch.bool), values, tensor)
    return values


def _dropout(
    source: Source,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    **others: Any,
) -> Tensor | None:
    training = others.get("train", training)
    if not training or not 0 < p < 1:
        return None
    values = _draw(source, "uniform", input.shape, input.dtype)
    if values is None:
        return None
    noise = (values < 1 - p).to(input.dtype) / (1 - p)
    return input.mul_(noise) if inplace else input * noise


def _dropout_(source: Source, input: Tensor, p: float, train: bool) -> Tensor | None:
    return _dropout(source, input, p, train, inplace=True)


def _gumbel_softmax(
    source: Source,
    logits: Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Tensor | None:
    values = _draw(source, "exponential", logits.shape, logits.dtype)
    if values is None:
        return None
    soft = torch.softmax((logits - values.log()) / tau, dim)
    if not hard:
        return soft
    index = soft.argmax(dim, keepdim=True).transpose(dim, -1)
    one_hot = (torch.arange(logits.shape[dim], device=index.device) == index).to(soft.dtype)
    return one_hot.transpose(dim, -1) - soft.detach() + soft


_REPLACEMENTS: dict[Any, Callable[..., Tensor | None]] = {
    torch.rand: _new("uniform"),
    torch.randn: _new("normal"),
    torch.rand_like: _like("uniform"),
    torch.randn_like: _like("normal"),
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    torch.dropout: _dropout,
    torch.dropout_: _dropout_,
    functional.dropout: _dropout,
    functional.gumbel_softmax: _gumbel_softmax,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.exponential_: _exponential_,
    Tensor.normal_: _normal_,
    Tensor.uniform_: _uniform_,
}
