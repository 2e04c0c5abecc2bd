"""A loop over time as C++: phases of matrix products and the arithmetic that consumes them in registers.

Every value of the loop is ``(batch, width)``. A *piece* of it is some of its columns; a panel is as many
columns as a vector has lanes. A phase goes over the panels of one width: it accumulates the panels of
matrix products, computes on them while they are in registers, and stores what a later phase, a later
step or the caller reads. The order of accumulation is that of ``k``, whatever the tile.
"""

from __future__ import annotations

import torch
from torch import fx

from unrolled.engines.native.graph import Split, UnsupportedError, per_row
from unrolled.engines.native.program import Emitted, Phase, Product, args_of, literal, width
from unrolled.engines.native.vocabulary import PLAIN, getitem

aten = torch.ops.aten

_MOVED = (aten.slice.Tensor, aten.split_with_sizes.default, aten.cat.default)
_PRODUCTS = (aten.mm.default, aten.addmm.default)


def emit(loop: Split, dtype: torch.dtype) -> Emitted:
    """Write the loop of a split as C++.

    Raises:
        UnsupportedError: an operation that is not in the compiler's vocabulary.
    """
    return _Emitter(loop, dtype).emit()


class _Emitter:
    def __init__(self, loop: Split, dtype: torch.dtype) -> None:
        self.loop = loop
        self.scalar = {torch.float32: "float", torch.float64: "double"}[dtype]
        self.inside = set(loop.loop)
        self.sizes: list[int] = []
        self.packs: list[tuple[list[Product], int]] = []
        self.stored: dict[fx.Node, int] = {}  # the level after which a stored value can be read
        self.levels: dict[fx.Node, int] = {}

    def emit(self) -> Emitted:
        for node in self.loop.loop:
            self._check(node)
        self.joined = self._spanned()
        wanted = dict.fromkeys([*self.loop.keeps, *self.loop.new])
        for node in self.loop.loop:
            if node.target in _PRODUCTS:
                wanted[self._product_row(node)] = None
            if node in self.joined:
                wanted[node] = None
        self.must = [n for n in self.loop.loop if n in wanted]
        phases = self._schedule()
        kept = set(self.loop.keeps)
        scratch = [n for n in self.must if n not in kept and n not in set(self.loop.new)]
        self.arrays = [n for n in self.loop.reads if not self._is_matrix(n)]
        self.slots = {n: f"a{k}" for k, n in enumerate(self.arrays)}
        self.kept_slots = {n: f"k{i}" for i, n in enumerate(self.loop.keeps)}
        self.scratch_slots = {n: f"b{i}" for i, n in enumerate(scratch)}
        bodies = [self._phase(number, phase) for number, phase in enumerate(phases)]
        source = self._file(bodies, scratch, len(phases))
        return Emitted(source, self.sizes, self.arrays, scratch, self.packs)

    # --- what is computed when ---

    def _check(self, node: fx.Node) -> None:
        target = node.target
        if target is getitem:
            return
        known = target in PLAIN or target in _MOVED or target in _PRODUCTS
        if target in (aten.add.Tensor, aten.sub.Tensor, aten.clamp.default):
            known = True
        if not known:
            raise UnsupportedError(f"{target} is not in the compiler's vocabulary")
        if not isinstance(node.meta["val"], (tuple, list)):
            width(node)  # raises where it has no two axes
        if target in _PRODUCTS:
            row, matrix = args_of(node)[-2:]
            if not (per_row(row) and not per_row(matrix)):
                raise UnsupportedError(f"{target} multiplies two values of the batch")
        if target is aten.cat.default and len(node.args) > 1 and node.args[1] not in (1, -1):
            raise UnsupportedError("it joins values along the batch")

    def _is_matrix(self, node: fx.Node) -> bool:
        return all(
            user.target in _PRODUCTS and user.args[-1] is node for user in node.users if user in self.inside
        )

    @staticmethod
    def _product_row(node: fx.Node) -> fx.Node:
        row: fx.Node = args_of(node)[-2]
        return row

    def _spanned(self) -> set[fx.Node]:
        """Joined values that are read otherwise than part by part: by anything but a product."""
        return {
            n for n in self.loop.loop if n.target is aten.cat.default
            and any(u in self.inside and u.target not in _PRODUCTS for u in n.users)
        }  # fmt: skip

    def _level(self, node: object) -> int:
        """The first phase in which a value can be computed."""
        if not isinstance(node, fx.Node) or node not in self.inside:
            return 0
        if node not in self.levels:
            level = max((self._level(n) + (n in self.joined) for n in node.all_input_nodes), default=0)
            if node.target in _PRODUCTS:
                row = self._product_row(node)
                level = max(level, self._level(row) + 1 if row in self.inside else 0)
            self.levels[node] = level
        return self.levels[node]

    def _schedule(self) -> list[Phase]:
        phases: dict[tuple[int, int], Phase] = {}
        for node in self.must:
            parts: list[tuple[fx.Node, int]] = [(node, 0)]
            if node.target is aten.cat.default:
                parts, column = [], 0
                for part in args_of(node)[0]:
                    parts.append((part, column))
                    column += width(part)
            for part, column in parts:
                key = (self._level(node), width(part))
                phases.setdefault(key, Phase(width(part))).stores.append((part, node, column))
        return [phases[key] for key in sorted(phases)]

    # --- how it is written ---

    def _size(self, value: int) -> str:
        self.sizes.append(value)
        return f"D[{len(self.sizes) + 2}]"

    def _phase(self, number: int, phase: Phase) -> str:
        self._lines: list[str] = []
        self._names: dict[tuple[fx.Node, int], str] = {}
        self._accumulated: dict[Product, int] = {}
        self._groups: dict[fx.Node, list[Product]] = {}
        self._number, self._phase_level = number, min(self._level(into) for _, into, _ in phase.stores)
        stores = []
        for what, into, column in phase.stores:
            value = self._piece(what, 0, phase.width)
            stores += [
                f"store({slot} + at * {self._size(width(into))} + {self._size(column)} + i, {value}, n);"
                for slot in self._targets(into)
            ]
        accumulators, loops = [], []
        for group, (row, products) in enumerate(self._groups.items()):
            count = len(products)
            pack = len(self.packs)
            self.packs.append((products, phase.width))
            depth = self._size(width(row))
            accumulators.append(f"  V g{group}[U][R][{count}] = {{}};")
            loops.append(f"""  {{
    const long K = {depth};
    const T* x = {self._address(row)} + row * K;
    const T* w = w{pack} + panel * K * {count} * L;
    for (long k = 0; k < K; k++) {{
      V m[U][{count}];
#pragma GCC unroll 16
      for (int u = 0; u < U; u++)
#pragma GCC unroll 16
        for (int g = 0; g < {count}; g++) m[u][g] = load(w + ((u * K + k) * {count} + g) * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {{
        const V s = splat(x[r * K + k]);
#pragma GCC unroll 16
        for (int u = 0; u < U; u++)
#pragma GCC unroll 16
          for (int g = 0; g < {count}; g++) g{group}[u][r][g] = fma(m[u][g], s, g{group}[u][r][g]);
      }}
    }}
  }}""")
        total = max(1, sum(len(products) for products in self._groups.values()))
        body = "\n".join("      " + line for line in [*self._lines, *stores])
        return (
            f"""
template <int R, int U> static inline __attribute__((always_inline)) void
phase{number}(const Step& s, long row, long panel) {{
  SLOTS
{chr(10).join([*accumulators, *loops])}
#pragma GCC unroll 16
  for (int u = 0; u < U; u++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {{
      const long i = (panel + u) * L, n = W{number} - i, at = row + r;
{body}
    }}
}}
""".replace("W" + str(number), self._size(phase.width))
            + f"""
static void pass{number}(const Step& s, long B) {{
  SLOTS
  const long panels = ({self._size(phase.width)} + L - 1) / L;
  constexpr int G = {total}, R = tile(G), U = strip(G);
  long panel = 0;
  if (B < R)
    for (; panel + U <= panels; panel += U)
      for (long row = 0; row < B; row++) phase{number}<1, U>(s, row, panel);
  for (; panel < panels; panel++) {{
    long row = 0;
    for (; row + R <= B; row += R) phase{number}<R, 1>(s, row, panel);
    for (; row < B; row++) phase{number}<1, 1>(s, row, panel);
  }}
}}
"""
        )

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

    def _piece(self, node: object, offset: int, columns: int) -> str:
        """The name of the vector that holds columns ``offset + i`` of a value."""
        if not isinstance(node, fx.Node):
            return f"splat(T({literal(node)}))"
        if (node, offset) not in self._names:
            text = self._expression(node, offset, columns)
            self._names[node, offset] = f"v{len(self._names)}"
            self._lines.append(f"const V {self._names[node, offset]} = {text};")
        return self._names[node, offset]

    def _expression(self, node: fx.Node, offset: int, columns: int) -> str:
        in_memory = node not in self.inside or (node in self.must and self._level(node) < self._phase_level)
        if in_memory:
            address, own = self._address(node), width(node)
            row = f"at * {self._size(own)}" if per_row(node) else "0"
            if own == 1 and columns > 1:
                return f"splat({address}[{row}])"
            return f"load({address} + {row} + {self._size(offset)} + i, n)"
        target, args = node.target, args_of(node)

        def part(value: object) -> str:
            one = isinstance(value, fx.Node) and width(value) == 1 and columns > 1
            if one and value in self.inside and value not in self.must:
                raise UnsupportedError(f"{target} spreads a single column")
            return self._piece(value, 0 if one else offset, columns)

        if target in (aten.add.Tensor, aten.sub.Tensor):
            scale = node.kwargs.get("alpha", 1)
            right = part(args[1]) if scale == 1 else f"({part(args[1])} * splat(T({literal(scale)})))"
            return f"({part(args[0])} {'+' if target is aten.add.Tensor else '-'} {right})"
        if target is aten.clamp.default:
            low, high = (*args[1:3], None, None)[:2]
            text = part(args[0])
            text = text if low is None else f"maximum({text}, splat(T({literal(low)})))"
            return text if high is None else f"minimum({text}, splat(T({literal(high)})))"
        if target in _PRODUCTS:
            text = self._accumulator(Product(args[-2], args[-1], offset))
            return f"({part(args[0])} + {text})" if target is aten.addmm.default else text
        if target is getitem:
            return self._moved(args[0], args[1], offset, columns)
        if target is aten.slice.Tensor:
            return self._piece(args[0], offset + (args[2] if len(args) > 2 and args[2] else 0), columns)
        if target is aten.cat.default:
            for value in args[0]:
                if offset < width(value):
                    return self._piece(value, offset, columns)
                offset -= width(value)
        return PLAIN[target].format(*map(part, args))

    def _moved(self, source: fx.Node, which: int, offset: int, columns: int) -> str:
        if source.target is not aten.split_with_sizes.default:
            raise UnsupportedError(f"{source.target} is not in the compiler's vocabulary")
        start = sum(args_of(source)[1][:which])
        return self._piece(args_of(source)[0], start + offset, columns)

    def _accumulator(self, product: Product) -> str:
        group = self._groups.setdefault(product.row, [])
        if product not in group:
            group.append(product)
        return f"g{list(self._groups).index(product.row)}[u][r][{group.index(product)}]"

    def _file(self, bodies: list[str], scratch: list[fx.Node], phases: int) -> str:
        loop, members, setup = self.loop, [], []
        count = 0

        def array(name: str, place: str, constant: str = "const ") -> None:
            nonlocal count
            members.append(f"{constant}T* {name};")
            setup.append(f"s.{name} = (T*)P[{count}]{place};")
            count += 1

        for node, name in self.slots.items():
            array(name, f" + t * B * {self._size(width(node))}" if per_row(node) else "")
        for pack in range(len(self.packs)):
            array(f"w{pack}", "")
        for node, name in self.kept_slots.items():
            array(name, f" + t * B * {self._size(width(node))}", "")
        for name in self.scratch_slots.values():
            array(name, "", "")
        states = []
        for k, old in enumerate(loop.old):
            members.append(f"const T* o{k}; T* n{k};")
            size = self._size(width(old))
            # the states of all steps in a row: the initial one first, or last where time runs back
            states.append(f"s.o{k} = (T*)P[{count}] + (back ? t + 1 : t) * B * {size};")
            states.append(f"s.n{k} = (T*)P[{count}] + (back ? t : t + 1) * B * {size};")
            count += 1
        names = [m.split("*")[1].strip(" ;") for m in members[: len(members) - len(loop.old)]]
        slots = "const int64_t* const D = s.D; " + " ".join(
            f"[[maybe_unused]] auto* const {n} = s.{n};" for n in names
        )
        slots += "".join(
            f" [[maybe_unused]] auto* const o{k} = s.o{k}; [[maybe_unused]] auto* const n{k} = s.n{k};"
            for k in range(len(loop.old))
        )
        newline = "\n"
        return f"""using T = {self.scalar};
#include "unrolled.h"

namespace {{

struct Step {{
  const int64_t* D;
  {f"{newline}  ".join(members)}
}};

// How many rows, or panels of one row, are computed at once: as many as the registers hold.
constexpr int tile(int products) {{
  const int free = REGISTERS - REGISTERS / 4;
  return products >= REGISTERS / 4 ? 1 : free / products > 6 ? 6 : free / products;
}}
constexpr int strip(int products) {{ return products >= 8 ? 1 : 8 / products; }}

{"".join(bodies).replace("SLOTS", slots)}
}}  // namespace

extern "C" int lanes() {{ return L; }}

extern "C" void run(const int64_t* sizes, void* const* P) {{
  const int64_t* const D = sizes;
  const long steps = D[0], B = D[1];
  const bool back = D[2];
  for (long step = 0; step < steps; step++) {{
    const long t = back ? steps - 1 - step : step;
    Step s;
    s.D = D;
    {f"{newline}    ".join([*setup, *states])}
    {" ".join(f"pass{k}(s, B);" for k in range(phases))}
  }}
}}
"""
