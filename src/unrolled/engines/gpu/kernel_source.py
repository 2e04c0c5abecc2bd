"""The source of a kernel while it is generated: its arguments, ranges, constants and functions."""

from __future__ import annotations

import ast
import functools
import keyword
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.generated_code import without_parentheses
from unrolled.engines.compiler.ir import label
from unrolled.engines.gpu.choice import Choice
from unrolled.engines.gpu.pieces import padded
from unrolled.engines.gpu.triton_ops import TritonOp, literal
from unrolled.engines.gpu.tuning import STAGES

_DTYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
_MAX_LINE = 100


@dataclass(frozen=True)
class Argument:
    """A pointer that a kernel takes.

    Attributes:
        name: Its name in the source.
        kind: What it points to: "value", "hoisted", "shifted_initial", "initial", "all_steps", "final",
            "saved", "workspace", or "arrived".
        target: The node, the product or the number of the state that it belongs to; of a workspace its
            name, and its numbers of rows for each row of the batch and of columns. "arrived" counts, for each
            tile of rows, how often its programs have arrived where they meet.
    """

    name: str
    kind: str
    target: Any


@dataclass(frozen=True)
class KernelSpec:
    """The source of a kernel.

    Attributes:
        source: Triton. Its function is ``kernel``.
        arguments: Its pointers, in order. ``launch.py`` lists the arguments that follow.
        warps: Number of warps of a program.
        choice: The strategy of the kernel, and why it was chosen.
        blocks: If programs share the columns of a row, the largest number of blocks of columns. Otherwise 0.
        meetings: How often these programs wait for each other in a step. 0: never.
    """

    source: str
    arguments: list[Argument]
    warps: int
    choice: Choice
    blocks: int = 0
    meetings: int = 0


@dataclass(frozen=True)
class Tile:
    """An expression of a kernel.

    Attributes:
        text: The expression.
        columns: Number of columns of the tile, with padding. 0 for a number.
        per_row: Whether it has a value for each row. If not, it has one row.
    """

    text: str
    columns: int
    per_row: bool


