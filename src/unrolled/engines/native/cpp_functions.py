"""The functions of a generated kernel: what a phase or a scalar computes, as C++."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from unrolled.engines.compiler.generated_code import without_parentheses
from unrolled.engines.compiler.kernel_ir import (
    Apply,
    Buffer,
    Instruction,
    Level,
    Load,
    Memory,
    Operand,
    Phase,
    ReadScalar,
    Register,
    Scalar,
    Sum,
)
from unrolled.engines.native.cpp_ops import CPP, literal
from unrolled.engines.native.operations import REDUCTIONS, expression_of

MEMBERS = {
    Memory.INPUT: "in",
    Memory.STATE: "old",
    Memory.NEW_STATE: "next",
    Memory.SAVED: "saved",
    Memory.SCRATCH: "scratch",
}
_MAX_EXPRESSION = 80  # characters; longer expressions are split
_MAX_LINE = 110


def phase_function(name: str, phase: Phase, sizes: list[int]) -> list[str]:
    """Return the function that computes a tile of a phase.

    Args:
        name: Its name.
        phase: The phase.
        sizes: The numbers that the functions of the kernel read. Those of this function are added.
    """
    names = _Locals(sizes)
    body = _Body(names, phase.instructions, [store.value for store in phase.stores], phase)
    # Without products, a phase reads memory in order, and the input of the next steps ahead of its use.
    tile, loop = ("Tile", "FOR_PANELS") if phase.groups else ("StreamTile", "FOR_ROWS_OF_PANELS")
    stores = [
        f"p.store({names.array(store.buffer, store.offset, 'Array')}, {body.operand(store.value)});"
        for store in phase.stores
    ]
    return [
        f"void {name}(const Step& s, const {tile} t) {{",
        *indented(names.declarations()),
        f"  {loop}(p, t) {{",
        *indented([*body.lines, *stores], 4),
        "  }",
        "}",
    ]


def scalars_class(name: str, level: Level, sizes: list[int]) -> list[str]:
    """Return the class that computes the scalars of a level for a block of rows.

    The arguments are those of :func:`phase_function`.
    """
    names = _Locals(sizes)
    lines = [line for scalar in level.scalars for line in _scalar(scalar, names)]
    return [
        f"struct {name} {{",
        "  template <int R> static void compute(const Step& s, const RowBlock<R>& rows) {",
        *indented([*names.declarations(), *lines], 4),
        "  }",
        "};",
    ]


def _scalar(scalar: Scalar, names: _Locals) -> list[str]:
    body = _Body(names, scalar.instructions, [scalar.result])
    target = names.scalar(scalar.number)
    result = body.operand(scalar.result)
    if scalar.reduction is None:
        call = f"rows.single({target}"
    else:
        reduction, columns = REDUCTIONS[scalar.reduction].name, names.size(scalar.width)
        call = f"rows.reduce({reduction}(), {target}, {columns}"
    stores = [f"rows.store({names.array(buffer, 0, 'Array')}, {target});" for buffer in scalar.buffers]
    lines = indented([*body.lines, f"return {result};"])
    return [f"{call}, [&](const Panel& p) {{", *lines, "});", *stores]


class _Locals:
    """The local variables of a function.

    Args:
        sizes: The numbers that the functions of the kernel read.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._names: dict[tuple[object, int], str] = {}
        self._declarators: dict[str, list[str]] = {}  # by type

    def size(self, value: int) -> str:
        """Return the expression for a number that depends on the sizes of the cell."""
        self._sizes.append(value)
        return f"s.sizes[{len(self._sizes) - 1}]"

    def array(self, buffer: Buffer, offset: int, kind: str) -> str:
        """Return the variable for the columns of a buffer from an offset on."""
        if (buffer, offset) not in self._names:
            value = f"s.{MEMBERS[buffer.memory]}[{buffer.index}]"
            name = str(buffer)
            if offset:
                name += f"_{1 + sum(key[0] == buffer and key[1] > 0 for key in self._names)}"
                value += f" + {self.size(offset)}"
            self._declare((buffer, offset), kind, name, value)
        return self._names[buffer, offset]

    def sums(self, phase: Phase, group: int, hoisted: bool) -> str:
        """Return the variable for the sums of a group."""
        groups = phase.hoisted if hoisted else phase.groups
        count = len(groups[group].products)
        if hoisted:
            return self._declare(
                ("hoisted", group), "Sums", f"hoisted{group}", f"t.hoisted_products({group}, {count})"
            )
        preceding = sum(len(one.products) for one in groups[:group])
        return self._declare(("sum", group), "Sums", f"sum{group}", f"t.products({preceding}, {count})")

    def scalar(self, number: int) -> str:
        """Return the variable for a scalar of all rows."""
        return self._declare(("scalar", number), "Column", f"scalar{number}", f"s.scalar[{number}]")

    def _declare(self, key: tuple[object, int], kind: str, name: str, value: str) -> str:
        if key not in self._names:
            self._names[key] = name
            self._declarators.setdefault(kind, []).append(f"{name} = {value}")
        return name

    def declarations(self) -> list[str]:
        """Return the declarations of all variables."""
        return [
            line
            for kind, declarators in self._declarators.items()
            for line in wrapped(f"const {kind} ", declarators, ";")
        ]


