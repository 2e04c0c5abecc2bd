"""Which line of a cell's step an operation belongs to."""

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
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unrolled.cells.base import Cell
from unrolled.engines.compiler.ir import UnsupportedError

_INSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Place:
    """A torch function that a step calls, and the line that calls it."""

    function: Any
    file: str
    line: int
    backward: bool = False

    def __str__(self) -> str:
        name = resolve_name(self.function) or getattr(self.function, "__qualname__", str(self.function))
        return f"{'the backward of ' * self.backward}{name}, {self.file}:{self.line}"


def refused(reason: str, place: Place | None) -> UnsupportedError:
    """The error for what a step does at a place."""
    return UnsupportedError(reason if place is None else f"{reason} ({place})")


def place_of(node: fx.Node) -> Place | None:
    """The place whose operation, or whose backward, a node of a captured graph belongs to."""
    waiting, seen, backward = [node], {node}, False
    for candidate in waiting:
        place: Place | None = candidate.meta.get("place")
        if place is not None:
            return dataclasses.replace(place, backward=backward or place.backward)
        backward = True
        waiting += [n for n in candidate.all_input_nodes if n not in seen]
        seen.update(candidate.all_input_nodes)
    return None


@contextmanager
def marking(place: Place | None) -> Iterator[None]:
    """Nodes that are traced meanwhile belong to a place."""
    mode = get_proxy_mode()
    nodes = None if mode is None else mode.tracer.graph.nodes
    before = 0 if nodes is None else len(nodes)
    try:
        yield
    finally:
        if nodes is not None and place is not None:
            for node, _ in zip(reversed(nodes), range(len(nodes) - before), strict=False):
                node.meta.setdefault("place", place)


class Marked(fx.Interpreter):
    """Runs a captured graph; what is traced meanwhile belongs to the places of its nodes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one node.

        Raises:
            UnsupportedError: it can't be compiled; with its place.
        """
        place = place_of(n) if n.op == "call_function" else None
        with marking(place):
            try:
                return super().run_node(n)
            except UnsupportedError as error:
                raise refused(str(error), place) from error


class Places(TorchFunctionMode):
    """Knows where in a step torch is called, and marks the nodes that are traced for each call.

    A product with a matrix that all rows share is written so that the rows stay rows: torch would copy the
    matrix for each of them.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        function = cell.equations()
        self._code: CodeType | None = getattr(function, "__code__", None)
        self.now: Place | None = None
        self.step: Place | None = None
        if self._code is not None:
            self.step = Place(function, self._code.co_filename, self._code.co_firstlineno)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        file, line = self._line()
        self.now = Place(func, file, line)
        with marking(self.now):
            if func in _PRODUCTS and _shared_matrix(*args):
                result = torch.einsum("b...ij,...jk->b...ik", *args)
            else:
                result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._sign(tensor.grad_fn)
        return result

    def _sign(self, made: Any) -> None:
        """Leave the place in torch's own nodes of the backward, which are new since the last call."""
        waiting = [made]
        while waiting:
            node = waiting.pop()
            if node is not None and _PLACE not in node.metadata:
                node.metadata[_PLACE] = self.now
                waiting += [following for following, _ in node.next_functions]

    def _line(self) -> tuple[str, int]:
        """The line of the step; of whatever stands outside torch where the step has no code of its own."""
        frame: FrameType | None = sys._getframe(1)
        outside = None
        while frame is not None:
            if frame.f_code is self._code:
                return frame.f_code.co_filename, frame.f_lineno
            if outside is None and not frame.f_code.co_filename.startswith(_INSIDE):
                outside = frame
            frame = frame.f_back
        return ("", 0) if outside is None else (outside.f_code.co_filename, outside.f_lineno)


_PLACE = "unrolled.place"


class BackwardPlaces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks what is traced of a backward with the places whose backward it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        running = torch._C._current_autograd_node()
        place: Place | None = None if running is None else running.metadata.get(_PLACE)  # type: ignore[attr-defined]
        with marking(place and dataclasses.replace(place, backward=True)):
            return func(*args, **(kwargs or {}))


_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


def _shared_matrix(left: Any, right: Any, *_: Any) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and left.dim() > right.dim() > 2
