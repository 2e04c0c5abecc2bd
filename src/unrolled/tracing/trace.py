"""A recorded run of a recurrent layer: every quantity of every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell
from unrolled.engines import reference
from unrolled.engines.torch_ops import transforms
from unrolled.layers.module import State, parametrizations_in_eval_mode
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing import display, hooks
from unrolled.tracing.backward import Loss, gradients_through_time
from unrolled.tracing.diagnosis import diagnose
from unrolled.tracing.findings import HealthReport
from unrolled.tracing.indexing import identical, normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.random_state import RandomState, capture_random_state, cuda_devices, replay_random_state
from unrolled.tracing.selection import BatchRows, Selection, SelectiveRecorder
from unrolled.tracing.step_recorder import StepRecorder, recorded_draws, run_recorded
from unrolled.tracing.torch_comparison import difference_from_torch

if TYPE_CHECKING:
    import pandas

    from unrolled.tracing.tables import StepTable

DIRECTIONS = ("forward", "backward")
_KEEP_EVERYTHING = Selection()
_NEEDS_WHOLE_CALL = (
    "{} runs the layer again, but this trace doesn't have the whole call: select only rows, or use "
    "record(model, gradients=True)"
)


class Trace:
    """The result of :func:`trace`: every named quantity of every layer, direction and step.

    ``trace[name]`` and ``names`` are those of layer 0 in forward direction. For others, use :meth:`layer`, or
    the arguments ``layer`` and ``direction`` of ``explain``, ``table``, ``plot`` and ``gradient``.

    Attributes:
        module: The traced module.
        recurrent: The equivalent layer of this library, with a copy of the parameters, mode and options.
        input: Input of the module.
        output, final_state: Result of the module for this input.
        selection: Which steps, quantities, units and rows were recorded. If any were left out, ``input`` and
            ``output`` are None.
        layers: The :class:`LayerTrace <unrolled.tracing.layer_trace.LayerTrace>` of each layer and direction,
            in the order in which they run.
    """

    def __init__(
        self,
        module: nn.Module,
        recurrent: Recurrent,
        layers: Sequence[LayerTrace],
        initial_states: Sequence[tuple[Tensor, ...]],
        call: tuple[Any, Any],
        result: tuple[Any, Any],
        random_state: RandomState,
        selection: Selection = _KEEP_EVERYTHING,
        rows: BatchRows | None = None,
    ) -> None:
        self.module = module
        self.layers = tuple(layers)
        # Of each layer and direction, with the rows in the engine's order.
        self._initial_states = tuple(initial_states)
        self.output, self.final_state = result
        self.recurrent = recurrent.with_cells(part.cell for part in self.layers)
        self.input = call[0]
        if not selection.keeps_everything:
            self.input = self.output = None
            self.final_state = _copy(map_tensors(self.final_state, selection.select_state_rows))
        self.selection = selection
        self._random_state = random_state
        self._dropout = dropout if rows is None else rows.dropout
        self._call: tuple[Any, Any] | None = call  # None if it wasn't kept: then the layer can't run again

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the quantities, in the order in which the step computes them."""
        return self.layers[0].names

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of the recorded time steps."""
        part = self.layers[0]
        return tuple(range(len(part.input))) if part.steps is None else part.steps

    def __getitem__(self, name: str) -> Tensor:
        """Return a quantity of layer 0 in forward direction, ``(time, batch, size)``.

        Raises:
            KeyError: If there is no such quantity.
        """
        return self.layers[0][name]

    def __repr__(self) -> str:
        return f"<Trace of {self.module}: {self.layers[0].extent}; {', '.join(self.names)}>"

    @property
    def nbytes(self) -> int:
        """The memory that the trace takes in bytes, including its copy of the parameters."""
        return sum(self.storages().values())

    def storages(self) -> dict[int, int]:
        """Return the size in bytes of every storage that the trace holds, by its address."""
        contents: list[Any] = [self.input, self.output, self.final_state, self._initial_states, self._call]
        for part in self.layers:
            contents += [part.input, part.lengths, *(getattr(part.cell, name) for name in part.cell.shapes())]
            contents += [] if part.draws is None else [part.draws.values]
            for by_name in (part.initial_state, part.values, part.gradients, part.before):
                contents += by_name.values()
        return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors(contents))}

    def layer(self, index: int, direction: str = "forward") -> LayerTrace:
        """Return the trace of one layer in one direction. Layer 0 is the lowest, -1 the top layer.

        Raises:
            IndexError: If there is no such layer.
            ValueError: If there is no such direction.
        """
        directions = [d for d in DIRECTIONS if any(part.direction == d for part in self.layers)]
        if direction not in directions:
            raise ValueError(f"direction must be {' or '.join(map(repr, directions))}, got {direction!r}")
        count = len(self.layers) // len(directions)
        position = normalize_index("layer", index, count) * len(directions) + directions.index(direction)
        return self.layers[position]

    def explain(
        self,
        name: str,
        step: int,
        unit: int,
        batch: int = 0,
        terms: int | None = 8,
        digits: int | None = 4,
        *,
        layer: int = 0,
        direction: str = "forward",
    ) -> str:
        """Call :meth:`.LayerTrace.explain` of one layer and direction."""
        return self.layer(layer, direction).explain(name, step, unit, batch, terms, digits)

    def table(
        self,
        names: Iterable[str] | None = None,
        steps: Sequence[int] | None = None,
        batch: int = 0,
        units: int | None = None,
        *,
        layer: int = 0,
        direction: str = "forward",
    ) -> StepTable:
        """Call :meth:`.LayerTrace.table` of one layer and direction."""
        return self.layer(layer, direction).table(names, steps, batch, units)

    def plot(self, kind: str, *, layer: int = 0, direction: str = "forward", **options: Any) -> Any:
        """Call :meth:`.LayerTrace.plot` of one layer and direction."""
        return self.layer(layer, direction).plot(kind, **options)

    def to_pandas(self) -> pandas.DataFrame:
        """Join the DataFrames of :meth:`.LayerTrace.to_pandas` of all layers and directions."""
        from unrolled.tracing.tables import import_pandas  # imports rich

        return import_pandas().concat([part.to_pandas() for part in self.layers], ignore_index=True)

    def backward(self, loss: Loss | Tensor) -> Trace:
        """Compute the gradient ∂loss/∂quantity at every step, which :meth:`gradient` returns.

        The layer runs again with its recorded parameters. The ``grad`` attributes of the module's parameters
        don't change.

        Args:
            loss: A function of the output, or of output and final state, that returns a scalar; or a target
                tensor, for the mean squared error of the output.

        Returns:
            This trace, so that calls can be chained: ``t.backward(loss).gradient("h")``.

        Raises:
            TypeError: If the loss is neither a function with these arguments nor a tensor.
            ValueError: If the loss doesn't return a real scalar that depends on the output, if the target has
                the wrong shape, or if only a part of the call was recorded.
        """
        if self._call is None:
            raise ValueError(_NEEDS_WHOLE_CALL.format("backward"))
        cells = [part.cell for part in self.layers]
        gradients_by_layer = gradients_through_time(
            self.recurrent, cells, self._initial_states, self._call, self._random_state, loss, self._dropout
        )
        for part, gradients in zip(self.layers, gradients_by_layer, strict=True):
            part.gradients.clear()
            part.gradients.update({name: self.selection.select(gradients[name]) for name in part.values})
        return self

    def forget(self) -> None:
        """Free what was only needed to run the layer again, unless the whole call was to be recorded."""
        if not self.selection.keeps_everything:
            self._call, self._initial_states = None, ()

    def gradient(self, name: str, *, layer: int = 0, direction: str = "forward") -> Tensor:
        """Call :meth:`.LayerTrace.gradient` of one layer and direction."""
        return self.layer(layer, direction).gradient(name)

    def to_html(
        self,
        path: str | Path,
        *,
        batch: int | Iterable[int] | None = None,
        labels: Sequence[Any] | None = None,
        inputs: str = "numbers",
        title: str | None = None,
        limit: int = 3_000_000,
        predictions: Sequence[Any] | None = None,
        baseline: Trace | None = None,
        live: bool = False,
    ) -> Path:
        """Write an interactive HTML page. It is a single file that works offline in any browser.

        The page shows every number of each step and how it was computed, the gradient after :meth:`backward`
        and what :meth:`health` finds. Inputs, weights, initial states and gates can be changed on it.

        Args:
            path: Path of the file.
            batch: The row, or several rows. By default, some of the first rows: up to 8 if they are small.
            labels: A label for each time step, such as the characters of a text, for one row (row 0 by
                default); or a list of them for each chosen row, or for each row of the batch.
            inputs: How to draw the input: as ``"numbers"``, or as an ``"image"`` with a row per time step.
            title: Title of the page. None for the layer.
            limit: Approximate maximum number of values to store; three million make 16 MB. If the values that
                the page can't compute exceed it, 1000 evenly spaced steps and means are stored (a warning).
            predictions: What the model predicts after each time step, as texts or numbers, like ``labels``.
            baseline: A trace of the same cell, sizes and input shape to compare, as from before training.
            live: Whether the page can run the layer on new input: typed, drawn, or audio. Needs zig or clang.

        Returns:
            The path.

        Raises:
            OSError: If the file can't be written.
            IndexError: If there is no such row.
            TypeError: If an argument has the wrong type.
            ValueError: If labels or predictions don't fit the time steps, a row has no time steps, the states
                are complex, ``live`` can't compile the layer, or another argument is invalid.
        """
        texts = {"labels": labels, "predictions": predictions, "title": title}
        options = {"batch": batch, "inputs": inputs, "limit": limit, "baseline": baseline, "live": live}
        return Path(display.package("page").write(self, path, **options, **texts))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Return what a notebook shows if a trace is the last value of a cell: the page."""
        return dict(display.package("page").notebook_view(self))

    def check(self) -> float:
        """Recompute with torch.nn and return the largest absolute difference in output and final state.

        Raises:
            ValueError: If torch.nn has no layer for this cell, or only a part of the call was recorded.
        """
        if self.input is None or self._call is None:
            raise ValueError(_NEEDS_WHOLE_CALL.format("check"))
        if self._dropout is not dropout and self.recurrent.training and self.recurrent.dropout > 0:
            raise ValueError(
                "the comparison with torch.nn needs the whole batch, because dropout is drawn for all rows"
            )
        result, call = (self.output, self.final_state), self._call
        return difference_from_torch(self.recurrent, self.layers, call, result, self._random_state)

    def health(self) -> HealthReport:
        """Look for problems in all layers, directions, steps and rows, such as NaNs and stuck gates.

        The gradient through time is checked after :meth:`backward` only.

        Returns:
            A report in words, the worst problem first. Print it, or iterate over its findings.
        """
        return diagnose(self.layers)