class Source:
    """The source of a kernel while it is generated.

    Args:
        dtype: Dtype of the loop.
        storage: Dtype of tensors, see :class:`~unrolled.engines.compiler.kernel_ir.KernelIR`.
        block: Number of columns of a program, if there is one for each block of columns. 0: all of them.

    Attributes:
        arguments: The pointers that it takes.
        head: Statements before the loop.
        step: Statements of a step.
        tail: Statements after the loop.
        depth: How many loops in a step the next statement is in.
    """

    def __init__(self, dtype: torch.dtype, storage: torch.dtype, block: int = 0) -> None:
        self.dtype, self.storage, self.block = dtype, storage, block
        self.arguments: list[Argument] = []
        self.head: list[str] = []
        self.step: list[str] = []
        self.tail: list[str] = []
        self.depth = 0
        self._names: dict[object, str] = {}
        self._functions: set[str] = set()

    def line(self, text: str) -> None:
        """Add a statement to the step, indented as deep as it is in loops over columns."""
        self.step.append("    " * self.depth + text)

    def argument(self, kind: str, target: Any, name: str) -> str:
        """Return the name of a pointer, and add it to the arguments at its first use."""
        key = ("argument", kind, target)
        if key not in self._names:
            used = {argument.name for argument in self.arguments} | _RESERVED | _device_functions().keys()
            number, unique = 1, name
            while unique in used:
                number, unique = number + 1, f"{name}_{number}"
            self._names[key] = unique
            self.arguments.append(Argument(unique, kind, target))
        return self._names[key]

    def call(self, name: str, *arguments: str) -> str:
        """Return the call of a function of ``device_functions.triton``."""
        self._functions.add(name)
        return f"{name}({', '.join(arguments)})"

    def load(self, address: str, mask: str = "", options: str = "") -> str:
        """Return a load, converted to the dtype of the loop. The result is 0 where the mask is false."""
        text = f"tl.load({address}, {mask}, 0.0{options})" if mask else f"tl.load({address})"
        return text if self.storage is self.dtype else f"{text}.to(DT)"

    def factor(self, text: str) -> str:
        """Return a factor of a matrix product, from its value in the dtype of the loop."""
        return text if self.storage is self.dtype else f"{text}.to(ST)"

    def value(self, node: fx.Node) -> str:
        """Return the pointer to a value of the graph."""
        return self.argument("value", node, identifier(label(node)))

    def in_head(self, key: object, name: str, expression: str) -> str:
        """Return the variable for an expression that is computed once, before the loop.

        A name that doesn't end in a digit is numbered.
        """
        if key not in self._names:
            self._names[key] = name if name[-1].isdigit() else self.numbered(name)
            self.head.append(f"{self._names[key]} = {expression}")
        return self._names[key]

    def numbered(self, prefix: str) -> str:
        """Return a new name."""
        number = self._names.get(("count", prefix), "0")
        self._names["count", prefix] = str(int(number) + 1)
        return prefix + number

    def columns(self, width: int) -> str:
        """Return the column numbers of a tile."""
        if width == 1:
            return ""
        size = self.padded(width)
        first = f"tl.program_id(1) * {size} + " if self.block else ""
        return self.in_head(("columns", size), f"c{size}", f"{first}tl.arange(0, {size})[None, :]")

    def padded(self, width: int) -> int:
        """Return the number of columns of a tile."""
        return self.block if self.block and width > 1 else padded(width)

    def depths(self, width: int) -> str:
        """Return the same numbers as rows: those of a matrix."""
        size = padded(width)
        return self.in_head(("rows", size), f"k{size}", f"tl.arange(0, {size})[:, None]")

    def column_mask(self, width: int) -> str:
        """Return which columns of a tile are no padding. Empty if all are."""
        if width % self.padded(width) == 0:
            return ""
        return self.in_head(("mask", width), f"m{width}", f"{self.columns(width)} < {width}")

    def depth_mask(self, width: int) -> str:
        """Return the same for the rows of a matrix."""
        if padded(width) == width:
            return ""
        return self.in_head(("row mask", width), f"n{width}", f"{self.depths(width)} < {width}")

    def number(self, value: float, inexact_only: bool = False) -> str:
        """Return a number as a tile, or as a literal if ``inexact_only`` and that means the same."""
        if inexact_only and (self.dtype is torch.float32 or is_float32(value)):
            return literal(value)
        return self.in_head(("number", repr(value)), "number", f"tl.full((1, 1), {literal(value)}, DT)")

    def apply(self, op: TritonOp, operands: list[Tile], values: list[float | None]) -> str:
        """Return the expression of an operation.

        Args:
            op: The operation.
            operands: Its operands.
            values: The number that each operand is, or None.
        """
        self._functions.update(op.functions)
        are_tiles = bool(op.functions) or all(value is not None for value in values)
        if op.template.startswith("tl.where") and len(values) == 3:
            are_tiles = are_tiles or (values[1] is not None and values[2] is not None)
        texts = [
            operand.text if value is None else self.number(value, inexact_only=not are_tiles)
            for operand, value in zip(operands, values, strict=True)
        ]
        if op.template.startswith(("tl.", *(f"{name}(" for name in op.functions))):
            texts = [without_parentheses(text) for text in texts]
        return op.template.format(*texts)

    def render(self, warps: int, choice: Choice, blocks: int = 0, meetings: int = 0) -> KernelSpec:
        """Return the source, for programs of a number of warps. The arguments are those of the spec."""
        parameters = [argument.name for argument in self.arguments]
        numbers = ["steps", "batch", "parts"] if meetings else ["steps", "batch"]
        steps = f"tl.range(count, num_stages={STAGES})" if self.block else "range(count)"
        named = ", ".join(f'"{name}"' for name in numbers)
        functions = "".join(f"\n\n{text}\n" for text in device_functions(self._functions))
        lines = [
            f"DT = tl.constexpr({_DTYPES[self.dtype]})",
            *([] if self.storage is self.dtype else [f"ST = tl.constexpr({_DTYPES[self.storage]})"]),
            *functions.splitlines(),
            "",
            "",
            f"@triton.jit(do_not_specialize=[{named}])",
            *wrapped("def kernel(", [*parameters, "starts", "lengths", *numbers, *_CONSTANTS], "):"),
            *(f"    {line}" for line in (*_ROWS, *self.head)),
            f"    for step in {steps}:",
            *(f"        {line}" for line in (*_STEP, *self.step)),
            *(f"    {line}" for line in self.tail),
        ]
        source = "import triton\nimport triton.language as tl\n\n" + "\n".join(lines) + "\n"
        return KernelSpec(source, self.arguments, warps, choice, blocks, meetings)


