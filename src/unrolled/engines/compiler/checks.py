"""Check that a step is a pure function of each row, so that one captured run is valid for every call.

A captured graph records what one run of the step did, for one batch size. So the step first runs on fake
tensors for several batch sizes, and the recorded operations are compared. A step is rejected if it branches
on the batch size, differs from run to run, changes an input in place or uses a tensor from outside. The error
names the operation and its line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines._torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    TorchDispatchMode,
    disable_current_modes,
    fake_tensor_logger,
    tree_leaves,
)
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.source_location import (
    LocationTracker,
    SourceLocation,
    unsupported,
    unsupported_draw,
)

aten = torch.ops.aten

OTHER_BATCH_SIZES = (2, 61)
_MAX_COMPARED = 4096  # elements of an outside tensor; a larger one must be the same object in each run
_LIFT_OPS = (aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default)

# Takes a batch size; returns the inputs by name, and a function that runs the step on them.
Run = Callable[[int], tuple[dict[str, Tensor], Callable[[], Any]]]


@contextmanager
def silence_fake_tensor_log() -> Iterator[None]:
    """Disable torch's log of fake tensor errors, because our own error reports them."""
    logger = fake_tensor_logger
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def tensor_attributes(cell: Cell) -> dict[str, Tensor]:
    """Return the tensors that are attributes of a cell or its class but no parameters, by name."""
    cell = cell.innermost
    names = dict.fromkeys(
        name for owner in (*reversed(type(cell).__mro__), cell) for name in getattr(owner, "__dict__", {})
    )
    static = {name: inspect.getattr_static(cell, name, None) for name in names if name not in cell.shapes()}
    return {name: value for name, value in static.items() if isinstance(value, Tensor)}


def read_tensor_attributes(cell: Cell, nodes: dict[str, fx.Node], device: torch.device) -> list[Tensor]:
    """Return the current values of the tensor attributes that a compiled step uses.

    Args:
        cell: The cell.
        nodes: Placeholders of the attributes in the captured graph, by name.
        device: Where they should be.

    Raises:
        UnsupportedError: If an attribute requires a gradient, isn't on the device, or no longer has the shape
            and dtype that the step was compiled for.
    """
    values = []
    for name, node in nodes.items():
        value, expected = getattr(cell.innermost, name), node.meta["val"]
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (expected.shape, expected.dtype):
            kind = f"{expected.dtype} with shape {tuple(expected.shape)}"
            raise UnsupportedError(f"its attribute {name} must be {kind}, as when the step was compiled")
        if value.requires_grad:
            raise UnsupportedError(f"its attribute {name} requires a gradient; declare it as a Param")
        if value.device != device:
            place = "the CPU" if device.type == "cpu" else device
            raise UnsupportedError(f"its attribute {name} is not on {place}")
        values.append(value)
    return values


@dataclass
class _RecordedCall:
    """One operation of a run.

    Attributes:
        operation: The torch operator.
        args: Arguments in a form that can be compared between runs, each with whether it may be a size.
        shapes: Shapes of the results.
        location: Source location of the call.
    """

    operation: Any
    args: list[tuple[Any, bool]]
    shapes: list[tuple[int, ...]]
    location: SourceLocation | None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the operations of a step that runs on fake tensors.

    Args:
        tracker: Tracks the current source location.
        inputs: Input tensors of the step, by name.
    """

    def __init__(self, tracker: LocationTracker, inputs: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_RecordedCall] = []
        self._tracker = tracker
        self._input_names = {tensor.untyped_storage()._cdata: name for name, tensor in inputs.items()}
        self._tensor_numbers = {id(tensor): number for number, tensor in enumerate(inputs.values())}
        self._alive = list(inputs.values())  # keeps the ids of these tensors from being reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        location = self._tracker.current
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise unsupported_draw(func, location)
        for argument, value in _named_arguments(func, args, kwargs or {}):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor):
                name = self._input_names.get(value.untyped_storage()._cdata)
                if name is not None:
                    raise unsupported(f"it changes its input {name} in place: {func}", location)
        recorded_args = [
            (self._comparable(func, leaf, location), "int" in str(argument.type).lower())
            for argument, value in _named_arguments(func, args, kwargs or {})
            for leaf in tree_leaves(value)
        ]
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for tensor in tensors:
            self._alive.append(tensor)
            self._tensor_numbers.setdefault(id(tensor), len(self._tensor_numbers))
        shapes = [tuple(tensor.shape) for tensor in tensors]
        self.calls.append(_RecordedCall(func, recorded_args, shapes, location))
        return result

    def _comparable(self, func: Any, value: Any, location: SourceLocation | None) -> Any:
        """Return an argument in a form that can be compared between runs."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._tensor_numbers:
            return self._tensor_numbers[id(value)], "tensor"
        if isinstance(value, FakeTensor):
            raise unsupported("it uses a tensor that another run of the step created", location)
        kind = f"{value.dtype} with shape {tuple(value.shape)}"
        if value.requires_grad:
            raise unsupported(
                f"it uses a tensor from outside ({kind}) that requires a gradient; declare it as a Param",
                location,
            )
        if type(value) is not Tensor or not value.is_cpu or value.layout is not torch.strided:
            raise unsupported(
                f"it uses a tensor from outside ({kind}) that isn't a plain tensor on the CPU", location
            )
        if func in _LIFT_OPS or value.numel() <= _MAX_COMPARED:  # perhaps created from numbers in each run
            with disable_current_modes():
                return tuple(value.shape), value.dtype, repr(value.flatten().tolist())  # NaN equals NaN
        return id(value), "outside"


