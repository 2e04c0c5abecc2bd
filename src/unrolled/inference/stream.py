"""Streaming inference: a sequence that arrives in chunks, with the state kept between calls."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.engines import memory
from unrolled.engines.fork_safety import renew_after_fork
from unrolled.engines.torch_ops import transforms
from unrolled.inference.call_override import override_calls
from unrolled.inference.custom_calls import has_custom_call
from unrolled.inference.double_buffer import DoubleBuffer, state_tensors
from unrolled.inference.frozen import FrozenCalls, FrozenCell
from unrolled.layers import initial_states
from unrolled.layers.cell_layers import SingleStepModule, first_state, is_single_step
from unrolled.layers.draws import DrawPosition, continue_draws
from unrolled.layers.module import State
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import InputError, check_values
from unrolled.layers.single_step import SingleStep

_WITHOUT_STREAM = (
    ". If the model keeps or changes its state itself, call it without a stream, in unrolled.frozen(model)"
)
_Layer = Recurrent | nn.RNNBase | SingleStepModule
_LAYERS = (Recurrent, nn.RNNBase)


class Stream:
    """Run a layer, or a model that contains layers, over a sequence that arrives in chunks.

    ::

        stream = unrolled.Stream(model)
        for x in chunks:                # one or more time steps each, with the layout that the model takes
            y = stream(x)
        stream.reset()                  # the next chunk starts a new sequence

    Each call continues from the final states of the previous call. For a layer, it returns the output at each
    time step of the chunk, without the states. For a model, it returns what the model returns. No gradients
    are recorded.

    On the native engine, the outputs of our layers are bit-identical to those of the whole sequence, however
    it is cut into chunks. In bfloat16, the states are rounded between chunks. If a cell draws random numbers,
    the first chunk draws the seed, and later chunks continue the numbers until :meth:`reset` is called for
    the whole batch.

    A single-step cell takes one time step per call, and its output is the new hidden state.

    Only recurrent layers and cells carry a state. Other modules that look at several time steps, such as a
    convolution, see one chunk. A model may call a cell, or a layer, step by step: its first call in a chunk,
    without a state or with zeros, continues from the previous chunk. Each later call must be given the state
    that the call before returned. A model that keeps its state itself, from one call of the model to the
    next, needs no stream: call it inside of :class:`unrolled.frozen`.

    Weights are packed at the first call, and again after a weight has changed. A change that torch can't
    detect (``weight.data.add_(1)``, NumPy) has no effect.

    The module itself is not modified. It can still be used directly, by other streams and in other threads.
    Calls of one stream from several threads run one after another.

    Args:
        module: A layer or single-step cell of unrolled or torch.nn, or a model that contains some.

    Raises:
        TypeError: If ``module`` is not a torch module.
        ValueError: If it contains no recurrent layer, or a bidirectional one.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Stream expects a torch.nn.Module, got {type(module).__name__}")
        self._module, self._layers = module, _find_layers(module)
        self._is_layer = "" in self._layers
        self._names: dict[int, str] = {}  # of layers, by id
        self._frozen_calls: dict[str, tuple[nn.Module, FrozenCalls | FrozenCell]] = {}
        self._states: dict[str, State] = {}
        self._new_states: dict[str, State] = {}  # of the current call
        self._positions: dict[str, DrawPosition] = {}
        self._double_buffer = DoubleBuffer(module) if isinstance(module, Recurrent) else None
        self._lock = threading.RLock()
        _streams.add(self)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the next chunk. The arguments are those of the module, without a state.

        Raises:
            ValueError: If the chunk has another batch size or dtype than the states.
            RuntimeError: If a layer is given a state that it didn't return in this call, or is called twice
                without one, or no layer is called.
        """
        with self._lock:
            double_buffer = self._double_buffer
            if double_buffer is not None:
                if not args and not kwargs and (output := double_buffer.run(x, self._states)) is not None:
                    return output
                self._unload_double_buffer()
            with torch.no_grad():
                return self._run_module(x, args, kwargs)

    def _run_module(self, x: Any, args: Any, kwargs: Any) -> Any:
        self._new_states.clear()
        if self._is_layer:
            result = self._call_layer(self._module, self._module, (x, *args), kwargs)
        else:
            layers = _find_layers(self._module)
            removed = self._states.keys() - layers.keys()
            if removed:
                raise RuntimeError(
                    f"{type(self._module).__name__} no longer contains {', '.join(sorted(removed))}, but the "
                    "stream holds a state of it: call reset() to start a new sequence"
                )
            self._layers = layers
            self._names = {id(layer): name for name, layer in layers.items()}
            for name in self._frozen_calls.keys() - layers.keys():
                del self._frozen_calls[name]
            with override_calls(self._layers.values(), self._call_layer):
                result = self._module(x, *args, **kwargs)
        if not self._new_states:
            raise RuntimeError(
                f"{type(self._module).__name__} called none of its recurrent layers, so the stream has no "
                "state to continue from"
            )
        self._states.update(self._new_states)
        if not self._is_layer:
            return result
        if is_single_step(self._module):
            return first_state(result)
        return result[0] if len(result) == 2 else (result[0], *result[2:])  # with all_states=True, those too

    def _call_layer(self, layer: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """Run a layer that the model calls, starting from its previous final state."""
        name = self._names.get(id(layer), "")
        args, kwargs = self._add_state(name, layer, args, kwargs)
        result = self._call_frozen(name, layer, args, kwargs)
        if result is None:
            with self._continued_draws(name):
                result = call(*args, **kwargs)
        # A copy, because the model may change the original.
        self._new_states[name] = _copy_state(result if is_single_step(layer) else result[1])
        return result

    def _call_frozen(self, name: str, layer: Any, args: Any, kwargs: Any) -> Any:
        """Run a layer with packed weights; return None if it must run as usual."""
        is_ours = isinstance(layer, (Recurrent, SingleStep))
        if len(args) not in (1, 2) or not is_ours or kwargs.keys() - {"state"} or has_custom_call(layer):
            return None
        cached = self._frozen_calls.get(name)
        if cached is None or cached[0] is not layer:
            frozen_calls = FrozenCell if isinstance(layer, SingleStep) else FrozenCalls
            cached = self._frozen_calls[name] = layer, frozen_calls(layer, allow_changes=True)
        return cached[1](args[0], args[1] if len(args) == 2 else kwargs.get("state"))

    def _continued_draws(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Let a call of a layer continue the random numbers of its previous call."""
        return continue_draws(self._positions.setdefault(name, DrawPosition()))

    def _add_state(self, name: str, layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of a layer's call with the stream's state added."""
        states = (*args[1:2], kwargs.get("hx"), kwargs.get("state"))
        given = next((state for state in states if state is not None), None)
        if name in self._new_states:
            if given is not None and _same_states(given, self._new_states[name]):
                return args, kwargs  # the next step of the chunk
            problem = (
                "called twice for one chunk" if given is None else "given another state than it returned"
            )
            raise RuntimeError(
                f"{_describe(name, layer)} is {problem}, so the stream can't tell which state belongs to "
                f"which call{'' if given is None else _WITHOUT_STREAM}"
            )
        if given is not None and (self._is_layer or not _is_zero(given, layer)):
            raise RuntimeError(
                f"{_describe(name, layer)} is given a state by its caller, but the stream provides the "
                f"state: call the layer without one{_WITHOUT_STREAM}"
            )
        if kwargs.get("resets") is not None and kwargs.get("reset_state") is None:
            # By default, resets would go back to the state given, which is the end of the previous chunk.
            kwargs = kwargs | {"reset_state": "initial"}
        state = self._states.get(name)
        if state is None:
            return args, kwargs
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        _check_chunk(x, state_tensors(state)[0], layer, name)
        if is_single_step(layer):
            return (x, state), {}
        other_kwargs = {key: value for key, value in kwargs.items() if key not in ("hx", "state")}
        return args[:1], other_kwargs | {"state" if isinstance(layer, Recurrent) else "hx": state}

    def reset(self, rows: Any = None) -> None:
        """Start a new sequence: the next call starts from zeros, or from the layer's own initial state.

        Args:
            rows: Booleans of shape ``(batch,)``: reset only these rows of the batch. If None, reset all.

        Raises:
            ValueError: If ``rows`` has another shape or dtype.
        """
        with self._lock:
            self._unload_double_buffer()
            if rows is None:
                self._states.clear()
                self._positions.clear()
                return
            if isinstance(rows, Tensor):
                check_values("reset: rows", rows)
            mask = torch.as_tensor(rows, device="cpu")
            for name, state in self._states.items():
                for tensor in state_tensors(state):
                    row_count = _row_count(tensor, self._layers[name])
                    if mask.dtype is torch.bool and mask.shape == (row_count,):
                        continue
                    expected = (
                        "no rows, since the state has no batch axis"
                        if row_count is None
                        else f"{row_count} booleans, one per row"
                    )
                    raise InputError(
                        f"reset of {_describe(name, self._layers[name])}: expected {expected}, got a tensor "
                        f"of {mask.dtype} with shape {tuple(mask.shape)}"
                    )
            for name, state in self._states.items():
                self._states[name] = state = _copy_state(state)
                initial_values = _initial_values(self._layers[name], state)
                for tensor, initial in zip(state_tensors(state), initial_values, strict=True):
                    tensor[..., mask.to(tensor.device), :] = initial

    @property
    def state(self) -> Any:
        """The states after the last call. Set it to continue from these states later.

        For a layer or cell, the state as it returns it, or None before the first call. For a model, a
        dictionary of states by layer name.
        """
        with self._lock:
            self._unload_double_buffer()
            states = {name: _copy_state(state) for name, state in self._states.items()}
        return states.get("") if self._is_layer else states

    @state.setter
    def state(self, state: Any) -> None:
        states = ({} if state is None else {"": state}) if self._is_layer else state
        if not isinstance(states, dict) or not states.keys() <= self._layers.keys():
            raise InputError(
                f"the state of a model is a dictionary by layer name ({', '.join(self._layers)}), got "
                + (", ".join(map(str, states)) if isinstance(states, dict) else type(states).__name__)
            )
        for name, part in states.items():
            tensors = state_tensors(part)
            if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise InputError(
                    f"{_describe(name, self._layers[name])}: a state is a tensor or a tuple of tensors, got "
                    f"{type(part).__name__}"
                )
            memory.check_dense(_describe(name, self._layers[name]), tensors)
            memory.check_not_freed(tensors)
        with self._lock:
            self._unload_double_buffer()
            self._states = {name: _copy_state(part) for name, part in states.items()}

    def __reduce__(self) -> str:
        raise TypeError(
            "a Stream can't be copied or pickled: create a new Stream of the module and set its state"
        )

    def _unload_double_buffer(self) -> None:
        """Move the states from the double buffer, if they are there, to the dictionary of states."""
        if self._double_buffer is not None and self._double_buffer.index is not None:
            self._states[""] = self._double_buffer.take_state()


def _find_layers(module: nn.Module) -> dict[str, Any]:
    """Return the recurrent layers of a module by name.

    Raises:
        ValueError: If there is none, or one is bidirectional.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _LAYERS) or is_single_step(layer)
    }
    if not layers:
        raise ValueError(
            f"Stream expects a recurrent layer or a model that contains one, but {type(module).__name__} "
            "contains none"
        )
    for name, layer in layers.items():
        if not is_single_step(layer) and layer.bidirectional:
            raise ValueError(
                f"Stream can't run {_describe(name, layer)}: it is bidirectional, so it also reads the "
                "sequence from its end, which hasn't arrived yet"
            )
    return layers


