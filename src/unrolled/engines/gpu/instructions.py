"""The instructions of a phase or a scalar as expressions on tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from unrolled.engines.compiler.generated_code import without_parentheses
from unrolled.engines.compiler.kernel_ir import Apply, Instruction, Load, Operand, ReadScalar, Register, Sum
from unrolled.engines.gpu.kernel_source import Source, Tile
from unrolled.engines.gpu.triton_ops import literal, operation

_MAX_EXPRESSION = 80  # characters; longer expressions get a name


class Tiles(Protocol):
    """Where the values of a run of columns come from."""

    def load(self, load: Load) -> Tile:
        """Return columns of a buffer."""

    def sum(self, one: Sum) -> Tile:
        """Return columns of a product."""

    def scalar(self, number: int) -> Tile:
        """Return a scalar."""


class Body:
    """The registers of a phase or a scalar, for a run of its columns.

    A register that is read once becomes a part of an expression.

    Args:
        source: The source of the kernel. Statements are added to its step.
        tiles: Where values come from.
        instructions: The instructions.
        results: What is stored or returned.
    """

    def __init__(
        self, source: Source, tiles: Tiles, instructions: Sequence[Instruction], results: Sequence[Operand]
    ) -> None:
        self._source, self._tiles = source, tiles
        self._registers: list[Tile] = []
        applied = [operand for one in instructions if isinstance(one, Apply) for operand in one.operands]
        operands = [*applied, *results]
        self._uses = Counter(operand.index for operand in operands if isinstance(operand, Register))
        for index, one in enumerate(instructions):
            self._registers.append(self._instruction(one))
            if isinstance(one, (Apply, Sum)) and self._uses[index] > 1:
                self._name(index)

    def _instruction(self, one: Instruction) -> Tile:
        match one:
            case Load():
                return self._tiles.load(one)
            case Sum():
                return self._tiles.sum(one)
            case ReadScalar(number):
                return self._tiles.scalar(number)
            case Apply():
                return self._apply(one)

    def _apply(self, one: Apply) -> Tile:
        op = operation(one)
        for position, operand in enumerate(one.operands):
            if isinstance(operand, Register) and (
                op.template.count(f"{{{position}}}") > 1
                or len(self._registers[operand.index].text) > _MAX_EXPRESSION
            ):
                self._name(operand.index)
        operands = [self.operand(operand) for operand in one.operands]
        values = [None if isinstance(operand, Register) else float(operand) for operand in one.operands]
        columns = max([1, *(tile.columns for tile in operands)])
        text = self._source.apply(op, operands, values)
        return Tile(text, columns, any(tile.per_row for tile in operands))

    def _name(self, index: int) -> None:
        tile = self._registers[index]
        if not tile.text.isidentifier():
            name = self._source.numbered("v")
            self._source.line(f"{name} = {without_parentheses(tile.text)}")
            self._registers[index] = Tile(name, tile.columns, tile.per_row)

    def operand(self, operand: Operand) -> Tile:
        """Return the tile of a register or a number."""
        if isinstance(operand, Register):
            return self._registers[operand.index]
        return Tile(literal(float(operand)), 0, False)

    def named(self, operand: Operand) -> Tile:
        """Return the same, in a variable."""
        if isinstance(operand, Register):
            self._name(operand.index)
        return self.operand(operand)
