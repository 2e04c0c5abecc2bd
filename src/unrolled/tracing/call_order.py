"""The order in which a model calls its recurrent layers and the modules between them."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.weak import WeakTensorKeyDictionary

from unrolled.engines._torch_private import current_graph_task_id
from unrolled.layers.tensors import tensors
from unrolled.tracing.call_sequence import CallSequence
from unrolled.tracing.hooks import ModuleHook
from unrolled.tracing.trace import Trace

# These have a faster way to run in eval mode, which a hook on one of their modules would turn off.
_NOT_OBSERVED = (nn.TransformerEncoderLayer, nn.MultiheadAttention, torch.jit.ScriptModule)
_MAX_CALLS = 1000  # that are kept, the last ones


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """A call of a recurrent layer, or of a module without children, such as a linear layer.

    Attributes:
        name: Name of the module in the model.
        module: The module as text, such as ``"LSTM(8, 16)"``.
        is_recurrent: Whether it is a recurrent layer.
        number: The number of this call of the module in the block, counted from 1.
        input, output: The shapes, such as ``"(7, 3, 8)"``.
        input_from: The module whose output the input is, such as ``"encoder"`` or ``"encoder, call 2"``. None
            if it was computed in another way.
        initial_state: The shapes of the given initial state; None if none was given.
        state_from: The layer whose final state the initial state is, or None.
        final_state: The shapes of the final state; None for other modules.
        not_recorded: Why a recurrent layer's call couldn't be recorded, or None.
        steps: The number of calls, if several were joined: the steps of a sequence, and those of the other
            modules in the same loop.
    """

    name: str
    module: str
    is_recurrent: bool
    number: int
    input: str
    output: str
    input_from: str | None = None
    initial_state: str | None = None
    state_from: str | None = None
    final_state: str | None = None
    not_recorded: str | None = None
    steps: int = 1
    _sequence: weakref.ref[CallSequence] | None = None

    @property
    def trace(self) -> Trace | None:
        """The trace of the call; None if the record doesn't have it, or no longer."""
        sequence = None if self._sequence is None else self._sequence()
        return None if sequence is None else sequence.trace

    def __str__(self) -> str:
        times = f"{self.steps} × " if self.steps > 1 else ""
        return f"{self.name or type(self).__name__}: {self.module}, {times}{self.input} → {self.output}"

    def is_repeated_by(self, other: ModuleCall) -> bool:
        """Whether another call is one of the same module, with the same shapes."""
        return (self.name, self.input, self.output) == (other.name, other.input, other.output)


