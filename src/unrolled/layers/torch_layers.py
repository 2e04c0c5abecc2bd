"""Drop-in replacements for torch.nn's recurrent layers and cells, with the same names and arguments."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.engines.torch_ops.onnx import OnnxExportError
from unrolled.layers import torch_calls
from unrolled.layers.module import State, States
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.rnn_base import RNNBaseAttributes
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.single_step import SingleStep


class DropInLayer(Recurrent, RNNBaseAttributes):
    """Base class of the drop-in replacements for torch.nn's recurrent layers, also a ``torch.nn.RNNBase``.

    Subclasses define ``torch_class``, the class they replace, ``torch_function``, which that class calls, and
    ``cell_class``, the cell they run.

    Args:
        input_size: Number of input features. None: that of the first input.
        hidden_size: Number of units in the hidden state.
        num_layers: Number of stacked layers.
        bias: If False, the layer has no ``bias_ih`` and ``bias_hh``.
        batch_first: If True, input and output are ``(batch, time, features)``.
        dropout: In training, the probability of zeroing an element of the output of every layer but the last.
        bidirectional: If True, a second direction runs from the last step to the first.
        proj_size: If above 0, the hidden state is projected to that many features. Only for LSTM.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        options: ``initial_state``, ``variational_dropout``, ``recurrent_dropout`` and ``zoneout``, see
            :class:`unrolled.Recurrent`.

    Raises:
        TypeError: If an argument has the wrong type or is unknown.
        ValueError: If an argument has an invalid value.
    """

    cell_class: ClassVar[type[Cell]]
    torch_class: ClassVar[type[nn.RNNBase]]
    torch_function: Any

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,  # all of torch.nn's layers have it at this position
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
        self.flatten_parameters()

    def flatten_parameters(self) -> None:
        """Put the weights into one buffer on a CUDA device, where cuDNN then needn't copy them in each call.

        As in torch.nn, the constructor does this, and ``to()`` and other methods that replace the weights.
        """
        if self.input_size:
            nn.RNNBase.flatten_parameters(self)

    @property
    def mode(self) -> str:  # type: ignore[override]
        """The layer's mode as in torch.nn, such as ``"LSTM"`` or ``"RNN_TANH"``."""
        return self.torch_class.__name__

    def forward(  # type: ignore[override]  # torch.nn's argument names
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        state: State | None = None,
        lengths: Any = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: State | str | None = None,
        all_states: bool = False,
        checkpoint: int | None = None,
    ) -> Any:
        """Run the layer, as :meth:`unrolled.Recurrent.forward` does, with torch.nn's argument names.

        ``state`` is another name for ``hx``. The other arguments are those of :class:`unrolled.Recurrent`.
        """
        if hx is not None and state is not None and not isinstance(input, Proxy):
            raise TypeError(f"{self._label} got its initial state twice, as hx and as state: pass only one")
        hx = state if hx is None else hx
        try:
            return super().forward(
                input,
                hx,
                lengths=lengths,
                mask=mask,
                resets=resets,
                reset_state=reset_state,
                all_states=all_states,
                checkpoint=checkpoint,
            )
        except OnnxExportError:
            rounds_activations = self.weight_storage is not None and self.weight_storage.weights == "int8"
            if all_states or rounds_activations or not (self.plain and lengths is mask is resets is None):
                raise
            torch_forward: Any = self.torch_class.forward  # reads only attributes that this class has, too
            return torch_forward(self, input, hx)

    def _run_by_torch(self, sequence: SequenceBatch, initial: States | None) -> tuple[Tensor, States] | None:
        if self.plain and self.weight_storage is None and torch_calls.are_answered(sequence.steps):
            return torch_calls.run_layer(self, sequence, initial)
        return None


