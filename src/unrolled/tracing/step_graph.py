"""The operations of a layer's steps as data, with which the steps can run again for other numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.indexing import equal_up_to_rounding, normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.program_recorder import Constants, ProgramRecorder
from unrolled.tracing.step_functions import UnsupportedError
from unrolled.tracing.step_recorder import StepRun, run_step
from unrolled.tracing.trace import Trace


@dataclass(frozen=True)
class LayerProgram:
    """The steps of a layer in one direction, for one row, as data.

    A program is a dictionary:

    * ``nodes``: the tensors of the step, in the order in which they are computed. Each has a ``shape`` and a
      ``dtype``. A node with a ``leaf`` isn't computed: ``"input"``, ``"draws"``, ``"state"`` or
      ``"parameter"`` with a ``name``, or ``"constant"`` with an ``index``. The others have a ``function`` and
      its ``args``, in which ``{"ref": k}`` is node ``k`` and ``{"number": "inf"}`` is infinity.
    * ``quantities``: the node of each quantity, by name.
    * ``held``: the quantities that can be held at other values: those that the step computes and that aren't
      another quantity under a second name.
    * ``states``: the node of each new state, by name.

    Attributes:
        programs: The different programs.
        program_of_step: For each time step, the index of its program.
        constants: The tensors that the programs take as they are, such as buffers.
        draws: The random numbers of each step, ``(time, width)``; None if the steps drew none.
        reason: Why there are no programs, as a sentence; None if there are.
    """

    programs: list[dict[str, Any]] = field(default_factory=list)
    program_of_step: list[int] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    draws: Tensor | None = None
    reason: str | None = None


def model_programs(trace: Trace, batch: int = 0) -> list[LayerProgram]:
    """Return the programs of every layer and direction of a trace, in the order of ``trace.layers``.

    Args:
        trace: The trace of a whole call.
        batch: The row.

    Raises:
        ValueError: If steps, quantities or units were left out of the trace.
        IndexError: If there is no such row.
    """
    return [trace_program(trace, part, batch) for part in trace.layers]


def trace_program(
    trace: Trace,
    part: LayerTrace,
    batch: int = 0,
    runs: Mapping[int, StepRun] | None = None,
    others: Sequence[Mapping[str, Tensor]] = (),
) -> LayerProgram:
    """Return the programs of a layer of a trace; see :func:`layer_program`."""
    program = layer_program(part, batch, runs, others)
    if part.layer > 0 and trace.recurrent.training and trace.recurrent.dropout > 0 and program.reason is None:
        return LayerProgram(reason=_sentence(part, "the dropout between the layers was random"))
    return program


def layer_program(
    part: LayerTrace,
    batch: int = 0,
    runs: Mapping[int, StepRun] | None = None,
    others: Sequence[Mapping[str, Tensor]] = (),
) -> LayerProgram:
    """Return the programs of a layer's steps.

    The steps run again for the row alone. Each program is checked: it must agree with the step for other
    inputs, states and parameters, too.

    Args:
        part: The trace of the layer.
        batch: The row.
        runs: The steps, if they have run again already, by time step. If some steps are missing, all steps
            have the program of these runs; the caller checks that it computes the other steps, too.
        others: For each of these runs, other tensors of the step that the programs return as well, by name.

    Raises:
        ValueError: If steps, quantities or units were left out of the trace.
        IndexError: If there is no such row.
    """
    part.check_whole("a program", chained=False)
    if part.changed_states:
        return LayerProgram(reason=_sentence(part, "the model changed the states between them"))
    batch = normalize_index("row", batch, part.input.shape[1])
    length = int(part.lengths[batch])
    texts: dict[str, int] = {}  # of the different programs
    program_of_step: list[int] = []
    recomputed: list[dict[str, Tensor]] = []
    constants = Constants()
    moves: dict[Any, Any] = {}
    try:
        for k, step in enumerate(range(length) if runs is None else runs):
            run = part.run_step(step, batch, moves) if runs is None else runs[step]
            recorder = ProgramRecorder(run, _parameters(part), constants, moves)
            quantities = {name: run.named[name] for name in part.values if name in run.named}
            program = recorder.program({**quantities, **(others[k] if others else {})})
            recomputed.append(quantities)
            text = json.dumps(program)
            if text not in texts:
                _check_program(part, run, recorder)
            program_of_step.append(texts.setdefault(text, len(texts)))
        _check_reproduced(part, batch, range(length) if runs is None else list(runs), recomputed)
        if len(program_of_step) < length:
            if len(texts) > 1:
                raise UnsupportedError("different steps compute different operations")
            program_of_step = [0] * length
    except UnsupportedError as error:
        return LayerProgram(reason=_sentence(part, str(error)))
    draws = None if part.draws is None else part.draws.values[:length, batch]
    return LayerProgram([json.loads(text) for text in texts], program_of_step, constants.tensors, draws)


def _sentence(part: LayerTrace, clause: str) -> str:
    return f"The steps of {type(part.cell).__name__} can't be recomputed on the page because {clause}."


def _parameters(part: LayerTrace) -> dict[str, Tensor]:
    return {name: getattr(part.cell, name) for name in part.cell.shapes()}


def _check_reproduced(
    part: LayerTrace, batch: int, steps: Sequence[int], recomputed: Sequence[Mapping[str, Tensor]]
) -> None:
    """Check that the steps, run again for one row, have the recorded quantities."""
    for name, values in part.values.items():
        expected = values[list(steps), batch]
        again = [
            step[name] for step in recomputed if name in step and step[name].shape[1:] == expected.shape[1:]
        ]
        if len(again) < len(expected) or not equal_up_to_rounding(torch.cat(again), expected).all():
            raise UnsupportedError(
                f"{name} of a row depends on other rows, or on random numbers that weren't recorded"
            )


def _check_program(part: LayerTrace, run: StepRun, recorder: ProgramRecorder) -> None:
    """Check that the program agrees with the step for another input, other states and other parameters."""
    generator = torch.Generator().manual_seed(0)

    def changed(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor * (1 + 0.1 * noise) + 0.1 * noise

    parameters = _parameters(part)
    new_parameters = {name: changed(tensor) for name, tensor in parameters.items()}
    new_state = {name: changed(tensor) for name, tensor in run.state_before.items()}
    new_input = changed(run.input)
    pairs = [(run.input, new_input), *zip(run.state_before.values(), new_state.values(), strict=True)]
    pairs += zip(parameters.values(), new_parameters.values(), strict=True)
    new_leaves = {id(leaf): new_leaf for leaf, new_leaf in pairs}
    try:
        expected = run_step(part.cell.bind(new_parameters), new_input, new_state, part.draws, run.draws)
        replayed = recorder.replay(new_leaves)
        agrees = all(
            equal_up_to_rounding(replayed(run.named[name]), expected.named[name]).all()
            for name in part.values
        )
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
        agrees = False
    if not agrees:
        raise UnsupportedError("it computes numbers outside of torch's functions")
