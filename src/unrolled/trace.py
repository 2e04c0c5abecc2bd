"""Every named number of every step of a layer: ours, a user's own cell, or torch.nn's."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled import counterpart, engines
from unrolled.cell import Cell
from unrolled.cell_module import State
from unrolled.explain import Recording, number
from unrolled.layers import Recurrent
from unrolled.recording import StepRecorder, cuda_devices, run_with_names
from unrolled.sequence import Sequence as Steps
from unrolled.tables import StepTable, frame

if TYPE_CHECKING:
    import pandas

DIRECTIONS = ("forward", "backward")


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

    def __repr__(self) -> str:
        time, batch = self.input.shape[:2]
        where = f"{type(self.cell).__name__}, layer {self.layer}, {self.direction}"
        return f"<LayerTrace of {where}: {time} steps × {batch} rows; {', '.join(self.values)}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the quantities, in the order in which the step computes them."""
        return tuple(self.values)

    def __getitem__(self, name: str) -> Tensor:
        """The quantity of this name, ``(time, batch, size)``; ``"x"`` is the input."""
        if name == "x" and name not in self.values:
            return self.input
        if name not in self.values:
            raise KeyError(f"no quantity {name!r} in this trace: it has {', '.join(self.names)}")
        return self.values[name]

    def state_before(self, step: int, batch: int = 0) -> dict[str, Tensor]:
        """The states, ``(size,)`` each, from which a row computes this step."""
        before = step - 1 if self.direction == "forward" else step + 1
        if not 0 <= before < self.lengths[batch]:
            return {name: state[batch] for name, state in self.initial_state.items()}
        return {name: self.values[name][before, batch] for name in self.initial_state}

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
            IndexError: there is no such step, unit or row.
            ValueError: the quantity is the input.
        """
        values = self[name]
        batch = position("row", batch, values.shape[1])
        step = position("time step", step, int(self.lengths[batch]))
        if name not in self.values:
            raise ValueError(f"{name} is the input: no arithmetic stands behind it")
        there = values[step, batch].flatten()
        unit = position("unit", unit, len(there))
        state = [part.unsqueeze(0) for part in self.state_before(step, batch).values()]
        recording = Recording()
        x = self.input[step, batch].unsqueeze(0)
        # outside inference mode, so that torch counts what the step changes in place
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(cuda_devices(x)):
            with recording:
                _, named = run_with_names(self.cell, x, *state)
            again, value = named.get(name), number(there[unit].item())
            if again is None or not _same(again.flatten(), there, unit):
                return f"{value} = {value}"
            index = tuple(int(axis) for axis in torch.unravel_index(torch.tensor(unit), again.shape))
            return f"{recording.explain(again, index, named, terms)} = {value}"

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
        quantities = {"x": self.input} if names is None else {}
        quantities |= {name: self[name] for name in (self.names if names is None else names)}
        rows = {name: values[:length, batch].reshape(length, -1) for name, values in quantities.items()}
        return StepTable(rows, chosen, units, title=f"layer {self.layer}, {self.direction}")

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each number: layer, direction, step, batch, name, unit, value."""
        return frame(self.values, self.lengths, self.layer, self.direction)


