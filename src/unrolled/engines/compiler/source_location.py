"""Map the operations of a captured graph to the lines of a cell's step."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, resolve_name

from unrolled.cells.base import Cell
from unrolled.engines._torch_private import (
    TorchDispatchMode,
    current_autograd_node,
    get_proxy_mode,
    tree_leaves,
)
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.replacements import REPLACEMENTS

_INTERNAL_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_METADATA_KEY = "unrolled.location"  # in the metadata of autograd nodes
COMPILER_FAULT = "the compiler failed unexpectedly"  # begins the message of an internal error
# Functions that split a dimension, with the position of the argument that has it.
_SPLITS: dict[Any, int] = {
    **dict.fromkeys((torch.unbind, Tensor.unbind), 1),
    **dict.fromkeys((torch.split, Tensor.split, torch.chunk, Tensor.chunk), 2),
    **dict.fromkeys((torch.tensor_split, Tensor.tensor_split), 2),
}
_MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


@dataclass(frozen=True)
class SourceLocation:
    """A torch function that a step calls, and the line of the call.

    Attributes:
        function: The function.
        file: Path of the source file.
        line: Line number.
        backward: Whether it is the function's backward, rather than the function itself.
    """

    function: Any
    file: str
    line: int
    backward: bool = False

    def __str__(self) -> str:
        name = resolve_name(self.function) or getattr(self.function, "__qualname__", str(self.function))
        return f"{'the backward of ' * self.backward}{name}, {self.file}:{self.line}"


def unsupported(reason: str, location: SourceLocation | None) -> UnsupportedError:
    """Return an error with a reason and, if known, the source location that caused it."""
    suffix = "" if location is None else f" ({location})"
    return UnsupportedError(reason if reason.endswith(suffix) else reason + suffix)


def unsupported_draw(operation: object, location: SourceLocation | None) -> UnsupportedError:
    """Return an error for an operation that draws random numbers and isn't replaced by extra inputs."""
    return unsupported(
        f"it draws random numbers in a way that can't be compiled, {operation}; use rand, randn, normal, "
        "bernoulli, exponential, dropout or gumbel_softmax in float32 or float64, with numbers for each row "
        "of the batch and without a generator",
        location,
    )


def location_of(node: fx.Node) -> SourceLocation | None:
    """Return the source location of a node of a captured graph.

    A node without one belongs to the backward of the nearest node that it is computed from.
    """
    pending, seen, backward = [node], {node}, False
    for candidate in pending:
        location: SourceLocation | None = candidate.meta.get("location")
        if location is not None:
            return dataclasses.replace(location, backward=backward or location.backward)
        backward = True
        pending += [n for n in candidate.all_input_nodes if n not in seen]
        seen.update(candidate.all_input_nodes)
    return None


@contextmanager
def tag_location(location: SourceLocation | None) -> Iterator[None]:
    """Give ``location`` to all nodes traced inside the ``with`` block that have none yet."""
    mode = get_proxy_mode()
    nodes = None if mode is None else mode.tracer.graph.nodes
    count_before = 0 if nodes is None else len(nodes)
    try:
        yield
    finally:
        if nodes is not None and location is not None:
            for node, _ in zip(reversed(nodes), range(len(nodes) - count_before), strict=False):
                node.meta.setdefault("location", location)


class LocationInterpreter(fx.Interpreter):
    """Run a captured graph, and give each node that is traced the location of the node that runs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one node.

        Raises:
            UnsupportedError: If the node can't be compiled. The message has its source location.
        """
        location = location_of(n) if n.op == "call_function" else None
        with tag_location(location):
            try:
                return super().run_node(n)
            except UnsupportedError as error:
                raise unsupported(str(error), location) from error


class LocationTracker(TorchFunctionMode):
    """Track which line of a step calls torch, and tag the nodes traced for each call.

    It also replaces a product with a matrix that all rows share by an einsum, because torch.matmul would copy
    the matrix for each row, and the functions in ``replacements.py``.

    Attributes:
        current: Location of the latest call of a torch function; None outside the step.
        step: Location of the step itself; None if it has no code object.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        function = cell.equations()
        self._code: CodeType | None = getattr(function, "__code__", None)
        self.current: SourceLocation | None = None
        self.step: SourceLocation | None = None
        if self._code is not None:
            self.step = SourceLocation(function, self._code.co_filename, self._code.co_firstlineno)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        file, line = self._line()
        self.current = SourceLocation(func, file, line)
        if func in _SPLITS:
            _check_split(func, args, kwargs or {}, self.current)
        with tag_location(self.current):
            if func in _MATMULS and _is_shared_matrix(*args):
                result = torch.einsum("b...ij,...jk->b...ik", *args)
            else:
                try:
                    result = REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
                except UnsupportedError as error:
                    raise unsupported(str(error), self.current) from error
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._tag_autograd_nodes(tensor.grad_fn)
        return result

    def _tag_autograd_nodes(self, grad_fn: Any) -> None:
        """Store the current location in autograd nodes that have none: those created by this call."""
        pending = [grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and _METADATA_KEY not in node.metadata:
                node.metadata[_METADATA_KEY] = self.current
                pending += [next_node for next_node, _ in node.next_functions]

    def _line(self) -> tuple[str, int]:
        """Return file and line of the step; without a step on the stack, of the first frame outside torch."""
        frame: FrameType | None = sys._getframe(1)
        caller = None
        while frame is not None:
            if frame.f_code is self._code:
                return frame.f_code.co_filename, frame.f_lineno
            if caller is None and not frame.f_code.co_filename.startswith(_INTERNAL_FOLDERS):
                caller = frame
            frame = frame.f_back
        return ("", 0) if caller is None else (caller.f_code.co_filename, caller.f_lineno)


class BackwardLocationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tag nodes traced in a backward pass with the location of the call that they differentiate."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        running = current_autograd_node()
        location: SourceLocation | None = None
        if running is not None:
            location = running.metadata.get(_METADATA_KEY)  # type: ignore[attr-defined]
        with tag_location(location and dataclasses.replace(location, backward=True)):
            return func(*args, **(kwargs or {}))


def _check_split(func: Any, args: Any, kwargs: Any, location: SourceLocation) -> None:
    """Check that a split isn't along the batch, which would create a tensor for each of a million rows.

    Raises:
        UnsupportedError: If the split is along the batch.
    """
    tensor, position = args[0] if args else kwargs["input"], _SPLITS[func]
    dim = kwargs.get("dim", args[position] if len(args) > position else 0)
    if tensor.dim() and tensor.shape[dim] % BATCH_SYMBOL == 0 < tensor.shape[dim]:
        reason = "it splits the batch into rows, for example in a loop over a tensor or with tolist()"
        raise unsupported(f"{reason}; compute all rows at once, with the batch as first dimension", location)


def _is_shared_matrix(left: Any, right: Any, *_: Any) -> bool:
    """Return whether ``right`` has no batch dimension, but ``left`` does."""
    return isinstance(left, Tensor) and isinstance(right, Tensor) and left.dim() > right.dim() > 2
