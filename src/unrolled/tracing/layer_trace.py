"""Every named number of every step of one layer in one direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.tracing import display
from unrolled.tracing.explain import explain, number
from unrolled.tracing.indexing import position, same
from unrolled.tracing.provenance import Derivations, Recording
from unrolled.tracing.random_state import cuda_devices
from unrolled.tracing.step_recorder import run_with_names
from unrolled.tracing.tables import StepTable, frame

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """Every named quantity of one layer in one direction.

    Attributes:
        cell: the cell with its parameters as they were.
        layer, direction: which layer (0 is the lowest) and ``"forward"`` or ``"backward"``.
        input: ``(time, batch, input)``, what the layer read.
        initial_state: ``(batch, size)`` for every state, by name.
        values: ``(time, batch, size)`` for every quantity, by name; zeros past the end of a row.
        lengths: ``(batch,)``, the number of steps of every row.
        gradients: after :meth:`Trace.backward <unrolled.Trace.backward>`, ``∂loss/∂quantity``, as ``values``.
        steps: the time steps that ``input`` and ``values`` have, where not all were kept; else None.
        units: the units of the hidden size that ``values`` have, where not all were kept; else None.
        partial: whether not all quantities or units were kept; an ``input`` that wasn't has no features.
        columns: for the quantities that were cut to these units, the true numbers of their features.
        before: where not all steps were kept, the states from which each one was computed.

    Time always counts along the sequence, in the backward direction too, where the state of a step
    comes from the step after it.
    """

    cell: Cell
    layer: int
    direction: str
    input: Tensor
    initial_state: dict[str, Tensor]
    values: dict[str, Tensor]
    lengths: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    steps: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None
    partial: bool = False
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        where = f"{type(self.cell).__name__}, layer {self.layer}, {self.direction}"
        return f"<LayerTrace of {where}: {self.extent}; {', '.join(self.values)}>"

    @property
    def extent(self) -> str:
        """How much it holds, in words."""
        time, batch = self.input.shape[:2]
        of = "" if self.steps is None or not batch else f" of {int(self.lengths.max())}"
        units = "" if self.units is None else f", units {_listed(self.units)} of {self.cell.hidden}"
        return f"{time}{of} steps × {batch} rows{units}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the quantities, in the order in which the step computes them."""
        return tuple(self.values)

    def __getitem__(self, name: str) -> Tensor:
        """The quantity of this name, ``(time, batch, size)``; ``"x"`` is the input."""
        if name == "x" and name not in self.values and self.input.shape[-1]:
            return self.input
        if name not in self.values:
            raise KeyError(f"no quantity {name!r} in this trace: it has {', '.join(self.names)}")
        return self.values[name]

    def gradient(self, name: str) -> Tensor:
        """∂loss/∂quantity, ``(time, batch, size)``: how much the loss would change with each of its numbers.

        Raises:
            KeyError: there is no such quantity.
            ValueError: there was no :meth:`Trace.backward <unrolled.Trace.backward>`.
        """
        self[name]
        if name not in self.gradients:
            raise ValueError(
                f"{name} is the input: there are gradients of {', '.join(self.names)}"
                if self.gradients
                else "there are no gradients yet: call backward of the trace first, with a function of the "
                "output, or record with gradients=True"
            )
        return self.gradients[name]

    def state_before(self, step: int, batch: int = 0) -> dict[str, Tensor]:
        """The states, ``(size,)`` each, from which a row computes this step."""
        if self.partial:
            raise ValueError(
                "the arithmetic of a step needs all of its quantities and units, and this trace keeps "
                f"{', '.join(self.names)}"
                + ("" if self.units is None else f" of units {_listed(self.units)}")
                + ": limit steps or rows in the place of names and units"
            )
        if self.steps is not None:
            at = self.at(position("time step", step, int(self.lengths[batch])))
            return {name: state[at, batch] for name, state in self.before.items()}
        before = step - 1 if self.direction == "forward" else step + 1
        if not 0 <= before < self.lengths[batch]:
            return {name: state[batch] for name, state in self.initial_state.items()}
        return {name: self.values[name][before, batch] for name in self.initial_state}

    def at(self, step: int) -> int:
        """Where a step, counted from 0, stands along the time axis of what is kept.

        Raises:
            IndexError: it wasn't kept.
        """
        if self.steps is None:
            return step
        if step not in self.steps:
            raise IndexError(f"step {step} wasn't kept: this trace has the steps {_listed(self.steps)}")
        return self.steps.index(step)

    def check_whole(self, what: str) -> None:
        """Raise where not every step, quantity and unit was kept, which ``what`` needs.

        Raises:
            ValueError: they weren't.
        """
        if self.steps is not None or self.partial:
            raise ValueError(
                f"{what} needs every step, quantity and unit, and this trace has {self.extent}; "
                f"{', '.join(self.names)}: limit no more than rows"
            )

    def explain(self, name: str, step: int, unit: int, batch: int = 0, terms: int = 8) -> str:
        """The arithmetic behind one number, with the numbers put in.

        ``0.5407·1.0000 + -0.1051·1.0000 + -0.5645 = -0.1290`` is the sum behind
        ``trace["input_sum"][0, 0, 0]``: weights times inputs, and the bias. Quantities that have a
        name of their own stand as their numbers. The step is run again for the row alone; a number
        that it doesn't give again, being random or made from several rows, stands for itself.

        Args:
            name: of the quantity.
            step: the time step, from 0; negative counts from the end of the row.
            unit: which of the quantity's features, from 0; those of several axes are counted in a row.
            batch: which row.
            terms: a longer sum shows its largest terms, this many, and what the others add up to.

        Raises:
            KeyError: there is no such quantity.
            IndexError: there is no such step, unit or row, or the step wasn't kept.
            ValueError: the quantity is the input, or not all quantities and units were kept.
        """
        values = self[name]
        batch = position("row", batch, values.shape[1])
        step = position("time step", step, int(self.lengths[batch]))
        if name not in self.values:
            raise ValueError(f"{name} is the input: no arithmetic stands behind it")
        derived = self.derivations(step, batch)
        there = values[self.at(step), batch].flatten()
        unit = position("unit", unit, len(there))
        value = number(there[unit].item())
        made = derived.made.get(name)
        again = made.numbers.flatten() if made else there[:0]
        if made is None or again.shape != there.shape or not same(again, there)[unit]:
            return f"{value} = {value}"
        return f"{explain(made, unit, terms)} = {value}"

    def derivations(self, step: int, batch: int = 0, moves: dict[Any, Any] | None = None) -> Derivations:
        """How every quantity of one step is made for one row: the step run again for the row alone.

        Args:
            step: the time step.
            batch: the row.
            moves: kept from one call to the next, it saves time.
        """
        state = {name: part.unsqueeze(0) for name, part in self.state_before(step, batch).items()}
        x = self.input[self.at(step), batch].unsqueeze(0)
        recording = Recording(moves)
        # outside inference mode, so that torch counts what the step changes in place
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(cuda_devices(x)):
            with recording:
                _, named = run_with_names(self.cell, x, *state.values())
            there = {name: part[self.at(step), batch].unsqueeze(0) for name, part in self.values.items()}
            shown = {
                name: value
                for name, value in there.items()
                if name in named and named[name].shape == value.shape
            }
            return Derivations(recording.derivations(named, shown), x, state)

    def table(
        self,
        names: Iterable[str] | None = None,
        steps: Sequence[int] | None = None,
        batch: int = 0,
        units: int | None = None,
    ) -> StepTable:
        """A rich table: a row for every step and quantity, a column for every unit.

        Args:
            names: the quantities; None: the input ``x`` and all of them.
            steps: the time steps; None: all, shortened where there are many.
            batch: the row.
            units: columns at most; None: as many as the console has room for. Wider quantities
                are cut after that many.
        """
        batch = position("row", batch, self.input.shape[1])
        names = None if names is None else list(names)
        if names == []:
            raise ValueError(f"a table needs at least one quantity: {', '.join(self.names)}")
        length = int(self.lengths[batch])
        chosen = None if steps is None else [position("time step", step, length) for step in steps]
        for step in chosen or ():
            self.at(step)
        kept = [step for step in self.steps or range(length) if step < length]
        quantities = {"x": self.input} if names is None and self.input.shape[-1] else {}
        quantities |= {name: self[name] for name in (self.names if names is None else names)}
        if not kept:
            raise ValueError(f"row {batch} has {length} steps, and none of them was kept")
        rows = {name: part[: len(kept), batch].reshape(len(kept), -1) for name, part in quantities.items()}
        title = f"layer {self.layer}, {self.direction}"
        return StepTable(rows, chosen, units, title, kept, self.columns)

    def plot(self, kind: str, **options: Any) -> Axes:
        """A picture with matplotlib, on its Axes; ``.figure.savefig("picture.svg")`` of them writes it.

        Args:
            kind: ``"gates"``, ``"states"``, ``"gradient"`` (after
                :meth:`Trace.backward <unrolled.Trace.backward>`), ``"unrolled"`` or ``"layer"``.
            options: of the function with this name in :mod:`unrolled.plot`: ``ax``, where to draw; ``batch``,
                the row; ``names``, the quantities of gates and gradient; ``steps`` of the layer unrolled.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError, TypeError: there is no such kind of picture, or it has no such option.
            KeyError, IndexError: there is no such quantity, row or step.
        """
        axes: Axes = display.package("plot").draw(self, kind, **options)
        return axes

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each number: layer, direction, step, batch, name, unit, value."""
        return frame(self.values, self.lengths, self.layer, self.direction, self.steps, self.columns)


def _listed(numbers: tuple[int, ...], most: int = 6) -> str:
    """Some numbers in words, those in the middle left out where there are many."""
    texts = list(map(str, numbers))
    if len(texts) > most:
        texts = [*texts[: most // 2], "…", *texts[-1:]]
    return ", ".join(texts)
