"""Recording of the local variables of a cell's step while an engine runs it."""

from __future__ import annotations

import contextlib
import cProfile
import dis
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.draws import ColumnSource, Draws, ReplaceDraws, draw_width
from unrolled.cells.wrappers import DrawsWrapper, WrapperSpec, wrap
from unrolled.engines import reference
from unrolled.engines._torch_private import DisableTorchFunction
from unrolled.layers.sequence import SequenceBatch
from unrolled.tracing.call_recorder import CallRecorder
from unrolled.tracing.random_state import cuda_devices


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


class StepRecorder:
    """Records the quantities of every step that its ``cell`` runs.

    Args:
        cell: The cell to record.
        keep: Applied to each tensor before it is stored. By default, copies it.

    Attributes:
        cell: A copy of the cell that records its steps.
        recorded: The quantities of each step, by name, in the order in which the steps ran.
    """

    def __init__(self, cell: Cell, keep: Callable[[Tensor], Tensor] = _copied) -> None:
        self.cell = cell.bind({})
        self.cell.__dict__["step"] = self._step
        self._original = cell
        self._keep = keep
        self.recorded: list[dict[str, Tensor]] = []
        self._batched_names: set[str] = set()

    def stacked(self, sequence: SequenceBatch, reverse: bool) -> dict[str, Tensor]:
        """Stop recording and stack each quantity over time.

        The quantities are removed from ``recorded``. Those whose size changes between steps, or that some
        steps don't have, are left out.

        Args:
            sequence: The layout of the sequences.
            reverse: Whether the last step ran first.

        Returns:
            Each quantity by name, ``(time, batch, size)``, zero padded.
        """
        self.close()
        in_order = self.recorded[::-1] if reverse else self.recorded
        names = [name for name in in_order[0] if name in self._batched_names]
        names = [name for name in names if all(name in step for step in in_order)]
        names = [name for name in names if len({step[name].shape[1:] for step in in_order}) == 1]
        join = torch.stack if sequence.batch_sizes is None else torch.cat
        return {name: sequence.padded(join([step.pop(name) for step in in_order])) for name in names}

    def close(self) -> None:
        """Stop recording.

        It breaks the reference cycle with ``cell``. Otherwise, the recorded tensors stay in memory until the
        garbage collector runs.
        """
        vars(self.cell).pop("step", None)

    def _step(self, x: Tensor, *state: Tensor) -> Any:
        if not self.recorded:
            with DisableTorchFunction():  # the wrapper's random numbers are for the step itself
                self._batched_names = batched_names(self._original, x, *state)
        new, named = run_with_locals(self._original, x, *state)
        self.recorded.append({name: self._keep(value) for name, value in named.items()})
        return new


def batched_names(cell: Cell, x: Tensor, *state: Tensor) -> set[str]:
    """Return the names of the tensors in a step that have one row for each row of the batch.

    The step runs a second time with one more row. The tensors of interest then have one more row, too.
    """

    def add_row(part: Tensor) -> Tensor:
        return torch.cat((part, part.new_zeros(1, *part.shape[1:])))

    with torch.random.fork_rng(cuda_devices(x)):
        tensors = {name: value for name, value in run_with_locals(cell, x, *state)[1].items() if value.dim()}
        try:
            larger = run_with_locals(cell, add_row(x), *map(add_row, state))[1]
        except (RuntimeError, ValueError, TypeError, IndexError):  # the step accepts only this batch size
            return {name for name, value in tensors.items() if len(value) == len(x)}
    common = {name for name in tensors if name in larger and larger[name].dim()}
    return {name for name in common if larger[name].shape[0] == tensors[name].shape[0] + 1 == len(x) + 1}