class CallOrder:
    """The calls of a model's modules in one thread, since the last call of the model itself began.

    Args:
        model: The model.
        recurrent: The recurrent layers by name. They are added with :meth:`add_recurrent`.
    """

    def __init__(self, model: nn.Module, recurrent: Iterable[str]) -> None:
        self._model = model
        self.calls: deque[ModuleCall] = deque(maxlen=_MAX_CALLS)
        self._numbers = Counter[str]()
        self._sources: Any = WeakTensorKeyDictionary()  # the call that returned a tensor, while it exists
        self._begins = False  # whether the model itself has been called since the last call
        self._in_loop = False  # whether the last call of a recurrent module continued a sequence
        self.model_calls = 0
        closed = [name for name, module in model.named_modules() if isinstance(module, _NOT_OBSERVED)]
        inside = tuple(f"{name}." if name else "" for name in (*recurrent, *closed))
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if not f"{name}.".startswith(inside) and next(module.children(), None) is None
        }
        self._names = {id(module): name for name, module in self._modules.items()}

    def observe(self) -> Callable[[], None]:
        """Add the calls of this thread's other modules.

        Modules inside of torch.nn's transformer layers are left out.

        Returns:
            A function that removes the hooks.
        """
        thread = threading.get_ident()

        def is_observed() -> bool:
            # A backward pass may repeat calls of the forward pass.
            return threading.get_ident() == thread and current_graph_task_id() == -1

        def before(module: nn.Module, _: Any) -> None:
            if module is self._model and is_observed():
                self._begins = True
                self.model_calls += 1

        def after(module: nn.Module, args: Any, output: Any) -> None:
            name = self._names.get(id(module))
            if name is not None and is_observed():
                self.add(name, module, args, output)

        handles: list[Any] = [
            module.register_forward_hook(ModuleHook(after, 3)) for module in self._modules.values()
        ]
        handles.append(self._model.register_forward_pre_hook(ModuleHook(before, 2)))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def add(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Add a call of a module that isn't a recurrent layer.

        Args:
            name: Name of the module.
            module: The module.
            args: The inputs.
            output: What the call returned.
        """
        call = self._new_call(name, module, args, output, is_recurrent=False)
        if not (self._in_loop and self._merge(call)):
            self.calls.append(call)
        self._set_source(name, output)

    def add_recurrent(
        self,
        name: str,
        module: nn.Module,
        call: tuple[Any, Any],
        result: tuple[Any, Any],
        sequence: CallSequence | None,
        not_recorded: str | None,
    ) -> None:
        """Add a call of a recurrent layer.

        Args:
            name: Name of the module.
            module: The module.
            call: The input, and the initial state or None.
            result: The output and the final state.
            sequence: The call, and those that it continues, if it was recorded.
            not_recorded: Why it wasn't.
        """
        x, state = call
        self._in_loop = sequence is not None and sequence.length > 1
        if self._in_loop:
            self._numbers[name] -= 1  # the number of the sequence
        entry = self._new_call(
            name,
            module,
            x,
            result[0],
            is_recurrent=True,
            initial_state=None if state is None else format_shape(state),
            state_from=self._source(state),
            final_state=format_shape(result[1]),
            not_recorded=not_recorded,
            steps=1 if sequence is None else sequence.length,
            _sequence=None if sequence is None else weakref.ref(sequence),
        )
        if not (self._in_loop and self._continue_sequence(entry)):
            self.calls.append(entry)
        self._set_source(name, result)

    def _new_call(self, name: str, module: nn.Module, x: Any, output: Any, **others: Any) -> ModuleCall:
        if self._begins:
            self.calls.clear()
            self._begins = False
        self._numbers[name] += 1
        return ModuleCall(
            name=name,
            module=" ".join(repr(module).split()),
            number=self._numbers[name],
            input=format_shape(x),
            output=format_shape(output),
            input_from=self._source(x),
            **others,
        )

    def _continue_sequence(self, call: ModuleCall) -> bool:
        """Join a step with those before it, and the other modules' calls since then with earlier ones.

        Returns:
            Whether the steps before are among the calls.
        """
        found = [
            k for k, one in enumerate(self.calls) if one.is_recurrent and one._sequence == call._sequence
        ]
        if not found:
            return False
        start = found[-1]
        self.calls[start] = replace(self.calls[start], steps=call.steps, final_state=call.final_state)
        later = [self.calls.pop() for _ in range(len(self.calls) - start - 1)]
        for one in reversed(later):
            if one.is_recurrent or not self._merge(one):
                self.calls.append(one)
        return True

    def _merge(self, call: ModuleCall) -> bool:
        """Join a call with the last one of the same module and shapes; return whether there is one."""
        for k in range(len(self.calls) - 1, -1, -1):
            if not self.calls[k].is_recurrent and self.calls[k].is_repeated_by(call):
                self.calls[k] = replace(self.calls[k], steps=self.calls[k].steps + call.steps)
                return True
        return False

    def _source(self, value: Any) -> str | None:
        """Return the call that returned all tensors of a value, or None."""
        sources = {self._sources.get(tensor) for tensor in tensors(value)}
        return sources.pop() if len(sources) == 1 else None

    def _set_source(self, name: str, result: Any) -> None:
        number = self._numbers[name]
        for tensor in tensors(result):
            self._sources[tensor] = name if number == 1 else f"{name}, call {number}"


def format_shape(value: Any) -> str:
    """Return the shape of a tensor as text; of several values, that of each."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, PackedSequence):
        return f"packed {(len(value.batch_sizes), int(value.batch_sizes[0]), *value.data.shape[1:])}"
    if isinstance(value, (tuple, list)):
        return ", ".join(format_shape(part) for part in value if part is not None)
    return type(value).__name__
