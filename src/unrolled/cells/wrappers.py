"""Cells that wrap another cell and change its step. Every engine runs them like any other cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from unrolled.cells.base import Cell
from unrolled.cells.draws import ColumnSource, Draws, ReplaceDraws, draw_width
from unrolled.cells.quantized_products import ProductMode, QuantizedProducts

States = tuple[Tensor, ...]
WrapperSpec = tuple[tuple[str, tuple[Any, ...]], ...]  # stored names and arguments, innermost wrapper first


class CellWrapper(Cell):
    """Base class of cells whose step calls the step of another cell, the inner cell.

    The input of a wrapper is the inner cell's input, followed by the extra input columns that only the
    wrapper reads. Its states are the inner cell's states, followed by its own.

    Args:
        inner: The wrapped cell. It may be a wrapper itself, and its parameters may be bound.
        extra_inputs: Number of extra input columns.
        states: The sizes of all states by name. None: those of the inner cell.
        arguments: The constructor's arguments after ``inner``.
    """

    state = ("states",)
    stored_name: ClassVar[str]  # exported programs contain it, so it must never change
    inner: Cell
    arguments: tuple[Any, ...]

    def __init__(
        self,
        inner: Cell,
        extra_inputs: int = 0,
        states: Mapping[str, int] | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        sizes = dict(inner.state_sizes() if states is None else states)
        own = {
            "inner": inner,
            "features": inner.features + extra_inputs,
            "state": tuple(sizes),
            "_state_sizes": sizes,
            "arguments": arguments,
            "_wrapper_spec": (*inner._wrapper_spec, (self.stored_name, arguments)),
        }
        attributes = {**inner.__dict__, **own}
        attributes.pop("step", None)  # of an inner cell that records its steps
        self.__dict__.update(attributes)  # like Cell.bind

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return a copy with tensors for the parameters, which the inner cell shares."""
        bound = super().bind(tensors)
        bound.__dict__["inner"] = self.inner.bind(tensors)
        return bound

    @property
    def innermost(self) -> Cell:
        """The cell without any wrappers."""
        return self.inner.innermost

    @property
    def spec(self) -> WrapperSpec:
        """The specification of all wrappers around the innermost cell, this one last."""
        return self._wrapper_spec

    def equations(self) -> Callable[..., Any]:
        """Return the function that contains the equations of the inner cell's step."""
        return self.inner.equations()

    def inner_step(self, x: Tensor, *states: Tensor) -> States:
        """Run the inner cell's step in the training mode of this cell."""
        self.inner.training = self.training
        new = self.inner.step(x[:, : self.inner.features], *states)
        return new if isinstance(new, tuple) else (new,)

    def extra_input(self, x: Tensor, index: int = 0) -> Tensor:
        """Return one of the extra input columns as booleans of shape ``(batch, 1)``."""
        column = self.inner.features + index
        return x[:, column : column + 1] > 0.5


class ResetWrapper(CellWrapper):
    """Reset the states to the initial states before the steps that an extra input marks.

    Args:
        inner: The wrapped cell.
        with_initial: True if further states hold the initial states. Otherwise these are zeros.
        reverse: True if the cell runs from the last step to the first.
        directions: Number of directions of the layer. Each direction has its own extra input column.
    """

    stored_name = "Resetting"

    def __init__(self, inner: Cell, with_initial: bool, reverse: bool, directions: int) -> None:
        sizes = inner.state_sizes()
        initial_sizes = {f"{name}_0": size for name, size in sizes.items()} if with_initial else {}
        super().__init__(inner, directions, {**sizes, **initial_sizes}, (with_initial, reverse, directions))
        self.reverse = reverse

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Run the inner step, from the initial states in the rows that are marked."""
        count = len(self.inner.state)
        current, stored = states[:count], states[count:]
        marked = self.extra_input(x, int(self.reverse))
        initial = stored or tuple(torch.zeros_like(state) for state in current)
        previous = [torch.where(marked, a, b) for a, b in zip(initial, current, strict=True)]
        return (*self.inner_step(x, *previous), *stored)


class MaskWrapper(CellWrapper):
    """Keep the states unchanged in the steps that an extra input, the mask, excludes."""

    stored_name = "Masked"

    def __init__(self, inner: Cell) -> None:
        super().__init__(inner, 1)

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Run the inner step, and return the old states in the rows where the mask is False."""
        mask = self.extra_input(x)
        new = self.inner_step(x, *states)
        return tuple(torch.where(mask, after, before) for after, before in zip(new, states, strict=True))


class AllStatesWrapper(CellWrapper):
    """Concatenate the first states into one, so that the output contains all of them.

    Args:
        inner: The wrapped cell.
        count: Number of states to concatenate.
    """

    stored_name = "Every"

    def __init__(self, inner: Cell, count: int) -> None:
        sizes = list(inner.state_sizes().items())
        others = dict(sizes[count:])
        super().__init__(inner, 0, {"every": sum(size for _, size in sizes[:count]), **others}, (count,))
        self.sizes = [size for _, size in sizes[:count]]

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Split the concatenated states, run the inner step and concatenate the new states."""
        joined, *others = states
        new = self.inner_step(x, *torch.split(joined, self.sizes, -1), *others)
        count = len(self.sizes)
        return (torch.cat(new[:count], -1), *new[count:])


class ZoneoutWrapper(CellWrapper):
    """Let units of the states keep their previous values: zoneout (Krueger et al., 2017, equation 3).

    Args:
        inner: The wrapped cell.
        rates: For each of its first states, the probability that a unit keeps its value.
        drawn: True in training, where extra inputs select the units that keep their values. Otherwise every
            state is the expected value: the weighted mean of its old and new values.
    """

    stored_name = "Zoned"

    def __init__(self, inner: Cell, rates: tuple[float, ...], drawn: bool) -> None:
        sizes = inner.state_sizes().values()
        width = sum(size for size, rate in zip(sizes, rates, strict=False) if rate)
        super().__init__(inner, width if drawn else 0, arguments=(rates, drawn))
        self.rates, self.drawn = rates, drawn

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Run the inner step, and replace some of the new values by the old ones."""
        new, column = list(self.inner_step(x, *states)), self.inner.features
        for k, (rate, before) in enumerate(zip(self.rates, states, strict=False)):
            if rate and self.drawn:
                size = before.shape[1]
                new[k] = torch.where(x[:, column : column + size] > 0.5, before, new[k])
                column += size
            elif rate:
                new[k] = rate * before + (1 - rate) * new[k]
        return tuple(new)


