"""A call of a layer that :class:`unrolled.Watch` keeps, to look for problems in it later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.layers.module import parametrizations_in_eval_mode
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing.backward import loss_from_gradients
from unrolled.tracing.call_sequence import join_gradients, join_traces
from unrolled.tracing.diagnosis import diagnose
from unrolled.tracing.findings import HealthReport
from unrolled.tracing.hooks import LayerCall, results_match
from unrolled.tracing.indexing import identical
from unrolled.tracing.random_state import RandomState
from unrolled.tracing.selection import BatchRows
from unrolled.tracing.thresholds import RECORDED_NUMBERS
from unrolled.tracing.trace import Trace, run_traced

_NO_GRADIENTS = "no backward pass reached the call"
_NUMBERS_PER_UNIT = 16  # that a trace records of a step, as for an LSTM with its sums and states


@dataclass(eq=False)
class ObservedCall:
    """Copies of what a call of a layer needs to run again. It holds no tensor of the call itself.

    Attributes:
        recurrent: The layer in the mode of the call.
        input, initial_state: Arguments of the call.
        final_state: Final state that the call returned.
        random_state: Random state before the call.
        rows: Rows to check, if there are too many numbers to check all; else None.
        gradients: Gradients of the output and of the final states, if a backward pass reached the call.
    """

    recurrent: Recurrent
    input: Tensor | PackedSequence
    initial_state: Any
    final_state: Any
    random_state: RandomState
    rows: tuple[int, ...] | None
    gradients: tuple[Any, list[Any]] | None = None

    @classmethod
    def from_call(
        cls, module: nn.Module, call: LayerCall, copy_parameters: bool, recurrent: Recurrent | None = None
    ) -> ObservedCall:
        """Copy a call.

        Args:
            module: The module that was called.
            call: The call.
            copy_parameters: Whether to copy the parameters, because an optimizer will change them.
            recurrent: The layer of an earlier step of the same sequence, to share its parameters.
        """
        with torch.inference_mode(False), torch.no_grad(), parametrizations_in_eval_mode(module):
            if recurrent is not None:
                copy_parameters = False
            else:
                recurrent = call.recurrent.with_cells()
            if copy_parameters:
                for name, parameter in recurrent._parameters.items():
                    recurrent._parameters[name] = None if parameter is None else parameter.detach().clone()  # type: ignore[assignment]
            return cls(
                recurrent,
                _copied(call.input),
                _copied(call.initial_state),
                _copied(call.final_state),
                call.random_state,
                _rows_to_check(call),
            )

    def add_gradients(self, output_gradient: Tensor | None, state_gradients: list[Tensor | None]) -> None:
        """Copy the gradients that a backward pass computed."""
        self.gradients = (_copied(output_gradient), [_copied(gradient) for gradient in state_gradients])

    def run(self, rows: tuple[int, ...] | None, earlier: Trace | None) -> Trace:
        """Run one step again, and compute its gradients.

        Args:
            rows: The rows to run; None for all.
            earlier: The trace of an earlier step, with which to share the parameters.
        """
        x, state, gradients = self.input, self.initial_state, self.gradients
        batch_rows = None
        if rows is not None:
            batch_rows = BatchRows.from_input(rows, x, self.recurrent.batch_first)
            x, state = batch_rows.select_sequence(x), batch_rows.select_states(state)
            if gradients is not None:
                output = None if gradients[0] is None else batch_rows.select_sequence(gradients[0])
                gradients = (output, [batch_rows.select_states(part) for part in gradients[1]])
        cells = None if earlier is None else [part.cell for part in earlier.layers]
        trace, _ = run_traced(
            self.recurrent,
            self.recurrent,
            x,
            state,
            self.random_state,
            rows=batch_rows,
            earlier_cells=cells,
        )
        if gradients is not None and any(part is not None for part in (gradients[0], *gradients[1])):
            trace.backward(loss_from_gradients(*gradients))
        return trace

    def diagnose(self) -> HealthReport:
        """Run the call again and look for problems."""
        x, state, final_state, rows = self.input, self.initial_state, self.final_state, None
        gradients = self.gradients
        batch = SequenceBatch.from_input(x, self.recurrent.batch_first, "").batch
        if self.rows is not None:
            rows = BatchRows.from_input(self.rows, x, self.recurrent.batch_first)
            x, state, final_state = (
                rows.select_sequence(x), rows.select_states(state), rows.select_states(final_state),
            )  # fmt: skip
            if gradients is not None:
                output_gradient = None if gradients[0] is None else rows.select_sequence(gradients[0])
                gradients = (output_gradient, [rows.select_states(gradient) for gradient in gradients[1]])
        trace, result = run_traced(self.recurrent, self.recurrent, x, state, self.random_state, rows=rows)
        if gradients is not None:
            trace.backward(loss_from_gradients(*gradients))
        report = diagnose(trace.layers, _NO_GRADIENTS, self.rows)
        notes = []
        if not results_match(result[1], final_state):
            notes.append(
                "the call itself: it returned another final state than this run, because the parameters "
                "changed in the meantime or a hook changed the result"
            )
        if self.rows is not None:
            notes.append(
                f"the other rows: only {len(self.rows)} of {batch} rows were checked, to save memory"
            )
        return HealthReport(report.findings, report.checked, [*notes, *report.not_checked])


@dataclass(eq=False)
class ObservedSteps:
    """Consecutive calls of one step each, or a single call.

    Attributes:
        calls: The calls.
    """

    calls: list[ObservedCall]

    def diagnose(self) -> HealthReport:
        """Run the calls again and look for problems."""
        if len(self.calls) == 1:
            return self.calls[0].diagnose()
        traces, notes = list[Trace](), list[str]()
        first = self.calls[0]
        batch = SequenceBatch.from_input(first.input, first.recurrent.batch_first, "").batch
        row_numbers = _NUMBERS_PER_UNIT * first.recurrent.hidden_size * len(self.calls)
        limit = max(1, RECORDED_NUMBERS // (row_numbers * first.recurrent.num_layers))
        rows = None if batch <= limit else tuple(range(limit))
        if rows is not None:
            notes.append(f"the other rows: only {limit} of {batch} rows were checked, to save memory")
        intact = True
        for before, call in zip([None, *self.calls[:-1]], self.calls, strict=True):
            traces.append(call.run(rows, traces[-1] if traces else None))
            if before is not None:
                pairs = zip(tensors(call.initial_state), tensors(before.final_state), strict=True)
                intact &= all(identical(*pair) for pair in pairs)
        steps = range(len(traces))
        joined = join_traces(traces, steps, len(traces), intact)
        join_gradients(joined, traces)
        report = diagnose(joined.layers, _NO_GRADIENTS, rows)
        return HealthReport(report.findings, report.checked, [*notes, *report.not_checked])


def _copied(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.detach().clone())


def _rows_to_check(call: LayerCall) -> tuple[int, ...] | None:
    """Return the rows to check of a call with many numbers: those with NaN or infinity, and the first ones.

    Returns:
        The rows, or None for all.
    """
    recurrent = call.recurrent
    sequence = SequenceBatch.from_input(call.input, recurrent.batch_first, "")
    layers = recurrent.num_layers * (1 + recurrent.bidirectional)
    row_numbers = _NUMBERS_PER_UNIT * recurrent.hidden_size * sequence.time * layers
    limit = max(1, RECORDED_NUMBERS // row_numbers)
    if sequence.batch <= limit:
        return None
    output = call.with_input_layout(call.output)
    steps = (
        SequenceBatch.from_input(output, recurrent.batch_first, "").steps
        if sequence.batch_sizes is None
        else sequence.padded(output)
    )
    bad = (~steps.isfinite()).unsqueeze(-1).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    chosen = list(dict.fromkeys([*bad[: (limit + 1) // 2], *range(sequence.batch)]))
    return tuple(sorted(chosen[:limit]))