def run_recorded(
    cell: Cell,
    steps: Tensor,
    state: tuple[Tensor, ...],
    sizes: Any,
    reverse: bool,
    wrapper_specs: Sequence[WrapperSpec] = ((), ()),
    extra_inputs: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a cell that records its steps on the reference engine, inside some wrappers.

    Args:
        cell: The cell.
        steps: The input.
        state: The initial states.
        sizes: The batch sizes if the input is packed, else None.
        reverse: Whether to run from the last time step to the first.
        wrapper_specs: The wrappers for each direction.
        extra_inputs: Features that the wrappers read in addition to ``steps``.
    """
    features = steps if extra_inputs is None else torch.cat((steps, extra_inputs), -1)
    return reference.run(wrap(cell, wrapper_specs[reverse]), features, state, sizes, reverse)


@dataclass(frozen=True, eq=False)
class RecordedDraws:
    """The random numbers that the steps of a cell drew.

    Attributes:
        draws: The draws of a step.
        values: Their numbers, ``(time, batch, width)``.
    """

    draws: Draws
    values: Tensor

    def of_row(self, step: int, row: int) -> Tensor:
        """Return the numbers of a step for a row alone, ``(1, width)``."""
        return self.values[step, row].unsqueeze(0)

    def replace(self, numbers: Tensor) -> ReplaceDraws:
        """Return a context manager in which a step draws the given numbers, ``(batch, width)``."""
        return ReplaceDraws(ColumnSource(self.draws, numbers, 0))


@dataclass(frozen=True, eq=False)
class StepRun:
    """A step that ran for one row while its calls were recorded.

    Attributes:
        recorder: The calls.
        input: Input of the step, ``(1, input)``.
        state_before: Each state before the step, ``(1, size)``, by name.
        draws: The random numbers of the step, ``(1, width)``; None if it drew none.
        named: The local tensors of the step and the new states, by name.
        new_state: Each new state, by name.
    """

    recorder: CallRecorder
    input: Tensor
    state_before: dict[str, Tensor]
    draws: Tensor | None
    named: dict[str, Tensor]
    new_state: dict[str, Tensor]


def run_step(
    cell: Cell,
    x: Tensor,
    state: dict[str, Tensor],
    recorded: RecordedDraws | None = None,
    draws: Tensor | None = None,
    moves: dict[Any, Any] | None = None,
) -> StepRun:
    """Run a step and record its calls of torch functions.

    Args:
        cell: The cell, bound to its parameters.
        x: The input, ``(batch, input)``.
        state: Each state before the step, ``(batch, size)``, by name.
        recorded: The recorded draws that the step's own are replaced by; None for torch's generator.
        draws: The random numbers of this step, ``(batch, width)``.
        moves: A cache. Pass the same dictionary to several calls to save time.
    """
    recorder = CallRecorder(moves)
    replaced = contextlib.nullcontext() if recorded is None or draws is None else recorded.replace(draws)
    # Outside of inference mode, since torch doesn't count in-place changes there.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(cuda_devices(x)),
        recorder,
        replaced,
    ):
        new, named = run_with_locals(cell, x, *state.values())
    returned = new if isinstance(new, tuple) else (new,)
    return StepRun(recorder, x, state, draws, named, dict(zip(cell.state, returned, strict=True)))


def recorded_draws(
    cell: Cell,
    sequence: SequenceBatch,
    reverse: bool,
    wrapper_specs: Sequence[WrapperSpec] = ((), ()),
    extra_inputs: Tensor | None = None,
) -> RecordedDraws | None:
    """Return the random numbers of a call of :func:`run_recorded`, or None if it drew none."""
    if extra_inputs is None:
        return None
    wrapper = wrap(cell, wrapper_specs[reverse])
    assert isinstance(wrapper, DrawsWrapper)
    first = wrapper.first - cell.features
    values = extra_inputs[..., first : first + sum(map(draw_width, wrapper.draws))]
    return RecordedDraws(wrapper.draws, sequence.padded(values).clone())


def run_with_locals(cell: Cell, x: Tensor, *state: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Run a step and capture its local variables.

    Returns:
        The step's result, and its local tensors by name, in the order of their first assignment.
    """
    codes = _step_codes(type(cell))
    captured: dict[str, Tensor] = {}

    def at_return(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code not in codes:
            return None
        if event == "return":
            local = frame.f_locals
            names = [name for name in _assigned_names(frame.f_code) if isinstance(local.get(name), Tensor)]
            captured.update({name: local[name] for name in names})
        return at_return

    with _profile(at_return):
        new = cell.step(x, *state)
    returned = new if isinstance(new, tuple) else (new,)
    if len(returned) == len(tuple(cell.state)):
        captured.update(zip(cell.state, returned, strict=True))
    named = {name: value for name, value in captured.items() if isinstance(value, Tensor)}
    # at_return refers to itself, so without this the tensors would stay in memory until the garbage collector
    # runs.
    captured.clear()
    return new, named


def quantity_names(cell: type[Cell]) -> set[str]:
    """Return all possible names of quantities of a cell: the local variables of its step, and its states."""
    return {name for code in _step_codes(cell) for name in _assigned_names(code)} | set(cell.state)


def _step_codes(cell: type[Cell]) -> list[CodeType]:
    """Return the code objects of a cell's step and of its base classes' steps, which it may call."""
    return [
        inspect.unwrap(vars(base)["step"]).__code__
        for base in reversed(cell.__mro__)
        if issubclass(base, Cell) and "step" in vars(base)
    ]


@contextlib.contextmanager
def _profile(at_return: Any) -> Iterator[None]:
    """Call a function whenever a Python function returns. On exit, restore the previous profiler."""
    previous = sys.getprofile()
    if previous is None or callable(previous) or isinstance(previous, cProfile.Profile):
        sys.setprofile(at_return)
    else:  # a profiler in C that Python code can't restore, such as that of torch.profiler
        tracer = sys.gettrace()
        sys.settrace(at_return)
    try:
        yield
    finally:
        if isinstance(previous, cProfile.Profile):  # before Python 3.12, setprofile can't restore it
            previous.enable()
        elif previous is None or callable(previous):
            sys.setprofile(previous)
        else:
            sys.settrace(tracer)


def _assigned_names(code: CodeType) -> list[str]:
    """Return the local variables that a function assigns, in the order of their first assignment."""
    names: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("STORE_FAST", "STORE_DEREF")):
            stored = instruction.argval
            if isinstance(stored, tuple):  # one instruction for two variables, since Python 3.13
                stored = stored if instruction.opname == "STORE_FAST_STORE_FAST" else stored[:1]
            names += stored if isinstance(stored, tuple) else (stored,)
    return list(dict.fromkeys(names))
