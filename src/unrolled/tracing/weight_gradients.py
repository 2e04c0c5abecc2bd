"""The gradient of each parameter, as a sum over time steps and rows of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.indexing import equal_up_to_rounding
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.program_runner import ProgramRunner
from unrolled.tracing.step_graph import LayerProgram

MAX_VALUES = 4_000_000  # gradients of all parameters at all steps, in double precision: 32 MB
_TOLERANCE = 1e-3  # of recomputed gradients, relative to the largest one


class NoWeightGradientsError(Exception):
    """The gradients of the parameters can't be split by step. The message is a clause after "because"."""


@dataclass(frozen=True)
class StepGradients:
    """The gradients at every time step of every row, together called *samples*.

    Attributes:
        steps: The time step of each sample, ``(samples,)``.
        rows: The row of each sample, ``(samples,)``.
        parameters: What each sample adds to the gradient of each parameter, ``(samples, *shape)``, by name.
        values: ``∂loss/∂value`` of each tensor that was asked for, ``(samples, size)``, by name.
        computed: These tensors, ``(samples, size)``, by name.
        input: The input, ``(samples, features)``.
        states: Each state before the step, ``(samples, size)``, by name.
    """

    steps: Tensor
    rows: Tensor
    parameters: dict[str, Tensor]
    values: dict[str, Tensor]
    computed: dict[str, Tensor]
    input: Tensor
    states: dict[str, Tensor]


def step_gradients(part: LayerTrace, program: LayerProgram) -> StepGradients:
    """Compute what each step of each row adds to the gradient of each parameter.

    The loss depends on a step only through its new states, and their gradients are recorded. So each step is
    recomputed and differentiated on its own. The results are compared with the recorded gradients.

    Args:
        part: The layer, after :meth:`Trace.backward <unrolled.Trace.backward>`.
        program: The program of its steps. All quantities in it have their gradients in the result.

    Raises:
        NoWeightGradientsError: If there are too many gradients, or the recomputed values differ from the
            recorded ones.
    """
    if program.reason is not None:
        raise NoWeightGradientsError("its steps can't be recomputed on the page")
    if len(program.programs) > 1:
        raise NoWeightGradientsError("its steps compute different operations")
    rows, steps = (part.lengths.cpu()[:, None] > torch.arange(len(part.input))).nonzero().T
    per_sample = sum(math.prod(shape) for shape in part.cell.shapes().values())
    if len(steps) * per_sample > MAX_VALUES:
        raise NoWeightGradientsError(
            f"{per_sample:,} parameters at {len(steps):,} steps have too many gradients; at most "
            f"{MAX_VALUES:,} are computed"
        )
    return _Samples(part, program, steps, rows).gradients()


