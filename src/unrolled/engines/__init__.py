"""Which engine runs a cell over time, and why. All of them give the numbers of the reference engine."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from unrolled.cell import Cell
from unrolled.engines import log, native, reference

__all__ = ["chosen", "engine", "reference", "run", "which"]

_NAMES = ("auto", "native", "reference")
_chosen: ContextVar[str] = ContextVar("engine", default="reference")


class engine:  # noqa: N801  # used as a function, and in a with statement
    """Choose the engine that runs cells: from this call on, or inside a ``with`` statement.

    ::

        unrolled.engine("auto")               # from here on, in this thread
        with unrolled.engine("native"):       # in this block
            output, state = layer(x)

    Args:
        name: ``"reference"``: the step as it stands, the choice where nothing is chosen; ``"auto"``:
            compiled loops where they can run, the reference engine elsewhere; ``"native"``:
            compiled loops, and an error where they can't run.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        if name not in _NAMES:
            raise ValueError(f"the engine should be {', '.join(map(repr, _NAMES))}, got {name!r}")
        self._before = _chosen.get()
        _chosen.set(name)

    def __enter__(self) -> engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.set(self._before)


def run(
    cell: Cell,
    x: Tensor,
    state: tuple[Tensor, ...],
    sizes: list[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a bound cell over a sequence on the engine that fits; see :func:`reference.run`.

    Raises:
        RuntimeError: ``engine("native")`` is chosen and can't take this call; the reason.
    """
    choice = _chosen.get()
    if choice == "reference":
        log.engine.info("%s: reference engine (it is chosen)", type(cell).__name__)
        return reference.run(cell, x, state, sizes, reverse)
    why, surprising, of_the_step = _obstacle(cell, x, state), False, True
    if why is None:
        try:
            compiled = native.compiled(cell, x.dtype)
            result = native.run(compiled, cell, x, state, sizes, reverse)
            log.engine.info(
                "%s: native engine (%s is chosen, nothing is in its way)", type(cell).__name__, choice
            )
            return result
        except (native.UnsupportedError, native.NoCompilerError) as error:
            why, surprising, of_the_step = str(error), True, isinstance(error, native.UnsupportedError)
    if choice == "native":
        raise RuntimeError(f"{type(cell).__name__} can't run on the native engine: {why}")
    log.engine.info("%s: reference engine (%s)", type(cell).__name__, why)
    result = reference.run(cell, x, state, sizes, reverse)
    if surprising:  # told once the step has run: a wrong step has raised its own error by now
        what = f"{type(cell).__name__} runs" if of_the_step else "recurrent layers run"
        log.announce(f"{what} on the reference engine, step by step: {why}")
    return result


def chosen() -> str:
    """The engine that is chosen here: ``"auto"``, ``"native"`` or ``"reference"``."""
    return _chosen.get()


def which(cell: Cell, x: Tensor, state: tuple[Tensor, ...], training: bool) -> tuple[str, str]:
    """Which engine ``"auto"`` gives a call to, and why; what the native one needs is compiled.

    Args:
        cell: with its parameters bound.
        x: ``(time, batch, input)``.
        state: the initial states, each ``(batch, size)``.
        training: whether a gradient is wanted.

    Returns:
        ``"native"`` or ``"reference"``, and the reason in words.
    """
    why = _obstacle(cell, x, state)
    if why is None:
        try:
            compiled = native.compiled(cell, x.dtype)
            if training:
                compiled.prepare_training()
            else:
                compiled.inference  # noqa: B018  # compiled at its first use
        except (native.UnsupportedError, native.NoCompilerError) as error:
            why = str(error)
    return ("native", "its step is compiled") if why is None else ("reference", why)


def _obstacle(cell: Cell, x: Tensor, state: tuple[Tensor, ...]) -> str | None:
    """Why the native engine doesn't take a call, in words; None where it does."""
    params = [getattr(cell, name) for name in cell.shapes()]
    tensors: list[Any] = [x, *state, *params]
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "the call is being compiled by torch"
    if torch._C._functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None:
        return "a torch transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return "its tensors are of a subclass of torch.Tensor"
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "its tensors are not on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is active"
    if x.dtype not in native.DTYPES or any(tensor.dtype != x.dtype for tensor in tensors):
        return f"it takes float32, float64 and bfloat16, not {x.dtype}"
    return None
