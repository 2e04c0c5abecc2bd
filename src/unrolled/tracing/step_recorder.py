"""The local variables of a cell's step, kept while an engine runs it."""

from __future__ import annotations

import contextlib
import cProfile
import dis
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.layers.sequence import SequenceBatch
from unrolled.tracing.random_state import cuda_devices


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


class StepRecorder:
    """Keeps the named quantities of every step that its ``cell`` runs.

    Args:
        cell: whose steps.
        keep: what is kept of a tensor.

    Attributes:
        kept: for each step that ran, its quantities by name.
    """

    def __init__(self, cell: Cell, keep: Callable[[Tensor], Tensor] = _copied) -> None:
        self.cell = cell.bind({})
        self.cell.__dict__["step"] = self._step
        self._original = cell
        self._keep = keep
        self.kept: list[dict[str, Tensor]] = []
        self._per_row: set[str] = set()

    def values(self, steps: SequenceBatch, reverse: bool) -> dict[str, Tensor]:
        """Every quantity that all steps have in one size, ``(time, batch, size)``, zeros past a row's end.

        It ends the recording, and ``kept`` hasn't them any more.
        """
        self.end()
        along = self.kept[::-1] if reverse else self.kept
        names = [name for name in along[0] if name in self._per_row]
        names = [name for name in names if all(name in kept for kept in along)]
        names = [name for name in names if len({kept[name].shape[1:] for kept in along}) == 1]
        join = torch.stack if steps.sizes is None else torch.cat
        return {name: steps.padded(join([kept.pop(name) for kept in along])) for name in names}

    def end(self) -> None:
        """Let go of the cell, which holds this: else all that was kept waits for the garbage collector."""
        vars(self.cell).pop("step", None)

    def _step(self, x: Tensor, *state: Tensor) -> Any:
        if not self.kept:
            self._per_row = names_per_row(self._original, x, *state)
        new, named = run_with_names(self._original, x, *state)
        self.kept.append({name: self._keep(value) for name, value in named.items()})
        return new


def names_per_row(cell: Cell, x: Tensor, *state: Tensor) -> set[str]:
    """The names whose tensors have a row for each row of the input, seen by giving one row more."""

    def one_more(part: Tensor) -> Tensor:
        return torch.cat((part, part.new_zeros(1, *part.shape[1:])))

    with torch.random.fork_rng(cuda_devices(x)):
        now = {name: value for name, value in run_with_names(cell, x, *state)[1].items() if value.dim()}
        try:
            more = run_with_names(cell, one_more(x), *map(one_more, state))[1]
        except (RuntimeError, ValueError, TypeError, IndexError):  # it takes just so many rows
            return {name for name, value in now.items() if len(value) == len(x)}
    grown = {name for name in now if name in more and more[name].dim()}
    return {name for name in grown if more[name].shape[0] == now[name].shape[0] + 1 == len(x) + 1}


def run_with_names(cell: Cell, x: Tensor, *state: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Run a step; what it returns, and its local tensors by name in the order of their lines."""
    codes = _codes(type(cell))
    found: dict[str, Tensor] = {}

    def at_return(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code not in codes:
            return None
        if event == "return":
            local = frame.f_locals
            names = [name for name in _assigned(frame.f_code) if isinstance(local.get(name), Tensor)]
            found.update({name: local[name] for name in names})
        return at_return

    with _watched(at_return):
        new = cell.step(x, *state)
    returned = new if isinstance(new, tuple) else (new,)
    if len(returned) == len(tuple(cell.state)):
        found.update(zip(cell.state, returned, strict=True))
    named = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    found.clear()  # at_return holds itself, and would hold the tensors until Python looks for such cycles
    return new, named


def names_of(cell: type[Cell]) -> set[str]:
    """The names that a quantity of a cell can have: the local variables of its step, and its states."""
    return {name for code in _codes(cell) for name in _assigned(code)} | set(cell.state)


def _codes(cell: type[Cell]) -> list[CodeType]:
    """The code of a cell's step, and of those that it may call of its bases."""
    return [
        inspect.unwrap(vars(base)["step"]).__code__
        for base in reversed(cell.__mro__)
        if issubclass(base, Cell) and "step" in vars(base)
    ]


@contextlib.contextmanager
def _watched(at_return: Any) -> Iterator[None]:
    """Call a function where functions return; who watches already, watches on afterwards."""
    previous = sys.getprofile()
    if previous is None or callable(previous) or isinstance(previous, cProfile.Profile):
        sys.setprofile(at_return)
    else:  # one in C that Python code can't put back, such as torch.profiler's
        tracer = sys.gettrace()
        sys.settrace(at_return)
    try:
        yield
    finally:
        if isinstance(previous, cProfile.Profile):  # before Python 3.12 it has a switch of its own
            previous.enable()
        elif previous is None or callable(previous):
            sys.setprofile(previous)
        else:
            sys.settrace(tracer)


def _assigned(code: CodeType) -> list[str]:
    """The local variables that a function assigns, in the order of their first assignment."""
    names: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("STORE_FAST", "STORE_DEREF")):
            stored = instruction.argval
            if isinstance(stored, tuple):  # one instruction for two variables, from Python 3.13
                stored = stored if instruction.opname == "STORE_FAST_STORE_FAST" else stored[:1]
            names += stored if isinstance(stored, tuple) else (stored,)
    return list(dict.fromkeys(names))