class Trace:
    """What :func:`trace` returns: every named number of every layer, direction and step.

    ``trace[name]``, ``names``, ``explain`` and ``table`` speak of the lowest layer, forward;
    :meth:`layer` gives the others.

    Attributes:
        module: the module that was traced.
        recurrent: the layer of this library that has its parameters; ``module`` itself if it is one.
        input: what the module was given.
        output, final_state: what the module returns for this input.
        layers: every layer and direction, in the order in which they run.
    """

    def __init__(
        self,
        module: nn.Module,
        recurrent: Recurrent,
        layers: Sequence[LayerTrace],
        call: tuple[Any, Any],
        result: tuple[Any, Any],
        random_state: Tensor,
    ) -> None:
        self.module = module
        self.layers = tuple(layers)
        self.output, self.final_state = result
        self.recurrent = recurrent
        self.input, self._state = call
        self._random_state = random_state

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the quantities, in the order in which the step computes them."""
        return self.layers[0].names

    def __getitem__(self, name: str) -> Tensor:
        """The quantity of this name in the lowest layer, forward: ``(time, batch, size)``."""
        return self.layers[0][name]

    def __repr__(self) -> str:
        time, batch = self.layers[0].input.shape[:2]
        return f"<Trace of {self.module}: {time} steps × {batch} rows; {', '.join(self.names)}>"

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

    def explain(self, name: str, step: int, unit: int, batch: int = 0, terms: int = 8) -> str:
        """:meth:`LayerTrace.explain` for the lowest layer, forward."""
        return self.layers[0].explain(name, step, unit, batch, terms)

    def table(
        self,
        names: Iterable[str] | None = None,
        steps: Sequence[int] | None = None,
        batch: int = 0,
        units: int | None = None,
    ) -> StepTable:
        """:meth:`LayerTrace.table` for the lowest layer, forward."""
        return self.layers[0].table(names, steps, batch, units)

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each number of every layer and direction, as a pandas DataFrame.

        Columns: layer, direction, step, batch, name, unit, value; nothing past the end of a row.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.concat([part.to_pandas() for part in self.layers], ignore_index=True)

    def check(self) -> float:
        """Recompute with torch.nn; the largest absolute difference in output and final state.

        Raises:
            ValueError: torch.nn has no layer that computes this cell.
        """
        weights = {
            f"{name}_l{part.layer}{'_reverse' if part.direction == 'backward' else ''}": getattr(
                part.cell, name
            )
            for part in self.layers
            for name in part.cell.shapes()
        }
        twin = counterpart.to_torch(self.recurrent, weights)
        devices = cuda_devices(self.input)
        with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*with projections is not supported with oneDNN")
            torch.set_rng_state(self._random_state)
            theirs = twin(self.input, self._state)
        ours = _tensors((self.output, self.final_state))
        pairs = zip(ours, _tensors(theirs), strict=True)
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
        ValueError: an input or state that doesn't fit the module.
    """
    recurrent = counterpart.recurrent(module)
    parts: list[LayerTrace] = []
    with torch.no_grad(), torch.random.fork_rng(cuda_devices(x)):
        random_state = torch.get_rng_state()
        call = (_copy(x), _copy(state))
        steps = Steps.of(call[0], recurrent.batch_first, type(module).__name__)

        def record(cell: Cell, rows: Tensor, start: Any, sizes: Any, reverse: bool) -> Any:
            recorder = StepRecorder(cell)
            start = engines.reference.zeros(cell, rows, sizes) if start is None else start
            result = engines.reference.run(recorder.cell, rows, start, sizes, reverse)
            parts.append(
                LayerTrace(
                    cell=cell.bind({name: getattr(cell, name).detach().clone() for name in cell.shapes()}),
                    layer=len(parts) // (1 + recurrent.bidirectional),
                    direction=DIRECTIONS[reverse],
                    input=steps.padded(rows).clone(),
                    initial_state={
                        name: steps.to_user_order(part, 0).clone()
                        for name, part in zip(cell.state, start, strict=True)
                    },
                    values=recorder.values(steps, reverse),
                    lengths=steps.lengths,
                )
            )
            return result

        def run(cells: list[Cell], rows: Tensor, starts: list[Any], sizes: Any) -> Any:
            directions = zip(cells, starts, (False, True), strict=False)
            return [record(cell, rows, start, sizes, reverse) for cell, start, reverse in directions]

        recurrent.check_noise("trace")
        result = recurrent.unroll(*call, run)
    return Trace(module, recurrent, parts, call, result, random_state)


def _same(again: Tensor, there: Tensor, unit: int) -> bool:
    """Whether a step run again gives the same number but for rounding."""
    if again.shape != there.shape or not (there.is_floating_point() or there.is_complex()):
        return torch.equal(again, there)
    rounding = torch.finfo(there.dtype).eps ** 0.5
    scale = there.abs().nan_to_num(0, 0, 0).max() * rounding
    return torch.allclose(again[unit].to(there.dtype), there[unit], rounding, float(scale), equal_nan=True)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """The absolute differences in a row, after a 0; equal infinities and NaN in both differ by 0."""
    a, b = a.double().flatten(), b.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.cat([a.new_zeros(1), (a - b).abs().masked_fill(same, 0)])


def position(what: str, index: int, size: int) -> int:
    """An index counted from 0; negative ones count from the end. Raises where there is no such one."""
    try:
        whole = operator.index(index)  # of NumPy and torch too, such as what argmax gives
    except TypeError:
        whole = None
    if whole is None or isinstance(index, bool):
        raise TypeError(f"the {what} should be a whole number, got {index!r}")
    if not -size <= whole < size:
        raise IndexError(f"there is no {what} {whole}: there are {size}, counted from 0")
    return whole % size


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, PackedSequence):
        return PackedSequence(function(value.data), *value[1:])
    if isinstance(value, (tuple, list)):
        return tuple(_map_tensors(part, function) for part in value)
    return function(value) if isinstance(value, Tensor) else value


def _copy(value: Any) -> Any:
    return _map_tensors(value, lambda tensor: tensor.detach().clone())


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found
