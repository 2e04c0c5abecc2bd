"""A loop over time as C++: phases of matrix products and the arithmetic that consumes them in registers.

Every value of the loop is ``(batch, width)``. A *piece* of it is some of its columns; a panel is as many
columns as a vector has lanes. The loop goes through *levels*: what a product or a reduction reads whole was
stored at an earlier level. At a level, first the reductions of rows are made, by each thread for itself;
then, for each width, a phase goes over the panels: it accumulates those of its products, computes on them
while they are in registers, and stores what a later level, a later step or the caller reads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.ir import is_number, per_row, width
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.schedule import Phase, Schedule
from unrolled.engines.native.cpp_ops import PLAIN, REDUCTIONS, SUMS, check, literal
from unrolled.engines.native.cpp_template import File, PhaseText, State, rows
from unrolled.engines.native.kernel_spec import Emitted, Pack, Product

aten = torch.ops.aten

_SIDE_BY_SIDE = 8  # products that are accumulated together, at most (STRIP in include/products.h)


def emit(
    loop: LoopPartition,
    dtype: torch.dtype,
    shifted: Collection[fx.Node] = (),
    whole: Collection[fx.Node] = (),
) -> Emitted:
    """Write the loop of a split as C++.

    Args:
        loop: the split.
        dtype: of all its values.
        shifted: states of another loop, of which the one before each step is read.
        whole: products that are computed before the loop, not in it, since others read them too.

    Raises:
        UnsupportedError: an operation that is not in the compiler's vocabulary.
    """
    stored: list[fx.Node] = []
    while True:
        try:
            return _Emitter(replace(loop, loop=[*stored, *loop.loop]), dtype, shifted, whole).emit()
        except _NeededWholeError as needed:
            stored.append(needed.args[0])


class _NeededWholeError(Exception):
    """A product that was to be read panel by panel has to be stored in every step: its node."""


@dataclass
class _Body:
    """The lines of a function that computes pieces, and what it sums up, by the row that is read.

    ``hoisted`` are sums of rows that are known before the loop; ``read`` the places of what every step has
    read from outside.
    """

    level: int
    products: bool
    lines: list[str] = field(default_factory=list)
    names: dict[tuple[fx.Node, int], str] = field(default_factory=dict)
    groups: list[list[Product]] = field(default_factory=list)
    hoisted: list[list[Product]] = field(default_factory=list)
    read: list[str] = field(default_factory=list)

    def place(self, product: Product, groups: list[list[Product]]) -> tuple[int, int]:
        """The group of a product and its place in it."""
        for number, group in enumerate(groups):
            if product in group:
                return number, group.index(product)
        for number, group in enumerate(groups):
            if group[0].row is product.row and len(group) < _SIDE_BY_SIDE:
                group.append(product)
                return number, len(group) - 1
        groups.append([product])
        return len(groups) - 1, 0


class _Emitter:
    def __init__(
        self,
        loop: LoopPartition,
        dtype: torch.dtype,
        shifted: Collection[fx.Node],
        whole: Collection[fx.Node],
    ) -> None:
        self.loop = loop
        self.scalar = {torch.float32: "float", torch.float64: "double"}[dtype]
        self.shifted = shifted
        products = (n for n in loop.before if n.target is aten.mm.default)  # the forward's are kept
        self.hoisted = {n for n in products if n in loop.reads and n not in whole}
        for node in loop.loop:
            check(node)
        self.schedule = Schedule(loop, may_wait=not shifted)
        self.inside, self.must = self.schedule.inside, self.schedule.must
        self.levels, self.scalars = self.schedule.levels, self.schedule.scalars
        self.sizes: list[int] = []
        self.strides: list[tuple[fx.Node, int]] = []
        self.pointers: list[tuple[str, Any]] = [("starts", None)]
        self.packs: list[Pack] = []
        self.shifts: list[tuple[fx.Node, int]] = []
        self.phases: list[PhaseText] = []
        self.crossed = False  # whether a column reads another one of a state
        self.slots: dict[fx.Node, str] = {}  # of what is read from outside, in the order of its use
        self.kept_slots = {n: f"k{k}" for k, n in enumerate(loop.keeps)}
        scratch = [n for n in self.must if n not in loop.keeps and n not in loop.new]
        self.scratch_slots = {n: f"b{k}" for k, n in enumerate(scratch)}

    def emit(self) -> Emitted:
        source = self._file().text()
        return Emitted(
            source,
            self.sizes,
            self.strides,
            self.shifts,
            self.pointers,
            self.packs,
            frozenset(self.hoisted),
            self.apart,
            bool(self.schedule.late),
        )

    @property
    def apart(self) -> bool:
        """Whether a step is one pass over the panels, each of which follows from itself alone."""
        now = [phase for phase in self.phases if not phase.late]
        alone = not now or (len(now) == 1 and not now[0].rows)
        return alone and not self.crossed and self.schedule.late.issuperset(self.scalars)

    # --- pieces ---

    def _size(self, value: int) -> str:
        self.sizes.append(value)
        return f"D[SIZES + {len(self.sizes) - 1}]"

    def _pointer(self, kind: str, what: Any) -> str:
        self.pointers.append((kind, what))
        return f"P[{len(self.pointers) - 1}]"

    def _targets(self, node: fx.Node) -> list[str]:
        found = [f"n{k}" for k, new in enumerate(self.loop.new) if new is node]
        if node in self.kept_slots:
            found.append(self.kept_slots[node])
        return found or [self.scratch_slots[node]]

    def _address(self, node: fx.Node) -> str:
        """Where a value that is in memory lies, at the first row of this step."""
        if node in self.loop.old:
            return f"o{self.loop.old.index(node)}"
        if node in self.inside:
            return self._targets(node)[0]
        return self.slots.setdefault(node, f"a{len(self.slots)}")

    def _piece(self, body: _Body, node: object, offset: int, columns: int) -> str:
        """The name of the vector that holds columns ``offset + i`` of a value."""
        if not isinstance(node, fx.Node):
            return f"splat(T({literal(node)}))"
        if is_number(node):
            return f"splat(T({literal(node.args[1])}))"
        if (node, offset) not in body.names:
            text = self._expression(body, node, offset, columns)
            body.names[node, offset] = f"v{len(body.names)}"
            body.lines.append(f"const V {body.names[node, offset]} = {text};")
        return body.names[node, offset]

    def _expression(self, body: _Body, node: fx.Node, offset: int, columns: int, now: bool = False) -> str:
        if node in self.scalars and not now:
            return f"splat(z{self.scalars[node]}[at])"
        stored = node in self.must and self.levels[node] < body.level and not now
        if node in self.hoisted and not stored:
            if not body.products:
                raise _NeededWholeError(node)
            return self._sum(body, node, offset, hoisted=True)
        if node not in self.inside or stored:
            return self._loaded(body, node, offset, columns)
        target, args = node.target, node.args

        def part(value: object) -> str:
            one = isinstance(value, fx.Node) and width(value) == 1
            return self._piece(body, value, 0 if one else offset, columns)

        if target in SUMS:
            scale = node.kwargs.get("alpha", 1)
            right = part(args[1]) if scale == 1 else f"({part(args[1])} * splat(T({literal(scale)})))"
            return f"({part(args[0])} {SUMS[target]} {right})"
        if target is aten.mm.default:
            if not body.products:
                raise AssertionError(f"{node} should have been stored")
            return self._sum(body, node, offset, hoisted=False)
        if target is aten.slice.Tensor:
            start = args[2] if len(args) > 2 and args[2] else 0
            assert isinstance(start, int)
            return self._piece(body, args[0], offset + start, columns)
        if target is aten.cat.default:
            for value in args[0]:  # type: ignore[union-attr]
                if offset < width(value):  # type: ignore[arg-type]
                    return self._piece(body, value, offset, columns)
                offset -= width(value)  # type: ignore[arg-type]
        taken = 1 if target in (aten.expand.default, aten.clone.default) else 3
        return PLAIN[target].format(*map(part, args[:taken]))

    def _sum(self, body: _Body, node: fx.Node, offset: int, hoisted: bool) -> str:
        """The sum of a product's panel; where it stands is known once all groups of the phase are."""
        row, matrix = node.args[:2]
        product = Product(row, matrix, offset)  # type: ignore[arg-type]
        group, place = body.place(product, body.hoisted if hoisted else body.groups)
        return f"hoisted[{group}][HOISTED{group}; + {place}]" if hoisted else f"sums[GROUP{group}; + {place}]"

    def _loaded(self, body: _Body, node: fx.Node, offset: int, columns: int) -> str:
        address, own = self._address(node), width(node)
        if node in self.loop.old and (offset or own != columns):
            self.crossed = True
        wide = self._size(own) if per_row(node) else ""
        if own == 1 and columns > 1:
            return f"splat({address}[{f'at * {wide}' if wide else 0}])"
        start = f"{self._size(offset)} + i"
        if not wide:
            return f"load({address} + {start}, n)"
        if node in self.slots:
            body.read.append(f"{address} + (at + ahead) * {wide} + {start}")
        return f"load({address} + at * {wide} + {start}, n)"

    # --- functions ---

    def _reductions(self, level: int) -> str:
        """What each thread computes of its rows before the phases of a level: R rows at once.

        The sums of a row are one after another; what hides their latency are the other rows.
        """
        blocks = []
        for node, number in self.scalars.items():
            if self.levels[node] != level:
                continue
            body = _Body(level, products=False)
            if node.target in REDUCTIONS:
                operand = node.args[0]
                assert isinstance(operand, fx.Node)
                value = self._piece(body, operand, 0, width(operand))
                join, neutral = REDUCTIONS[node.target]
                beyond = f"first(n, {value}, splat(T({neutral})))"
                block = [
                    f"const long W = {self._size(width(operand))};",
                    "V all[R];",
                    f"EACH all[r] = splat(T({neutral}));",
                    "for (long i = 0; i < W; i += L) {",
                    "  const long n = W - i;",
                    "  EACH {",
                    "    [[maybe_unused]] const long at = from + r;",
                    *(f"    {line}" for line in body.lines),
                    f"    all[r] = {join.format('all[r]', beyond)};",
                    "  }",
                    "}",
                    "EACH one[r] = all[r][0];",
                    "for (int j = 1; j < L; j++)",
                    f"  EACH one[r] = {join.format('splat(one[r])', 'splat(all[r][j])')}[0];",
                ]
            else:
                text = self._expression(body, node, 0, 1, now=True)
                block = [
                    "[[maybe_unused]] const long i = 0, n = 1;",
                    "EACH {",
                    "  [[maybe_unused]] const long at = from + r;",
                    *(f"  {line}" for line in body.lines),
                    f"  one[r] = ({text})[0];",
                    "}",
                ]
            block.append(f"EACH z{number}[from + r] = one[r];")
            if node in self.must:
                size = self._size(1)
                block.append("if (h.by_rows || h.id == 0) {")
                block += [f"  EACH {slot}[(from + r) * {size}] = one[r];" for slot in self._targets(node)]
                block.append("}")
            blocks.append(block)
        return rows(level, blocks) if blocks else ""

    def _phase(self, name: str, level: int, phase: Phase, late: bool) -> PhaseText:
        body, stores = _Body(level, products=True), []
        for what, into, column in phase.stores:
            value = self._piece(body, what, 0, phase.width)
            stores += [
                f"store({slot} + at * {self._size(width(into))} + {self._size(column)} + i, {value}, n);"
                for slot in self._targets(into)
            ]
        early = [] if body.groups else [f"__builtin_prefetch({place});" for place in dict.fromkeys(body.read)]
        lines = "\n".join([*early, *body.lines, *stores])
        before = 0
        for number, group in enumerate(body.groups):
            shift = f"{before} * rows * panels + " if before else ""
            lines = lines.replace(f"GROUP{number};", f"{shift}(r * panels + u) * {len(group)}")
            before += len(group)
        for number, group in enumerate(body.hoisted):
            lines = lines.replace(f"HOISTED{number};", f"(HERE * panels + u) * {len(group)}")
        return PhaseText(
            name,
            self._size(phase.width),
            [self._address(group[0].row) for group in body.groups],
            [self._hoisted_row(group[0].row) for group in body.hoisted],
            [self._group(tuple(group), phase.width) for group in (*body.groups, *body.hoisted)],
            lines,
            late,
        )

    def _hoisted_row(self, row: fx.Node) -> str:
        return f"(const T*){self._pointer('array', row)} + begin * {self._size(width(row))}"

    def _group(self, products: tuple[Product, ...], columns: int) -> tuple[str, str]:
        """A group as C++ has it, and where its packed matrices are kept from call to call."""
        pack = Pack(products, columns)
        self.packs.append(pack)
        matrices = []
        for product in products:
            self.strides.append((product.matrix, len(self.sizes)))
            k, n = self._size(0), self._size(0)
            offset = self._size(product.offset)
            from_ = self._pointer("matrix", product.matrix)
            matrices.append(f"{{(T*){from_} + {offset} * {n}, {k}, {n}}}")
        inner = ", ".join(matrices)
        text = f"{{{len(products)}, {self._size(pack.depth)}, nullptr, {{{inner}}}, nullptr}}"
        return text, self._pointer("pack", pack)

    def _file(self) -> File:
        loop = self.loop
        functions: list[PhaseText | str] = []
        calls: list[str] = []
        late: list[str] = []
        for level, phases in enumerate(self.schedule.phases()):
            to = late if self.schedule.late and level >= self.schedule.first_late else calls
            if to:
                to.append("h.meet();")
            reductions = self._reductions(level)
            if reductions:
                functions.append(reductions)
                to.append(f"rows{level}(s, h);")
            for number, phase in enumerate(phases):
                text = self._phase(f"{level}_{number}", level, phase, to is late)
                self.phases.append(text)
                functions.append(text)
                steps = "0, room_rows, 1" if to is late else "shift, room_rows, steps"
                to.append(f"pass{text.name}(*this, s, h, {steps});")
        return File(
            scalar=self.scalar,
            functions=functions,
            phases=self.phases,
            calls=calls,
            late=late,
            arrays=[self._array(node, name) for node, name in self.slots.items()],
            kept=[
                (name, f"(T*){self._pointer('kept', node)} + at.first * {self._size(width(node))}")
                for node, name in self.kept_slots.items()
            ],
            scratch=[
                (name, self._size(width(node)), node in self.schedule.crossing or node in self.schedule.late)
                for node, name in self.scratch_slots.items()
            ],
            scalars=[f"z{number}" for number in self.scalars.values()],
            states=[
                State(
                    self._size(width(old)),
                    initial=self._pointer("initial", k),
                    kept=self._pointer("states", k),
                    final=self._pointer("final", k),
                    crossing=new in self.schedule.crossing,
                    late=new in self.schedule.late,
                )
                for k, (old, new) in enumerate(zip(loop.old, loop.new, strict=True))
            ],
            apart=self.apart,
        )

    def _array(self, node: fx.Node, name: str) -> tuple[str, str]:
        """A value from outside, and where it lies at a step."""
        base = self._pointer("array", node)
        if not per_row(node):
            return name, f"(const T*){base}"
        columns = self._size(width(node))
        if node not in self.shifted:
            return name, f"(const T*){base} + at.first * {columns}"
        first, shift = self._pointer("first", node), self._size(0)
        self.shifts.append((node, len(self.sizes) - 1))
        return name, f"array({base}, {first}, {shift}, c, at, {columns})"