class _Body:
    """The statements that compute the registers of a phase or of a scalar.

    A register that one operation reads becomes a part of its expression.

    Args:
        names: The variables of the function.
        instructions: The instructions.
        results: What is stored or returned.
        phase: The phase, or None for a scalar.

    Attributes:
        lines: The statements.
    """

    def __init__(
        self,
        names: _Locals,
        instructions: list[Instruction],
        results: Iterable[Operand],
        phase: Phase | None = None,
    ) -> None:
        self.lines: list[str] = []
        self._names, self._phase = names, phase
        self._texts: list[str] = []  # of each register: its variable, or its expression
        self._uses = Counter(operand.index for operand in results if isinstance(operand, Register))
        if phase is not None:  # a value that is stored has a name
            self._uses += self._uses
        for one in instructions:
            if isinstance(one, Apply):
                self._uses += Counter(
                    operand.index for operand in one.operands if isinstance(operand, Register)
                )
        for index, one in enumerate(instructions):
            self._texts.append(self._expression(one))
            if self._uses[index] != 1:
                self._name(index)

    def operand(self, operand: Operand) -> str:
        """Return the expression for a register or a number."""
        return self._texts[operand.index] if isinstance(operand, Register) else f"splat({literal(operand)})"

    def _name(self, index: int) -> None:
        """Store a register in a variable."""
        self.lines.append(f"const V v{index} = {without_parentheses(self._texts[index])};")
        self._texts[index] = f"v{index}"

    def _expression(self, instruction: Instruction) -> str:
        match instruction:
            case Load():
                return self._load(instruction)
            case Sum(group, index, hoisted):
                assert self._phase is not None
                return f"p.get({self._names.sums(self._phase, group, hoisted)}, {index})"
            case ReadScalar(number):
                return f"p.scalar({self._names.scalar(number)})"
            case Apply():
                return self._apply(instruction)

    def _load(self, load: Load) -> str:
        buffer = load.buffer
        array = self._names.array(
            buffer, 0 if load.broadcast else load.offset, "Array" if buffer.per_row else "Row"
        )
        if load.broadcast:
            return f"p.broadcast({array})"
        streams = self._phase is not None and not self._phase.groups
        ahead = streams and buffer.per_row and buffer.memory is Memory.INPUT
        return f"p.load_ahead({array})" if ahead else f"p.load({array})"

    def _apply(self, instruction: Apply) -> str:
        registers = [operand.index for operand in instruction.operands if isinstance(operand, Register)]
        expression = expression_of(instruction)
        for position, operand in enumerate(instruction.operands):
            if isinstance(operand, Register) and expression.uses(position) > 1:
                self._name_expression(operand.index)
        while True:
            operands = list(map(self.operand, instruction.operands))
            if expression.is_call:
                operands = list(map(without_parentheses, operands))
            text = CPP.apply(instruction, operands)
            longest = max(registers, key=lambda index: len(self._texts[index]), default=None)
            if len(text) <= _MAX_EXPRESSION or longest is None or not self._name_expression(longest):
                return text

    def _name_expression(self, index: int) -> bool:
        """Store a register in a variable, unless it is in one."""
        if self._texts[index] == f"v{index}":
            return False
        self._name(index)
        return True


def wrapped(start: str, items: Iterable[str], end: str) -> Iterator[str]:
    """Yield the lines of a list with commas between its items, each short enough."""
    line, indent = start, " " * 4
    for number, item in enumerate(items):
        separator = ", " if number else ""
        if len(line) + len(separator) + len(item) + len(end) > _MAX_LINE - 4:
            yield f"{line}{separator.rstrip()}"
            line, separator = indent, ""
        line += separator + item
    yield line + end


def indented(lines: Iterable[str], columns: int = 2) -> list[str]:
    """Return lines with spaces in front."""
    return [" " * columns + line for line in lines]
