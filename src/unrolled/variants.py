"""Cells made of cells: a step with something around it, which every engine runs as a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from unrolled.cell import Cell

States = tuple[Tensor, ...]
Chain = tuple[tuple[str, tuple[Any, ...]], ...]  # variants by name with their arguments, the innermost first


class Variant(Cell):
    """A cell whose step is that of another one, its inner cell, with something around it.

    The columns of x that only the variant reads follow those of the inner cell; states of its own follow the
    inner cell's.

    Args:
        inner: the cell, perhaps a variant itself, perhaps bound.
        columns: how many columns of x the variant reads.
        states: the sizes of all states by name; None: those of the inner cell.
        arguments: what the variant was made with, beside the inner cell.
    """

    state = ("states",)
    inner: Cell
    arguments: tuple[Any, ...]

    def __init__(
        self,
        inner: Cell,
        columns: int = 0,
        states: Mapping[str, int] | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        sizes = dict(inner.state_sizes() if states is None else states)
        self.__dict__ = {
            **inner.__dict__,
            "inner": inner,
            "features": inner.features + columns,
            "state": tuple(sizes),
            "_state_sizes": sizes,
            "arguments": arguments,
            "_identity": (type(self), inner.identity(), *arguments),
        }

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """A copy whose parameters, and those of the inner cell, are these tensors."""
        bound = super().bind(tensors)
        bound.__dict__["inner"] = self.inner.bind(tensors)
        return bound

    @property
    def innermost(self) -> Cell:
        """The cell that its author wrote."""
        return self.inner.innermost

    @property
    def chain(self) -> Chain:
        """The variants around the innermost cell, this one last."""
        before = self.inner.chain if isinstance(self.inner, Variant) else ()
        return (*before, (type(self).__name__, self.arguments))

    def equations(self) -> Callable[..., Any]:
        """The function that holds the equations: the inner cell's."""
        return self.inner.equations()

    def inner_step(self, x: Tensor, *states: Tensor) -> States:
        """The inner cell's step, in the mode of this one."""
        self.inner.training = self.training
        new = self.inner.step(x[:, : self.inner.features], *states)
        return new if isinstance(new, tuple) else (new,)

    def column(self, x: Tensor, number: int = 0) -> Tensor:
        """One of the columns that only this variant reads, as truth values: ``(batch, 1)``."""
        at = self.inner.features + number
        return x[:, at : at + 1] > 0.5


class Resetting(Variant):
    """Goes back to the initial state before steps that are marked so.

    Args:
        inner: the cell.
        given: whether the initial states are given, as states that follow; else they are zeros.
        back: from the last step to the first.
        lanes: how many directions there are: each has a column of its own.
    """

    def __init__(self, inner: Cell, given: bool, back: bool, lanes: int) -> None:
        sizes = inner.state_sizes()
        first = {f"{name}_0": size for name, size in sizes.items()} if given else {}
        super().__init__(inner, lanes, {**sizes, **first}, (given, back, lanes))
        self.back = back

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """The inner step, from the initial state where the row of x is marked."""
        count = len(self.inner.state)
        now, first = states[:count], states[count:]
        marked = self.column(x, int(self.back))
        start = first or tuple(torch.zeros_like(part) for part in now)
        begun = [torch.where(marked, one, part) for one, part in zip(start, now, strict=True)]
        return (*self.inner_step(x, *begun), *first)


class Masked(Variant):
    """Leaves the states as they are in steps that are not marked."""

    def __init__(self, inner: Cell) -> None:
        super().__init__(inner, 1)

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """The inner step where the row of x is marked, the states as they were elsewhere."""
        marked = self.column(x)
        new = self.inner_step(x, *states)
        return tuple(torch.where(marked, after, before) for after, before in zip(new, states, strict=True))


class Every(Variant):
    """Has its first states side by side as one, so that all of them are its output.

    Args:
        inner: the cell.
        count: how many states.
    """

    def __init__(self, inner: Cell, count: int) -> None:
        sizes = list(inner.state_sizes().items())
        rest = dict(sizes[count:])
        super().__init__(inner, 0, {"every": sum(size for _, size in sizes[:count]), **rest}, (count,))
        self.sizes = [size for _, size in sizes[:count]]

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """The inner step of the states side by side."""
        every, *rest = states
        new = self.inner_step(x, *torch.split(every, self.sizes, -1), *rest)
        count = len(self.sizes)
        return (torch.cat(new[:count], -1), *new[count:])


_KINDS: dict[str, Callable[..., Variant]] = {kind.__name__: kind for kind in (Resetting, Masked, Every)}


def varied(cell: Cell, chain: Chain) -> Cell:
    """A cell with all variants of a chain around it."""
    for name, arguments in chain:
        cell = _KINDS[name](cell, *arguments)
    return cell
