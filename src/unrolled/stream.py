"""A sequence that comes piece by piece: the state is kept between calls."""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.drop_in import DropInLayer
from unrolled.frozen import FrozenCalls
from unrolled.layers import Recurrent, State
from unrolled.sequence import InputError
from unrolled.shuttle import Shuttle, parts_of

_Layer = Recurrent | nn.RNNBase
_LAYERS = (Recurrent, nn.RNNBase)


class Stream:
    """Run a layer, or a model that holds some, over a sequence that comes piece by piece.

    ::

        stream = unrolled.Stream(model)
        for x in pieces:                # each of one time step or more, laid out as the model takes it
            y = stream(x)
        stream.reset()                  # the next piece begins another sequence

    Each call goes on from the states that the call before ended with. For a layer it returns the output at
    every step given, without the states; for a model what the model returns. However a sequence is cut, our
    layers give the same bits on the native engine as for the whole of it at once; what else a model does over
    time, such as a convolution, sees one piece. Nothing records gradients. Weights are packed at the first
    call, and again where one was changed; a change behind torch's back (``weight.data``, NumPy) is not seen.

    A stream shares the tensors of the module and nothing else: the module can be used beside it, by other
    streams too, and keeps the mode that it had when the stream was made. Calls of one stream follow one
    another, also from several threads.

    Args:
        module: one of our layers or torch.nn's, or a model that holds some.

    Raises:
        TypeError: it is no module.
        ValueError: it holds no recurrent layer, or one that reads sequences from their end too.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Stream takes a module, got {type(module).__name__}")
        shared = itertools.chain(module.parameters(), module.buffers())
        self._module = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
        self._layers = {
            name: layer for name, layer in self._module.named_modules() if isinstance(layer, _LAYERS)
        }
        if not self._layers:
            raise ValueError(
                "Stream takes a recurrent layer or a model that holds some, "
                f"{type(module).__name__} holds none"
            )
        for name, layer in self._layers.items():
            if layer.bidirectional:
                raise ValueError(
                    f"Stream can't run {_told(name, layer)}: it is bidirectional and reads a sequence "
                    "from its end too, which is still to come"
                )
            layer.register_forward_pre_hook(_Begin(self, name), with_kwargs=True)
            layer.register_forward_hook(_End(self, name))
            if isinstance(layer, Recurrent):
                layer._frozen = FrozenCalls(layer, renewed=True)
        self._states: dict[str, State] = {}
        self._new: dict[str, State] = {}
        self._shuttle: Shuttle | None = None
        top = self._layers.get("")
        if isinstance(top, Recurrent) and type(top).forward in (Recurrent.forward, DropInLayer.forward):
            self._shuttle = Shuttle(top)
        self._lock = threading.Lock()

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the next piece, given as the module takes it, without a state.

        Raises:
            ValueError: the piece has not as many rows as the states.
            RuntimeError: the model gives a layer a state itself, calls one twice, or calls none.
        """
        with self._lock:
            shuttle = self._shuttle
            if shuttle is not None:
                if not args and not kwargs and (output := shuttle.run(x, self._states)) is not None:
                    return output
                self._unload()
            self._new.clear()
            with torch.no_grad():
                made = self._module(x, *args, **kwargs)
            if not self._new:
                raise RuntimeError(
                    f"{type(self._module).__name__} called none of its recurrent layers: the stream has no "
                    "state to go on with"
                )
            self._states.update(self._new)
            return made[0] if "" in self._layers else made

    def reset(self, rows: Any = None) -> None:
        """Begin anew: the next call starts from zeros, or from what a layer starts from by itself.

        Args:
            rows: ``(batch,)`` booleans: only these rows begin anew, from zeros. None: all.

        Raises:
            ValueError: there are not as many rows.
        """
        with self._lock:
            self._unload()
            if rows is None:
                self._states.clear()
                return
            chosen = torch.as_tensor(rows, device="cpu")
            for name, state in self._states.items():
                parts = [part.clone() for part in parts_of(state)]
                for part in parts:
                    if part.dim() != 3 or chosen.dtype != torch.bool or chosen.shape != part.shape[1:2]:
                        many = (
                            f"{part.shape[1]} booleans, one a row"
                            if part.dim() == 3
                            else "no rows: one sequence"
                        )
                        raise InputError(
                            f"reset of {_told(name, self._layers[name])}: expected {many}, got "
                            f"{chosen.dtype} of the shape {tuple(chosen.shape)}"
                        )
                    part[:, chosen.to(part.device)] = 0
                self._states[name] = tuple(parts) if isinstance(state, tuple) else parts[0]

    @property
    def state(self) -> Any:
        """The states after the last call, to go on from later: set it to what it was.

        For a layer laid out as it returns them, None before the first call; for a model a dictionary of such
        by the names of its layers.
        """
        with self._lock:
            self._unload()
            found = {
                name: tuple(part.clone() for part in state) if isinstance(state, tuple) else state.clone()
                for name, state in self._states.items()
            }
        return found.get("") if "" in self._layers else found

    @state.setter
    def state(self, state: Any) -> None:
        given = ({} if state is None else {"": state}) if "" in self._layers else state
        if not isinstance(given, dict) or not given.keys() <= self._layers.keys():
            raise InputError(
                f"the state of a model is a dictionary by layers ({', '.join(self._layers)}), got "
                + (", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__)
            )
        with self._lock:
            self._unload()
            self._states = dict(given)

    def _unload(self) -> None:
        """Have the states here, and not where the shuttle left them."""
        if self._shuttle is not None and self._shuttle.at is not None:
            self._states[""] = self._shuttle.unload()


class _Begin:
    """Before a layer of a stream is called: it gets the state that it ended with."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name

    def __call__(self, layer: _Layer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        stream, name = self._stream, self._name
        if name in stream._new:
            raise RuntimeError(
                f"{_told(name, layer)} is called twice for one piece: a stream can't tell which state "
                "is whose"
            )
        if any(given is not None for given in (*args[1:2], kwargs.get("hx"), kwargs.get("state"))):
            raise RuntimeError(
                f"{_told(name, layer)} is given a state by its caller, and a stream has its own: leave it out"
            )
        state = stream._states.get(name)
        if state is None:
            return None
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        _check_rows(x, parts_of(state)[0], layer, name)
        rest = {key: value for key, value in kwargs.items() if key not in ("hx", "state")}
        return args[:1], rest | {"state" if isinstance(layer, Recurrent) else "hx": state}


class _End:
    """After a layer of a stream was called: its final state is kept."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name

    def __call__(self, layer: nn.Module, args: Any, result: Any) -> None:
        self._stream._new[self._name] = result[1]


def _told(name: str, layer: nn.Module) -> str:
    return f"{type(layer).__name__} {name!r}" if name else type(layer).__name__


def _check_rows(x: Any, state: Any, layer: _Layer, name: str) -> None:
    """Raise where a piece has another number of rows than the states; None where it is one sequence alone."""
    if isinstance(x, PackedSequence):
        rows: int | None = int(x.batch_sizes[0])
    elif isinstance(x, Tensor) and x.dim() in (2, 3):
        rows = x.shape[0 if layer.batch_first else 1] if x.dim() == 3 else None
    else:
        return  # the layer says what is wrong
    if not isinstance(state, Tensor) or state.dim() not in (2, 3):
        return
    kept = state.shape[1] if state.dim() == 3 else None
    if rows != kept:
        had, got = ("one sequence without a batch axis" if n is None else f"{n} rows" for n in (kept, rows))
        raise InputError(
            f"{_told(name, layer)}: the stream goes on with {had}, and this piece has {got}: reset() begins "
            "anew"
        )
