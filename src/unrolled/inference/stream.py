"""A sequence that comes piece by piece: the state is kept between calls."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.engines.torch_ops import transforms
from unrolled.inference.call_override import intercepted
from unrolled.inference.double_buffer import DoubleBuffer, hooked, parts_of
from unrolled.inference.frozen import FrozenCalls
from unrolled.layers.module import State
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import InputError
from unrolled.layers.single_step import SingleStep
from unrolled.layers.torch_layers import DropInLayer

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
    layers give the same bits on the native engine as for the whole of it at once (in bfloat16 the states are
    rounded between pieces). What else a model does over time, such as a convolution, sees one piece; a cell
    that the model calls step by step has its state from the model. Nothing records gradients. Weights are
    packed at the first call, and again where one was changed; a change behind torch's back
    (``weight.data.add_(1)``, NumPy) is not seen.

    A stream leaves the module as it is: it can be used beside the stream, by other streams and in other
    threads too. Calls of one stream follow one another, also from several threads.

    Args:
        module: one of our layers or torch.nn's, or a model that holds some.

    Raises:
        TypeError: it is no module.
        ValueError: it holds no recurrent layer, or one that reads sequences from their end too.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Stream takes a module, got {type(module).__name__}")
        self._module, self._layers = module, _checked(module)
        self._alone = "" in self._layers
        self._names: dict[int, str] = {}
        self._fast: dict[str, tuple[Recurrent, FrozenCalls]] = {}
        self._states: dict[str, State] = {}
        self._new: dict[str, State] = {}
        self._shuttle = DoubleBuffer(module) if _is_usual(module) else None
        self._lock = threading.RLock()
        _streams.add(self)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the next piece, given as the module takes it, without a state.

        Raises:
            ValueError: the piece has not as many rows as the states, or another dtype.
            RuntimeError: a layer is given a state by its caller, or called twice; or none is called.
        """
        with self._lock:
            shuttle = self._shuttle
            if shuttle is not None:
                if not args and not kwargs and (output := shuttle.run(x, self._states)) is not None:
                    return output
                self._unload()
            with torch.no_grad():
                return self._through(x, args, kwargs)

    def _through(self, x: Any, args: Any, kwargs: Any) -> Any:
        self._new.clear()
        if self._alone:
            args, kwargs = self._begin("", self._module, (x, *args), kwargs)
            made = self._module(*args, **kwargs)
            self._end("", made)
        else:
            layers = _checked(self._module)
            lost = self._states.keys() - layers.keys()
            if lost:
                raise RuntimeError(
                    f"{type(self._module).__name__} no longer holds {', '.join(sorted(lost))}, of which the "
                    "stream has a state: reset() begins anew"
                )
            self._layers = layers
            self._names = {id(layer): name for name, layer in self._layers.items()}
            with intercepted(self._layers.values(), self._step):
                made = self._module(x, *args, **kwargs)
        if not self._new:
            raise RuntimeError(
                f"{type(self._module).__name__} called none of its recurrent layers: the stream has no "
                "state to go on with"
            )
        self._states.update(self._new)
        if not self._alone:
            return made
        return made[0] if len(made) == 2 else (made[0], *made[2:])  # every state, where that is asked for

    def _step(self, layer: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """A call of a layer of the model, with the state that it ended with."""
        name = self._names[id(layer)]
        args, kwargs = self._begin(name, layer, args, kwargs)
        made, fast = None, self._fast.get(name)
        plain = len(args) == 1 and kwargs.keys() <= {"state"} and _is_usual(layer)
        if plain and not hooked(layer):
            if fast is None or fast[0] is not layer:
                fast = self._fast[name] = layer, FrozenCalls(layer, renewed=True)
            made = fast[1](args[0], kwargs.get("state"))
        if made is None:
            made = call(*args, **kwargs)
        self._end(name, made)
        return made

    def _begin(self, name: str, layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before a layer is called: it gets the state that it ended with."""
        if name in self._new:
            raise RuntimeError(
                f"{_told(name, layer)} is called twice for one piece: a stream can't tell which state "
                "is whose"
            )
        if any(given is not None for given in (*args[1:2], kwargs.get("hx"), kwargs.get("state"))):
            raise RuntimeError(
                f"{_told(name, layer)} is given a state by its caller, and a stream has its own: leave it out"
            )
        if kwargs.get("resets") is not None and kwargs.get("reset_state") is None:
            kwargs = kwargs | {"reset_state": "initial"}  # and not what the piece before ended with
        state = self._states.get(name)
        if state is None:
            return args, kwargs
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        _check_piece(x, parts_of(state)[0], layer, name)
        rest = {key: value for key, value in kwargs.items() if key not in ("hx", "state")}
        return args[:1], rest | {"state" if isinstance(layer, Recurrent) else "hx": state}

    def _end(self, name: str, result: Any) -> None:
        """After a layer was called: its final state is kept, out of the model's reach."""
        self._new[name] = _copied(result[1])

    def reset(self, rows: Any = None) -> None:
        """Begin anew: the next call starts from zeros, or from what a layer starts from by itself.

        Args:
            rows: ``(batch,)`` booleans: only these rows begin anew. None: all.

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
                for part in parts_of(state):
                    if part.dim() == 3 and chosen.dtype is torch.bool and chosen.shape == part.shape[1:2]:
                        continue
                    many = (
                        f"{part.shape[1]} booleans, one a row" if part.dim() == 3 else "no rows: one sequence"
                    )
                    raise InputError(
                        f"reset of {_told(name, self._layers[name])}: expected {many}, got "
                        f"{chosen.dtype} of the shape {tuple(chosen.shape)}"
                    )
            for name, state in self._states.items():
                self._states[name] = state = _copied(state)
                for part, first in zip(parts_of(state), _first_of(self._layers[name], state), strict=True):
                    part[:, chosen.to(part.device)] = first

    @property
    def state(self) -> Any:
        """The states after the last call, to be kept and set again to go on from there.

        For a layer laid out as it returns them, None before the first call; for a model a dictionary of such
        by the names of its layers.
        """
        with self._lock:
            self._unload()
            found = {name: _copied(state) for name, state in self._states.items()}
        return found.get("") if self._alone else found

    @state.setter
    def state(self, state: Any) -> None:
        given = ({} if state is None else {"": state}) if self._alone else state
        if not isinstance(given, dict) or not given.keys() <= self._layers.keys():
            raise InputError(
                f"the state of a model is a dictionary by layers ({', '.join(self._layers)}), got "
                + (", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__)
            )
        for name, part in given.items():
            if not parts_of(part) or not all(isinstance(tensor, Tensor) for tensor in parts_of(part)):
                raise InputError(
                    f"{_told(name, self._layers[name])}: a state is a tensor or a tuple of tensors, got "
                    f"{type(part).__name__}"
                )
        with self._lock:
            self._unload()
            self._states = {name: _copied(part) for name, part in given.items()}

    def __reduce__(self) -> str:
        raise TypeError("a Stream can't be copied or pickled: make one of the module, and hand on its state")

    def _unload(self) -> None:
        """Have the states here, and not where the shuttle left them."""
        if self._shuttle is not None and self._shuttle.at is not None:
            self._states[""] = self._shuttle.unload()


def _checked(module: nn.Module) -> dict[str, Any]:
    """The layers of a model by name, of which a stream can be made."""
    layers: dict[str, Any] = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, _LAYERS)
    }
    if not layers:
        single = isinstance(module, (SingleStep, nn.RNNCellBase))
        raise ValueError(
            f"Stream takes a recurrent layer or a model that holds some, {type(module).__name__} "
            + ("is a single step" if single else "holds none")
        )
    for name, layer in layers.items():
        if layer.bidirectional:
            raise ValueError(
                f"Stream can't run {_told(name, layer)}: it is bidirectional and reads a sequence from its "
                "end too, which a stream hasn't seen yet"
            )
    return layers


def _is_usual(module: nn.Module) -> TypeGuard[Recurrent]:
    """Whether a module is a layer of ours that computes what its class does."""
    return isinstance(module, Recurrent) and type(module).forward in (Recurrent.forward, DropInLayer.forward)


def _first_of(layer: _Layer, state: State) -> list[Any]:
    """What the rows of a layer's states start from."""
    if isinstance(layer, Recurrent) and layer.initial_state == "learned":
        return [part.detach() for part in layer._learned(1)]
    return [0.0 for _ in parts_of(state)]


def _copied(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(part.detach().clone() for part in state)
    return state.detach().clone()


def _told(name: str, layer: nn.Module) -> str:
    return f"{type(layer).__name__} {name!r}" if name else type(layer).__name__


def _check_piece(x: Any, state: Any, layer: _Layer, name: str) -> None:
    """Raise where a piece has another number of rows than the states, or another dtype."""
    rows: int | None
    if isinstance(x, PackedSequence):
        rows = int(x.batch_sizes[0])
    elif isinstance(x, Tensor) and x.dim() in (2, 3):
        rows = x.shape[0 if layer.batch_first else 1] if x.dim() == 3 else None
    else:
        return  # the layer says what is wrong
    if state.dim() not in (2, 3):
        return
    kept = state.shape[1] if state.dim() == 3 else None
    had, got = ("one sequence without a batch axis" if n is None else f"{n} rows" for n in (kept, rows))
    weight = next(layer.parameters(), state)
    if weight.dtype != state.dtype and not transforms.autocasts(weight.device.type):
        had, got = f"states of {state.dtype}", f"weights of {weight.dtype}"
    if had != got:
        raise InputError(
            f"{_told(name, layer)}: the stream goes on with {had}, and this piece has {got}: reset() begins "
            "anew"
        )


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


def _after_fork() -> None:
    for stream in list(_streams):
        stream._lock = threading.RLock()  # a thread that the child doesn't have may hold the other one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
