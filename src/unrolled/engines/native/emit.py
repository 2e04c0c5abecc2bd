"""A loop over time as C++: phases of matrix products and the arithmetic that consumes them in registers.

Every value of the loop is ``(batch, width)``. A *piece* of it is some of its columns; a panel is as many
columns as a vector has lanes. The loop goes through *levels*: what a product or a reduction reads whole was
stored at an earlier level. At a level, first the reductions of rows are made, by each thread for itself;
then, for each width, a phase goes over the panels: it accumulates those of its products, computes on them
while they are in registers, and stores what a later level, a later step or the caller reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from unrolled.engines.native.graph import Split
from unrolled.engines.native.program import (
    HEADER,
    Emitted,
    Pack,
    Product,
    literal,
    per_row,
    width,
)
from unrolled.engines.native.schedule import Phase, Schedule
from unrolled.engines.native.vocabulary import PLAIN, REDUCTIONS, SUMS, is_number

aten = torch.ops.aten

_SIDE_BY_SIDE = 8  # products that are accumulated together, at most (STRIP in include/products.h)


def emit(loop: Split, dtype: torch.dtype) -> Emitted:
    """Write the loop of a split as C++.

    Raises:
        UnsupportedError: an operation that is not in the compiler's vocabulary.
    """
    return _Emitter(loop, dtype).emit()


@dataclass
class _Body:
    """The lines of a function that computes pieces, and what it accumulates, by the row that is read."""

    level: int
    products: bool
    lines: list[str] = field(default_factory=list)
    names: dict[tuple[fx.Node, int], str] = field(default_factory=dict)
    groups: list[list[Product]] = field(default_factory=list)

    def place(self, product: Product) -> tuple[int, int]:
        """The group of a product and its place in it."""
        for number, group in enumerate(self.groups):
            if product in group:
                return number, group.index(product)
        for number, group in enumerate(self.groups):
            if group[0].row is product.row and len(group) < _SIDE_BY_SIDE:
                group.append(product)
                return number, len(group) - 1
        self.groups.append([product])
        return len(self.groups) - 1, 0


class _Emitter:
    def __init__(self, loop: Split, dtype: torch.dtype) -> None:
        self.loop = loop
        self.scalar = {torch.float32: "float", torch.float64: "double"}[dtype]
        self.schedule = Schedule(loop)
        self.inside, self.must = self.schedule.inside, self.schedule.must
        self.levels, self.scalars = self.schedule.levels, self.schedule.scalars
        self.sizes: list[int] = []
        self.strides: list[tuple[fx.Node, int]] = []
        self.pointers: list[tuple[str, Any]] = [("starts", None)]
        self.packs: list[Pack] = []

    def emit(self) -> Emitted:
        kept, new = set(self.loop.keeps), set(self.loop.new)
        arrays = [n for n in self.loop.reads if not self.schedule.is_matrix(n) and not is_number(n)]
        scratch = [n for n in self.must if n not in kept and n not in new]
        self.slots = {n: f"a{k}" for k, n in enumerate(arrays)}
        self.kept_slots = {n: f"k{k}" for k, n in enumerate(self.loop.keeps)}
        self.scratch_slots = {n: f"b{k}" for k, n in enumerate(scratch)}
        source = self._file()
        return Emitted(source, self.sizes, self.strides, self.pointers, self.packs, len(self.scalars))

    # --- pieces ---

    def _size(self, value: int) -> str:
        self.sizes.append(value)
        return f"D[{len(self.sizes) - 1 + HEADER}]"

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
        return self.slots[node] if node in self.slots else self._targets(node)[0]

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
        if node not in self.inside or (node in self.must and self.levels[node] < body.level and not now):
            return self._loaded(node, offset, columns)
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
            group, place = body.place(Product(args[0], args[1], offset))  # type: ignore[arg-type]
            return f"sums[GROUP{group}; + {place}]"
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

    def _loaded(self, node: fx.Node, offset: int, columns: int) -> str:
        address, own = self._address(node), width(node)
        row = f"at * {self._size(own)}" if per_row(node) else "0"
        if own == 1 and columns > 1:
            return f"splat({address}[{row}])"
        return f"load({address} + {row} + {self._size(offset)} + i, n)"

    # --- functions ---

    def _reductions(self, level: int) -> str:
        """What each thread computes of its rows before the phases of a level."""
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
                    f"V all = splat(T({neutral}));",
                    f"const long W = {self._size(width(operand))};",
                    "for (long i = 0; i < W; i += L) {",
                    "  const long n = W - i;",
                    *(f"  {line}" for line in body.lines),
                    f"  all = {join.format('all', beyond)};",
                    "}",
                    "T one = all[0];",
                    f"for (int j = 1; j < L; j++) one = {join.format('splat(one)', 'splat(all[j])')}[0];",
                ]
            else:
                text = self._expression(body, node, 0, 1, now=True)
                block = [
                    "[[maybe_unused]] const long i = 0, n = 1;",
                    *body.lines,
                    f"const T one = ({text})[0];",
                ]
            block.append(f"z{number}[at] = one;")
            if node in self.must:
                block.append("if (h.by_rows || h.id == 0) {")
                block += [f"  {slot}[at * {self._size(1)}] = one;" for slot in self._targets(node)]
                block.append("}")
            blocks.append("    {\n      " + "\n      ".join(block) + "\n    }")
        if not blocks:
            return ""
        lines = "\n".join(blocks)
        return f"""