class _Samples:
    """All steps of all rows of a layer, and their program."""

    def __init__(self, part: LayerTrace, program: LayerProgram, steps: Tensor, rows: Tensor) -> None:
        self._part, self._steps, self._rows = part, steps, rows
        self._program = program.programs[0]
        self._quantities: dict[str, int] = self._program["quantities"]
        shapes = part.cell.shapes()
        self._runner = ProgramRunner(self._program, {}, program.constants, free=shapes)
        self._parameters = {
            name: _double(getattr(part.cell, name)).expand(len(steps), *shape).clone().requires_grad_()
            for name, shape in shapes.items()
        }
        self._input = self._of(part.input)
        self._states = {name: self._before(name) for name in part.initial_state}
        self._draws = None if part.draws is None else self._of(part.draws.values)

    def _of(self, values: Tensor) -> Tensor:
        """Return the values of the samples, ``(samples, size)``, given ``(time, batch, size)``."""
        return _double(values)[self._steps, self._rows].flatten(1)

    def _before(self, name: str) -> Tensor:
        """Return a state before each sample."""
        values, start = self._part.values[name], self._part.initial_state[name].unsqueeze(0)
        if self._part.direction == "forward":
            return self._of(torch.cat([start.to(values), values[:-1]]))
        later = self._of(torch.cat([values[1:], start.to(values)]))
        is_last = self._steps + 1 == self._part.lengths.cpu()[self._rows]
        return torch.where(is_last[:, None], _double(start[0])[self._rows].flatten(1), later)

    def gradients(self) -> StepGradients:
        names = {ref: name for name, ref in reversed(self._quantities.items()) if self._is_computed(ref)}
        sizes = {name: math.prod(self._program["nodes"][ref]["shape"]) for ref, name in names.items()}
        with torch.inference_mode(False), torch.enable_grad():
            perturbations = {
                name: torch.zeros(len(self._steps), size, dtype=torch.float64, requires_grad=True)
                for name, size in sizes.items()
            }
            values = self._runner.run_perturbed(
                self._input, self._states, self._parameters, perturbations, self._draws
            )
            self._check("numbers", values, self._part.values)
            outputs = self._output_gradients(values, perturbations, names)
            inputs = {**self._parameters, **perturbations}
            found = _grad([values[name] for name in outputs], list(outputs.values()), inputs)
        gradients = {name: found[names[ref]] for name, ref in self._quantities.items() if ref in names}
        self._check("gradients", gradients, self._part.gradients)
        return StepGradients(
            self._steps,
            self._rows,
            {name: found[name].detach() for name in self._parameters},
            gradients,
            {name: value.detach() for name, value in values.items()},
            self._input,
            self._states,
        )

    def _is_computed(self, ref: int) -> bool:
        node = self._program["nodes"][ref]
        return "function" in node and node["dtype"].startswith("float")

    def _output_gradients(
        self, values: Mapping[str, Tensor], perturbations: Mapping[str, Tensor], names: Mapping[int, str]
    ) -> dict[str, Tensor]:
        """Return the gradient of each new state, without what reaches it through other new states.

        The gradient of the cell state of an LSTM, for instance, is recorded with what comes from the hidden
        state of the same step.
        """
        found: dict[str, Tensor] = {}
        for name, ref in sorted(self._program["states"].items(), key=lambda state: -state[1]):
            if ref not in names or names[ref] in {names[self._quantities[one]] for one in found}:
                continue
            total = self._of(self._part.gradients[name])
            at = {names[ref]: perturbations[names[ref]]}
            inner = _grad([values[one] for one in found], list(found.values()), at)[names[ref]]
            found[name] = total - inner
        return found

    def _check(self, what: str, computed: Mapping[str, Tensor], recorded: Mapping[str, Tensor]) -> None:
        """Check that the recomputed numbers or gradients are the recorded ones up to rounding."""
        for name in recorded.keys() & computed.keys():
            if not recorded[name].is_floating_point():
                continue
            expected, value = self._of(recorded[name]), computed[name]
            if what == "numbers":
                is_equal = value.shape == expected.shape and equal_up_to_rounding(
                    value.to(recorded[name].dtype), expected.to(recorded[name].dtype)
                )
            else:
                finite = expected.isfinite() & value.isfinite()
                scale = expected[finite].abs().max() if finite.any() else expected.new_zeros(())
                is_equal = ~finite | ((value - expected).abs() <= _TOLERANCE * scale + 1e-30)
            if not torch.as_tensor(is_equal).all():
                raise NoWeightGradientsError(f"the recomputed {what} of {name} differ from the recorded ones")


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _grad(outputs: list[Tensor], weights: list[Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a weighted sum of outputs by name; zeros where they don't depend on it."""
    pairs = [(a, b) for a, b in zip(outputs, weights, strict=True) if a.requires_grad]
    found: Iterable[Any] = [None] * len(inputs)
    if pairs:
        found = torch.autograd.grad(
            [a for a, _ in pairs],
            list(inputs.values()),
            [b for _, b in pairs],
            retain_graph=True,
            allow_unused=True,
        )
    return {
        name: torch.zeros_like(one) if gradient is None else gradient
        for (name, one), gradient in zip(inputs.items(), found, strict=True)
    }
