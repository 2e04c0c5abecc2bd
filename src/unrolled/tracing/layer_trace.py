"""The recorded values of one layer in one direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines.fork_safety import lazy_property
from unrolled.tracing import display
from unrolled.tracing.explain import DIGITS, explain, unexplained
from unrolled.tracing.indexing import equal_up_to_rounding, normalize_index
from unrolled.tracing.provenance import StepGraph, computation_graph
from unrolled.tracing.row_names import RowNames, row_names
from unrolled.tracing.step_recorder import RecordedDraws, StepRun, run_step

if TYPE_CHECKING:
    import pandas

    from unrolled.tracing.tables import StepTable


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """Every named quantity of one layer in one direction, at every time step.

    The time axis is that of the sequence, in the backward direction, too: there, a step's previous state
    comes from the next time step.

    Attributes:
        cell: The cell with a copy of its parameters.
        layer, direction: Index of the layer (0 is the lowest), and ``"forward"`` or ``"backward"``.
        input: Input of the layer, ``(time, batch, input)``.
        initial_state: Each state before the first step, ``(batch, size)``, by name.
        values: Each quantity by name, ``(time, batch, size)``, zero padded.
        lengths: Sequence length of each row, ``(batch,)``.
        gradients: ``∂loss/∂quantity`` in the same form as ``values``. Empty before
            :meth:`Trace.backward <unrolled.Trace.backward>`.
        steps: The recorded time steps; None for all.
        units: The recorded units of the hidden size; None for all.
        partial: Whether quantities or units were left out. An ``input`` that was left out has no features.
        columns: For each quantity with only some of its units, the numbers of the recorded features.
        before: Each state before the recorded steps, by name, if only some steps were recorded or the model
            changed states between steps.
        changed_states: Whether all steps are calls of their own, between which the model changed states.
        draws: The random numbers of all steps, if the steps draw any and everything was recorded.
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
    changed_states: bool = False
    draws: RecordedDraws | None = None

    def __repr__(self) -> str:
        where = f"{type(self.cell).__name__}, layer {self.layer}, {self.direction}"
        return f"<LayerTrace of {where}: {self.extent}; {', '.join(self.values)}>"

    @property
    def extent(self) -> str:
        """The number of recorded steps, rows and units as text."""
        time, batch = self.input.shape[:2]
        length = int(self.lengths.max()) if batch else time
        total = "" if self.steps is None or length == time else f" of {length}"
        units = "" if self.units is None else f", units {_format_indices(self.units)} of {self.cell.hidden}"
        return f"{time}{total} steps × {batch} rows{units}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the quantities, in the order in which the step computes them."""
        return tuple(self.values)

    @property
    def input_name(self) -> str:
        """Name of the input, ``"x"``, or ``"x (input)"`` if the step computes another ``x``."""
        return "x (input)" if "x" in self.values else "x"

    @lazy_property
    def row_names(self) -> RowNames:
        """The gate that each row of the weighted sums and parameters computes."""
        return row_names(self.cell)

    def __getitem__(self, name: str) -> Tensor:
        """Return a quantity or the input, ``(time, batch, size)``.

        Args:
            name: The name of the quantity, or :attr:`input_name`.

        Raises:
            KeyError: If there is no such quantity.
        """
        if name == self.input_name and self.input.shape[-1]:
            return self.input
        if name not in self.values:
            raise KeyError(f"no quantity {name!r} in this trace: it has {', '.join(self.names)}")
        return self.values[name]

    def gradient(self, name: str) -> Tensor:
        """Return ``∂loss/∂quantity``, ``(time, batch, size)``.

        Raises:
            KeyError: If there is no such quantity.
            ValueError: If :meth:`Trace.backward <unrolled.Trace.backward>` wasn't called, or the quantity is
                the input.
        """
        self[name]
        if name not in self.gradients:
            raise ValueError(
                f"{name} is the input, which has no gradient here: choose from {', '.join(self.names)}"
                if self.gradients
                else "there are no gradients yet: call trace.backward(target) or "
                "trace.backward(lambda y: y.sum()) first, or use record(model, gradients=True)"
            )
        return self.gradients[name]

    def state_before(self, step: int, batch: int = 0) -> dict[str, Tensor]:
        """Return the states from which a row computes a step, ``(size,)`` each, by name.

        Raises:
            ValueError: If quantities or units were left out.
            IndexError: If the step wasn't recorded.
        """
        if self.partial:
            units = "" if self.units is None else f" of units {_format_indices(self.units)}"
            raise ValueError(
                "the arithmetic of a step needs all quantities and units, but this trace has only "
                f"{', '.join(self.names)}{units}: select steps or rows instead of names and units"
            )
        if self.steps is not None:
            position = self.at(normalize_index("time step", step, int(self.lengths[batch])))
            return {name: state[position, batch] for name, state in self.before.items()}
        previous = step - 1 if self.direction == "forward" else step + 1
        if not 0 <= previous < self.lengths[batch]:
            return {name: state[batch] for name, state in self.initial_state.items()}
        return {name: self.values[name][previous, batch] for name in self.initial_state}

    def at(self, step: int) -> int:
        """Return the position of a step, counted from 0, along the time axis of ``values``.

        Raises:
            IndexError: If the step wasn't recorded.
        """
        if self.steps is None:
            return step
        if step not in self.steps:
            raise IndexError(
                f"step {step} wasn't recorded: this trace has the steps {_format_indices(self.steps)}"
            )
        return self.steps.index(step)

    def check_whole(self, what: str, chained: bool = True) -> None:
        """Check that all steps, quantities and units were recorded.

        Args:
            what: What needs them, for the error message.
            chained: Whether it also needs each step to begin with the states after the step before.

        Raises:
            ValueError: If some were left out, or the model changed states between steps.
        """
        if self.changed_states and not self.partial:
            if not chained:
                return
            raise ValueError(
                f"{what} needs states that pass unchanged from step to step, but the model changed them in "
                "between: use table, explain or to_pandas"
            )
        if self.steps is not None or self.partial:
            raise ValueError(
                f"{what} needs all steps, quantities and units, but this trace has only {self.extent}; "
                f"{', '.join(self.names)}: select only rows"
            )

    def explain(
        self,
        name: str,
        step: int,
        unit: int,
        batch: int = 0,
        terms: int | None = 8,
        digits: int | None = DIGITS,
    ) -> str:
        """Show the arithmetic behind one number.

        For example, ``0.54068·1 − 0.10514·1 − 0.56450 = −0.1290`` shows the pre-activation
        ``trace["input_sum"][0, 0, 0]``: weights times inputs, plus the bias. Other named quantities appear as
        numbers. The line is right when it is checked by hand: operands have more digits than the result where
        they are needed. If the layer's own rounding errors make this impossible, the sign is ``≈``.

        To find the arithmetic, the step runs again for the row alone. A number that can't be
        reproduced this way, because it depends on other rows, or on random numbers that
        weren't recorded, is shown without arithmetic.

        Args:
            name: The quantity.
            step: The time step. Negative values count from the end of the row.
            unit: The feature of the quantity. Several feature axes are flattened.
            batch: The row.
            terms: Maximum number of terms of a sum. A longer sum shows its largest terms and the total of the
                rest. None for all terms.
            digits: Minimum number of decimal places. None shows the operands exactly, and as many digits of
                the result as are right.

        Raises:
            KeyError: If there is no such quantity.
            IndexError: If the step, unit or row is out of range, or the step wasn't recorded.
            ValueError: If the quantity is the input, or quantities or units were left out.
        """
        values = self[name]
        batch = normalize_index("row", batch, values.shape[1])
        step = normalize_index("time step", step, int(self.lengths[batch]))
        if name not in self.values:
            raise ValueError(f"{name} is the input, so there is no arithmetic to show")
        graph = self.derivations(step, batch)
        unit = normalize_index("unit", unit, values.shape[2:].numel())
        return self.explain_in(graph, name, step, unit, batch, terms, digits)

    def explain_in(
        self,
        graph: StepGraph,
        name: str,
        step: int,
        unit: int,
        batch: int = 0,
        terms: int | None = 8,
        digits: int | None = DIGITS,
    ) -> str:
        """Show the arithmetic behind one number, given the result of :meth:`derivations` for its step.

        Args:
            graph: The computation graph of the step and row.
            name: The quantity.
            step: The time step, counted from 0.
            unit: The feature of the quantity, counted from 0.
            batch: The row, counted from 0.
            terms: As for :meth:`explain`.
            digits: As for :meth:`explain`.
        """
        recorded = self[name][self.at(step), batch].flatten()
        node = graph.nodes.get(name)
        recomputed = node.numbers.flatten() if node else recorded[:0]
        if (
            node is None
            or recomputed.shape != recorded.shape
            or not equal_up_to_rounding(recomputed, recorded)[unit]
        ):
            return unexplained(recorded[unit].item(), digits, recorded.dtype)
        return explain(node, unit, recorded[unit].item(), terms, digits)

    def derivations(self, step: int, batch: int = 0, moves: dict[Any, Any] | None = None) -> StepGraph:
        """Run a step again for one row and return its computation graph.

        Args:
            step: The time step.
            batch: The row.
            moves: A cache. Pass the same dictionary to several calls to save time.
        """
        return self.graph_of(self.run_step(step, batch, moves), step, batch)

    def graph_of(self, run: StepRun, step: int, batch: int = 0) -> StepGraph:
        """Return the computation graph of a step that ran again; see :meth:`run_step`."""
        recorded = {name: part[self.at(step), batch].unsqueeze(0) for name, part in self.values.items()}
        displayed = {
            name: value
            for name, value in recorded.items()
            if name in run.named and run.named[name].shape == value.shape
        }
        with torch.inference_mode(False), torch.no_grad():
            return StepGraph(
                computation_graph(run.recorder, run.named, displayed), run.input, run.state_before
            )

    def run_step(self, step: int, batch: int = 0, moves: dict[Any, Any] | None = None) -> StepRun:
        """Run a step again for one row and record its calls of torch functions.

        Args:
            step: The time step.
            batch: The row.
            moves: A cache. Pass the same dictionary to several calls to save time.
        """
        state = {name: part.unsqueeze(0) for name, part in self.state_before(step, batch).items()}
        x = self.input[self.at(step), batch].unsqueeze(0)
        draws = None if self.draws is None else self.draws.of_row(step, batch)
        return run_step(self.cell, x, state, self.draws, draws, moves)

    def table(
        self,
        names: Iterable[str] | None = None,
        steps: Sequence[int] | None = None,
        batch: int = 0,
        units: int | None = None,
    ) -> StepTable:
        """Return a rich table with a row for every step and quantity, and a column for every unit.

        Args:
            names: The quantities. None for the input and all quantities.
            steps: The time steps. None for all, or the first and last ones of a long sequence.
            batch: The row.
            units: Maximum number of columns. None for as many as fit into the console.

        Raises:
            KeyError: If there is no such quantity.
            IndexError: If a step or the row is out of range, or a step wasn't recorded.
            ValueError: If ``names`` is empty, or no step of the row was recorded.
        """
        batch = normalize_index("row", batch, self.input.shape[1])
        names = None if names is None else list(names)
        if names == []:
            raise ValueError(f"a table needs at least one quantity: choose from {', '.join(self.names)}")
        length = int(self.lengths[batch])
        selected = None if steps is None else [normalize_index("time step", step, length) for step in steps]
        for step in selected or ():
            self.at(step)
        recorded = [step for step in self.steps or range(length) if step < length]
        if names is None:
            names = [*([self.input_name] if self.input.shape[-1] else []), *self.names]
        quantities = {name: self[name] for name in names}
        if not recorded:
            raise ValueError(f"row {batch} has {length} steps, but none of them was recorded")
        count = len(recorded)
        rows = {name: part[:count, batch].reshape(count, -1) for name, part in quantities.items()}
        title = f"layer {self.layer}, {self.direction}"
        from unrolled.tracing.tables import StepTable  # imports rich

        return StepTable(rows, selected, units, title, recorded, self.columns)

    def plot(self, kind: str, **options: Any) -> Any:
        """Plot with matplotlib, or draw the cell.

        To save a plot, use ``.figure.savefig("plot.svg")`` of the result; for the drawing of the cell,
        ``.save("cell.svg")``.

        Args:
            kind: ``"cell"``, ``"gates"``, ``"states"``, ``"gradient"`` (after
                :meth:`Trace.backward <unrolled.Trace.backward>`), ``"unrolled"``, ``"layer"`` or ``"text"``.
            options: For ``"cell"``, those of :func:`unrolled.diagram.draw`: ``step``, ``unit``, ``batch`` and
                ``theme``. Otherwise, options of the function with this name in :mod:`unrolled.plot`: ``ax``,
                the Axes to draw on; ``batch``, the row; ``names``, the quantities of gates and gradient;
                ``steps`` of the unrolled layer; ``labels``, ``unit`` and ``quantity`` of the text.

        Returns:
            The matplotlib ``Axes``; for ``"cell"`` a :class:`CellDrawing <unrolled.diagram.CellDrawing>`.

        Raises:
            ImportError: If matplotlib isn't installed, unless the cell is drawn.
            ValueError: If there is no such kind of plot, or the cell has no diagram.
            TypeError: If it has no such option.
            KeyError: If there is no such quantity.
            IndexError: If a row, unit or step is out of range.
        """
        if kind == "cell":
            return display.package("diagram").draw(self, **options)
        return display.package("plot").draw(self, kind, **options)

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with one row for each number.

        The columns are layer, direction, step, batch, name, unit and value. Padding is left out.

        Raises:
            ImportError: If pandas isn't installed.
        """
        from unrolled.tracing.tables import data_frame  # imports rich

        return data_frame(self.values, self.lengths, self.layer, self.direction, self.steps, self.columns)


def _format_indices(indices: tuple[int, ...], limit: int = 6) -> str:
    """Format indices as comma-separated text. A long list is shortened in the middle."""
    texts = list(map(str, indices))
    if len(texts) > limit:
        texts = [*texts[: limit // 2], "…", *texts[-1:]]
    return ", ".join(texts)