static void rows{level}(const Step& s, const Share& h) {{
  SLOTS
  for (long at = h.from; at < std::min(h.to, s.rows); at++) {{
{lines}
  }}
}}
"""

    def _phase(self, name: str, level: int, phase: Phase) -> str:
        body, stores = _Body(level, products=True), []
        for what, into, column in phase.stores:
            value = self._piece(body, what, 0, phase.width)
            stores += [
                f"store({slot} + at * {self._size(width(into))} + {self._size(column)} + i, {value}, n);"
                for slot in self._targets(into)
            ]
        first = len(self.packs)
        self.packs += [Pack(tuple(group), phase.width) for group in body.groups]
        lines = "\n      ".join([*body.lines, *stores])
        before = 0
        for number, group in enumerate(body.groups):
            shift = f"{before} * rows * panels + " if before else ""
            lines = lines.replace(f"GROUP{number};", f"{shift}(r * panels + u) * {len(group)}")
            before += len(group)
        count = len(body.groups)
        groups = ", ".join(f"&groups[{first + k}]" for k in range(count)) or "nullptr"
        rows = ", ".join(self._address(group[0].row) for group in body.groups) or "nullptr"
        if count:
            size = self._size(phase.width)
            self.prepared.append(
                f"  const Group* const own{name}[] = {{{groups}}};\n"
                f"  if (!h.direct) pack(h, {size}, own{name}, {count});"
            )
        return f"""
static void point{name}(const Step& s, long row, int rows, long panel, int panels,
                        [[maybe_unused]] const V* sums) {{
  SLOTS
  const long W = {self._size(phase.width)};
  for (int u = 0; u < panels; u++)
    for (int r = 0; r < rows; r++) {{
      const long i = (panel + u) * L, n = W - i, at = row + r;
      {lines}
    }}
}}