class RNN(DropInLayer):
    """Simple recurrent layer: a drop-in replacement for :class:`torch.nn.RNN`.

    The arguments are those of :class:`.DropInLayer`, with ``nonlinearity`` after ``num_layers``.

    Args:
        nonlinearity: ``"tanh"`` or ``"relu"``.
    """

    cell_class = cells.RNN
    torch_class = nn.RNN

    def __init__(
        self,
        input_size: int | None,
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
    def mode(self) -> str:  # type: ignore[override]
        """``"RNN_TANH"`` or ``"RNN_RELU"``, as in torch.nn."""
        return f"RNN_{self.nonlinearity.upper()}"

    @property
    def torch_function(self) -> Any:
        """The function that torch.nn.RNN calls."""
        return torch.rnn_tanh if self.nonlinearity == "tanh" else torch.rnn_relu

    def _special_options(self) -> dict[str, Any]:
        return {}  # torch.nn.RNN's repr doesn't show the nonlinearity


class LSTM(DropInLayer):
    """Long short-term memory: a drop-in replacement for :class:`torch.nn.LSTM`.

    The arguments are those of :class:`.DropInLayer`.
    """

    cell_class = cells.LSTM
    torch_class = nn.LSTM
    torch_function = staticmethod(torch.lstm)
    # torch.nn's states are pairs here, too.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(DropInLayer):
    """Gated recurrent unit: a drop-in replacement for :class:`torch.nn.GRU`.

    The arguments are those of :class:`.DropInLayer`.
    """

    cell_class = cells.GRU
    torch_class = nn.GRU
    torch_function = staticmethod(torch.gru)


class DropInCell(SingleStep, nn.RNNCellBase):
    """Base class of the drop-in replacements for torch.nn's recurrent cells.

    Subclasses also inherit from ``torch_class``, the class they replace, for code that asks for it.
    They define it, ``torch_function``, which that class calls, and ``cell_class``, the cell they run.
    """

    cell_class: ClassVar[type[Cell]]
    torch_class: ClassVar[type[nn.RNNCellBase]]
    torch_function: Any

    def forward(self, input: Tensor, hx: State | None = None) -> Any:
        """Run one step.

        Args:
            input: Input of shape ``(batch, input)``, or ``(input,)`` for a single row.
            hx: The previous state. Zeros by default.

        Returns:
            The new state.
        """
        return super().forward(input, hx)

    def _run_by_torch(self, rows: Tensor, initial: States | None) -> States | None:
        is_answered = self.weight_storage is None and torch_calls.are_answered(rows)
        return torch_calls.run_cell(self, rows, initial) if is_answered else None


class RNNCell(DropInCell, nn.RNNCell):
    """One step of :class:`RNN`: a drop-in replacement for :class:`torch.nn.RNNCell`."""

    cell_class = cells.RNN
    torch_class = nn.RNNCell

    def __init__(
        self,
        input_size: int | None,
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

    @property
    def torch_function(self) -> Any:
        """The function that torch.nn.RNNCell calls."""
        return torch.rnn_tanh_cell if self.nonlinearity == "tanh" else torch.rnn_relu_cell


class LSTMCell(DropInCell, nn.LSTMCell):
    """One step of :class:`LSTM`: a drop-in replacement for :class:`torch.nn.LSTMCell`."""

    cell_class = cells.LSTM
    torch_class = nn.LSTMCell
    torch_function = staticmethod(torch.lstm_cell)

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(self.cell_class, input_size, hidden_size, bias=bias, device=device, dtype=dtype)


class GRUCell(DropInCell, nn.GRUCell):
    """One step of :class:`GRU`: a drop-in replacement for :class:`torch.nn.GRUCell`."""

    cell_class = cells.GRU
    torch_class = nn.GRUCell
    torch_function = staticmethod(torch.gru_cell)

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(self.cell_class, input_size, hidden_size, bias=bias, device=device, dtype=dtype)


LAYERS: tuple[type[DropInLayer], ...] = (RNN, LSTM, GRU)
CELLS: tuple[type[DropInCell], ...] = (RNNCell, LSTMCell, GRUCell)