def trace(module: nn.Module, x: Tensor | PackedSequence, state: State | None = None) -> Trace:
    """Run a recurrent layer and record every intermediate value.

    The quantities are named after the local variables of the cell's step. The trace holds copies without
    gradients. The module, its mode, hooks and gradients, and the random state don't change.

    Args:
        module: A layer of this library, or a ``torch.nn.RNN``, ``LSTM`` or ``GRU``.
        x: Input of the module: batched, unbatched or packed.
        state: Initial state, as the module itself takes it. Zeros by default.

    Raises:
        TypeError: If the module isn't a recurrent layer, or overrides its forward method.
        ValueError: If the input or state doesn't fit the module, or autocast is on.
    """
    recurrent = hooks.recurrent_for_input(module, x)
    hooks.check_memory(type(module).__name__, x, state, list(module.parameters()))
    device = x.data.device.type if isinstance(x, (Tensor, PackedSequence)) else ""
    if transforms.autocast_enabled(device):
        raise ValueError(
            "trace doesn't support autocast: call it outside of autocast, or inside "
            f"torch.autocast({device!r}, enabled=False)"
        )
    return run_traced(module, recurrent, x, state, capture_random_state(cuda_devices(x)))[0]


def run_traced(
    module: nn.Module,
    recurrent: Recurrent,
    x: Tensor | PackedSequence,
    state: State | None,
    random_state: RandomState,
    selection: Selection = _KEEP_EVERYTHING,
    rows: BatchRows | None = None,
    earlier_cells: Sequence[Cell] | None = None,
) -> tuple[Trace, tuple[Any, Any]]:
    """Run a layer on the reference engine and record the selected quantities.

    Args:
        module: The module that was called.
        recurrent: The equivalent layer of this library.
        x: Input of the call.
        state: Initial state of the call.
        random_state: Random state before the call.
        selection: What to record.
        rows: The rows that ``x`` and ``state`` were selected from; None if they are the whole batch.
        earlier_cells: Cells of another trace of the module. Their parameters are shared if they are equal.

    Returns:
        The trace, and the output and final state of the run.
    """
    parts: list[LayerTrace] = []
    initial_states: list[tuple[Tensor, ...]] = []
    keep: Any = _copy if selection.keeps_everything else lambda value: map_tensors(value, Tensor.detach)
    eval_mode = parametrizations_in_eval_mode(recurrent)
    with torch.no_grad(), replay_random_state(random_state, cuda_devices(x)), eval_mode:
        call = (keep(x), keep(state))
        sequence = SequenceBatch.from_input(call[0], recurrent.batch_first, type(module).__name__)

        def copy_cell(cell: Cell) -> Cell:
            parameters = {name: getattr(cell, name).detach() for name in cell.shapes()}
            earlier = None if earlier_cells is None else earlier_cells[len(parts)]
            if earlier and all(identical(getattr(earlier, name), parameters[name]) for name in parameters):
                return cell.bind({name: getattr(earlier, name) for name in parameters})
            return cell.bind({name: tensor.clone() for name, tensor in parameters.items()})

        def record(cell: Cell, steps: Tensor, start: Any, sizes: Any, reverse: bool, draws: Any) -> Any:
            start = reference.zeros(cell, steps, sizes) if start is None else start
            recorder = (
                StepRecorder(cell)
                if selection.keeps_everything
                else SelectiveRecorder(cell, selection, sequence, reverse)
            )
            result = run_recorded(recorder.cell, steps, start, sizes, reverse, **draws)
            initial_states.append(_copy(start))
            initial_state = {
                name: sequence.to_user_order(part, 0).clone()
                for name, part in zip(cell.state, start, strict=True)
            }
            recorded = (
                recorder.layer_trace_fields()
                if isinstance(recorder, SelectiveRecorder)
                else {"input": sequence.padded(steps).clone(), "values": recorder.stacked(sequence, reverse)}
            )
            if selection.keeps_everything:
                recorded["draws"] = recorded_draws(cell, sequence, reverse, **draws)
            parts.append(
                LayerTrace(
                    cell=copy_cell(cell),
                    layer=len(parts) // (1 + recurrent.bidirectional),
                    direction=DIRECTIONS[reverse],
                    initial_state={name: selection.select_rows(part) for name, part in initial_state.items()},
                    lengths=selection.select_rows(sequence.lengths),
                    **recorded,
                )
            )
            return result

        def run(cells: list[Cell], steps: Tensor, starts: list[Any], sizes: Any, **draws: Any) -> Any:
            calls = zip(cells, starts, (False, True), strict=False)
            return [record(cell, steps, start, sizes, reverse, draws) for cell, start, reverse in calls]

        recurrent.check_only_step("trace")
        result = recurrent.unroll(*call, run, dropout if rows is None else rows.dropout)
    new_trace = Trace(module, recurrent, parts, initial_states, call, result, random_state, selection, rows)
    return new_trace, result


def _copy(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.detach().clone())
