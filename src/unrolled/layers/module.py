"""A module that owns the parameters of cells: what layers and single steps have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unrolled.cells.base import Cell
from unrolled.engines.torch_ops import transforms
from unrolled.layers.sequence import InputError

State = Tensor | tuple[Tensor, ...]
States = tuple[Tensor, ...]
Run = Callable[[list[Cell], Tensor, list[States | None], Any], list[tuple[Tensor, States]]]


class CellModule(nn.Module):
    """Owns the parameters of cells; a cell's names get a suffix such as ``_l0_reverse``."""

    def __init__(self, cells: dict[str, Cell], device: Any, dtype: Any) -> None:
        super().__init__()
        for cell in cells.values():
            _check_held(cell)
            if dtype is not None and dtype.is_complex:
                _check_complex(cell, dtype)
        self._cells = cells
        self._named = {
            suffix: [(name, name + suffix, shape) for name, shape in cell.shapes().items()]
            for suffix, cell in cells.items()
        }
        for suffix, cell in cells.items():
            for name, shape in cell.shapes().items():
                empty = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name + suffix, nn.Parameter(empty))
        self.reset_parameters()

    @property
    def _label(self) -> str:
        """The name of the class, for messages."""
        return type(self).__name__

    @property
    def _first(self) -> Cell:
        return next(iter(self._cells.values()))

    def chosen_options(self) -> dict[str, Any]:
        """The value of every option of the cell."""
        return self._first.chosen_options()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, in the order of registration, as its ``Param`` says."""
        for suffix in self._cells:
            cell = self._bind(suffix)
            params = cell.params()
            for name, full, _ in self._named[suffix]:
                if parametrize.is_parametrized(self, full):  # its parameters are then what gives this value
                    drawn = torch.empty_like(getattr(self, full))
                    params[name].fill(drawn, cell)
                    setattr(self, full, drawn)
                else:
                    pruned = self._parameters.get(f"{full}_orig")
                    params[name].fill(getattr(self, full) if pruned is None else pruned, cell)

    def _bind(self, suffix: str) -> Cell:
        cell, held = self._cells[suffix], self._parameters
        tensors = {}
        for name, full, shape in self._named[suffix]:
            found = held.get(full)
            if found is None:
                found = getattr(self, full)  # what a parametrization makes of a parameter
            if found.shape != shape:
                raise InputError(
                    f"{self._label}: the parameter {full} should have the shape {shape}, it has "
                    f"{tuple(found.shape)}"
                )
            tensors[name] = found
        bound = cell.bind(tensors)
        bound.training = self.training
        return bound

    def with_cells(self, cells: Iterable[Cell] | None = None) -> Self:
        """This module as it is now, in its mode, with the parameters of bound cells for its own.

        What is done to it afterwards, but to a parameter in place, this one doesn't see.

        Args:
            cells: one for each of its own, in their order; None: those, with its parameters.
        """
        cells = map(self._bind, self._cells) if cells is None else cells
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        pairs = zip(self._named.values(), cells, strict=True)
        own = {full: getattr(cell, name) for named, cell in pairs for name, full, _ in named}
        vars(made)["_parameters"] = own | {k: v for k, v in self._parameters.items() if k not in own}
        vars(made).pop("_frozen", None)
        return made

    def _states(self, state: State | None, name: str) -> tuple[Tensor, ...]:
        """What a user gave as state, as a tuple with a tensor for each state of the cell."""
        names = tuple(self._first.state)
        one = len(names) == 1
        given: Any = (state,) if one else state
        expected = "a tensor" if one else f"a tuple of {len(names)} tensors"
        if not isinstance(given, (tuple, list)) or not all(isinstance(part, Tensor) for part in given):
            raise TypeError(
                f"{name}: Expected the state ({', '.join(names)}) to be {expected}, got {_describe(state)}"
            )
        if len(given) != len(names):
            raise InputError(
                f"{name}: Expected the state ({', '.join(names)}) to be {expected}, got {len(given)}"
            )
        return tuple(given)

    def _check(self, what: str, tensor: Tensor) -> None:
        """Raise where a tensor's dtype or device is not that of the parameters."""
        weight = next(iter(self._parameters.values()), None)
        if weight is None and (weight := next(self.parameters(), None)) is None:
            return
        if tensor.dtype == weight.dtype and tensor.device == weight.device:
            return
        what = f"{self._label} {what}"
        if tensor.device != weight.device:
            raise InputError(
                f"{what} is on {tensor.device} but the layer's parameters are on {weight.device}: move "
                f"one with .to({str(weight.device)!r})"
            )
        number = tensor.is_floating_point() or tensor.is_complex()
        if tensor.dtype != weight.dtype and not (number and transforms.autocasts(weight.device.type)):
            noun = "input" if what.endswith("input") else "state"
            raise InputError(
                f"{what} dtype ({tensor.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert {noun}: {noun}.to({weight.dtype})"
                + (f", or convert model: model.to({tensor.dtype})" if number else "")
            )

    def _run(
        self, run: Run, suffixes: list[str], steps: Tensor, starts: list[States | None], sizes: Any
    ) -> list[tuple[Tensor, States]]:
        """Run the cells of these suffixes; what goes wrong in a step is told by its cause."""
        cells = [self._bind(suffix) for suffix in suffixes]
        try:
            return run(cells, steps, starts, sizes)
        except RuntimeError as error:
            kinds: dict[tuple[Any, Any], str] = {}
            for cell, suffix in zip(cells, suffixes, strict=True):
                for name in cell.shapes():
                    held = getattr(cell, name)
                    kinds.setdefault((held.dtype, held.device), name + suffix)
            if len(kinds) <= 1:
                raise
            named = " and ".join(f"{name} ({kind[0]}, {kind[1]})" for kind, name in kinds.items())
            raise InputError(
                f"{self._label} has parameters of different kinds, {named}: convert all of them with .to()"
            ) from error


def _check_complex(cell: Cell, dtype: torch.dtype) -> None:
    """Raise where the step of a cell can't be taken in complex numbers."""
    params = {name: torch.zeros(shape, dtype=dtype, device="cpu") for name, shape in cell.shapes().items()}
    widths = cell.features, *cell.state_sizes().values()
    try:
        with torch.no_grad():
            cell.bind(params).step(*(torch.zeros(1, width, dtype=dtype, device="cpu") for width in widths))
    except (RuntimeError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(cell).__name__} can't be computed in {dtype} ({why}): use a real dtype, or keep real and "
            "imaginary parts as states of a cell of your own"
        ) from None


def _check_held(cell: Cell) -> None:
    """Raise where a cell holds parameters that no layer would train or save."""
    for holder in (*type(cell).__mro__, cell):
        for name, value in vars(holder).items():
            if isinstance(value, nn.Parameter) or (
                isinstance(value, nn.Module) and next(value.parameters(), None) is not None
            ):
                raise TypeError(
                    f"{type(cell).__name__}.{name} is a {type(value).__name__}, which a layer would neither "
                    f"train nor save: declare its parameters, such as {name} = unrolled.Param('hidden', "
                    "'input'), and compute with torch.nn.functional"
                )


def _describe(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value)}"
    return f"a {type(value).__name__}"


@contextlib.contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Have a module's parametrizations compute as in eval mode, in which they draw and change nothing."""
    held: Any = getattr(module, "parametrizations", None)
    training = [one for one in held.modules() if one.training] if isinstance(held, nn.Module) else []
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True
