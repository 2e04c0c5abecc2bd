"""Layers of any cell: stacking, directions, dropout, initial states, torch.nn's parameter names."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell, whole
from unrolled.engines import dispatch
from unrolled.layers.call_options import CallOptions
from unrolled.layers.module import CellModule, Run, State, States
from unrolled.layers.regularization import RecurrentRegularization
from unrolled.layers.sequence import InputError, SequenceBatch

# Options that torch.nn's layers don't have, with their defaults.
_NOT_IN_TORCH: dict[str, Any] = {
    "initial_state": "zeros",
    "variational_dropout": 0.0,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
}


class Recurrent(CellModule):
    """A recurrent layer of any cell, with the options and the parameter names of torch.nn.LSTM.

    Shapes: T time steps, B rows (batch), I input features, H features of the output (the first
    state), K = ``num_layers`` × directions.

    Args:
        cell: the class of the cell, a subclass of :class:`Cell`.
        input_size: I, features of the input.
        hidden_size: units of the hidden state.
        num_layers: layers on top of each other, each reading the output of the one below.
        bias: whether the parameters whose names begin with ``bias`` exist.
        batch_first: input and output are ``(B, T, features)`` instead of ``(T, B, features)``.
        dropout: the probability of zeroing an output between two layers, in training.
        bidirectional: a second cell runs from the last step to the first; outputs are joined.
        initial_state: ``"zeros"``, or ``"learned"``: what rows start from where no state is given is a
            parameter, ``(H,)`` for each state of each layer and direction.
        variational_dropout: the probability of leaving out a feature of the input of every layer, in
            training: for each row the same in all time steps (Gal & Ghahramani, 2016).
        recurrent_dropout: the same of the hidden state, where it enters a matrix product.
        zoneout: the probability that a unit of a state keeps its value in a time step, in training, and what
            is expected of that elsewhere (Krueger et al., 2017): one for all states, or a mapping by name.
        device, dtype: of the parameters.
        cell_options: options of the cell.

    Raises:
        TypeError, ValueError: an argument or option that can't be used, named.
    """

    _stack: list[list[str]]  # the suffixes of each layer's cells: forward, then backward
    _frozen: Callable[[Any, Any], tuple[Any, Any] | None] | None = None  # see unrolled.frozen

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
        input_size: int,
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
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element "
                f"being zeroed, got {dropout!r}"
            )
        for name, value in (("batch_first", batch_first), ("bidirectional", bidirectional)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        num_layers = whole("num_layers", num_layers)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
                f"expects num_layers greater than 1, but got dropout={dropout} and num_layers=1",
                stacklevel=1 + _constructors(type(self)),
            )
        if initial_state not in ("zeros", "learned"):
            raise ValueError(f"initial_state should be 'zeros' or 'learned', got {initial_state!r}")
        _check_options(type(self), cell, cell_options)
        directions = ("", "_reverse") if bidirectional else ("",)
        cells = {}
        features = input_size
        for k in range(num_layers):
            for direction in directions:
                made = cells[f"_l{k}{direction}"] = cell(features, hidden_size, bias=bias, **cell_options)
            features = len(directions) * next(iter(made.state_sizes().values()))
        super().__init__(cells, device, dtype)
        suffixes = list(cells)
        self._stack = [suffixes[k : k + len(directions)] for k in range(0, len(cells), len(directions))]
        self.cell = cell
        self.input_size = self._first.input
        self.hidden_size = self._first.hidden
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.initial_state = initial_state
        self.variational_dropout, self.recurrent_dropout = variational_dropout, recurrent_dropout
        self.zoneout = zoneout
        names = list(cell.state)
        self._noise = RecurrentRegularization.of(variational_dropout, recurrent_dropout, zoneout, names)
        if initial_state == "learned":
            for suffix, made in cells.items():
                for name, size in made.state_sizes().items():
                    start = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
                    self.register_parameter(f"initial_{name}{suffix}", start)
        self.bidirectional = bidirectional

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | None = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_state: State | str | None = None,
        all_states: bool = False,
        checkpoint: int | None = None,
    ) -> Any:
        """Run the layer.

        Args:
            x: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` for one sequence, or a
                ``torch.nn.utils.rnn.PackedSequence``.
            state: the initial state ``(K, B, H)``, or ``(K, H)`` for one sequence; a tuple of such
                where the cell keeps several. None: zeros.
            lengths: ``(B,)``, whole numbers up to T: the steps of each row that count. The others cost no
                time, but with ``checkpoint`` and inside torch's transforms, where they run without effect;
                outputs there are zeros, and the final state is that after a row's own last step.
            resets: booleans, ``(T, B)``, or ``(B, T)`` with ``batch_first``, or ``(T,)``: the first steps of
                episodes or documents. Before such a step a row's state goes back to its initial state, and
                no gradient flows past. The direction that runs back does so on the same borders.
            reset_state: what resets go back to, laid out as ``state``, or ``"initial"``: what the layer
                starts from by itself, for calls that go on from an earlier final state. None: ``state``.
            all_states: whether to return every state of every time step too.
            checkpoint: for long sequences in training: keep no more for the backward than the states
                between segments of so many time steps, and compute each segment anew. Not for packed
                sequences; without effect inside torch's transforms (compile, export, torch.func), which
                keep what they keep.

        Returns:
            The output of the last layer, laid out as ``x`` with ``H × directions`` features, and the
            final state, laid out as ``state``. With ``all_states`` also a dictionary: of each state by name
            the values after every step of every layer and direction, ``(K, T, B, H)``, where ``T, B`` stand
            as in ``x``.

        Raises:
            TypeError, ValueError: an input or state that doesn't fit, with what was expected.
        """
        noise = self._noise if self._noise is not None and self._noise.acts(self.training) else None
        plain = lengths is None and resets is reset_state is None and not all_states and noise is None
        if plain and self._frozen is not None and not torch.compiler.is_compiling():
            done = self._frozen(x, state)
            if done is not None:
                return done
        run: Any = dispatch.run
        if checkpoint is not None:
            _check_checkpoint(checkpoint, x, self._label)
            run = functools.partial(run, checkpoint=checkpoint)
        if plain:
            return self.unroll(x, state, run)
        sequence = SequenceBatch.of(x, self.batch_first, self._label)
        asked = CallOptions(self._label, sequence, every=all_states, noise=noise, training=self.training)
        if all_states:
            asked.check("all_states")
        if resets is not None:
            asked.mark(resets, len(self._stack[0]))
        if lengths is not None:
            asked.end(lengths, keep=checkpoint is not None)
        if reset_state is not None:
            asked.first = self._first_of(reset_state, resets, asked.sequence)
        output, final = self.unroll(asked.sequence, state, functools.partial(asked.run, run))
        return (output, final, asked.states(list(self._first.state))) if all_states else (output, final)

    def unroll(
        self,
        x: Tensor | PackedSequence | SequenceBatch,
        state: State | None,
        run: Run,
        drop: Callable[[Tensor, float], Tensor] = drop,
    ) -> tuple[Tensor | PackedSequence, State]:
        """:meth:`forward` with ``run`` in the place of the engine, called once a layer."""
        sequence = x if isinstance(x, SequenceBatch) else SequenceBatch.of(x, self.batch_first, self._label)
        steps = sequence.steps
        self._check("input", steps)
        if steps.shape[-1] != self.input_size:
            raise InputError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {steps.shape[-1]}"
            )
        if state is not None:
            initial: States | None = self._initial(state, sequence)
        else:
            initial = self._learned(sequence.batch) if self.initial_state == "learned" else None
        final: list[States] = []
        for suffixes in self._stack:
            if len(final) and self.training and self.dropout > 0:
                steps = drop(steps, self.dropout)
            starts: list[States | None] = [None] * len(suffixes)
            if initial is not None:
                starts = [tuple(part[len(final) + d] for part in initial) for d in range(len(suffixes))]
            results = self._run(run, suffixes, steps, starts, sequence.sizes)
            final += [last for _, last in results]
            steps = results[0][0] if len(results) == 1 else torch.cat([output for output, _ in results], -1)
        if len(final) == 1:
            states = tuple([sequence.state_out(part.unsqueeze(0)) for part in final[0]])
        else:
            states = tuple(sequence.state_out(torch.stack(parts)) for parts in zip(*final, strict=True))
        return sequence.output(steps), states if len(states) > 1 else states[0]

    @property
    def plain(self) -> bool:
        """Whether the layer by itself computes what its cells do, from zeros."""
        return self._noise is None and self.initial_state == "zeros"

    def check_noise(self, what: str) -> None:
        """Raise where the layer computes something else than its cells' steps, which ``what`` is about.

        Raises:
            ValueError: it does now.
        """
        if self._noise is not None and self._noise.acts(self.training):
            raise ValueError(
                f"{self._label}: {what} is of the cell's own steps, which dropout over time and zoneout "
                "change; make a layer without these options and load the weights into it"
            )

    def _learned(self, batch: int) -> States:
        """The initial states that are parameters, ``(K, B, H)`` each."""
        return tuple(torch.stack(parts).unsqueeze(1).expand(-1, batch, -1) for parts in self._starts())

    def _first_of(self, given: Any, resets: Any, sequence: SequenceBatch) -> States:
        """What resets go back to where that is asked for; nothing for zeros."""
        if resets is None:
            raise ValueError(f"{self._label}: reset_state says what resets go back to: give resets too")
        if not isinstance(given, str):
            try:
                return self._initial(given, sequence)
            except (TypeError, InputError) as error:
                raise type(error)(f"reset_state: {error}") from None
        if given != "initial":
            raise ValueError(f"{self._label}: reset_state should be a state or 'initial', got {given!r}")
        return self._learned(sequence.batch) if self.initial_state == "learned" else ()

    def _starts(self) -> list[list[Tensor]]:
        """The parameters that rows start from, of each state by layer and direction."""
        names, suffixes = self._first.state, self._cells
        return [[getattr(self, f"initial_{name}{suffix}") for suffix in suffixes] for name in names]

    def reset_parameters(self) -> None:
        """Draw every parameter anew as its ``Param`` says; learned initial states are zeros again."""
        super().reset_parameters()
        if getattr(self, "initial_state", "zeros") == "learned":  # not so while the layer is made
            for parts in self._starts():
                for part in parts:
                    nn.init.zeros_(part)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Any, Any]:
        """Run one time step: the bits of the step in a whole sequence.

        Args:
            x: ``(B, I)``, or ``(I,)`` for one row.
            state: the state before it, ``(K, B, H)``, or ``(K, H)`` for one row; a tuple of such where the
                cell keeps several. None: the initial one.

        Returns:
            The output, ``(B, H)`` or ``(H,)``, and the state after the step, laid out as ``state``.

        Raises:
            TypeError, ValueError: an input or state that doesn't fit; the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError(f"{self._label}: a bidirectional layer has no step: it reads from the end too")
        if not isinstance(x, Tensor) or x.dim() not in (1, 2):
            got = f"{x.dim()}D" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(
                f"{self._label}: step takes x of shape (batch, features) or (features,), got {got}"
            )
        axis = 1 if self.batch_first and x.dim() == 2 else 0
        output, final = self(x.unsqueeze(axis), state)
        return output.squeeze(axis), final

    def flatten_parameters(self) -> None:
        """Do nothing; torch.nn's layers have this method, and models call it."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of every layer and direction, as in torch.nn."""
        return [
            [getattr(self, name + suffix) for name in cell.shapes()] for suffix, cell in self._cells.items()
        ]

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, in torch.nn's form."""
        parts = [self.cell.__name__] if type(self) is Recurrent else []
        parts += [str(self.input_size), str(self.hidden_size)]
        parts += [f"{name}={value!r}" for name, value in self._special_options().items()]
        shown = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, default in (shown | _NOT_IN_TORCH).items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)

    def _special_options(self) -> dict[str, Any]:
        """The options of the cell that differ from their defaults, for the repr."""
        defaults = self.cell.options()
        return {name: value for name, value in self.chosen_options().items() if value != defaults[name]}

    def _initial(self, state: State, sequence: SequenceBatch) -> States:
        count, batch = len(self._cells), sequence.batch
        expected = {
            state_name: (count, batch, size) for state_name, size in self._first.state_sizes().items()
        }
        given = self._states(state, self._label)
        for (state_name, shape), part in zip(expected.items(), given, strict=True):
            wanted = shape if sequence.batched else (shape[0], shape[2])
            if part.dim() != len(wanted):
                kind = "batched 3-D" if sequence.batched else "unbatched 2-D"
                every = " and ".join(f"{name}x" for name in expected)
                ranks = ", ".join(f"{part.dim()}-D" for part in given)
                raise InputError(
                    f"For {kind} input, {every} should also be {len(wanted)}-D but got "
                    + (f"{ranks} tensor" if len(given) == 1 else f"({ranks}) tensors")
                )
            if tuple(part.shape) != wanted:
                raise InputError(
                    f"Expected hidden size {wanted}, got {list(part.shape)} for the state {state_name}"
                )
            self._check(f"state {state_name}", part)
        return tuple(sequence.state_in(part) for part in given)


def _check_checkpoint(checkpoint: Any, x: object, layer: str) -> None:
    if not isinstance(checkpoint, int) or isinstance(checkpoint, bool):
        raise TypeError(f"{layer}: checkpoint should be a number of time steps, got {checkpoint!r}")
    if checkpoint < 1:
        raise ValueError(f"{layer}: checkpoint should be at least one time step, got {checkpoint}")
    if isinstance(x, PackedSequence):
        raise ValueError(f"{layer}: checkpoint takes no packed sequence; give a padded one")


def _constructors(layer: type[Recurrent]) -> int:
    """How many constructors stand between a user's call and Recurrent's own, that one included."""
    above = layer.__mro__[: layer.__mro__.index(Recurrent) + 1]
    return sum("__init__" in vars(base) for base in above)


def _check_options(layer: type[nn.Module], cell: type[Cell], given: dict[str, Any]) -> None:
    known = [
        name
        for name in inspect.signature(layer).parameters
        if name not in ("cell", "cell_options", "options", "unknown")
    ]
    known += [name for name in (*_NOT_IN_TORCH, *cell.options()) if name not in known]
    for name in given:
        if name not in cell.options():
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            of = f" of {cell.__name__}" if "cell" in inspect.signature(layer).parameters else ""
            raise TypeError(f"{layer.__name__}{of} has no option {name!r}: {hint}")