def _named_arguments(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """Return the arguments of a call, as pairs of schema argument and value."""
    schema = func._schema.arguments
    return [
        *zip(schema, args, strict=False),
        *((argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs),
    ]


def check_capturable(make_run: Callable[[bool], Run], training: bool, tracker: LocationTracker) -> bool:
    """Run a step on fake tensors for several batch sizes, and compare the runs.

    Args:
        make_run: Takes the mode, training or not, and returns a function that starts runs of the step.
        training: Mode that the step will be captured in.
        tracker: Source location tracker of the step.

    Returns:
        Whether the step does the same in the other mode.

    Raises:
        UnsupportedError: If the step can't be captured, or does something else for another batch size. The
            message names the operation and its line.
    """
    run = make_run(training)
    first = _record(run, BATCH_SYMBOL, tracker)
    for batch in OTHER_BATCH_SIZES:
        differs, location = _difference(first, _record(run, batch, tracker), batch)
        if differs:
            # Without a change of the batch size, is there still a difference?
            always, always_location = _difference(first, _record(run, BATCH_SYMBOL, tracker), BATCH_SYMBOL)
            if always:
                raise unsupported("it differs from run to run", always_location)
            raise unsupported("it depends on the batch size", location)
    try:
        other_mode = _record(make_run(not training), BATCH_SYMBOL, tracker)
        return not _difference(first, other_mode, BATCH_SYMBOL)[0]
    except UnsupportedError:
        return False


def _record(run: Run, batch: int, tracker: LocationTracker) -> list[_RecordedCall]:
    """Run a step for a batch size and return its operations."""
    inputs, step = run(batch)
    recorder = _Recorder(tracker, inputs)
    with recorder, tracker:
        step()
    return recorder.calls


def _difference(
    first: list[_RecordedCall], second: list[_RecordedCall], batch: int
) -> tuple[bool, SourceLocation | None]:
    """Compare two runs.

    Args:
        first: Operations of a run with batch size ``BATCH_SYMBOL``.
        second: Operations of a run with batch size ``batch``.
        batch: Batch size of the second run.

    Returns:
        Whether the runs differ, and the location of the first difference.
    """
    for a, b in zip(first, second, strict=False):
        if not _is_same_call(a, b, batch):
            return True, b.location
    if len(first) != len(second):
        return True, max(first, second, key=len)[min(len(first), len(second))].location
    return False, None


def _is_same_call(first: _RecordedCall, second: _RecordedCall, batch: int) -> bool:
    """Return whether two calls are the same, apart from the batch size."""

    def resize(size: Any) -> Any:
        is_batch = type(size) is int and size and size % BATCH_SYMBOL == 0
        return size // BATCH_SYMBOL * batch if is_batch else size

    return (
        first.operation is second.operation
        and len(first.args) == len(second.args)
        and all(
            _is_equal(a, b) or (may_be_size and _is_equal(resize(a), b))
            for (a, may_be_size), (b, _) in zip(first.args, second.args, strict=True)
        )
        and [tuple(map(resize, shape)) for shape in first.shapes] == second.shapes
    )


def _is_equal(a: Any, b: Any) -> bool:
    """Return whether two arguments have the same type and value; NaN equals NaN."""
    return type(a) is type(b) and (a == b or (a != a and b != b))


def capture_error(error: Exception, tracker: LocationTracker) -> UnsupportedError:
    """Return the ``UnsupportedError`` for an error that was raised during a capture."""
    if isinstance(error, UnsupportedError):
        return error
    location = tracker.current or tracker.step
    if isinstance(error, DynamicOutputShapeException):
        return unsupported(
            "its step can't be captured because the shape of a result depends on the values of a tensor; "
            "use torch.where or multiply by a mask, which keep the shape",
            location,
        )
    if isinstance(error, DataDependentOutputException):
        return unsupported(
            "its step can't be captured because it reads the values of a tensor, as if and item() do; "
            "use torch.where(condition, a, b) instead",
            location,
        )
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return unsupported(f"its step can't be captured, {type(error).__name__}: {first_line}", location)
