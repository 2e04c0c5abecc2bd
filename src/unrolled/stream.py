"""A sequence that comes piece by piece: the state is kept between calls."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.cell_module import CellModule, State
from unrolled.drop_in import DropInLayer
from unrolled.frozen import FrozenCalls
from unrolled.layers import Recurrent
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
    layers give the same bits on the native engine as for the whole of it at once (in bfloat16 the states are
    rounded between pieces). What else a model does over time, such as a convolution, sees one piece; a cell
    that the model calls step by step has its state from the model. Nothing records gradients. Weights are
    packed at the first call, and again where one was changed; a change behind torch's back
    (``weight.data.add_(1)``, NumPy) is not seen.

    A stream shares the tensors of the module and leaves it as it is: it can be used beside the stream, by
    other streams too. Calls of one stream follow one another, also from several threads.

    Args:
        module: one of our layers or torch.nn's, or a model that holds some.

    Raises:
        TypeError: it is no module.
        ValueError: it holds no recurrent layer, or one that reads sequences from their end too.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Stream takes a module, got {type(module).__name__}")
        layers = _layers_of(module)
        if not layers:
            raise ValueError(
                "Stream takes a recurrent layer or a model that holds some, "
                f"{type(module).__name__} holds none"
            )
        for name, layer in layers.items():
            if layer.bidirectional:
                raise ValueError(
                    f"Stream can't run {_told(name, layer)}: it is bidirectional and reads a sequence "
                    "from its end too, which is still to come"
                )
        self._module, self._layers, self._alone = module, layers, "" in layers
        self._twin: nn.Module | None = None
        self._made_of: list[Any] = []
        self._states: dict[str, State] = {}
        self._new: dict[str, State] = {}
        usual = type(module).forward in (Recurrent.forward, DropInLayer.forward)
        self._shuttle = Shuttle(module) if isinstance(module, Recurrent) and usual else None
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
            self._end("", self._module, args, made)
        else:
            made = self._streamed()(x, *args, **kwargs)
        if not self._new:
            raise RuntimeError(
                f"{type(self._module).__name__} called none of its recurrent layers: the stream has no "
                "state to go on with"
            )
        self._states.update(self._new)
        if not self._alone:
            return made
        return made[0] if len(made) == 2 else (made[0], *made[2:])  # every state, where that is asked for

    def _streamed(self) -> nn.Module:
        """The model with its layers hooked to this stream: another one, that shares its tensors and hooks."""
        model = self._module
        tensors = itertools.chain(model.parameters(), model.buffers())
        made_of = [model.training, *tensors]
        same = len(made_of) == len(self._made_of) and all(map(operator.is_, made_of, self._made_of))
        if self._twin is None or not same:
            twin = copy.deepcopy(model, _shared(model))
            for name, layer in _layers_of(twin).items():
                for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
                    setattr(layer, hooks, getattr(layer, hooks).copy())  # the user's own, and ours
                begin, end = functools.partial(self._begin, name), functools.partial(self._end, name)
                layer.register_forward_pre_hook(begin, with_kwargs=True)
                layer.register_forward_hook(end)
                if isinstance(layer, Recurrent):
                    layer._frozen = FrozenCalls(layer, renewed=True)
            self._twin, self._made_of = twin, made_of
        return self._twin

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

    def _end(self, name: str, layer: nn.Module, args: Any, result: Any) -> None:
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
        """The states after the last call, to go on from later: set it to what it was.

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


def _layers_of(module: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _LAYERS)}


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a copy of a model has in common with it, as :func:`copy.deepcopy` takes it: tensors, and hooks."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    found: dict[int, Any] = {}
    for module in model.modules():
        cells = module._cells.values() if isinstance(module, CellModule) else ()
        for holder in (module, *cells):
            for name, value in vars(holder).items():
                if isinstance(value, Tensor) or name.endswith(("_hooks", "_hooks_with_kwargs")):
                    shared.append(value)
        if isinstance(module, Recurrent) and module._frozen is not None:
            found[id(module._frozen)] = None
    return found | {id(value): value for value in shared}


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
    if weight.dtype != state.dtype:
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