_CONSTANTS = ("REVERSE: tl.constexpr", "SHIFT: tl.constexpr", "PRECISION: tl.constexpr", "ROWS: tl.constexpr")
_ROWS = (
    "rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]",
    "stride = tl.cast(batch, tl.int64)",
    "in_batch = rows < stride",
    "length = stride if lengths is None else tl.load(lengths + rows, in_batch, 0)",
    "count = steps if lengths is None else tl.max(tl.max(length, 1), 0)",
)
_STEP = (
    "t = count - 1 - step if REVERSE else step",
    "live = in_batch if lengths is None else t < length",
    "at = (t * stride if lengths is None else tl.load(starts + t)) + rows",
)
_RESERVED = {
    "starts", "lengths", "steps", "batch", "REVERSE", "SHIFT", "PRECISION", "ROWS", "DT", "ST", "tl",
    "triton", "rows", "stride", "in_batch", "length", "count", "step", "t", "live", "at", "before", "inside",
    "float", "kernel", "range", "old", "new", "last", "first", "value", "initial", "c", "m", "d", "k",
    "parts", "part", "goal",
}  # fmt: skip


def identifier(name: str) -> str:
    """Return a name that is no generated name: of a column range, a mask, a weight, a state or a value."""
    name = re.sub(r"\W", "_", name)
    generated = r"[ackmnrsvw]\d+(_\d+)?|(number|scalar|product|scratch|saved|initial|steps|final)\d+|\d.*"
    return f"{name}_" if re.fullmatch(generated, name) or keyword.iskeyword(name) else name


def is_float32(value: float) -> bool:
    """Return whether float32 represents a number exactly."""
    if value != value:
        return True
    try:
        return bool(struct.unpack("f", struct.pack("f", value))[0] == value)
    except OverflowError:
        return False


def wrapped(start: str, items: Iterable[str], end: str) -> list[str]:
    """Return the lines of a list of parameters, each short enough."""
    lines, line = [start], " " * 4
    for item in items:
        if len(line) + len(item) > _MAX_LINE:
            lines.append(line.rstrip())
            line = " " * 4
        line += f"{item}, "
    return [*lines, line.rstrip(), end]


@functools.cache
def _device_functions() -> dict[str, tuple[str, set[str]]]:
    """Return the source of each function of ``device_functions.triton``, and the functions that it calls."""
    text = files(__package__).joinpath("device_functions.triton").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    names = {node.name for node in functions}
    lines = text.splitlines()
    return {
        node.name: (
            "\n".join(lines[node.lineno - 1 - len(node.decorator_list) : node.end_lineno]),
            {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} & names,
        )
        for node in functions
    }


def device_functions(names: Iterable[str]) -> list[str]:
    """Return the sources of functions of ``device_functions.triton``, and of those that they call."""
    functions, needed, pending = _device_functions(), set[str](), list(names)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += functions[name][1]
    return [text for name, (text, _) in functions.items() if name in needed]


def full(tile: Tile, size: int) -> str:
    """Return a tile with all rows and this number of columns."""
    if tile.columns == 0:
        return f"tl.full((ROWS, {size}), {tile.text}, DT)"
    if tile.per_row and tile.columns == size:
        return tile.text
    return f"tl.broadcast_to({without_parentheses(tile.text)}, (ROWS, {size}))"


def times(index: str, stride: int) -> str:
    """Return an index times a stride."""
    return index if stride == 1 else f"{index} * {stride}"
