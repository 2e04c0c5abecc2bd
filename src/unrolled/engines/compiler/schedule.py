"""Assign the values of a loop to levels and phases, and decide which of them are stored in memory.

Values that no later step reads, such as an output that is a product with the state, are *deferred*: they are
computed after a block of steps, for all rows of the block at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import fx

from unrolled.engines.compiler.ir import ancestors, is_product, is_reduction, width
from unrolled.engines.compiler.partition import LoopPartition

aten = torch.ops.aten


@dataclass
class Pass:
    """A pass over the columns of all values of one width, at one level.

    Attributes:
        width: Number of columns.
        stores: Values that the pass stores, each with the stored node that it is a part of, and its first
            column there.
    """

    width: int
    stores: list[tuple[fx.Node, fx.Node, int]] = field(default_factory=list)


class Schedule:
    """The levels of a loop.

    What a product or a reduction reads must have been stored whole at an earlier level, and so must a
    concatenation that any value reads. A product itself is stored if a later level reads it. Only phases
    have the sum of a hoisted product, so it is stored in the loop if a scalar is computed from it.

    Args:
        partition: The partition that contains the loop.
        hoisted: Products that are computed before the loop, a block of steps at a time.
        allow_deferred: Whether values may be deferred.

    Attributes:
        loop: Values of the loop, in order.
        inside: The same, as a set.
        levels: For each value, the first level at which it can be computed.
        deferred: Values that are computed after the steps of a block. Their levels begin at
            ``first_deferred_level``.
        read_by_deferred: Values of each step that deferred values read, in graph order.
        stored: Values that are stored, in graph order.
        scalars: Values of one column that each thread computes for itself, numbered.
    """

    def __init__(self, partition: LoopPartition, hoisted: Collection[fx.Node], allow_deferred: bool) -> None:
        self.partition = partition
        self.hoisted = hoisted
        self.loop = list(partition.loop)
        self._assign(allow_deferred)
        while (hidden := self._hidden_product()) is not None:
            self.loop.insert(len(self.loop) - len(partition.loop), hidden)
            self._assign(allow_deferred)
        read = {operand for node in self.deferred for operand in node.all_input_nodes}
        self.read_by_deferred = [n for n in self.loop if n in read and n not in self.deferred]

    def _assign(self, allow_deferred: bool) -> None:
        """Assign the values of the loop to levels, and decide which are stored."""
        partition = self.partition
        self.inside = set(self.loop)
        self.deferred = self._find_deferred() if allow_deferred else set()
        self.first_deferred_level = 0
        self.levels: dict[fx.Node, int] = {}
        self.scalars: dict[fx.Node, int] = {}
        stored = dict.fromkeys([*partition.saved, *partition.new_states])
        in_registers: set[fx.Node] = set()  # values that depend on a product in the same level
        for node in sorted(self.loop, key=self.deferred.__contains__):  # a stable sort: deferred values last
            multiplies = is_product(node)
            level = self.first_deferred_level if node in self.deferred else 0
            is_scalar = is_reduction(node) or (
                width(node) == 1
                and not multiplies
                and node.target is not aten.cat.default
                and any(n in self.scalars for n in node.all_input_nodes)
            )
            if is_scalar:
                self.scalars[node] = len(self.scalars)
            for operand in node.all_input_nodes:
                if operand not in self.inside:
                    continue
                if node in self.deferred and operand not in self.deferred:
                    stored[operand] = None
                    continue
                if multiplies or operand.target is aten.cat.default:
                    read_whole = True
                elif is_reduction(node):
                    read_whole = operand in in_registers
                elif node.target is aten.cat.default or operand in self.scalars:
                    read_whole = False
                else:  # a column that is broadcast to all columns, or read by every thread for a scalar
                    read_whole = width(operand) == 1 and (width(node) > 1 or is_scalar)
                if read_whole:
                    stored[operand] = None
                level = max(level, self.levels[operand] + read_whole)
            for operand in node.all_input_nodes:
                if operand in in_registers and self.levels[operand] < level:
                    stored[operand] = None
            self.levels[node] = level
            if multiplies or (
                not is_scalar
                and any(n in in_registers and self.levels[n] == level for n in node.all_input_nodes)
            ):
                in_registers.add(node)
            if node not in self.deferred:
                self.first_deferred_level = max(self.first_deferred_level, level + 1)
        self.stored = [n for n in self.loop if n in stored]

    def _hidden_product(self) -> fx.Node | None:
        """Return a hoisted product that a scalar would read, although only phases know its sum."""
        for scalar in self.scalars:
            level = self.levels[scalar]
            pending, seen = list(scalar.all_input_nodes), set[fx.Node]()
            while pending:
                node = pending.pop(0)
                if node in seen or node in self.scalars:
                    continue
                seen.add(node)
                is_stored = node in self.stored and self.levels[node] < level
                if node in self.hoisted and not is_stored:
                    return node
                if node in self.inside and not is_stored:
                    pending += node.all_input_nodes
        return None

    def _find_deferred(self) -> set[fx.Node]:
        """Return the values that no later step depends on, if they contain a product or a reduction."""
        read_states = [
            new
            for old, new in zip(self.partition.old_states, self.partition.new_states, strict=True)
            if not self.inside.isdisjoint(old.users)
        ]
        deferred = self.inside - ancestors(read_states)
        operands = {operand for node in deferred for operand in node.all_input_nodes}
        is_costly = any(is_product(node) or is_reduction(node) for node in deferred)
        reads_column = any(width(node) == 1 for node in (operands & self.inside) - deferred)
        reads_old_state = not operands.isdisjoint(self.partition.old_states)
        return deferred if is_costly and not reads_column and not reads_old_state else set()

    def passes(self) -> list[list[Pass]]:
        """Return the passes of each level, ordered by width."""
        passes: dict[tuple[int, int], Pass] = {}  # by level and width
        for node in self.stored:
            if node in self.scalars:
                continue
            parts: list[tuple[fx.Node, int]] = [(node, 0)]
            if node.target is aten.cat.default:
                parts, column = [], 0
                for part in node.args[0]:  # type: ignore[union-attr]
                    parts.append((part, column))  # type: ignore[arg-type]
                    column += width(part)  # type: ignore[arg-type]
            for part, column in parts:
                key = (self.levels[node], width(part))
                passes.setdefault(key, Pass(width(part))).stores.append((part, node, column))
        count = 1 + max([0, *(level for level, _ in passes), *(self.levels[n] for n in self.scalars)])
        return [[passes[key] for key in sorted(passes) if key[0] == level] for level in range(count)]