static void pass{name}(const Step& s, const Share& h, [[maybe_unused]] const Group* groups) {{
  SLOTS
  const Group* const own[] = {{{groups}}};
  const T* const x[] = {{{rows}}};
  sweep<Step, {count}>(s, h, {self._size(phase.width)}, own, x, point{name});
}}
"""

    def _group(self, pack: Pack) -> str:
        matrices = []
        for product in pack.products:
            self.strides.append((product.matrix, len(self.sizes)))
            k, n = self._size(0), self._size(0)
            offset = self._size(product.offset)
            from_ = self._pointer("matrix", product.matrix)
            matrices.append(f"{{(T*){from_} + {offset} * {n}, {k}, {n}}}")
        packed = self._pointer("pack", pack)
        inner = ", ".join(matrices)
        return f"{{{len(pack.products)}, {self._size(pack.depth)}, (T*){packed}, {{{inner}}}}}"

    def _file(self) -> str:
        loop = self.loop
        self.prepared: list[str] = []
        functions: list[str] = []
        calls: list[str] = []
        for level, phases in enumerate(self.schedule.phases()):
            if calls:
                calls.append("h.meet();")
            reductions = self._reductions(level)
            if reductions:
                functions.append(reductions)
                calls.append(f"rows{level}(s, h);")
            for number, phase in enumerate(phases):
                functions.append(self._phase(f"{level}_{number}", level, phase))
                calls.append(f"pass{level}_{number}(s, h, groups);")
        members, setup = [], []

        def array(name: str, kind: str, what: Any, place: str, constant: str = "") -> None:
            members.append(f"{constant}T* {name};")
            setup.append(f"s.{name} = (T*){self._pointer(kind, what)}{place};")

        for node, name in self.slots.items():
            place = f" + first * {self._size(width(node))}" if per_row(node) else ""
            array(name, "array", node, place, "const ")
        for node, name in self.kept_slots.items():
            array(name, "kept", node, f" + first * {self._size(width(node))}")
        for node, name in self.scratch_slots.items():
            array(name, "scratch", node, "")
        for number in self.scalars.values():
            array(f"z{number}", "scalars", number, " + id * D[ROWS]")
        for k, old in enumerate(loop.old):
            members.append(f"const T* o{k}; T* n{k};")
            size, initial = self._size(width(old)), self._pointer("initial", k)
            new, grown = self._pointer("new", k), self._pointer("grown", k)
            places = f"(T*){initial}, (T*){new} + last * {size}, (T*){grown}"
            setup.append(f"s.o{k} = before(h, {places}, {size}, rows, rows_last);")
            setup.append(f"s.n{k} = (T*){new} + first * {size};")
        groups = ",\n      ".join(self._group(pack) for pack in self.packs) or "{}"
        names = [m.split("*")[1].strip(" ;") for m in members[: len(members) - len(loop.old)]]
        names += [f"{kind}{k}" for k in range(len(loop.old)) for kind in "on"]
        slots = "[[maybe_unused]] const int64_t* const D = s.D; " + " ".join(
            f"[[maybe_unused]] auto* const {n} = s.{n};" for n in names
        )
        newline, tab = "\n", "\n    "
        return f"""using T = {self.scalar};
#include "loop.h"

namespace {{

struct Step {{
  const int64_t* D;
  long rows;
  {f"{newline}  ".join(members)}
}};
{"".join(functions).replace("SLOTS", slots)}
void work(void* what, int id, int count) {{
  Call& c = *(Call*)what;
  const int64_t* const D = c.D;
  void* const* const P = c.P;
  const Share h = share(c, id, count);
  [[maybe_unused]] const Group groups[] = {{
      {groups}}};
{newline.join(self.prepared)}
  if (h.by_rows) c.meeting.wait(count);
  const auto* const starts = (const int64_t*)P[0];
  long last = 0, rows_last = 0;
  for (long step = 0; step < D[STEPS]; step++) {{
    const long t = D[BACK] ? D[STEPS] - 1 - step : step;
    [[maybe_unused]] const long first = starts ? starts[t] : t * D[ROWS];
    const long rows = starts ? starts[t + 1] - starts[t] : D[ROWS];
    Step s;
    s.D = D;
    s.rows = rows;
    {tab.join(setup)}
    if (rows_last && rows_last < rows) h.meet();
    {tab.join(calls)}
    h.meet();
    last = first;
    rows_last = rows;
  }}
}}

}}  // namespace

extern "C" void run(const int64_t* sizes, void* const* pointers, const Products* products) {{
  Call c{{sizes, pointers, products, {{}}}};
  products->team((int)sizes[THREADS], work, &c);
}}
"""