class RecurrentDropoutWrapper(CellWrapper):
    """Apply dropout to the first state where a matrix product reads it. A further state is the dropout mask.

    Other operations read the state without dropout, so a gate that keeps the state keeps all of it. Dropout
    also applies to values computed from the state that then enter a product, such as ``r * h`` in a GRU.
    """

    stored_name = "Dropped"

    def __init__(self, inner: Cell) -> None:
        sizes = inner.state_sizes()
        super().__init__(inner, 0, {**sizes, "mask": next(iter(sizes.values()))})

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Run the inner step, with the masked state in its matrix products."""
        *current, mask = states
        with _MaskedInProducts(current[0], current[0] * mask):
            new = self.inner_step(x, *current)
        return (*new, mask)


class DrawsWrapper(CellWrapper):
    """Give the step its random numbers: extra inputs, which are drawn for all time steps before the loop.

    Args:
        inner: The wrapped cell.
        draws: The draws of its step.
        reverse: True if the cell runs from the last step to the first.
        directions: Number of directions of the layer. Each direction has its own numbers.
    """

    stored_name = "Drawn"

    def __init__(self, inner: Cell, draws: Draws, reverse: bool, directions: int) -> None:
        width = sum([draw_width(draw) for draw in draws])
        super().__init__(inner, directions * width, arguments=(draws, reverse, directions))
        self.draws, self.first = draws, inner.features + reverse * width

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Run the inner step with the numbers of its draws."""
        with ReplaceDraws(ColumnSource(self.draws, x, self.first)):
            return self.inner_step(x, *states)


class QuantizedWrapper(CellWrapper):
    """Compute the matrix products of the step with quantized weights, for inference.

    Args:
        inner: The wrapped cell.
        weights: The format of the weights: ``"int8"``, ``"bfloat16"`` or ``"float16"``.
        quantize_input: Whether products that depend only on the input are included.
        scales: For int8: fixed scales of the activations, one per product. Empty: none.
    """

    stored_name = "Quantized"
    _product_mode: Callable[..., ProductMode] = QuantizedProducts  # an export to ONNX replaces it

    def __init__(self, inner: Cell, weights: str, quantize_input: bool, scales: tuple[float, ...]) -> None:
        super().__init__(inner, arguments=(weights, quantize_input, scales))

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Run the inner step with quantized products."""
        with self._product_mode(x, states, *self.arguments):
            return self.inner_step(x, *states)


def wrapped_cells(cell: Cell) -> Iterator[Cell]:
    """Yield a cell and all cells that it wraps, from the outside in."""
    yield cell
    while isinstance(cell, CellWrapper):
        cell = cell.inner
        yield cell


def rounds_activations(cell: Cell) -> bool:
    """Return whether a cell, or one that it wraps, computes products in int8."""
    return any(
        isinstance(one, QuantizedWrapper) and one.arguments[0] == "int8" for one in wrapped_cells(cell)
    )


_PRODUCTS = {
    torch.nn.functional.linear, torch.nn.functional.bilinear, torch.matmul, torch.mm, torch.bmm, torch.mv,
    torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot, Tensor.matmul, Tensor.mm, Tensor.bmm,
    Tensor.addmm, Tensor.baddbmm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip


class _MaskedInProducts(TorchFunctionMode):
    """Replace a value by its masked version wherever a matrix product reads it.

    Operations on the value run twice: on the value and on its masked version. Products read the masked
    results, all other operations the unmasked ones.
    """

    def __init__(self, value: Tensor, masked: Tensor) -> None:
        super().__init__()
        self._masked = {id(value): masked}
        self._alive = [value]  # as long as the tensors exist, Python can't reuse their ids

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(id(leaf) in self._masked for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        masked_args, masked_kwargs = tree_map(lambda leaf: self._masked.get(id(leaf), leaf), (args, kwargs))
        masked_result = func(*masked_args, **masked_kwargs)
        if func in _PRODUCTS:
            return masked_result
        result = func(*args, **kwargs)
        for value, masked in zip(tree_leaves(result), tree_leaves(masked_result), strict=True):
            if isinstance(value, Tensor):
                self._masked[id(value)] = masked
                self._alive.append(value)
        return result


_WRAPPERS: dict[str, Callable[..., CellWrapper]] = {
    wrapper.stored_name: wrapper
    for wrapper in (
        QuantizedWrapper,
        DrawsWrapper,
        ZoneoutWrapper,
        RecurrentDropoutWrapper,
        ResetWrapper,
        MaskWrapper,
        AllStatesWrapper,
    )
}


def wrap(cell: Cell, spec: WrapperSpec) -> Cell:
    """Return the cell inside all the wrappers that ``spec`` lists."""
    for name, arguments in spec:
        cell = _WRAPPERS[name](cell, *arguments)
    return cell
