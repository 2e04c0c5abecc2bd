"""Modules that run a single step of a cell, like torch.nn.LSTMCell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import rounds_activations
from unrolled.engines import dispatch, memory
from unrolled.engines.call_plans.signature import CallSignature
from unrolled.engines.selection import engine
from unrolled.engines.torch_ops.onnx import OnnxExportError
from unrolled.layers.draws import CallDraws
from unrolled.layers.fx import record_call
from unrolled.layers.module import CellModule, State
from unrolled.layers.sequence import InputError


class SingleStep(CellModule):
    """A module that runs a single step of a cell, like torch.nn.LSTMCell.

    Args:
        cell: The class of the cell, a subclass of :class:`Cell`.
        input_size: Number of input features. None: that of the first input.
        hidden_size: Number of units in the hidden state.
        bias: If False, parameters whose names begin with ``bias`` are omitted.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        cell_options: Options of the cell.

    Raises:
        TypeError: If an argument has the wrong type or an option is unknown.
        ValueError: If an argument or option has an invalid value.
    """

    _packed: Callable[[Any, Any], Any] | None = None  # set by unrolled.quantize

    def __init__(
        self,
        cell: type[Cell],
        input_size: int | None,
        hidden_size: int,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **cell_options: Any,
    ) -> None:
        has_input_size = input_size is not None
        features = hidden_size if input_size is None else input_size
        unbound = cell(features, hidden_size, bias=bias, **cell_options)
        super().__init__({"": unbound}, device, dtype, has_input_size)
        for name in unbound.params():
            if name not in unbound.shapes():
                self.register_parameter(name, None)
        self.cell = cell
        self.input_size = unbound.input if has_input_size else 0
        self.hidden_size = unbound.hidden
        self.bias = bias

    def _new_cells(self, input_size: int) -> dict[str, Cell]:
        return {"": self.cell(input_size, self.hidden_size, bias=self.bias, **self.chosen_options())}

    def forward(self, x: Tensor, state: State | None = None) -> Any:
        """Run one step.

        Args:
            x: Input of shape ``(batch, input)``, or ``(input,)`` for a single row.
            state: The previous state, ``(batch, hidden)`` or ``(hidden,)``. A tuple of tensors if the cell
                has several states. Zeros by default.

        Returns:
            The new state, in the same form as ``state``.

        Raises:
            TypeError: If ``x`` or ``state`` has the wrong type.
            InputError: If ``x`` or ``state`` has the wrong shape, dtype or device.
        """
        if isinstance(x, Proxy):
            return record_call(self, x, state, {})
        if torch.compiler.is_compiling():
            return self._run_unplanned(x, state)
        if self._packed is not None:
            result = self._packed(x, state)
            if result is not None:
                return result
        result = self._run_planned(x, state)
        if result is None:
            result = self._run_unplanned(x, state)
            self._note_call(x, state, _signature)
        return result

    def _run_unplanned(self, x: Tensor, state: State | None) -> Any:
        """Run one step without a plan; see :meth:`forward`."""
        name = self._label
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: Expected input to be a Tensor, got {type(x).__name__}")
        memory.check_dense(name, [x])
        if x.dim() not in (1, 2):
            raise InputError(f"{name}: Expected input to be 1D or 2D, got {x.dim()}D instead")
        self._check_dtype_and_device("input", x)
        if x.shape[-1] != self.input_size:
            raise InputError(
                f"input has inconsistent input_size: got {x.shape[-1]} expected {self.input_size}"
            )
        rows = x if x.dim() == 2 else x.unsqueeze(0)
        initial = self._initial_states(state, rows, batched=x.dim() == 2)
        final = self._run_by_torch(rows, initial)
        if final is None:
            [(_, final)] = self._run(_run_step, [""], rows.unsqueeze(0), [initial], None, CallDraws())
        final = final if x.dim() == 2 else tuple(part.squeeze(0) for part in final)
        return final if len(final) > 1 else final[0]

    def _run_by_torch(self, rows: Tensor, initial: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Run one step by torch's own function. None if torch has none for this cell or device."""
        return None

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as torch.nn formats them."""
        parts = [str(self.input_size), str(self.hidden_size)]
        if not self.bias:
            parts.append("bias=False")
        defaults, options = self.cell.options(), self.chosen_options()
        parts += [f"{name}={options[name]}" for name in defaults if options[name] != defaults[name]]
        return ", ".join(parts + self._storage_arguments())

    def _initial_states(self, state: State | None, rows: Tensor, batched: bool) -> tuple[Tensor, ...] | None:
        if state is None:
            return None
        name, sizes = self._label, self._first.state_sizes()
        states = self._state_tuple(state, name)
        for index, (part, size) in enumerate(zip(states, sizes.values(), strict=True)):
            which = f"hx[{index}]" if len(states) > 1 else "hidden"
            if part.dim() not in (1, 2):
                raise InputError(f"{name}: Expected {which} to be 1D or 2D, got {part.dim()}D instead")
            if part.dim() != 1 + batched:
                raise InputError(
                    f"{name}: Expected {which} to be {1 + batched}D like the input, got {part.dim()}D"
                )
            self._check_dtype_and_device(which, part)
            if part.shape[-1] != size:
                raise InputError(
                    f"hidden{index} has inconsistent hidden_size: got {part.shape[-1]}, expected {size}"
                )
            batch, own = (
                rows.shape[0],
                part.shape[0],
            )  # not len(), which would fix a size that torch.export varies
            if batched and own != batch:
                raise InputError(f"Input batch size {batch} doesn't match hidden{index} batch size {own}")
        return states if batched else tuple(part.unsqueeze(0) for part in states)


def _run_step(cells: list[Cell], *args: Any, **kwargs: Any) -> Any:
    """Run a single step on the selected engine, but for ONNX in torch's own operations."""
    try:
        return dispatch.run(cells, *args, **kwargs)
    except OnnxExportError:
        if any(map(rounds_activations, cells)):  # the export would contain products in float
            raise
        with engine("reference"):
            return dispatch.run(cells, *args, **kwargs)


def _signature(module: SingleStep, x: Tensor, stateful: bool) -> CallSignature:
    """Return the signature of a call."""
    rows = x.shape[:-1]
    return CallSignature(
        cells=[module._first],
        training=module.training,
        names=[[full_name for _, full_name, _ in module._named[""]]],
        dtype=x.dtype,
        x=x.shape,
        steps=1,
        batch=rows.numel(),
        states=tuple(torch.Size((*rows, size)) for size in module._first.state_sizes().values()),
        stateful=stateful,
        output=None,
    )
