"""The random numbers of a layer: which numbers its step draws, and their values for all time steps of a call.

A step that draws random numbers gets them as extra inputs, so every engine and every backward pass sees the
same ones. They come from a counter (``philox.py``) whose seed is drawn from torch's generator, once for each
call of a layer. They take as much memory as other inputs of this width.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.draws import Draw, Draws, ReplaceDraws, draw_width
from unrolled.engines import philox
from unrolled.engines._torch_private import FakeTensorMode, TorchDispatchMode, constant_for_dynamo
from unrolled.engines.backends import backend_for
from unrolled.engines.compiler.checks import silence_fake_tensor_log, tensor_attributes
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.kept_captures import Entry
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.fork_safety import delay_forks
from unrolled.engines.native import philox as compiled_philox
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.engines.selection import current_engine

DTYPES = (torch.float32, torch.float64)

_CPU = torch.device("cpu")  # the draws are the same on every device
_BATCH_SIZES = (61, 2)
_MAX_DRAWS = 1 << 16  # of a step, as each has a stream of numbers


@constant_for_dynamo
def planned_draws(cell: Cell, training: bool, dtype: torch.dtype) -> Draws:
    """Return the random numbers that a step draws.

    Args:
        cell: The cell. Its parameters need not be bound.
        training: Whether the layer is in training mode.
        dtype: Dtype of the input, the states and the parameters.

    Returns:
        The draws in the order of the step. Empty if the step draws none, or if not all of them can be
        replaced by extra inputs. It then runs on the reference engine, with numbers from torch's generator.
    """
    try:
        cache: dict[Any, Any] = step_values(cell).derived
    except UnsupportedError:
        cache = cell.__dict__["_engine_cache"]
    key = ("draws", training, dtype)
    draws: Draws | None = cache.get(key)
    if draws is None:
        entry = Entry("draws", cell, training, dtype, backend_for(_CPU).captures)
        draws = _stored_draws(entry)
        if draws is None:
            if dtype in DTYPES and current_engine() != "reference":
                backend_for(_CPU).prepare(dtype)
            # In a new thread, no mode or transform is active. The first fake tensors import packages.
            with delay_forks(), ThreadPoolExecutor(1) as pool:
                draws = pool.submit(_plan, cell, training, dtype).result()
            if draws is not None:
                entry.write(draws)
        draws = cache[key] = draws or ()
    return draws


# torch.compile treats the result as a constant; see dispatch.py.


class _OtherDrawError(Exception):
    """A step draws random numbers in a way that isn't supported."""


class _RefuseOtherDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise an error for operations that draw random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _OtherDrawError
        return func(*args, **(kwargs or {}))


def _stored_draws(entry: Entry) -> Draws | None:
    """Return the draws that another process has found, or None if they aren't stored."""
    data = entry.read()
    try:
        draws: Draws | None = (
            None if data is None else tuple((str(kind), tuple(shape)) for kind, shape in data)
        )
        valid = draws is None or all(
            kind in philox.KINDS and all(type(size) is int for size in shape) for kind, shape in draws
        )
    except (TypeError, ValueError):
        return None
    return draws if valid else None


def _plan(cell: Cell, training: bool, dtype: torch.dtype) -> Draws | None:
    """Return the draws of a step, () if they can't be replaced, or None if the step raises an error."""
    if dtype not in DTYPES:
        return ()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), silence_fake_tensor_log():
            first, second = (_run_step(cell, training, dtype, batch) for batch in _BATCH_SIZES)
    except Exception:  # the step is arbitrary Python code; if it is wrong, the engine raises the error
        return None
    if len(first) != len(second) or len(first) >= _MAX_DRAWS:
        return ()
    draws = [_with_symbolic_batch(a, b) for a, b in zip(first, second, strict=True)]
    return () if None in draws else tuple(draw for draw in draws if draw is not None)


