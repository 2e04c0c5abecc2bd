"""The order in which a model calls its recurrent layers and the modules between them."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.rnn import PackedSequence

from unrolled.tracing.trace import Trace

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
        initial_state: The shapes of the given initial state; None if none was given.
        final_state: The shapes of the final state; None for other modules.
        not_recorded: Why a recurrent layer's call couldn't be recorded, or None.
    """

    name: str
    module: str
    is_recurrent: bool
    number: int
    input: str
    output: str
    initial_state: str | None = None
    final_state: str | None = None
    not_recorded: str | None = None
    _trace: weakref.ref[Trace] | None = None

    @property
    def trace(self) -> Trace | None:
        """The trace of the call; None if the record doesn't have it, or no longer."""
        return None if self._trace is None else self._trace()

    def __str__(self) -> str:
        return f"{self.name or type(self).__name__}: {self.module}, {self.input} → {self.output}"


class CallOrder:
    """The calls of a model's modules in one thread, since the last call of the model itself began.

    Args:
        model: The model.
        recurrent: The recurrent layers by name. They and their submodules are added with :meth:`add`.
    """

    def __init__(self, model: nn.Module, recurrent: Iterable[str]) -> None:
        self._model = model
        self.calls: deque[ModuleCall] = deque(maxlen=_MAX_CALLS)
        self._numbers = Counter[str]()
        self._begins = False  # whether the model itself has been called since the last call
        inside = tuple(f"{name}." if name else "" for name in recurrent)
        self._names = {
            id(module): name
            for name, module in model.named_modules()
            if not f"{name}.".startswith(inside) and next(module.children(), None) is None
        }

    def observe(self) -> Callable[[], None]:
        """Add the calls of this thread's other modules, with hooks that aren't part of any module.

        Returns:
            A function that removes the hooks.
        """
        thread = threading.get_ident()

        def is_observed() -> bool:
            # A backward pass may repeat calls of the forward pass.
            return threading.get_ident() == thread and torch._C._current_graph_task_id() == -1

        def before(module: nn.Module, _: Any) -> None:
            if module is self._model and is_observed():
                self._begins = True

        def after(module: nn.Module, args: Any, output: Any) -> None:
            name = self._names.get(id(module))
            if name is not None and is_observed():
                self.add(name, module, args, output, is_recurrent=False)

        handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def add(self, name: str, module: nn.Module, args: Any, output: Any, **others: Any) -> None:
        """Add a call.

        Args:
            name: Name of the module.
            module: The module.
            args: The inputs.
            output: What the call returned.
            others: Other attributes of the :class:`ModuleCall`.
        """
        if self._begins:
            self.calls.clear()
            self._begins = False
        self._numbers[name] += 1
        self.calls.append(
            ModuleCall(
                name=name,
                module=" ".join(repr(module).split()),
                number=self._numbers[name],
                input=format_shape(args),
                output=format_shape(output),
                **others,
            )
        )


def format_shape(value: Any) -> str:
    """Return the shape of a tensor as text; of several values, that of each."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, PackedSequence):
        return f"packed {(len(value.batch_sizes), int(value.batch_sizes[0]), *value.data.shape[1:])}"
    if isinstance(value, (tuple, list)):
        return ", ".join(format_shape(part) for part in value if part is not None)
    return type(value).__name__
