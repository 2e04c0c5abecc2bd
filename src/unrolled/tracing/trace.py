"""Every named number of every step of a layer: ours, a user's own cell, or torch.nn's."""

from __future__ import annotations

import warnings
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
from unrolled.layers.convert import to_torch
from unrolled.layers.module import State, at_rest
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing import backward, display, hooks
from unrolled.tracing.backward import Loss
from unrolled.tracing.indexing import position
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.random_state import cuda_devices, drawing_from, random_state
from unrolled.tracing.selection import BatchRows, LimitedRecorder, Selection
from unrolled.tracing.step_recorder import StepRecorder
from unrolled.tracing.tables import StepTable, pandas_or_why

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

DIRECTIONS = ("forward", "backward")
_ALL = Selection()
_NOT_WHOLE = (
    "{} runs the layer again, which takes all of its call, and of this one not all was kept: limit no more "
    "than rows, or record with gradients=True"
)


class Trace:
    """What :func:`trace` returns: every named number of every layer, direction and step.

    ``trace[name]`` and ``names`` speak of the lowest layer, forward; :meth:`layer` gives the others, and so
    do the arguments ``layer`` and ``direction`` of ``explain``, ``table``, ``plot`` and ``gradient``.

    Attributes:
        module: the module that was traced.
        recurrent: the layer of this library that computes what ``module`` did: with the parameters, mode and
            options that it had.
        input: what the module was given.
        output, final_state: what the module returns for this input.
        selection: what was kept. Where that is not every step, quantity and unit, there is no ``input`` and
            no ``output``, but None.
        layers: every layer and direction, in the order in which they run.
    """

    def __init__(
        self,
        module: nn.Module,
        recurrent: Recurrent,
        layers: Sequence[LayerTrace],
        starts: Sequence[tuple[Tensor, ...]],
        call: tuple[Any, Any],
        result: tuple[Any, Any],
        random_state: list[Tensor],
        selection: Selection = _ALL,
        rows: BatchRows | None = None,
    ) -> None:
        self.module = module
        self.layers = tuple(layers)
        self._starts = tuple(starts)  # of each layer and direction, in the order of the engines' rows
        self.output, self.final_state = result
        self.recurrent = recurrent.with_cells(part.cell for part in self.layers)
        self.input = call[0]
        if not selection.whole:
            self.input = self.output = None
            self.final_state = _copy(map_tensors(self.final_state, selection.of_states))
        self.selection = selection
        self._random_state = random_state
        self._drop = dropout if rows is None else rows.dropout
        self._again: tuple[Any, Any] | None = call  # what it needs to run again

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the quantities, in the order in which the step computes them."""
        return self.layers[0].names

    def __getitem__(self, name: str) -> Tensor:
        """The quantity of this name in the lowest layer, forward: ``(time, batch, size)``."""
        return self.layers[0][name]

    def __repr__(self) -> str:
        return f"<Trace of {self.module}: {self.layers[0].extent}; {', '.join(self.names)}>"

    @property
    def nbytes(self) -> int:
        """The bytes of all that it holds, the copies of the parameters among them."""
        return sum(self.storages().values())

    def storages(self) -> dict[int, int]:
        """The bytes of everything in memory that it holds, by the address."""
        held: list[Any] = [self.input, self.output, self.final_state, self._starts, self._again]
        for part in self.layers:
            held += [part.input, part.lengths, *(getattr(part.cell, name) for name in part.cell.shapes())]
            for named in (part.initial_state, part.values, part.gradients, part.before):
                held += named.values()
        return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors(held)}

    def layer(self, index: int, direction: str = "forward") -> LayerTrace:
        """One layer (0 is the lowest; negative counts from the top) in one direction.

        Raises:
            IndexError: there is no such layer.
            ValueError: the direction is neither ``"forward"`` nor ``"backward"``, or the layer
                has no backward direction.
        """
        present = [d for d in DIRECTIONS if any(part.direction == d for part in self.layers)]
        if direction not in present:
            raise ValueError(f"direction should be {' or '.join(map(repr, present))}, got {direction!r}")
        count = len(self.layers) // len(present)
        return self.layers[position("layer", index, count) * len(present) + present.index(direction)]

    def explain(
        self,
        name: str,
        step: int,
        unit: int,
        batch: int = 0,
        terms: int = 8,
        *,
        layer: int = 0,
        direction: str = "forward",
    ) -> str:
        """:meth:`.LayerTrace.explain` of a layer and direction as :meth:`layer` takes them."""
        return self.layer(layer, direction).explain(name, step, unit, batch, terms)

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
        """:meth:`.LayerTrace.table` of a layer and direction as :meth:`layer` takes them."""
        return self.layer(layer, direction).table(names, steps, batch, units)

    def plot(self, kind: str, *, layer: int = 0, direction: str = "forward", **options: Any) -> Axes:
        """:meth:`.LayerTrace.plot` of a layer and direction as :meth:`layer` takes them."""
        return self.layer(layer, direction).plot(kind, **options)

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each number of every layer and direction, as a pandas DataFrame.

        Columns: layer, direction, step, batch, name, unit, value; nothing past the end of a row.

        Raises:
            ImportError: pandas is not installed.
        """
        frames = pandas_or_why()
        return frames.concat([part.to_pandas() for part in self.layers], ignore_index=True)

    def backward(self, loss: Loss | Tensor) -> Trace:
        """Compute the gradient through time: ∂loss/∂quantity at every step, which :meth:`gradient` gives.

        The layer runs again with the parameters that it had; theirs and the module's gradients stay as they
        were.

        Args:
            loss: a function of the output, or with two arguments of output and final state, that gives one
                number; or a tensor, the target, from which the loss is the mean squared difference of the
                output.

        Returns:
            This trace, so that ``t.backward(loss).gradient("h")`` can be written.

        Raises:
            TypeError, ValueError: a loss that gives no such number, or a target of another shape; not all of
                the call was kept.
        """
        if self._again is None:
            raise ValueError(_NOT_WHOLE.format("a backward"))
        cells = [part.cell for part in self.layers]
        found = backward.through_time(
            self.recurrent, cells, self._starts, self._again, self._random_state, loss, self._drop
        )
        for part, gradients in zip(self.layers, found, strict=True):
            part.gradients.clear()
            part.gradients.update({name: self.selection.cut(gradients[name]) for name in part.values})
        return self

    def forget(self) -> None:
        """Leave out what was not to be kept, and is only needed to run again."""
        if not self.selection.whole:
            self._again, self._starts = None, ()

    def gradient(self, name: str, *, layer: int = 0, direction: str = "forward") -> Tensor:
        """:meth:`.LayerTrace.gradient` of a layer and direction as :meth:`layer` takes them."""
        return self.layer(layer, direction).gradient(name)

    def to_html(
        self,
        path: str | Path,
        *,
        batch: int = 0,
        labels: Sequence[str] | None = None,
        inputs: str = "numbers",
        title: str | None = None,
        limit: int = 3_000_000,
    ) -> Path:
        """Write the trace as a page: one file to look at in a browser, which needs nothing but itself.

        It shows the layer unrolled through time, every number of a step, what each is made of, the equations,
        heat maps of the whole sequence, the gradient through time after :meth:`backward`, and the check
        against torch.nn.

        Args:
            path: of the file.
            batch: the row.
            labels: what stands for each time step, such as the characters of a text.
            inputs: how the input is drawn: as ``"numbers"``, or ``"image"``, whose rows are the time steps.
            title: of the page; None: the layer.
            limit: how many numbers are kept, about; three million make a file of 16 MB. Of a larger trace,
                and of one of more than 1000 time steps, evenly spread steps are kept with every number, 1000
                at most, and means over bins of all of them; a warning says so.

        Returns:
            The path.

        Raises:
            OSError: a path that can't be written.
            IndexError: there is no such row.
            TypeError, ValueError: labels of another number than time steps, another word for ``inputs``, a
                row without time steps, complex states, or another argument that can't be.
        """
        written: Path = display.package("page").write(
            self, path, batch=batch, labels=labels, inputs=inputs, title=title, limit=limit
        )
        return written

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """What a notebook shows where a trace is the last value of a cell: the page."""
        views: dict[str, Any] = display.package("page").shown(self)
        return views

    def check(self) -> float:
        """Recompute with torch.nn; the largest absolute difference in output and final state.

        Raises:
            ValueError: torch.nn has no layer that computes this cell; or not all of the call was kept.
        """
        if self.input is None or self._again is None:
            raise ValueError(_NOT_WHOLE.format("a check"))
        if self._drop is not dropout and self.recurrent.training and self.recurrent.dropout > 0:
            raise ValueError(
                "a check needs the whole batch: torch.nn would draw another dropout for some of its rows"
            )
        weights = {
            f"{name}_l{part.layer}{'_reverse' if part.direction == 'backward' else ''}": getattr(
                part.cell, name
            )
            for part in self.layers
            for name in part.cell.shapes()
        }
        twin = to_torch(self.recurrent, weights)
        devices = cuda_devices(self.input)
        with torch.no_grad(), drawing_from(self._random_state, devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*with projections is not supported with oneDNN")
            theirs = twin(*self._again)
        ours = tensors((self.output, self.final_state))
        pairs = zip(ours, tensors(theirs), strict=True)
        return float(torch.cat([_differences(a, b) for a, b in pairs]).max())


def trace(module: nn.Module, x: Tensor | PackedSequence, state: State | None = None) -> Trace:
    """Run a recurrent layer and keep every named quantity of every step.

    The names are the local variables of the cell's step. The module, its mode, hooks and gradients
    and the random state stay as they were; the trace holds copies, without gradients.

    Args:
        module: a layer of this library, or a ``torch.nn.RNN``, ``LSTM`` or ``GRU``.
        x: what the module takes: batched or not, packed or not.
        state: the initial state, as the module takes it.

    Raises:
        TypeError: the module is no recurrent layer, or overrides the forward of one.
        ValueError: an input or state that doesn't fit the module; autocast is on.
    """
    recurrent = hooks.layer_to_run(module, x)
    device = x.data.device.type if isinstance(x, (Tensor, PackedSequence)) else ""
    if transforms.autocasts(device):
        raise ValueError(
            "a trace doesn't follow autocast: call trace outside of it, or inside "
            f"torch.autocast({device!r}, enabled=False)"
        )
    return traced(module, recurrent, x, state, random_state(cuda_devices(x)))[0]


def traced(
    module: nn.Module,
    recurrent: Recurrent,
    x: Tensor | PackedSequence,
    state: State | None,
    drawn_from: list[Tensor],
    selection: Selection = _ALL,
    rows: BatchRows | None = None,
    earlier: Sequence[Cell] | None = None,
) -> tuple[Trace, tuple[Any, Any]]:
    """:func:`trace`, with limits.

    Args:
        module: what was called.
        recurrent: our layer of it.
        x: what it was given.
        state: what it was given.
        drawn_from: the random state before the call.
        selection: what is kept.
        rows: where x and state are of some rows of a batch, which.
        earlier: the cells of another trace of the module: their copies of the parameters serve where they are
            the same.

    Returns:
        The trace, and the output and final state of what ran.
    """
    parts: list[LayerTrace] = []
    starts: list[tuple[Tensor, ...]] = []
    keep: Any = _copy if selection.whole else _detached
    with torch.no_grad(), drawing_from(drawn_from, cuda_devices(x)), at_rest(recurrent):
        call = (keep(x), keep(state))
        steps = SequenceBatch.of(call[0], recurrent.batch_first, type(module).__name__)

        def bound(cell: Cell) -> Cell:
            now = {name: getattr(cell, name).detach() for name in cell.shapes()}
            then = None if earlier is None else earlier[len(parts)]
            if then is not None and all(_equal(getattr(then, name), now[name]) for name in now):
                now = {name: getattr(then, name) for name in now}
            else:
                now = {name: tensor.clone() for name, tensor in now.items()}
            return cell.bind(now)

        def record(cell: Cell, rows: Tensor, start: Any, sizes: Any, reverse: bool) -> Any:
            start = reference.zeros(cell, rows, sizes) if start is None else start
            recorder = (
                StepRecorder(cell) if selection.whole else LimitedRecorder(cell, selection, steps, reverse)
            )
            result = reference.run(recorder.cell, rows, start, sizes, reverse)
            starts.append(_copy(start))
            begun = {
                name: steps.to_user_order(part, 0).clone()
                for name, part in zip(cell.state, start, strict=True)
            }
            own = (
                recorder.parts()
                if isinstance(recorder, LimitedRecorder)
                else {"input": steps.padded(rows).clone(), "values": recorder.values(steps, reverse)}
            )
            parts.append(
                LayerTrace(
                    cell=bound(cell),
                    layer=len(parts) // (1 + recurrent.bidirectional),
                    direction=DIRECTIONS[reverse],
                    initial_state={name: selection.of_rows(part) for name, part in begun.items()},
                    lengths=selection.of_rows(steps.lengths),
                    **own,
                )
            )
            return result

        def run(cells: list[Cell], rows: Tensor, starts: list[Any], sizes: Any) -> Any:
            directions = zip(cells, starts, (False, True), strict=False)
            return [record(cell, rows, start, sizes, reverse) for cell, start, reverse in directions]

        recurrent.check_noise("trace")
        result = recurrent.unroll(*call, run, dropout if rows is None else rows.dropout)
    return Trace(module, recurrent, parts, starts, call, result, drawn_from, selection, rows), result


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one to a copy."""
    return a.dtype is b.dtype and a.device == b.device and torch.equal(a, b)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """The absolute differences in a row, after a 0; equal infinities and NaN in both differ by 0."""
    a, b = a.double().flatten(), b.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.cat([a.new_zeros(1), (a - b).abs().masked_fill(same, 0)])


def _detached(value: Any) -> Any:
    return map_tensors(value, Tensor.detach)


def _copy(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.detach().clone())