def _row_count(state: Tensor, layer: _Layer) -> int | None:
    """Return the batch size of a state; None if it has no batch axis."""
    has_rows = state.dim() == (2 if is_single_step(layer) else 3)
    return state.shape[-2] if has_rows else None


def _same_states(given: Any, returned: Any) -> bool:
    pairs = zip(state_tensors(given), state_tensors(returned), strict=False)
    return all(isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _is_zero(state: Any, layer: _Layer) -> bool:
    """Whether a state is the one that a layer begins with if it is given none."""
    if getattr(layer, "initial_state", "zeros") != "zeros":
        return False
    return all(isinstance(part, Tensor) and not part.any() for part in state_tensors(state))


def _initial_values(layer: _Layer, state: State) -> list[Any]:
    """Return the values that each state of a layer is reset to."""
    if isinstance(layer, Recurrent) and layer.initial_state == "learned":
        return [tensor.detach() for tensor in initial_states.learned(layer, 1)]
    return [0.0 for _ in state_tensors(state)]


def _copy_state(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(tensor.detach().clone() for tensor in state)
    return state.detach().clone()


def _describe(name: str, layer: nn.Module) -> str:
    """Return the class of a layer and its name in the model, for messages."""
    return f"{type(layer).__name__} {name!r}" if name else type(layer).__name__


def _check_chunk(x: Any, state: Any, layer: _Layer, name: str) -> None:
    """Raise InputError if a chunk has another batch size or dtype than the states."""
    rows: int | None
    if isinstance(x, PackedSequence) and x.batch_sizes.dim() == 1 and len(x.batch_sizes):
        rows = int(x.batch_sizes[0])
    elif isinstance(x, Tensor) and is_single_step(layer) and x.dim() in (1, 2):
        rows = x.shape[0] if x.dim() == 2 else None
    elif isinstance(x, Tensor) and not is_single_step(layer) and x.dim() in (2, 3):
        rows = x.shape[0 if layer.batch_first else 1] if x.dim() == 3 else None
    else:
        return  # the layer raises a better error
    if state.dim() - (not is_single_step(layer)) not in (1, 2):
        return
    state_rows = _row_count(state, layer)
    expected, got = ("no batch axis" if n is None else f"{n} rows" for n in (state_rows, rows))
    got = f"this chunk has {got}"
    weight = next(layer.parameters(), state)
    if weight.dtype != state.dtype and not transforms.autocast_enabled(weight.device.type):
        expected, got = f"dtype {state.dtype}", f"the weights have {weight.dtype}"
    elif state_rows == rows:
        return
    raise InputError(
        f"{_describe(name, layer)}: the stream's states have {expected}, but {got}: call reset() to start a "
        "new sequence"
    )


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@renew_after_fork
def _renew_locks() -> None:
    for stream in list(_streams):
        stream._lock = threading.RLock()
