"""Where the weights, states and values of a program lie in the arrays of its C code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.export.errors import ExportError
from unrolled.export.kernels import Array, StepKernel, step_kernel
from unrolled.export.program import Program, Stage, Value

PADDING = 15  # numbers after the last one of an array, because a vector of 16 may be loaded from any of them


@dataclass
class PlacedStage:
    """A stage, and where its numbers lie.

    Attributes:
        stage: The stage.
        step: Its kernel.
        weights: First index of its weights.
        words: First index of its quantized matrices.
        initial: First index in the weights of its initial states. None if they are zeros.
        states: First index of its states in the block of all states.
        gathered: First index in the work memory of its inputs side by side. None if it has one input.
    """

    stage: Stage
    step: StepKernel
    weights: int
    words: int
    initial: int | None
    states: int
    gathered: int | None


class Layout:
    """The arrays of a program.

    The memory of a model has two blocks of states, which take turns as the states before and after a step,
    and the work memory: what passes from one part of a step to the next.

    Args:
        program: The program.

    Raises:
        ExportError: If the step of a cell can't be compiled.

    Attributes:
        stages: The stages.
        weights: All weights in float32.
        words: All quantized matrices.
        table: First index of the table of the lookup in the weights.
        states: Number of values of all states.
        work: Number of values of the work memory.
        values: First index in the work memory of each value of a step that isn't a state.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[Value, int] = {}
        self.stages: list[PlacedStage] = []
        self.states = 0
        self._weights, self._words = Array(torch.float32), Array(torch.int32)
        self.table = 0 if program.lookup is None else self._weights.add(program.lookup.table)
        steps = [_compile(stage) for stage in program.stages]
        self.work = max([step.scratch_size for step in steps], default=0)
        for stage, step in zip(program.stages, steps, strict=True):
            self._place(stage, step)
        self.weights = self._weights.tensor() if self._weights.size else torch.zeros(1)
        self.words = self._words.tensor()

    def _place(self, stage: Stage, step: StepKernel) -> None:
        initial = None
        if any(bool(state.any()) for state in stage.initial):
            initial = self._weights.add(torch.cat(stage.initial))
        gathered = None
        if len(stage.inputs) > 1:
            gathered = self._reserve(sum(value.width for value in stage.inputs))
        if not stage.has_state:
            self.values[stage.output] = self._reserve(stage.output.width)
        weights, words = self._weights.add(step.weights), self._words.add(step.words)
        self.stages.append(PlacedStage(stage, step, weights, words, initial, self.states, gathered))
        self.states += step.state_size if stage.has_state else 0

    def _reserve(self, width: int) -> int:
        """Add numbers to the work memory, and return the index of the first."""
        self.work += width
        return self.work - width

    @property
    def memory(self) -> int:
        """Number of values of the memory of a model."""
        return 2 * self.states + self.work + PADDING


def _compile(stage: Stage) -> StepKernel:
    try:
        return step_kernel(stage.cell)
    except UnsupportedError as error:
        raise ExportError(
            f"{stage.name}: {type(stage.cell.innermost).__name__} can't be exported: {error}"
        ) from None
