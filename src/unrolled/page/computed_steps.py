"""What a page needs to compute the numbers of a layer's steps instead of storing them.

The page stores the input, the parameters, the program of a step and the states before every few steps. From
these, it computes a step when it is shown. Its results differ from the trace by rounding errors, so the page
also stores corrections:

* Most quantities and all states are corrected bit by bit: the difference in units of the last bit takes a few
  bits for each value, and larger differences are in a list of exceptions.
* Weighted sums, whose rounding errors are larger, only have a list of exceptions: the values whose printed
  digits would differ.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.page.sampling import encode_values
from unrolled.tracing.indexing import equal_up_to_rounding
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.program_runner import ProgramRunner
from unrolled.tracing.step_graph import LayerProgram

INTERVALS = (8, 16, 32, 64)  # steps from one stored state to the next
MAX_BITS = 7  # per unit for corrections; a quantity that needs more is only exact in the printed digits
_WIDTHS = (0, 2, 4, 8)  # bits of a difference
_EXCEPTION_BITS = 64
_TRIAL_STEPS = 64  # to find the quantities with larger rounding errors
_CHUNK_VALUES = 4_000_000  # of all steps that are computed at once


class NotComputableError(Exception):
    """The steps can't be computed on the page. The message is a sentence."""


@dataclass(frozen=True)
class StepNumbers:
    """How the numbers of a step are found among the results of its program.

    Attributes:
        sources: The pieces of each value; see :func:`unrolled.page.diagram_data.value_sources`.
        values: The values of one step, for those without pieces.
    """

    sources: list[Any]
    values: list[Tensor]


def stored_values(part: LayerTrace, length: int, interval: int) -> int:
    """Return how many values a page stores that computes the steps of a layer.

    Args:
        part: The layer.
        length: The number of time steps of the row.
        interval: The number of steps from one stored state to the next.
    """
    parameters = sum(math.prod(shape) for shape in part.cell.shapes().values())
    draws = 0 if part.draws is None else part.draws.values.shape[-1]
    states = sum(state[0].numel() for state in part.initial_state.values())
    features: int = part.input.shape[2:].numel()
    return parameters + length * (features + draws) + states * math.ceil(length / interval)


def computed_steps(
    part: LayerTrace, batch: int, length: int, interval: int, program: LayerProgram, numbers: StepNumbers
) -> dict[str, Any]:
    """Return the data from which a page computes the steps of a layer.

    Args:
        part: The layer.
        batch: The row.
        length: The number of time steps of the row.
        interval: The number of steps from one stored state to the next.
        program: The program of all steps.
        numbers: How the numbers of a step are found.

    Raises:
        NotComputableError: If the program doesn't compute what was recorded.
    """
    layer = _Layer(part, batch, length, program)
    corrections = {
        name: _Corrections(name in part.cell.state, layer.values_per_unit(name)) for name in layer.corrected
    }
    layer.choose_widths(corrections)
    largest = [_largest(value) for value in numbers.values]
    for steps in layer.chunks():
        run = layer.run(steps, corrections)
        layer.check(steps, run.values)
        for name, found in corrections.items():
            found.add(run.computed[name], run.values[name])
        for k, pieces in enumerate(numbers.sources):
            for piece in pieces or ():
                value = run.values[piece["name"]]
                value = value if piece["elements"] is None else value[:, piece["elements"]]
                largest[k] = max(largest[k], _largest(value))
    order = range(length) if part.direction == "forward" else range(length - 1, -1, -1)
    starts = list(order)[::interval]
    return {
        "interval": interval,
        "input": encode_values(part.input[:length, batch].flatten(1)),
        "states": {name: encode_values(state[starts]) for name, state in layer.before.items()},
        "corrections": {name: found.data() for name, found in corrections.items()},
        "largest": largest,
    }


