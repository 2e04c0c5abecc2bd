"""torch.nn's recurrent classes by name: the same constructors, call signatures and attributes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.layers.module import State
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep


class DropInLayer(Recurrent):
    """A layer that takes the place of ``torch_class``; it computes with ``cell_class``.

    Args:
        input_size: features of the input.
        hidden_size: units of the hidden state.
        num_layers: layers on top of each other.
        bias: whether the layer has ``bias_ih`` and ``bias_hh``.
        batch_first: input and output are ``(batch, time, features)``.
        dropout: the probability of zeroing an output between two layers, in training.
        bidirectional: a second direction runs from the last step to the first.
        proj_size: above 0, the hidden state is projected to that many features, where the cell can.
        device, dtype: of the parameters.
        options: ``initial_state``, ``variational_dropout``, ``recurrent_dropout`` and ``zoneout``, see
            :class:`unrolled.Recurrent`.

    Raises:
        TypeError, ValueError: an argument that can't be used, named.
    """

    cell_class: ClassVar[type[Cell]]
    torch_class: ClassVar[type[nn.RNNBase]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,  # stands here in all of torch.nn's layers, by position
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        if "proj_size" in self.cell_class.options():
            options["proj_size"] = proj_size
        elif proj_size != 0:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(
            self.cell_class,
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )
        self.proj_size = proj_size

    @property
    def mode(self) -> str:
        """torch.nn's name for what the layer computes, such as ``"LSTM"`` or ``"RNN_TANH"``."""
        return self.torch_class.__name__

    def forward(  # type: ignore[override]  # torch.nn's argument names
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        state: State | None = None,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_state: State | str | None = None,
        all_states: bool = False,
        checkpoint: int | None = None,
    ) -> Any:
        """Run the layer: :meth:`unrolled.Recurrent.forward` under torch.nn's argument names.

        ``state`` is another name for ``hx``, the one that every layer of this library takes, as are
        ``lengths``, ``resets``, ``reset_state``, ``all_states`` and ``checkpoint``.
        """
        if hx is not None and state is not None:
            raise TypeError(f"{self._label} got its initial state twice, as hx and as state")
        return super().forward(
            input,
            state if hx is None else hx,
            lengths=lengths,
            resets=resets,
            reset_state=reset_state,
            all_states=all_states,
            checkpoint=checkpoint,
        )


class RNN(DropInLayer):
    """Simple recurrent layer, a drop-in for :class:`torch.nn.RNN`: same arguments, same numbers.

    The arguments are those of :class:`.DropInLayer`, and after ``num_layers`` one more.

    Args:
        nonlinearity: ``"tanh"`` or ``"relu"``.
    """

    cell_class = cells.RNN
    torch_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **unknown: Any,
    ) -> None:
        flags = (bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        super().__init__(input_size, hidden_size, num_layers, *flags, nonlinearity=nonlinearity, **unknown)
        self.nonlinearity = nonlinearity

    @property
    def mode(self) -> str:
        """``"RNN_TANH"`` or ``"RNN_RELU"``, as in torch.nn."""
        return f"RNN_{self.nonlinearity.upper()}"

    def _special_options(self) -> dict[str, Any]:
        return {}  # the repr of torch.nn.RNN does not show its nonlinearity


class LSTM(DropInLayer):
    """Long short-term memory, a drop-in for :class:`torch.nn.LSTM`: same arguments, same numbers.

    The arguments are those of :class:`.DropInLayer`.
    """

    cell_class = cells.LSTM
    torch_class = nn.LSTM


class GRU(DropInLayer):
    """Gated recurrent unit, a drop-in for :class:`torch.nn.GRU`: same arguments, same numbers.

    The arguments are those of :class:`.DropInLayer`.
    """

    cell_class = cells.GRU
    torch_class = nn.GRU


class DropInCell(SingleStep):
    """One step in the place of ``torch_class``; it computes with ``cell_class``."""

    cell_class: ClassVar[type[Cell]]
    torch_class: ClassVar[type[nn.RNNCellBase]]

    def forward(self, input: Tensor, hx: State | None = None) -> Any:
        """Run one step: ``(batch, input)`` or ``(input,)``, and the state, to the new state."""
        return super().forward(input, hx)


class RNNCell(DropInCell):
    """One step of :class:`RNN`, a drop-in for :class:`torch.nn.RNNCell`."""

    cell_class = cells.RNN
    torch_class = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            self.cell_class,
            input_size,
            hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
            nonlinearity=nonlinearity,
        )
        self.nonlinearity = nonlinearity


class LSTMCell(DropInCell):
    """One step of :class:`LSTM`, a drop-in for :class:`torch.nn.LSTMCell`."""

    cell_class = cells.LSTM
    torch_class = nn.LSTMCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(self.cell_class, input_size, hidden_size, bias=bias, device=device, dtype=dtype)


class GRUCell(DropInCell):
    """One step of :class:`GRU`, a drop-in for :class:`torch.nn.GRUCell`."""

    cell_class = cells.GRU
    torch_class = nn.GRUCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(self.cell_class, input_size, hidden_size, bias=bias, device=device, dtype=dtype)


LAYERS: tuple[type[DropInLayer], ...] = (RNN, LSTM, GRU)
CELLS: tuple[type[DropInCell], ...] = (RNNCell, LSTMCell, GRUCell)
