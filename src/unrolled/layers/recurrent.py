"""``Recurrent``: a layer that runs any cell over time, with the options of torch.nn.LSTM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell, positive_int
from unrolled.engines import dispatch, memory
from unrolled.layers import argument_checks, initial_states, layer_plans, lazy
from unrolled.layers.call_options import CallOptions
from unrolled.layers.draws import CallDraws
from unrolled.layers.fx import OPTIONS, record_call
from unrolled.layers.module import CellModule, Run, State, States
from unrolled.layers.regularization import RecurrentRegularization
from unrolled.layers.sequence import InputError, SequenceBatch
from unrolled.layers.tensors import add_axis, tensors


class Recurrent(CellModule):
    """A recurrent layer for any cell, with the options and parameter names of torch.nn.LSTM.

    Shapes: T time steps, B rows (batch), I input features, H output features (the size of the first state),
    K = ``num_layers`` × directions.

    Args:
        cell: The class of the cell, a subclass of :class:`Cell`.
        input_size: Number of input features, I. None: that of the first input. Until the first call or the
            loading of a state dict, the parameters then have no shape, as those of torch.nn.LazyLinear.
        hidden_size: Number of units in the hidden state.
        num_layers: Number of stacked layers. Each one reads the output of the layer below.
        bias: If False, parameters whose names begin with ``bias`` are omitted.
        batch_first: If True, input and output are ``(B, T, features)`` instead of ``(T, B, features)``.
        dropout: In training, the probability of zeroing an element of the output of every layer but the last.
        bidirectional: If True, a second cell runs from the last step to the first, and the outputs of both
            directions are concatenated.
        initial_state: The initial state if a call doesn't have one. ``"zeros"``, or ``"learned"`` for
            parameters of shape ``(H,)``, one per state, layer and direction.
        variational_dropout: In training, the probability of zeroing an input feature of every layer, with the
            same mask at every time step (Gal & Ghahramani, 2016).
        recurrent_dropout: The same for the hidden state where it enters a matrix product.
        zoneout: The probability that a unit of a state keeps its value in a time step (Krueger et al., 2017):
            a number for all states, or a mapping from state names to numbers. In eval mode states are the
            expected values.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        cell_options: Options of the cell.

    Raises:
        TypeError: If an argument has the wrong type or an option is unknown.
        ValueError: If an argument or option has an invalid value.
    """

    _stack: list[list[str]]  # for each layer, the suffixes of its forward and backward cells
    _frozen: Callable[[Any, Any], tuple[Any, Any] | None] | None = None  # set by unrolled.frozen

    cell: type[Cell]
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    initial_state: str
    _noise: RecurrentRegularization | None

    def __init__(
        self,
        cell: type[Cell],
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        initial_state: str = "zeros",
        variational_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float | Mapping[str, float] = 0.0,
        device: Any = None,
        dtype: Any = None,
        **cell_options: Any,
    ) -> None:
        if not (isinstance(cell, type) and issubclass(cell, Cell)):
            raise TypeError(f"cell should be a subclass of unrolled.Cell, got {cell!r}")
        argument_checks.check_dropout(dropout)
        argument_checks.check_flags(batch_first=batch_first, bidirectional=bidirectional)
        argument_checks.check_initial_state(initial_state)
        num_layers = positive_int("num_layers", num_layers)
        if dropout > 0 and num_layers == 1:
            argument_checks.warn_of_unused_dropout(dropout, type(self), Recurrent)
        argument_checks.check_cell_options(type(self), cell, cell_options)
        has_input_size = input_size is not None
        stack = (hidden_size if input_size is None else input_size, hidden_size, num_layers, bidirectional)
        cells = lazy.stacked_cells(cell, *stack, bias=bias, **cell_options)
        super().__init__(cells, device, dtype, has_input_size)
        suffixes, directions = list(cells), 2 if bidirectional else 1
        self._stack = [suffixes[k : k + directions] for k in range(0, len(cells), directions)]
        self.cell = cell
        self.input_size = self._first.input if has_input_size else 0
        self.hidden_size = self._first.hidden
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.initial_state = initial_state
        self.variational_dropout, self.recurrent_dropout = variational_dropout, recurrent_dropout
        self.zoneout = zoneout
        self._noise = RecurrentRegularization.from_options(
            variational_dropout, recurrent_dropout, zoneout, list(cell.state)
        )
        if initial_state == "learned":
            for suffix, unbound in cells.items():
                for name, size in unbound.state_sizes().items():
                    parameter = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
                    self.register_parameter(f"initial_{name}{suffix}", parameter)
        self.bidirectional = bidirectional

    def _new_cells(self, input_size: int) -> dict[str, Cell]:
        stack = (input_size, self.hidden_size, self.num_layers, self.bidirectional)
        return lazy.stacked_cells(self.cell, *stack, bias=self.bias, **self.chosen_options())

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | None = None,
        *,
        lengths: Any = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: State | str | None = None,
        all_states: bool = False,
        checkpoint: int | None = None,
    ) -> Any:
        """Run the layer.

        Args:
            x: Input of shape ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``. Also ``(T, I)`` for a
                single sequence, or a ``torch.nn.utils.rnn.PackedSequence``.
            state: Initial state of shape ``(K, B, H)``, or ``(K, H)`` for a single sequence. A tuple of
                tensors if the cell has several states. The default is set by the option ``initial_state``.
            lengths: The length of each row: integers from 0 to T, ``(B,)``. Outputs past the end of a row are
                zeros, and its final state is the state after its last step. Steps past the end don't run.
                Exceptions are calls with ``checkpoint`` and torch's transforms (compile, export, torch.func),
                where they run without effect.
            mask: Booleans of shape ``(T, B)``, ``(B, T)`` with ``batch_first``, or ``(T,)``. False skips a
                step: the states stay as they are, the output is zero, and a reset waits for the next step. As
                in Keras, and the opposite of torch's ``key_padding_mask``.
            resets: Booleans of the same shape as ``mask``. True marks the first step of an episode or
                document. Before this step the row's state is reset to its initial state. No gradient flows
                past it, and no NaN either, except in torch's transforms. The backward direction is reset at
                the same boundaries.
            reset_state: The state after a reset, in the same form as ``state``. ``"initial"`` is the layer's
                default initial state, for calls whose ``state`` comes from a previous call. By default resets
                restore ``state``.
            all_states: If True, also return every state of every time step.
            checkpoint: Save memory in training on long sequences: the backward pass keeps only the states
                between segments of this many time steps, and recomputes each. Not supported for packed
                sequences. Ignored inside torch's transforms (compile, export, torch.func).

        Returns:
            The output of the last layer, in the layout of ``x`` with ``H × directions`` features, and the
            final state, in the same form as ``state``. With ``all_states`` also a dictionary with the values
            of each state after every step of every layer and direction: ``(K, T, B, H)``, or ``(K, B, T, H)``
            with ``batch_first``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has the wrong shape, dtype, device or value.
        """
        if isinstance(x, Proxy):
            values = lengths, mask, resets, reset_state, None if all_states is False else True, checkpoint
            return record_call(self, x, state, dict(zip(OPTIONS, values, strict=True)))
        regularization = self._noise
        if regularization is not None and not regularization.is_active(self.training):
            regularization = None
        plain = lengths is mask is resets is reset_state is None and not all_states and regularization is None
        if plain and (result := layer_plans.run(self, x, state, checkpoint)) is not None:
            return result
        run: Any = dispatch.run
        if checkpoint is not None:
            argument_checks.check_checkpoint(checkpoint, x, self._label)
            run = functools.partial(run, checkpoint=checkpoint)
        if plain:
            result = self.unroll(x, state, run, own_states=True)
            layer_plans.note(self, x, state, checkpoint)
            return result
        memory.check_not_freed(tensors((x, state, lengths, mask, resets, reset_state)))
        sequence = SequenceBatch.from_input(x, self.batch_first, self._label)
        options = CallOptions(
            self._label,
            sequence,
            all_states=all_states,
            regularization=regularization,
            training=self.training,
        )
        if all_states:
            options.check_not_packed("all_states")
        if resets is not None:
            options.set_resets(resets, len(self._stack[0]))
        if lengths is not None:
            options.set_lengths(lengths, mask_steps=checkpoint is not None)
        if mask is not None:
            options.set_mask(mask, lengths, mask_steps=checkpoint is not None)
        if reset_state is not None:
            options.reset_states = initial_states.after_reset(self, reset_state, resets, options.sequence)
        run = functools.partial(options.run, run)
        output, final = self.unroll(options.sequence, state, run, own_states=True)
        if all_states:
            return output, final, options.states(list(self._first.state))
        return output, final

    def unroll(
        self,
        x: Tensor | PackedSequence | SequenceBatch,
        state: State | None,
        run: Run,
        drop: Callable[[Tensor, float], Tensor] = drop,
        *,
        own_states: bool = False,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the layer as :meth:`forward` does, with ``run`` in place of the engine.

        Args:
            x: The input, as in :meth:`forward`, or a SequenceBatch.
            state: The initial state, as in :meth:`forward`.
            run: Called once per layer, see ``CellModule._run``. Returns outputs and final states.
            drop: Applies dropout between layers.
            own_states: Whether nothing else uses the final states that ``run`` returns.

        Returns:
            The output and the final state.
        """
        sequence, initial = self._checked_input(x, state)
        result = self._run_by_torch(sequence, initial) if run is dispatch.run else None
        if result is None:
            result = self.run_stack(sequence, initial, run, drop, own_states=own_states)
        return self._in_user_layout(sequence, *result)

    def _run_by_torch(self, sequence: SequenceBatch, initial: States | None) -> tuple[Tensor, States] | None:
        """Run all layers by torch's own function. None if torch has none for this layer or device."""
        return None

    def _in_user_layout(
        self, sequence: SequenceBatch, steps: Tensor, states: States
    ) -> tuple[Tensor | PackedSequence, State]:
        states = tuple([sequence.state_out(part) for part in states])
        return sequence.output(steps), states if len(states) > 1 else states[0]

    def run_stack(
        self,
        sequence: SequenceBatch,
        initial: States | None,
        run: Run,
        drop: Callable[[Tensor, float], Tensor] = drop,
        *,
        own_states: bool = False,
    ) -> tuple[Tensor, States]:
        """Run all layers, as :meth:`unroll` does, on a batch that was checked.

        Args:
            sequence: The input.
            initial: The initial states in the row order of ``sequence``, ``(K, B, H)`` each. None: zeros.
            run: See :meth:`unroll`.
            drop: See :meth:`unroll`.
            own_states: See :meth:`unroll`.

        Returns:
            The output in the layout of ``sequence.steps``, and the final states like the initial ones.
        """
        steps = sequence.steps
        final: list[States] = []
        draws = CallDraws(sequence.sorted_indices)
        for suffixes in self._stack:
            if len(final) and self.training and self.dropout > 0:
                steps = drop(steps, self.dropout)
            starts: list[States | None] = [None] * len(suffixes)
            if isinstance(sequence.batch_sizes, Tensor) and final:
                # The zeros of the default, but with the batch size of the first layer's graph node.
                starts = [tuple([torch.zeros_like(part) for part in final[0]])] * len(suffixes)
            if initial is not None:
                starts = [tuple(part[len(final) + d] for part in initial) for d in range(len(suffixes))]
            results = self._run(run, suffixes, steps, starts, sequence.batch_sizes, draws)
            final += [last for _, last in results]
            steps = results[0][0] if len(results) == 1 else torch.cat([output for output, _ in results], -1)
        if len(final) == 1:
            return steps, tuple([add_axis(part, own_states) for part in final[0]])
        return steps, tuple([torch.stack(parts) for parts in zip(*final, strict=True)])

    def _checked_input(
        self, x: Tensor | PackedSequence | SequenceBatch, state: State | None
    ) -> tuple[SequenceBatch, States | None]:
        """Return the batch of an input and the initial states, None for zeros, after all checks.

        Raises:
            TypeError: If ``x`` or ``state`` has the wrong type.
            InputError: If ``x`` or ``state`` has the wrong shape, dtype or device.
        """
        sequence = (
            x if isinstance(x, SequenceBatch) else SequenceBatch.from_input(x, self.batch_first, self._label)
        )
        self._check_dtype_and_device("input", sequence.steps)
        if sequence.steps.shape[-1] != self.input_size:
            raise InputError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {sequence.steps.shape[-1]}"
            )
        if state is not None:
            return sequence, initial_states.given(self, state, sequence)
        learned = self.initial_state == "learned"
        return sequence, initial_states.learned(self, sequence.batch) if learned else None

    @property
    def plain(self) -> bool:
        """Whether the layer has no regularization and starts from zeros."""
        return self._noise is None and self.initial_state == "zeros"

    def check_only_step(self, what: str, allow_quantized: bool = False) -> None:
        """Raise ValueError if the layer has dropout over time, zoneout or quantized weights.

        Args:
            what: The operation that doesn't support them, for the error message.
            allow_quantized: Whether quantized weights are supported.
        """
        if not allow_quantized:
            self.check_float(what)
        if self._noise is not None and self._noise.is_active(self.training):
            raise ValueError(
                f"{self._label}: {what} doesn't support dropout over time or zoneout. Create a layer without "
                "these options and load the weights into it"
            )

    def reset_parameters(self) -> None:
        """Initialize every parameter with its ``Param``, and set learned initial states to zeros."""
        super().reset_parameters()
        if getattr(self, "initial_state", "zeros") == "learned":  # unset when called by CellModule.__init__
            for parts in initial_states.learned_parameters(self):
                for part in parts:
                    nn.init.zeros_(part)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Any, Any]:
        """Run one time step. Without random numbers, it is bit-identical to that step in a sequence.

        Args:
            x: Input of shape ``(B, I)``, or ``(I,)`` for a single row.
            state: The previous state, ``(K, B, H)``, or ``(K, H)`` for a single row. A tuple of tensors if
                the cell has several states. The default is set by the option ``initial_state``.

        Returns:
            The output, ``(B, H)`` or ``(H,)``, and the new state, in the same form as ``state``.

        Raises:
            TypeError: If ``state`` has the wrong type.
            ValueError: If the layer is bidirectional, or ``x`` or ``state`` has the wrong shape or dtype.
        """
        if self.bidirectional:
            raise ValueError(
                f"{self._label}: a bidirectional layer can't run step by step, because it also reads backward"
            )
        if not isinstance(x, Tensor) or x.dim() not in (1, 2):
            got = f"{x.dim()}D" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(
                f"{self._label}: step takes x of shape (batch, features) or (features,), got {got}"
            )
        memory.check_dense(self._label, [x])
        axis = 1 if self.batch_first and x.dim() == 2 else 0
        output, final = self(x.unsqueeze(axis), state)
        return output.squeeze(axis), final

    def flatten_parameters(self) -> None:
        """Do nothing. Models that use torch.nn's layers may call this method."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of every layer and direction, as in torch.nn."""
        return [
            [getattr(self, name + suffix) for name in cell.shapes()] for suffix, cell in self._cells.items()
        ]

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as torch.nn formats them."""
        parts = [self.cell.__name__] if type(self) is Recurrent else []
        parts += argument_checks.changed_arguments(self, self._special_options())
        return ", ".join(parts + self._storage_arguments())

    def _special_options(self) -> dict[str, Any]:
        """Return the cell's options that differ from their defaults, for the repr."""
        defaults = self.cell.options()
        return {name: value for name, value in self.chosen_options().items() if value != defaults[name]}