class _Layer:
    """The recorded numbers of a layer, and the program that computes them again."""

    def __init__(self, part: LayerTrace, batch: int, length: int, program: LayerProgram) -> None:
        self._part, self._batch, self._length = part, batch, length
        parameters = {name: getattr(part.cell, name) for name in part.cell.shapes()}
        self._program = program.programs[0]
        self._runner = ProgramRunner(self._program, parameters, program.constants)
        self._draws = program.draws
        refs = {name: ref for name, ref in self._program["quantities"].items() if name in part.values}
        self._recorded = {name: part.values[name][:length, batch].flatten(1).detach().cpu() for name in refs}
        first_names = {ref: name for name, ref in reversed(refs.items())}
        self.corrected = [
            name
            for name, ref in refs.items()
            if first_names[ref] == name
            and "function" in self._program["nodes"][ref]
            and self._recorded[name].dtype is torch.float32
        ]
        self.before = {}
        for name, initial in part.initial_state.items():
            start, values = (
                initial[batch : batch + 1].flatten(1),
                part.values[name][:length, batch].flatten(1),
            )
            shifted = [start, values[:-1]] if part.direction == "forward" else [values[1:], start]
            self.before[name] = torch.cat(shifted)

    def values_per_unit(self, name: str) -> float:
        """Return the size of a quantity, relative to the hidden size: 4 for the stacked gates of an LSTM."""
        return self._recorded[name].shape[1] / self._part.cell.hidden

    def chunks(self) -> Iterator[Tensor]:
        """Return all steps in parts that fit into memory."""
        return iter(torch.split(torch.arange(self._length), max(1, _CHUNK_VALUES // self._runner.step_size)))

    def run(self, steps: Tensor, corrections: Mapping[str, _Corrections]) -> Any:
        """Compute some steps."""
        return self._runner.run(
            self._part.input[:, self._batch].flatten(1)[steps],
            {name: state[steps] for name, state in self.before.items()},
            {name: self._recorded[name][steps] for name in corrections},
            lambda name, computed, recorded: corrections[name].chosen(computed, recorded),
            None if self._draws is None else self._draws[steps],
        )

    def choose_widths(self, corrections: Mapping[str, _Corrections]) -> None:
        """Choose how each quantity is corrected, from some of the steps."""
        steps = torch.linspace(0, self._length - 1, min(self._length, _TRIAL_STEPS)).long()
        for _ in corrections:  # a value that is not corrected changes the errors of later ones
            computed = self.run(steps, corrections).computed
            changes = [
                found.choose_width(computed[name], self._recorded[name][steps])
                for name, found in corrections.items()
            ]
            if not any(changes):
                return

    def check(self, steps: Tensor, values: Mapping[str, Tensor]) -> None:
        """Check that the values are the recorded ones up to rounding."""
        for name, recorded in self._recorded.items():
            expected = recorded[steps]
            if values[name].shape != expected.shape or not equal_up_to_rounding(values[name], expected).all():
                raise NotComputableError(
                    f"The steps of {type(self._part.cell).__name__} can't be computed on the page because "
                    f"{name} of some steps doesn't follow from the program of the first one."
                )


class _Corrections:
    """The corrections of one quantity.

    Args:
        is_state: Whether it is a state, from which the next step is computed.
        per_unit: How many values it has for each unit of the layer.
    """

    def __init__(self, is_state: bool, per_unit: float) -> None:
        self._is_state, self._per_unit = is_state, per_unit
        self._all_bits = True
        self._width = 0
        self._codes: list[np.ndarray[Any, Any]] = []
        self._positions: list[np.ndarray[Any, Any]] = []
        self._values: list[np.ndarray[Any, Any]] = []
        self._count = 0

    def chosen(self, computed: Tensor, recorded: Tensor) -> Tensor:
        """Return the values on the page."""
        return (
            recorded
            if self._all_bits
            else torch.where(differ_in_print(computed, recorded), recorded, computed)
        )

    def choose_width(self, computed: Tensor, recorded: Tensor) -> bool:
        """Choose the bits of a difference. Returns whether the values on the page are others than before."""
        if not self._all_bits or not computed.numel():
            return False
        differences = _bit_differences(computed, recorded)
        costs = {
            width: width + _EXCEPTION_BITS * float(_is_exception(differences, width).mean())
            for width in _WIDTHS
        }
        self._width = min(costs, key=lambda width: costs[width])
        self._all_bits = self._is_state or costs[self._width] * self._per_unit <= MAX_BITS
        self._width *= self._all_bits
        return not self._all_bits

    def add(self, computed: Tensor, chosen: Tensor) -> None:
        """Add the corrections of some steps."""
        differences = _bit_differences(computed, chosen).ravel()
        is_exception = _is_exception(differences, self._width)
        exceptions = np.flatnonzero(is_exception)
        self._codes.append(np.where(is_exception, 0, differences).astype(np.int8))
        self._positions.append(exceptions + self._count)
        self._values.append(chosen.numpy().ravel()[exceptions].astype(np.float32))
        self._count += len(differences)

    def data(self) -> dict[str, Any]:
        """Return the corrections for JSON.

        Returns:
            ``width``: the bits of a difference. ``codes``: the differences of the bit patterns, from the low
            bits of each byte up. ``positions`` and ``values``: the exceptions.
        """
        return {
            "width": self._width,
            "codes": _packed(np.concatenate(self._codes), self._width),
            "positions": _encoded(np.concatenate(self._positions).astype("<i4")),
            "values": _encoded(np.concatenate(self._values).astype("<f4")),
        }


def differ_in_print(computed: Tensor, recorded: Tensor) -> Tensor:
    """Whether a page prints numbers differently: with two decimals, as results, or with one decimal more."""
    decimals = _decimals(recorded)
    differ = _decimals(computed) != decimals
    for places in (torch.full_like(decimals, 2), decimals, decimals + 1):
        differ |= _printed(computed, places) != _printed(recorded, places)
    return differ & ~(computed.isnan() & recorded.isnan())


def _decimals(values: Tensor) -> Tensor:
    """Return the decimals with which results are printed."""
    size = values.abs()
    power = size.clamp(1e-300, 1e300).log10().floor()
    return torch.where(size >= 1e5, 3 - power, torch.where((size < 5e-5) & (size > 0), 1 - power, 4.0))


def _printed(values: Tensor, places: Tensor) -> Tensor:
    return (values.abs() * 10**places + 0.5).floor() * values.sign()


def _bit_differences(computed: Tensor, recorded: Tensor) -> np.ndarray[Any, Any]:
    """Return the differences of the bit patterns in single precision; large ones between different signs."""
    bits = [part.to(torch.float32).numpy().view(np.int32).astype(np.int64) for part in (computed, recorded)]
    differences: np.ndarray[Any, Any] = bits[1] - bits[0]
    differences[(computed.isnan() & recorded.isnan()).numpy()] = 0
    return differences


def _largest(values: Tensor) -> float:
    """Return the largest finite magnitude."""
    return float(values.double().abs().nan_to_num(0, 0, 0).max()) if values.numel() else 0.0


def _is_exception(differences: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    """Whether differences don't fit into signed numbers of some bits; without bits, only 0 does."""
    half = 2**width // 2
    result: np.ndarray[Any, Any] = (differences < -half) | (differences > max(0, half - 1))
    return result


def _packed(differences: np.ndarray[Any, Any], width: int) -> str:
    if width == 0:
        return ""
    per_byte = 8 // width
    codes = differences.view(np.uint8) & (2**width - 1)
    padded = np.concatenate([codes, np.zeros(-len(codes) % per_byte, np.uint8)]).reshape(-1, per_byte)
    return _encoded(np.bitwise_or.reduce(padded << (width * np.arange(per_byte, dtype=np.uint8)), 1))


def _encoded(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
