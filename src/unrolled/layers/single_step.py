"""One step of any cell as a module, the counterpart of torch.nn's cells."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines import dispatch
from unrolled.layers.module import CellModule, State
from unrolled.layers.sequence import InputError


class SingleStep(CellModule):
    """One step of any cell, as torch.nn.LSTMCell has it.

    Args:
        cell: the class of the cell, a subclass of :class:`Cell`.
        input_size: features of the input.
        hidden_size: units of the hidden state.
        bias: whether the parameters whose names begin with ``bias`` exist.
        device, dtype: of the parameters.
        cell_options: options of the cell.
    """

    def __init__(
        self,
        cell: type[Cell],
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **cell_options: Any,
    ) -> None:
        made = cell(input_size, hidden_size, bias=bias, **cell_options)
        super().__init__({"": made}, device, dtype)
        for name in made.params():
            if name not in made.shapes():
                self.register_parameter(name, None)
        self.cell = cell
        self.input_size = made.input
        self.hidden_size = made.hidden
        self.bias = bias

    def forward(self, x: Tensor, state: State | None = None) -> Any:
        """Run one step.

        Args:
            x: ``(batch, input)``, or ``(input,)`` for one row.
            state: ``(batch, hidden)`` or ``(hidden,)``; a tuple of such where the cell keeps several.
                None: zeros.

        Returns:
            The new state, laid out as ``state``.

        Raises:
            TypeError, ValueError: an input or state that doesn't fit, with what was expected.
        """
        name = self._label
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: Expected input to be a Tensor, got {type(x).__name__}")
        if x.dim() not in (1, 2):
            raise InputError(f"{name}: Expected input to be 1D or 2D, got {x.dim()}D instead")
        self._check("input", x)
        if x.shape[-1] != self.input_size:
            raise InputError(
                f"input has inconsistent input_size: got {x.shape[-1]} expected {self.input_size}"
            )
        rows = x if x.dim() == 2 else x.unsqueeze(0)
        initial = self._initial(state, rows, batched=x.dim() == 2)
        [(_, final)] = self._run(dispatch.run, [""], rows.unsqueeze(0), [initial], None)
        final = final if x.dim() == 2 else tuple(part.squeeze(0) for part in final)
        return final if len(final) > 1 else final[0]

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, in torch.nn's form."""
        parts = [str(self.input_size), str(self.hidden_size)]
        if not self.bias:
            parts.append("bias=False")
        options, chosen = self.cell.options(), self.chosen_options()
        parts += [f"{name}={chosen[name]}" for name in options if chosen[name] != options[name]]
        return ", ".join(parts)

    def _initial(self, state: State | None, rows: Tensor, batched: bool) -> tuple[Tensor, ...] | None:
        if state is None:
            return None
        name, sizes = self._label, self._first.state_sizes()
        given = self._states(state, name)
        for index, (part, size) in enumerate(zip(given, sizes.values(), strict=True)):
            which = f"hx[{index}]" if len(given) > 1 else "hidden"
            if part.dim() not in (1, 2):
                raise InputError(f"{name}: Expected {which} to be 1D or 2D, got {part.dim()}D instead")
            if part.dim() != 1 + batched:
                raise InputError(
                    f"{name}: Expected {which} to be {1 + batched}D as the input is, got {part.dim()}D"
                )
            self._check(which, part)
            if part.shape[-1] != size:
                raise InputError(
                    f"hidden{index} has inconsistent hidden_size: got {part.shape[-1]}, expected {size}"
                )
            if batched and len(part) != len(rows):
                raise InputError(
                    f"Input batch size {len(rows)} doesn't match hidden{index} batch size {len(part)}"
                )
        return given if batched else tuple(part.unsqueeze(0) for part in given)
