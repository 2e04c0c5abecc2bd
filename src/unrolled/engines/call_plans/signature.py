"""The call that a plan is for: its cells, shapes and dtype, and what else its results depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines import registry
from unrolled.engines.call_plans.native_replay import Condition
from unrolled.engines.call_plans.recorder import CallRecorder, NotRecordableError
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.step_values import StepValues, step_values
from unrolled.engines.draws import planned_draws
from unrolled.engines.native.backend import NativeCell


@dataclass(frozen=True)
class CallSignature:
    """A call of a module with one direction, without its tensors.

    Shapes are those of the user's tensors. In memory, an input is ``(steps, batch, features)``, and each
    state ``(layers, batch, size)``.

    Attributes:
        cells: The cell of each layer, not bound to parameters.
        training: Whether the module is in training mode.
        names: The names of each cell's parameters in the module, in the order of ``Cell.shapes``.
        dtype: Dtype of all tensors.
        x: Shape of the input.
        steps: Number of time steps.
        batch: Batch size.
        states: Shapes of the states.
        stateful: Whether initial states are given. If not, they are zeros.
        output: Shape of the output. None: only the final states are returned.
    """

    cells: Sequence[Cell]
    training: bool
    names: Sequence[Sequence[str]]
    dtype: torch.dtype
    x: torch.Size
    steps: int
    batch: int
    states: tuple[torch.Size, ...]
    stateful: bool
    output: torch.Size | None

    def result(self, results: Sequence[Tensor]) -> Any:
        """Return the output, if any, and the final states as the module returns them."""
        final = results if self.output is None else results[1:]
        final_state = tuple(final) if len(self.states) > 1 else final[0]
        return final_state if self.output is None else (results[0], final_state)


def state_tensors(state: Any, signature: CallSignature) -> Sequence[Any] | None:
    """Return the initial states that a user passes, or None if there are more or fewer."""
    if not signature.stateful:
        return ()
    if len(signature.states) == 1:
        return (state,)
    return state if type(state) in (tuple, list) and len(state) == len(signature.states) else None


class CompiledCall:
    """The compiled cells of a call, and what their results depend on apart from tensors.

    Args:
        signature: The call.

    Attributes:
        signature: The call.
        layout: Memory layout of the rows.
        cells: The cells, without parameters.
        compiled: The compiled cells.
        names: The names of all parameters in the module.
        input_shapes: Shapes of the input, the initial states and the parameters.
        result_shapes: Shapes of the output, if it is returned, and of the final states.
        threads: Torch's number of threads.

    Raises:
        NotRecordableError: If a cell draws random numbers, or reads tensors that aren't parameters.
        UnsupportedError: If a cell can't be compiled.
        UnavailableError: If there is no C++ compiler.
    """

    def __init__(self, signature: CallSignature) -> None:
        self.signature = signature
        self.layout = Layout(signature.steps, signature.batch)
        self.cells = [_bound(cell, signature.training) for cell in signature.cells]
        self.compiled = [_compiled(cell, signature.dtype) for cell in self.cells]
        params = [torch.Size(shape) for cell in self.cells for shape in cell.shapes().values()]
        self.names = [name for names in signature.names for name in names]
        states = signature.states if signature.stateful else ()
        self.input_shapes = [signature.x, *states, *params]
        self.result_shapes = [
            *([signature.output] if signature.output is not None else []),
            *signature.states,
        ]
        self._values: list[StepValues] = [step_values(cell) for cell in self.cells]
        if [each.digest for each in self._values] != [each.digest for each in self.compiled]:
            raise NotRecordableError("a Python value that its step reads is changing")
        self._unchanged = [each.unchanged for each in self._values]
        self.threads, self._default_dtype = torch.get_num_threads(), torch.get_default_dtype()

    def is_current(self) -> bool:
        """Return whether a call would run the same kernels now, with the same arguments."""
        if torch.get_num_threads() != self.threads or torch.get_default_dtype() is not self._default_dtype:
            return False
        for unchanged in self._unchanged:  # noqa: SIM110  # a generator would cost 0.2 microseconds
            if not unchanged():
                return False
        return True

    def native_conditions(self) -> list[Condition]:
        """Return the conditions of :meth:`is_current` for compiled code."""
        return [
            (torch.get_num_threads, self.threads),
            (torch.get_default_dtype, self._default_dtype),
            *((unchanged, True) for unchanged in self._unchanged),
        ]

    def example(self) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
        """Return tensors as those of a call: the input, the states, and the parameters of each cell."""
        signature, layout = self.signature, self.layout

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=signature.dtype, device="cpu")

        with torch.inference_mode(False):
            x = empty(layout.steps, layout.batch, self.cells[0].features)
            states = [empty(*shape) for shape in signature.states]
            params = [[empty(*shape) for shape in cell.shapes().values()] for cell in self.cells]
        return x, states if signature.stateful else [], params

    def by_layer(self, states: Sequence[Tensor]) -> list[tuple[Tensor, ...] | None]:
        """Return the states of each layer, ``(batch, size)`` each; None if none are given."""
        if not states:
            return [None] * len(self.cells)
        sizes = self.cells[0].state_sizes().values()
        parts = [
            part.view(len(self.cells), self.layout.batch, size)
            for part, size in zip(states, sizes, strict=True)
        ]
        return [tuple(part[k] for part in parts) for k in range(len(self.cells))]


def _bound(cell: Cell, training: bool) -> Cell:
    """Return a cell in the mode of its module, without its parameters."""
    bound = cell.bind({})
    bound.training = training
    return bound


def _compiled(cell: Cell, dtype: torch.dtype) -> NativeCell:
    """Return the compiled cell.

    Raises:
        NotRecordableError: If it draws random numbers, reads other tensors, or converts between dtypes.
    """
    if planned_draws(cell.unbound, cell.training, dtype):
        raise NotRecordableError("its step draws random numbers")
    compiled: Any = registry.compiled(cell, dtype)
    captured = compiled.captured
    if captured.tensor_attributes or captured.constant_attributes or compiled.dtype is not dtype:
        raise NotRecordableError("it reads tensors that aren't parameters, or in another dtype")
    if not isinstance(compiled, NativeCell):
        raise NotRecordableError("it doesn't run on the native engine")
    return compiled


def check_recorded(recorder: CallRecorder, results: Sequence[Tensor | None]) -> None:
    """Raise NotRecordableError unless each result is a new tensor, contiguous in its own memory."""
    for result in results:
        if result is not None and not (recorder.is_whole(result) and result.is_contiguous()):
            raise NotRecordableError("a result is a view")
