"""Which engine runs a cell over time, and why. All of them give the numbers of the reference engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import WrapperSpec, wrap
from unrolled.engines import log, reference, run_compiled
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.native import registry
from unrolled.engines.native.compiled_cell import DTYPES
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.engines.torch_ops import transforms

States = tuple[Tensor, ...]

_NAMES = ("auto", "native", "reference")
_chosen: ContextVar[str] = ContextVar("engine", default="auto")


class engine:  # noqa: N801  # used as a function, and in a with statement
    """Choose the engine that runs cells: from this call on, or inside a ``with`` statement.

    ::

        unrolled.engine("reference")          # from here on, in this thread
        with unrolled.engine("native"):       # in this block
            output, state = layer(x)

    Args:
        name: ``"auto"``, the choice where nothing is chosen: compiled loops where they can run, the
            reference engine elsewhere; ``"native"``: compiled loops, and an error where they can't run;
            ``"reference"``: the step as it stands, one time step after another.

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


def chosen() -> str:
    """The engine that is chosen: ``"auto"``, ``"native"`` or ``"reference"``."""
    return _chosen.get()


def run(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | None = None,
    checkpoint: int | None = None,
    chains: Sequence[WrapperSpec] = ((), ()),
    columns: Tensor | None = None,
) -> list[tuple[Tensor, States]]:
    """Run bound cells over a sequence on the engine that fits; see :func:`reference.run`.

    Args:
        cells: the first runs from the first time step to the last, a second one back.
        x: ``(time, batch, input)``; with ``sizes`` ``(sum of sizes, input)``, the steps in a row.
        states: the initial states of each cell, each ``(batch, size)``; None: zeros.
        sizes: how many rows have a step at each time, never growing; None: all of them.
        checkpoint: keep no more for the backward than the states between segments of so many steps, and
            run each segment forward anew; None: keep what the backward reads. Not with ``sizes``.
        chains: for each cell the variants around it, of which the states are.
        columns: what variants read beside x, laid out as it is.

    Returns:
        For each cell the first state after every step, laid out as ``x``, and each row's final states.

    Raises:
        RuntimeError: ``engine("native")`` is chosen and can't take this call; the reason.
    """
    if transforms.may_autocast() and transforms.autocasts(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            cells, x, states = transforms.in_autocast(cells, x, states)
            columns = None if columns is None else columns.to(x.dtype)
            return run(cells, x, states, sizes, checkpoint, chains, columns)
    if transforms.active():
        return _transformed(cells, _joined(x, columns), states, sizes, checkpoint, chains)
    if chains[0]:
        cells = [wrap(cell, chain) for cell, chain in zip(cells, chains, strict=False)]
    choice = _chosen.get()
    if choice == "reference":
        log.engine.info("%s: reference engine (it is chosen)", type(cells[0].innermost).__name__)
        return _by_reference(cells, _joined(x, columns), states, sizes, checkpoint)
    why, surprising, of_the_step = _obstacle(cells, x, states), False, True
    name = type(cells[0].innermost).__name__
    if why is None:
        try:
            result = run_compiled.run(cells, x, states, sizes, checkpoint, columns)
            log.engine.info("%s: native engine (%s is chosen, nothing is in its way)", name, choice)
            return result
        except (UnsupportedError, NoCompilerError) as error:
            why, surprising, of_the_step = str(error), True, isinstance(error, UnsupportedError)
    if choice == "native":
        raise RuntimeError(f"{name} can't run on the native engine: {why}")
    log.engine.info("%s: reference engine (%s)", name, why)
    result = _by_reference(cells, _joined(x, columns), states, sizes, checkpoint)
    if surprising:  # told once the step has run: a wrong step has raised its own error by now
        what = f"{name} runs" if of_the_step else "recurrent layers run"
        log.announce(f"{what} on the reference engine, step by step: {why}")
    return result


def _joined(x: Tensor, columns: Tensor | None) -> Tensor:
    """The input with what variants read beside it."""
    return x if columns is None else torch.cat((x, columns), -1)


def which(cell: Cell, x: Tensor, state: States, training: bool) -> tuple[str, str]:
    """Which engine ``"auto"`` gives a call to, and why; what the native one needs is compiled.

    Args:
        cell: with its parameters bound.
        x: ``(time, batch, input)``.
        state: the initial states, each ``(batch, size)``.
        training: whether a gradient is wanted.

    Returns:
        ``"native"`` or ``"reference"``, and the reason in words.
    """
    why = _obstacle([cell], x, [state])
    if why is None:
        try:
            compiled = registry.compiled(cell, x.dtype)
            if training:
                compiled.prepare_training()
            else:
                compiled.inference  # noqa: B018  # compiled at its first use
        except (UnsupportedError, NoCompilerError) as error:
            why = str(error)
    return ("native", "its step is compiled") if why is None else ("reference", why)


def in_transform() -> bool:
    """Whether a transform of torch is active: compile, export, vmap, torch.func, forward mode, autocast."""
    return transforms.active() or (transforms.may_autocast() and transforms.autocasts("cpu"))


def _transformed(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | None,
    checkpoint: int | None,
    chains: Sequence[WrapperSpec],
) -> list[tuple[Tensor, States]]:
    """:func:`run` under a transform of torch: by an operator where there is one, else by the reference."""
    choice, forward_mode = _now()
    if forward_mode:
        why = "forward-mode differentiation is active"
    elif choice == "reference":
        why = "it is chosen"
    else:
        found = transforms.run(cells, x, states, sizes, chains)
        if not isinstance(found, str):
            return found
        why = found
    if choice == "native":
        raise RuntimeError(f"{type(cells[0].innermost).__name__} can't run on the native engine: {why}")
    cells = [wrap(cell, chain) for cell, chain in zip(cells, chains, strict=False)]
    return _by_reference(cells, x, states, sizes, checkpoint)


def _now() -> tuple[str, bool]:
    """The engine that is chosen, and whether forward-mode differentiation is active."""
    return _chosen.get(), transforms.in_forward_mode()


# What torch.compiler.assume_constant_result sets; to call it would import the compiler, for 1.5 seconds.
_now._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _by_reference(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | None,
    checkpoint: int | None,
) -> list[tuple[Tensor, States]]:
    run = reference.run
    if checkpoint is not None and torch.is_grad_enabled():
        run = functools.partial(reference.run_in_segments, checkpoint)
    return [
        run(cell, x, state, sizes, reverse)
        for cell, state, reverse in zip(cells, states, (False, True), strict=False)
    ]


def _obstacle(cells: Sequence[Cell], x: Tensor, states: Sequence[States | None]) -> str | None:
    """Why the native engine doesn't take a call, in words; None where it does."""
    dtype = x.dtype
    if dtype not in DTYPES:
        return f"it takes float32, float64 and bfloat16, not {dtype}"
    tensors = [x]
    for cell, state in zip(cells, states, strict=True):
        held = cell.__dict__
        tensors += [held[name] for name in cell.shapes()]
        tensors += state or ()
    for tensor in tensors:
        if type(tensor) is not Parameter and type(tensor) is not Tensor:
            return "its tensors are of a subclass of torch.Tensor"
        if not tensor.is_cpu:
            return "its tensors are not on the CPU"
        if tensor.is_neg():
            return "a tensor's numbers are yet to be negated"
        if tensor.dtype is not dtype:
            return f"its tensors are of several dtypes, {dtype} and {tensor.dtype}"
    return None