def _run_step(cell: Cell, training: bool, dtype: torch.dtype, batch: int) -> list[Draw]:
    """Run a step on fake tensors and return its draws."""
    draws: list[Draw] = []

    def source(kind: str, shape: tuple[int, ...]) -> Tensor:
        draws.append((kind, shape))
        return torch.empty(shape, dtype=dtype)

    shapes = {name: torch.empty(shape, dtype=dtype) for name, shape in cell.shapes().items()}
    attributes = {name: torch.empty_like(value) for name, value in tensor_attributes(cell).items()}
    bound = cell.bind({**shapes, **attributes})
    bound.training = training
    widths = cell.features, *cell.state_sizes().values()
    with ReplaceDraws(source), _RefuseOtherDraws():  # type: ignore[no-untyped-call]
        bound.step(*(torch.empty(batch, width, dtype=dtype) for width in widths))
    return draws


def _with_symbolic_batch(first: Draw, second: Draw) -> Draw | None:
    """Return a draw with a symbol for the batch size, given the draw for two batch sizes.

    None if it doesn't have numbers for each row of the batch, along a single axis.
    """
    (kind, shape), (other_kind, other_shape) = first, second
    if kind != other_kind or len(shape) != len(other_shape):
        return None
    axes = [k for k, (a, b) in enumerate(zip(shape, other_shape, strict=True)) if a != b]
    if len(axes) != 1:
        return None
    axis, (batch, other_batch) = axes[0], _BATCH_SIZES
    multiple = shape[axis] // batch
    if (shape[axis], other_shape[axis]) != (multiple * batch, multiple * other_batch):
        return None
    if axis > 0 and multiple > 1:
        return None
    return kind, (*shape[:axis], -multiple, *shape[axis + 1 :])


def draw_seed() -> Tensor:
    """Draw a seed from torch's generator of the CPU."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")


def draw_entries(draws: Draws, layer: int, directions: int) -> list[philox.Entry]:
    """Return what to fill, for the columns of all directions of a layer, one direction after the other."""
    entries: list[philox.Entry] = []
    column = 0
    for direction in range(directions):
        for k, draw in enumerate(draws):
            stream = (layer * 2 + direction) % _MAX_DRAWS * _MAX_DRAWS + k
            entries.append((stream, philox.KINDS.index(draw[0]), draw_width(draw), column))
            column += draw_width(draw)
    return entries


def draw_values(
    x: Tensor,
    seed: Tensor,
    sizes: list[int] | Tensor | None,
    order: Tensor | None,
    first_step: int,
    entries: list[philox.Entry],
) -> Tensor:
    """Return the random numbers of all rows of an input.

    Args:
        x: The input, ``(time, batch, features)``, or ``(sum of sizes, features)`` if ``sizes`` is given.
        seed: The seed, an int64.
        sizes: Number of sequences at each time step, as in a packed sequence.
        order: The user's row for each row of the batch. None if the order is the same.
        first_step: The number of the first time step.
        entries: See :func:`draw_entries`.

    Returns:
        The numbers, with the layout of ``x``.
    """
    if sizes is None:
        steps = torch.arange(x.shape[0], device="cpu").repeat_interleave(x.shape[1])
        rows = torch.arange(x.shape[1], device="cpu").repeat(x.shape[0])
    else:
        counts = torch.as_tensor(sizes, dtype=torch.int64, device="cpu")
        steps = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        rows = torch.arange(len(steps), device="cpu") - (counts.cumsum(0) - counts)[steps]
    rows = rows if order is None else order.to("cpu", torch.int64)[rows]
    steps += first_step
    out = torch.empty(len(steps), sum(width for _, _, width, _ in entries), dtype=x.dtype, device="cpu")
    number = int(seed)
    try:
        compiled_philox.fill(out, number, steps, rows, entries)
    except NoCompilerError:
        philox.fill(out.numpy(), number % 2**64, steps.numpy(), rows.numpy(), entries)
    return out.view(*x.shape[:-1], out.shape[1]).to(x.device)
