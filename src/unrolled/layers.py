"""Layers of any cell: stacking, directions, dropout, initial states, torch.nn's parameter names."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from unrolled import engines
from unrolled.asked import Asked
from unrolled.cell import Cell, whole
from unrolled.sequence import InputError, Sequence

State = Tensor | tuple[Tensor, ...]
States = tuple[Tensor, ...]
Run = Callable[[list[Cell], Tensor, list[States | None], list[int] | None], list[tuple[Tensor, States]]]


class CellModule(nn.Module):
    """Owns the parameters of cells; a cell's names get a suffix such as ``_l0_reverse``."""

    def __init__(self, cells: dict[str, Cell], device: Any, dtype: Any) -> None:
        super().__init__()
        self._cells = cells
        for suffix, cell in cells.items():
            for name, shape in cell.shapes().items():
                empty = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name + suffix, nn.Parameter(empty))
        self.reset_parameters()

    @property
    def _label(self) -> str:
        """The name of the class, for messages."""
        return type(self).__name__

    @property
    def _first(self) -> Cell:
        return next(iter(self._cells.values()))

    def chosen_options(self) -> dict[str, Any]:
        """The value of every option of the cell."""
        return self._first.chosen_options()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, in the order of registration, as its ``Param`` says."""
        for suffix, cell in self._cells.items():
            params = cell.params()
            for name in cell.shapes():
                params[name].fill(getattr(self, name + suffix), cell.hidden)

    def _bind(self, suffix: str) -> Cell:
        cell, held = self._cells[suffix], self._parameters
        tensors = {}
        for name in cell.shapes():  # getattr finds what a parametrization makes of a parameter
            found = held.get(name + suffix)
            tensors[name] = getattr(self, name + suffix) if found is None else found
        bound = cell.bind(tensors)
        bound.training = self.training
        return bound

    def _states(self, state: State | None, name: str) -> tuple[Tensor, ...]:
        """What a user gave as state, as a tuple with a tensor for each state of the cell."""
        names = tuple(self._first.state)
        one = len(names) == 1
        given: Any = (state,) if one else state
        expected = "a tensor" if one else f"a tuple of {len(names)} tensors"
        if not isinstance(given, (tuple, list)) or not all(isinstance(part, Tensor) for part in given):
            raise TypeError(
                f"{name}: Expected the state ({', '.join(names)}) to be {expected}, got {_describe(state)}"
            )
        if len(given) != len(names):
            raise InputError(
                f"{name}: Expected the state ({', '.join(names)}) to be {expected}, got {len(given)}"
            )
        return tuple(given)

    def _check(self, what: str, tensor: Tensor) -> None:
        """Raise where a tensor's dtype or device is not that of the parameters."""
        weight = next(iter(self._parameters.values()), None)
        if weight is None and (weight := next(self.parameters(), None)) is None:
            return
        if tensor.dtype == weight.dtype and tensor.device == weight.device:
            return
        what = f"{self._label} {what}"
        if tensor.device != weight.device:
            raise InputError(
                f"{what} is on {tensor.device} but the layer's parameters are on {weight.device}: move "
                f"one with .to({str(weight.device)!r})"
            )
        number = tensor.is_floating_point() or tensor.is_complex()
        if tensor.dtype != weight.dtype and not (number and torch.is_autocast_enabled(weight.device.type)):
            noun = "input" if what.endswith("input") else "state"
            raise InputError(
                f"{what} dtype ({tensor.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert {noun}: {noun}.to({weight.dtype})"
                + (f", or convert model: model.to({tensor.dtype})" if number else "")
            )

    def _run(
        self, run: Run, suffixes: list[str], steps: Tensor, starts: list[States | None], sizes: Any
    ) -> list[tuple[Tensor, States]]:
        """Run the cells of these suffixes; what goes wrong in a step is told by its cause."""
        cells = [self._bind(suffix) for suffix in suffixes]
        try:
            return run(cells, steps, starts, sizes)
        except RuntimeError as error:
            kinds: dict[tuple[Any, Any], str] = {}
            for cell, suffix in zip(cells, suffixes, strict=True):
                for name in cell.shapes():
                    held = getattr(cell, name)
                    kinds.setdefault((held.dtype, held.device), name + suffix)
            if len(kinds) <= 1:
                raise
            named = " and ".join(f"{name} ({kind[0]}, {kind[1]})" for kind, name in kinds.items())
            raise InputError(
                f"{self._label} has parameters of different kinds, {named}: convert all of them with .to()"
            ) from error


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
        self.bidirectional = bidirectional

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | None = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
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
                time; outputs there are zeros, and the final state is that after a row's own last step.
            resets: booleans, ``(T, B)``, or ``(B, T)`` with ``batch_first``, or ``(T,)``: the first steps of
                episodes or documents. Before such a step a row's state goes back to its initial state, and
                no gradient flows past. The direction that runs back does so on the same borders.
            all_states: whether to return every state of every time step too.
            checkpoint: for long sequences in training: keep no more for the backward than the states
                between segments of so many time steps, and compute each segment anew. Not for packed
                sequences.

        Returns:
            The output of the last layer, laid out as ``x`` with ``H × directions`` features, and the
            final state, laid out as ``state``. With ``all_states`` also a dictionary: of each state by name
            the values after every step of every layer and direction, ``(K, T, B, H)``, where ``T, B`` stand
            as in ``x``.

        Raises:
            TypeError, ValueError: an input or state that doesn't fit, with what was expected.
        """
        plain = lengths is None and resets is None and not all_states
        if plain and self._frozen is not None and (done := self._frozen(x, state)) is not None:
            return done
        run: Any = engines.run
        if checkpoint is not None:
            _check_checkpoint(checkpoint, x, self._label)
            run = functools.partial(run, checkpoint=checkpoint)
        if plain:
            return self.unroll(x, state, run)
        asked = Asked(self._label, Sequence.of(x, self.batch_first, self._label), every=all_states)
        if all_states:
            asked.check("all_states")
        if resets is not None:
            asked.mark(resets, len(self._stack[0]))
        if lengths is not None:
            asked.end(lengths, keep=checkpoint is not None)
        output, final = self.unroll(asked.sequence, state, functools.partial(asked.run, run))
        return (output, final, asked.states(list(self._first.state))) if all_states else (output, final)

    def unroll(
        self, x: Tensor | PackedSequence | Sequence, state: State | None, run: Run
    ) -> tuple[Tensor | PackedSequence, State]:
        """:meth:`forward` with ``run`` in the place of the engine, called once a layer."""
        sequence = x if isinstance(x, Sequence) else Sequence.of(x, self.batch_first, self._label)
        steps = sequence.steps
        self._check("input", steps)
        if steps.shape[-1] != self.input_size:
            raise InputError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {steps.shape[-1]}"
            )
        initial = None if state is None else self._initial(state, sequence)
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
        for name, default in shown.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)

    def _special_options(self) -> dict[str, Any]:
        """The options of the cell that differ from their defaults, for the repr."""
        defaults = self.cell.options()
        return {name: value for name, value in self.chosen_options().items() if value != defaults[name]}

    def _initial(self, state: State, sequence: Sequence) -> States:
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
    known += [name for name in cell.options() if name not in known]
    for name in given:
        if name not in cell.options():
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            of = f" of {cell.__name__}" if "cell" in inspect.signature(layer).parameters else ""
            raise TypeError(f"{layer.__name__}{of} has no option {name!r}: {hint}")


def _describe(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value)}"
    return f"a {type(value).__name__}"
