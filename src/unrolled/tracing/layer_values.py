"""The recorded values of a layer, prepared for the checks of :meth:`unrolled.Trace.health`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.descriptions import quantity_descriptions
from unrolled.engines.fork_safety import lazy_property
from unrolled.tracing.call_recorder import CallRecorder
from unrolled.tracing.findings import Finding, Severity
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.provenance import Node, StepGraph, computation_graph
from unrolled.tracing.random_state import cuda_devices
from unrolled.tracing.saturation import saturating_functions
from unrolled.tracing.step_recorder import run_with_locals

STEP_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)  # of a step with another batch size


_LABEL_WORDS = 5  # a longer description isn't a name


class CannotCheckError(Exception):
    """A check isn't possible. The message says why. It is empty if the layer has nothing to check."""


@dataclass(frozen=True, eq=False)
class StepBatch:
    """Some steps of some rows, as rows of one batch.

    Attributes:
        indices: Their positions along the joined axes of time and batch.
        x: Their inputs.
        states: The states before them, by name.
    """

    indices: Tensor
    x: Tensor
    states: dict[str, Tensor]


class LayerValues:
    """The values of one layer in one direction, without padding.

    Args:
        part: The trace of the layer.
        without_gradients: Why there may be no gradients.
        rows: The number of each row. By default, they are counted from 0.

    Attributes:
        part: The trace of the layer.
        without_gradients: Why there may be no gradients.
        row_numbers: The number of each row.
        cell: Its cell.
        running: Which steps of which rows run, ``(time, batch)``.
        finite: Those of them in which all recorded numbers are finite.
        steps: The number of each step along the time axis.
    """

    def __init__(self, part: LayerTrace, without_gradients: str, rows: Sequence[int] | None) -> None:
        self.part, self.cell = part, part.cell
        self.without_gradients = without_gradients
        self._graphs: dict[tuple[int, int], StepGraph | None] = {}
        self._moves: dict[Any, Any] = {}
        first = next(iter(part.values.values()), part.input)
        self.steps = list(range(first.shape[0])) if part.steps is None else list(part.steps)
        lengths = part.lengths.to(first.device)
        self.running = torch.tensor(self.steps, device=first.device).unsqueeze(1) < lengths
        self.row_numbers = tuple(range(self.running.shape[1]) if rows is None else rows)
        self.finite = self.running.clone()
        for value in (*part.values.values(), part.input):
            self.finite &= value.isfinite().unsqueeze(-1).flatten(2).all(-1)

    @lazy_property
    def run_order(self) -> list[int]:
        """Positions along the time axis, in the order in which the steps run."""
        positions = list(range(len(self.steps)))
        return positions if self.part.direction == "forward" else positions[::-1]

    @lazy_property
    def functions(self) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
        """The saturating function that computed each quantity, for those that have one.

        A quantity whose elements are those of others, such as all gates together, is left out.
        """
        cell = self.cell
        state = [part.new_zeros(1, size) for part, size in self._state_examples()]
        x = state[0].new_zeros(1, cell.input, dtype=self._input_dtype())
        recorder = CallRecorder()
        try:
            # Outside of inference mode, since torch doesn't count in-place changes there.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.random.fork_rng(cuda_devices(x)),
                recorder,
            ):
                _, named = run_with_locals(cell, x, *state)
            nodes = computation_graph(recorder, named, {})
        except STEP_ERRORS:
            return {}
        recorded = {name: value for name, value in named.items() if name in self.part.values}
        functions = saturating_functions(recorder, recorded)
        split = {source for name in functions for source in _moved_from(nodes[name])}
        return {name: function for name, function in functions.items() if name not in split}

    def _state_examples(self) -> Iterator[tuple[Tensor, int]]:
        return zip(self.part.initial_state.values(), self.cell.state_sizes().values(), strict=True)

    def _input_dtype(self) -> torch.dtype:
        if self.part.input.shape[-1]:
            return self.part.input.dtype
        parameters = (getattr(self.cell, name) for name in self.cell.shapes())
        real = (tensor.dtype for tensor in parameters if tensor.is_floating_point())
        return next(real, next(iter(self.part.initial_state.values())).dtype)

    def samples(self, name: str) -> Tensor:
        """Return the finite values of a quantity as ``(steps of all rows, units)``; complex ones as sizes.

        Raises:
            CannotCheckError: If fewer than two steps have finite values.
        """
        self.check_samples()
        values = self.part.values[name][self.finite]
        values = values.reshape(len(values), -1)
        return (values.abs() if values.is_complex() else values).double()

    def check_samples(self) -> None:
        """Raise CannotCheckError if fewer than two steps have finite values."""
        if int(self.finite.sum()) < 2:
            raise CannotCheckError("fewer than two steps have finite numbers")

    def unit_numbers(self, name: str, positions: Tensor) -> tuple[int, ...]:
        """Return the units of a quantity at some positions of its features."""
        columns = self.part.columns.get(name)
        found: list[int] = positions.flatten().tolist()
        return tuple(found if columns is None else (columns[k] for k in found))

    def label(self, name: str) -> str:
        """Return what a quantity is, such as ``forget gate``, from the cell's docstring; empty if unknown."""
        what = quantity_descriptions(type(self.cell)).get(name, "").partition(":")[0]
        return what if len(what.split()) <= _LABEL_WORDS else ""

    def graph(self, position: int, row: int) -> StepGraph | None:
        """Return the computation graph of a step, or None if it can't be computed again."""
        if (position, row) not in self._graphs:
            try:
                self._graphs[position, row] = self.part.derivations(self.steps[position], row, self._moves)
            except STEP_ERRORS:
                self._graphs[position, row] = None
        return self._graphs[position, row]

    def parameter_of(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, if any."""
        return next((name for name in self.cell.shapes() if getattr(self.cell, name) is tensor), None)

    def finding(self, kind: str, severity: Severity, message: str, quantity: str, **others: Any) -> Finding:
        """Return a finding about this layer."""
        part = self.part
        return Finding(kind, severity, message, part.layer, part.direction, quantity, **others)

    def step_batch(self, limit: int) -> StepBatch:
        """Return inputs and previous states of some steps with finite numbers, as one batch.

        The steps are spread evenly over all steps and rows.

        Raises:
            CannotCheckError: If the inputs or states weren't recorded, or are too few.
        """
        part = self.part
        if part.partial:
            raise CannotCheckError("it needs all quantities and units, and only some were recorded")
        batch = self.running.shape[1]
        if part.steps is not None:
            before = part.before
        else:
            before = {}
            for name, initial in part.initial_state.items():
                states = part.values[name]
                rolled = torch.empty_like(states)
                if part.direction == "forward":
                    rolled[1:], rolled[:1] = states[:-1], initial
                else:
                    rolled[:-1], rolled[-1:] = states[1:], initial
                    last = (part.lengths - 1).to(states.device)
                    rolled[last, torch.arange(batch, device=states.device)] = initial
                before[name] = rolled
        usable = self.finite.clone()
        for state in before.values():
            usable &= state.isfinite().flatten(2).all(-1)
        chosen = usable.flatten().nonzero().flatten()
        if len(chosen) < 2:
            raise CannotCheckError("fewer than two steps have finite numbers")
        if len(chosen) > limit:
            chosen = chosen[torch.linspace(0, len(chosen) - 1, limit, device=chosen.device).long()]
        x = part.input.flatten(0, 1)[chosen]
        return StepBatch(chosen, x, {name: state.flatten(0, 1)[chosen] for name, state in before.items()})


def _moved_from(node: Node) -> set[str]:
    """Return the named quantities that a tensor is only moved from, such as by a split."""
    if node.kind != "moved":
        return set()
    named = {operand.name for operand in node.operands if operand.kind == "value"}
    return (named - {""}).union(*map(_moved_from, node.operands))
