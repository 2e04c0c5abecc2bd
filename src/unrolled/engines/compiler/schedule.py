"""When each value of a loop is computed, and which are stored: levels, and the phases of each.

What no later step reads, as an output that is a product with the state, is *late*: it is computed after a
block of steps, for all their rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from unrolled.engines.compiler.ir import ancestors, is_reduction, width
from unrolled.engines.compiler.partition import LoopPartition

aten = torch.ops.aten


@dataclass
class Phase:
    """A pass over the panels of one width at one level: what it stores, into what, from which column."""

    width: int
    stores: list[tuple[fx.Node, fx.Node, int]] = field(default_factory=list)


class Schedule:
    """The levels of a loop.

    What a product or a reduction reads whole was stored at an earlier level, and so was what a later
    level would need a product for.

    Args:
        loop: its split.
        may_wait: whether values may be late.

    Attributes:
        levels: of every value, the first at which it can be computed.
        late: the values that are computed after the steps of a block; their levels begin with ``first_late``.
        crossing: values of each step that late ones read, in order.
        must: the values that are stored, in order.
        scalars: values of one column that each thread computes and keeps for itself, numbered.
    """

    def __init__(self, loop: LoopPartition, may_wait: bool) -> None:
        self.loop = loop
        self.inside = set(loop.loop)
        self.late = self._late() if may_wait else set()
        self.first_late = 0
        self.levels: dict[fx.Node, int] = {}
        self.scalars: dict[fx.Node, int] = {}
        wanted = dict.fromkeys([*self.loop.keeps, *self.loop.new])
        unstored: set[fx.Node] = set()  # values that stand in registers with a product of their level
        for node in sorted(self.loop.loop, key=self.late.__contains__):  # in order, the late ones last
            product = node.target is aten.mm.default
            level = self.first_late if node in self.late else 0
            is_scalar = is_reduction(node) or (
                width(node) == 1
                and not product
                and node.target is not aten.cat.default
                and any(n in self.scalars for n in node.all_input_nodes)
            )
            if is_scalar:
                self.scalars[node] = len(self.scalars)
            for given in node.all_input_nodes:
                if given not in self.inside:
                    continue
                if node in self.late and given not in self.late:
                    wanted[given] = None
                    continue
                at = self.levels[given]
                if product:
                    whole = True
                elif is_reduction(node):
                    whole = given in unstored
                elif node.target is aten.cat.default or given in self.scalars:
                    whole = False
                else:  # one column for all, or for what each thread keeps for itself
                    whole = width(given) == 1 and (width(node) > 1 or is_scalar)
                if whole:
                    wanted[given] = None
                level = max(level, at + whole)
            for given in node.all_input_nodes:
                if given in unstored and self.levels[given] < level:
                    wanted[given] = None
            self.levels[node] = level
            if product or (
                not is_scalar and any(n in unstored and self.levels[n] == level for n in node.all_input_nodes)
            ):
                unstored.add(node)
            if node not in self.late:
                self.first_late = max(self.first_late, level + 1)
        self.must = [n for n in self.loop.loop if n in wanted]
        read = {given for node in self.late for given in node.all_input_nodes}
        self.crossing = [n for n in self.loop.loop if n in read and n not in self.late]

    def _late(self) -> set[fx.Node]:
        """What leads to no state that a step reads, where a product or a sum is in it."""
        read = [
            new
            for old, new in zip(self.loop.old, self.loop.new, strict=True)
            if not self.inside.isdisjoint(old.users)
        ]
        late = self.inside - ancestors(read)
        given = {given for node in late for given in node.all_input_nodes}
        whole = any(node.target is aten.mm.default or is_reduction(node) for node in late)
        narrow = any(width(node) == 1 for node in (given & self.inside) - late)
        return late if whole and not narrow and given.isdisjoint(self.loop.old) else set()

    def phases(self) -> list[list[Phase]]:
        """The phases of each level."""
        found: dict[tuple[int, int], Phase] = {}
        for node in self.must:
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
                found.setdefault(key, Phase(width(part))).stores.append((part, node, column))
        count = 1 + max([0, *(level for level, _ in found), *(self.levels[n] for n in self.scalars)])
        return [[found[key] for key in sorted(found) if key[0] == level] for level in range(count)]
