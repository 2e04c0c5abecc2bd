"""Whether a step is what the compiler takes: a pure function of a row; and where its lines stand.

A captured graph holds what one run of the step did, for one size of the batch. So the step is first run on
tensors without data, for several sizes, and what it did is compared: a branch on the size of the batch, a
number that differs from run to run, an input that is changed, a tensor from outside are refused here, by
operation and line, and never compiled into something that is right for one call only.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from unrolled.cells.base import Cell
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.source_location import Place, Places, refused

aten = torch.ops.aten

OTHER_SIZES = (2, 61)  # of the batch


@contextmanager
def without_its_log() -> Iterator[None]:
    """What fails in a step on tensors without data is told by its own error, not by torch's log of it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def own_tensors(cell: Cell) -> dict[str, Tensor]:
    """The tensors that a cell holds beside its parameters, as attributes, by name."""
    cell = cell.innermost
    names = dict.fromkeys(
        name for owner in (*reversed(type(cell).__mro__), cell) for name in getattr(owner, "__dict__", {})
    )
    static = {name: inspect.getattr_static(cell, name, None) for name in names if name not in cell.shapes()}
    return {name: value for name, value in static.items() if isinstance(value, Tensor)}


def own_values(cell: Cell, own: dict[str, fx.Node]) -> list[Tensor]:
    """What the tensors that a compiled step uses beside its parameters are now.

    Raises:
        UnsupportedError: one of them is of another shape, dtype or device than the step was compiled for, or
            wants a gradient.
    """
    values = []
    for name, node in own.items():
        value, expected = getattr(cell.innermost, name), node.meta["val"]
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (expected.shape, expected.dtype):
            kind = f"{expected.dtype} of shape {tuple(expected.shape)}"
            raise UnsupportedError(f"its {name} should be {kind}, as when its step was compiled")
        if value.requires_grad:
            raise UnsupportedError(f"its tensor {name} wants a gradient, which only a Param gets")
        if not value.is_cpu:
            raise UnsupportedError(f"its tensor {name} is not on the CPU")
        values.append(value)
    return values


@dataclass
class _Entry:
    """What one operation was given and made."""

    operation: Any
    given: list[tuple[Any, bool]]  # and whether it may be a size
    shapes: list[tuple[int, ...]]
    place: Place | None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what a step does with tensors that have no data."""

    def __init__(self, places: Places, inputs: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[_Entry] = []
        self._places = places
        self._inputs = {tensor.untyped_storage()._cdata: name for name, tensor in inputs.items()}
        self._numbers = {id(tensor): number for number, tensor in enumerate(inputs.values())}
        self._alive = list(inputs.values())  # so that no other tensor gets the id of one of these

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = self._places.now
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise refused(f"it draws random numbers: {func}", place)
        for argument, value in _arguments(func, args, kwargs or {}):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor):
                name = self._inputs.get(value.untyped_storage()._cdata)
                if name is not None:
                    raise refused(f"it changes its input {name} in place: {func}", place)
        given = [
            (self._known(func, leaf, place), "int" in str(argument.type).lower())
            for argument, value in _arguments(func, args, kwargs or {})
            for leaf in tree_leaves(value)
        ]
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for tensor in made:
            self._alive.append(tensor)
            self._numbers.setdefault(id(tensor), len(self._numbers))
        self.entries.append(_Entry(func, given, [tuple(tensor.shape) for tensor in made], place))
        return result

    def _known(self, func: Any, value: Any, place: Place | None) -> Any:
        """An argument in a form that can be compared between runs."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._numbers:
            return self._numbers[id(value)], "tensor"
        if isinstance(value, FakeTensor):
            raise refused("it uses a tensor that another run of the step has made", place)
        if func in _FRESH:  # a tensor that the step makes from numbers
            with _disable_current_modes():
                return tuple(value.shape), value.dtype, value.flatten().tolist()
        kind = f"{value.dtype} of shape {tuple(value.shape)}"
        raise refused(
            f"it uses a tensor from outside ({kind}): make it in the step, or keep it as an attribute of the "
            "cell",
            place,
        )


def _arguments(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """Every argument of the schema that was given, with its value."""
    schema = func._schema.arguments
    return [
        *zip(schema, args, strict=False),
        *((argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs),
    ]


_FRESH = (aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default)


# For a size of the batch the inputs by name, and what runs a step on them.
Run = Callable[[int], tuple[dict[str, Tensor], Callable[[], Any]]]


def examine(trial: Callable[[bool], Run], training: bool, places: Places) -> bool:
    """Run a step for several sizes of the batch, without data.

    Args:
        trial: for a mode, one cell's runs.
        training: the mode.
        places: where the step is.

    Returns:
        Whether the step does the same in the other mode.

    Raises:
        UnsupportedError: what it does is not the same for all sizes, or can't be captured; the operation and
            the line.
    """
    run = trial(training)
    first = _recorded(run, BATCH_SYMBOL, places)
    for rows in OTHER_SIZES:
        different, at = _difference(first, _recorded(run, rows, places), rows)
        if different:
            changes, where = _difference(first, _recorded(run, BATCH_SYMBOL, places), BATCH_SYMBOL)
            if changes:
                raise refused("it differs from run to run", where)
            raise refused("it depends on the size of the batch", at)
    try:
        return not _difference(first, _recorded(trial(not training), BATCH_SYMBOL, places), BATCH_SYMBOL)[0]
    except UnsupportedError:
        return False


def _recorded(run: Run, rows: int, places: Places) -> list[_Entry]:
    inputs, step = run(rows)
    recorder = _Recorder(places, inputs)
    with recorder, places:
        step()
    return recorder.entries


def _difference(first: list[_Entry], again: list[_Entry], rows: int) -> tuple[bool, Place | None]:
    """Whether two runs did something else, and where."""
    for a, b in zip(first, again, strict=False):
        if not _same(a, b, rows):
            return True, b.place
    if len(first) != len(again):
        return True, max(first, again, key=len)[min(len(first), len(again))].place
    return False, None


def _same(first: _Entry, again: _Entry, rows: int) -> bool:
    """Whether two runs did the same, but for the size of the batch."""

    def sized(size: Any) -> Any:
        whole = type(size) is int and size and size % BATCH_SYMBOL == 0
        return size // BATCH_SYMBOL * rows if whole else size

    return (
        first.operation is again.operation
        and len(first.given) == len(again.given)
        and all(
            _equal(a, b) or (size and _equal(sized(a), b))
            for (a, size), (b, _) in zip(first.given, again.given, strict=True)
        )
        and [tuple(map(sized, shape)) for shape in first.shapes] == again.shapes
    )


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


def captured_error(error: Exception, places: Places) -> UnsupportedError:
    """What to say of an error that was raised while a step was captured."""
    if isinstance(error, UnsupportedError):
        return error
    place = places.now or places.step
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return refused("its step can't be captured, it asks for the values of a tensor", place)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return refused(f"its step can't be captured, {type(error).__name__}: {first}", place)
