"""Cells made of cells: a step with something around it, which every engine runs as a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from unrolled.cells.base import Cell

States = tuple[Tensor, ...]
WrapperSpec = tuple[
    tuple[str, tuple[Any, ...]], ...
]  # variants by name with their arguments, the innermost first


class CellWrapper(Cell):
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
    stored_name: ClassVar[str]  # in exported programs, so it never changes
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
    def chain(self) -> WrapperSpec:
        """The variants around the innermost cell, this one last."""
        before = self.inner.chain if isinstance(self.inner, CellWrapper) else ()
        return (*before, (self.stored_name, self.arguments))

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


class ResetWrapper(CellWrapper):
    """Goes back to the initial state before steps that are marked so.

    Args:
        inner: the cell.
        given: whether the initial states are given, as states that follow; else they are zeros.
        back: from the last step to the first.
        lanes: how many directions there are: each has a column of its own.
    """

    stored_name = "Resetting"

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


class MaskWrapper(CellWrapper):
    """Leaves the states as they are in steps that are not marked."""

    stored_name = "Masked"

    def __init__(self, inner: Cell) -> None:
        super().__init__(inner, 1)

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """The inner step where the row of x is marked, the states as they were elsewhere."""
        marked = self.column(x)
        new = self.inner_step(x, *states)
        return tuple(torch.where(marked, after, before) for after, before in zip(new, states, strict=True))


class AllStatesWrapper(CellWrapper):
    """Has its first states side by side as one, so that all of them are its output.

    Args:
        inner: the cell.
        count: how many states.
    """

    stored_name = "Every"

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


class ZoneoutWrapper(CellWrapper):
    """Has units of the states keep their values: zoneout (Krueger et al., 2017, equation 3).

    Args:
        inner: the cell.
        rates: for each of its first states the probability that a unit does.
        drawn: whether columns of x say which units do; else all of them do in part, as is expected.
    """

    stored_name = "Zoned"

    def __init__(self, inner: Cell, rates: tuple[float, ...], drawn: bool) -> None:
        sizes = inner.state_sizes().values()
        columns = sum(size for size, rate in zip(sizes, rates, strict=False) if rate)
        super().__init__(inner, columns if drawn else 0, arguments=(rates, drawn))
        self.rates, self.drawn = rates, drawn

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """The inner step, with some of the old values in the place of new ones."""
        new, at = list(self.inner_step(x, *states)), self.inner.features
        for k, (rate, before) in enumerate(zip(self.rates, states, strict=False)):
            if rate and self.drawn:
                size = before.shape[1]
                new[k] = torch.where(x[:, at : at + size] > 0.5, before, new[k])
                at += size
            elif rate:
                new[k] = rate * before + (1 - rate) * new[k]
        return tuple(new)


class RecurrentDropoutWrapper(CellWrapper):
    """Has products read the first state with units left out: a state that follows says which.

    What else reads the state reads all of it: a gate that lets it pass does so undiminished. What is computed
    of the state and then enters a product, as a state that a gate resets, has those units left out.
    """

    stored_name = "Dropped"

    def __init__(self, inner: Cell) -> None:
        sizes = inner.state_sizes()
        super().__init__(inner, 0, {**sizes, "mask": next(iter(sizes.values()))})

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """The inner step, its products with other values of the first state."""
        *now, mask = states
        with _Twins(now[0], now[0] * mask):
            new = self.inner_step(x, *now)
        return (*new, mask)


_PRODUCTS = {
    torch.nn.functional.linear, torch.nn.functional.bilinear, torch.matmul, torch.mm, torch.bmm, torch.mv,
    torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot, Tensor.matmul, Tensor.mm, Tensor.bmm,
    Tensor.addmm, Tensor.baddbmm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip


class _Twins(TorchFunctionMode):
    """Has products read the twin of a value, and what is computed of the twin in the place of the value."""

    def __init__(self, value: Tensor, twin: Tensor) -> None:
        super().__init__()
        self._twins = {id(value): twin}
        self._alive = [value]  # or another value may get its number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(id(leaf) in self._twins for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        theirs, named = tree_map(lambda leaf: self._twins.get(id(leaf), leaf), (args, kwargs))
        twin = func(*theirs, **named)
        if func in _PRODUCTS:
            return twin
        made = func(*args, **kwargs)
        for one, other in zip(tree_leaves(made), tree_leaves(twin), strict=True):
            if isinstance(one, Tensor):
                self._twins[id(one)] = other
                self._alive.append(one)
        return made


_WRAPPERS: dict[str, Callable[..., CellWrapper]] = {
    wrapper.stored_name: wrapper
    for wrapper in (ZoneoutWrapper, RecurrentDropoutWrapper, ResetWrapper, MaskWrapper, AllStatesWrapper)
}


def wrap(cell: Cell, chain: WrapperSpec) -> Cell:
    """A cell with all variants of a chain around it."""
    for name, arguments in chain:
        cell = _WRAPPERS[name](cell, *arguments)
    return cell
