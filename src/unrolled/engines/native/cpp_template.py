"""The text of a loop in C++, around the functions that compute its values."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SIZE = re.compile(r"D\[SIZES \+ (\d+)\]")
_AT_ONCE = 4  # rows of which one number each is computed side by side


@dataclass
class PhaseText:
    """A pass over the panels of one width.

    Attributes:
        name: of its functions.
        width: its columns.
        rows: what each of its groups reads, at the first row of a step.
        hoisted: what each of its hoisted groups reads, at row ``begin``.
        groups: first those of every step, then the hoisted ones; each with where its packed matrices lie
            if they are kept.
        lines: what it computes on a panel and stores.
        late: whether it is of many steps, after them.
    """

    name: str
    width: str
    rows: list[str]
    hoisted: list[str]
    groups: list[tuple[str, str]]
    lines: str
    late: bool

    @property
    def kind(self) -> str:
        """Its type in C++."""
        return f"Phase<{len(self.rows)}, {len(self.hoisted)}>"

    def hoist(self) -> str:
        """The call that sums up its hoisted groups."""
        rows = ", ".join([*["nullptr"] * len(self.rows), *self.hoisted])
        return f"{{ const T* const x[] = {{{rows}}}; p{self.name}.hoist(h, x, many, room_rows); }}"

    def function(self, several: list[State] | None = None) -> str:
        """Its function of one tile, and the pass; with ``several`` of several steps, and of these states."""
        lines, over = self.lines, []
        if not self.rows:  # a store might change what lies in memory
            read = sorted(set(map(int, _SIZE.findall(lines))))
            over += [f"const long d{k} = D[SIZES + {k}];" for k in read]
            lines = _SIZE.sub(r"d\1", lines)
        over.append(f"const long W = {self.width};")
        fetches = "__builtin_prefetch" in lines
        if fetches:
            over.append("const Ahead fetched(s, W, rows);")
        here, depth = "r", 0
        if several is not None:
            here = "(r + moved)"
            over += ["for (long k = 0; k < steps; k++) {", "  const long moved = k * s.stride();"]
            over += [f"  {line}" for number, state in enumerate(several) for line in state.at_step(number)]
            depth = 1
        order = ["for (int u = 0; u < panels; u++)", "for (int r = 0; r < rows; r++)"]
        if self.rows:
            over += ["  " * depth + order[0], "  " * (depth + 1) + f"{order[1]} {{"]
        else:  # as it lies in memory
            over += ["  " * depth + order[1], "  " * (depth + 1) + f"{order[0]} {{"]
        inner = [f"const long i = (panel + u) * L, n = W - i, at = row + {here};"]
        inner += ["const long ahead = fetched.from(r);"] * fetches
        inner += lines.replace("HERE", here).splitlines()
        over += ["  " * (depth + 2) + line for line in inner]
        over += ["  " * (depth + 1) + "}", *["}"] * depth]
        return f"""
static void point{self.name}(const Step& s, long row, int rows, long panel, int panels,
                        [[maybe_unused]] const V* sums, [[maybe_unused]] const V* const* hoisted,
                        [[maybe_unused]] long steps) {{
  SLOTS
  {_lines(over, 2)}
}}

static void pass{self.name}(const Work& w, const Step& s, const Share& h, long shift, long room_rows,
                            long steps) {{
  SLOTS
  const T* const x[] = {{{", ".join(self.rows) or "nullptr"}}};
  w.p{self.name}.sweep(s, h, x, shift, room_rows, steps, point{self.name});
}}
"""


def rows(level: int, blocks: list[list[str]]) -> str:
    """The function that computes one number a row, or several.

    Args:
        level: of it.
        blocks: lines for each number: from row ``from`` on, ``one[r]`` of R rows; EACH is a loop over them.
    """
    lines = "\n".join("  {\n    " + "\n    ".join(block) + "\n  }" for block in blocks)
    return f"""
template <int R> static void some{level}(const Step& s, [[maybe_unused]] const Share& h, const long from) {{
  SLOTS
  [[maybe_unused]] T one[R];
{lines}
}}

static void rows{level}(const Step& s, const Share& h) {{
  const long to = std::min(h.to, s.rows);
  long at = h.from;
  for (; at + {_AT_ONCE} <= to; at += {_AT_ONCE}) some{level}<{_AT_ONCE}>(s, h, at);
  for (; at < to; at++) some{level}<1>(s, h, at);
}}
"""


@dataclass
class State:
    """A state: its width, and where its first value, those of all steps and each row's last go.

    ``crossing``: what is late reads it; ``late``: it is late itself.
    """

    width: str
    initial: str
    kept: str
    final: str
    crossing: bool
    late: bool

    def at_step(self, number: int) -> list[str]:
        """Where it lies before and after the k-th of several steps, whose rows are ``moved``."""
        if self.late:
            return []
        now, other, old, width = f"s.n{number}", f"s.m{number}", f"s.o{number}", self.width
        turn = f"(k & 1 ? {{}} : {{}}) - moved * {width}"
        after = f"{other} ? {turn.format(other, now)} : {now}"
        before = f"{other} ? {turn.format(now, other)} : {now} - s.stride() * {width}"
        return [
            f"[[maybe_unused]] T* const n{number} = {after};",
            f"[[maybe_unused]] const T* const o{number} = k == 0 ? {old} : {before};",
        ]


@dataclass
class File:
    """A loop: pairs are names and what they begin as.

    Attributes:
        calls: what a step does.
        late: what is done after the steps of a block, for all their rows.
        scratch: names, widths, and whether there is room for the rows of a block.
        apart: a column of a step follows from the same column of the step before alone, so that threads
            which share columns need not wait for one another.
    """

    scalar: str
    functions: list[PhaseText | str]
    phases: list[PhaseText]
    calls: list[str]
    late: list[str]
    arrays: list[tuple[str, str]]
    kept: list[tuple[str, str]]
    scratch: list[tuple[str, str, bool]]
    scalars: list[str]
    states: list[State]
    apart: bool

    def text(self) -> str:
        """The source of the library."""
        members, slots = self._members()
        late = [k for k, state in enumerate(self.states) if state.late]
        now = [k for k, state in enumerate(self.states) if not state.late]
        functions = "".join(
            function
            if isinstance(function, str)
            else function.function(self.states if self.apart and not function.late else None)
            for function in self.functions
        )
        return f"""using T = {self.scalar};
#include "loop.h"

namespace {{

// What changes from step to step.
struct Step : Moment {{
  {_lines(members, 2)}
}};

// What a thread keeps for all steps.
struct Work {{
  static constexpr bool APART = {str(self.apart).lower()}, LATE = {str(bool(self.late)).lower()};
  Share h, all;
  {_lines(self._own(), 2)}

  void lay(const Call& c, const Share& share, Room& shared, Room& own) {{
    [[maybe_unused]] const int64_t* const D = c.D;
    void* const* const P = c.P;
    [[maybe_unused]] const bool direct = D[DIRECT];
    h = share;
    all = share.of_block(D);
    {_lines(self._lay(), 4)}
  }}

  void begin(long rows) const {{
    {_lines([f"s{k}.begin(rows);" for k in range(len(self.states))], 4)}
  }}

  void pack() const {{
    {_lines([f"p{phase.name}.pack(h);" for phase in self.phases], 4)}
  }}

  void keep(Step& s) const {{
    {_lines([f"s.{name} = {name};" for name in (*(n for n, *_ in self.scratch), *self.scalars)], 4)}
  }}

  void place(Step& s, const Call& c, const Place& at) const {{
    [[maybe_unused]] const int64_t* const D = c.D;
    [[maybe_unused]] void* const* const P = c.P;
    {_lines(self._place(), 4)}
  }}

  void before(Step& s, long step, long rows, long rows_last) const {{
    {_lines([f"s.o{k} = value_before(h, s{k}, s.n{k}, step, rows, rows_last);" for k in now], 4)}
  }}

  void finish(const Step& s, long from, long to) const {{
    {_lines([f"keep_last(h, s{k}, s.n{k}, from, to);" for k in now], 4)}
  }}

  void finish_late(const Step& s, long row, long from, long to) const {{
    {_lines([f"keep_last(h, s{k}, s.n{k} + row * s{k}.width, from, to);" for k in late], 4)}
  }}

  void hoist(const Call& c, long begin, long many, long room_rows) const {{
    [[maybe_unused]] const int64_t* const D = c.D;
    [[maybe_unused]] void* const* const P = c.P;
    {_lines([phase.hoist() for phase in self.phases if phase.hoisted], 4)}
  }}

  void step(const Step& s, long shift, long room_rows, long steps) const;
  void late(const Step& s, long room_rows) const;
}};
{functions.replace("SLOTS", slots)}
void Work::step(const Step& s, long shift, long room_rows, long steps) const {{
  {_lines(self.calls, 2)}
}}

void Work::late(const Step& s, long room_rows) const {{
  [[maybe_unused]] const Share& h = all;
  {_lines(self.late, 2)}
}}

}}  // namespace

extern "C" bool run(const int64_t* sizes, void* const* pointers, const Products* products) {{
  return call<Work, Step>(sizes, pointers, products);
}}
"""

    def _members(self) -> tuple[list[str], str]:
        """The places of values that a step has, and their names within its functions."""
        count = range(len(self.states))
        read = [*(name for name, _ in self.arrays), *(f"o{k}" for k in count)]
        written = [name for name, *_ in (*self.kept, *self.scratch)] + self.scalars + [f"n{k}" for k in count]
        members = [f"const T* {name};" for name in read]
        members += [f"T* {name};" for name in (*written, *(f"m{k}" for k in count))]
        slots = ["[[maybe_unused]] const int64_t* const D = s.D;"]
        slots += [f"[[maybe_unused]] auto* const {name} = s.{name};" for name in (*read, *written)]
        return members, " ".join(slots)

    def _own(self) -> list[str]:
        lines = [f"T* {name};" for name in (*(n for n, *_ in self.scratch), *self.scalars)]
        lines += [f"State s{k};" for k in range(len(self.states))]
        return lines + [f"{phase.kind} p{phase.name};" for phase in self.phases]

    def _place(self) -> list[str]:
        lines = [f"s.{name} = {place};" for name, place in (*self.arrays, *self.kept)]
        blocks = [(name, width) for name, width, block in self.scratch if block]
        lines += [f"s.{name} = {name} + (at.first - at.known) * {width};" for name, width in blocks]
        lines += [f"s.n{k} = s{k}.after(at);" for k in range(len(self.states))]
        return lines + [f"s.m{k} = s{k}.other(at.step);" for k in range(len(self.states))]

    def _lay(self) -> list[str]:
        lines = [
            f"{name} = shared.take<T>({'D[HOISTED] * ' if block else ''}D[ROWS] * {width});"
            for name, width, block in self.scratch
        ]
        block = "D[HOISTED] * " if self.late else ""
        lines += [f"{name} = own.take<T>({block}D[ROWS]);" for name in self.scalars]
        for k, state in enumerate(self.states):
            rows = "D[HOISTED]" if state.crossing or state.late else "0"
            lines.append(
                f"s{k}.lay(shared, c, {state.width}, {state.initial}, {state.kept}, {state.final}, {rows});"
            )
        for phase in self.phases:
            name = f"p{phase.name}"
            share = "all" if phase.late else "h"
            for number, (group, _) in enumerate(phase.groups):
                lines.append(f"{name}.groups[{number}] = Group{group};")
            lines.append(f"{name}.cut({share}, D[BY_ROWS] || D[TURNS] ? 1 : D[THREADS], {phase.width});")
            if phase.groups:
                kept = ", ".join(f"(T*){where}" for _, where in phase.groups)
                lines.append(f"{{ T* const kept[] = {{{kept}}}; {name}.share_room(shared, direct, kept); }}")
                lines.append(f"{name}.own_room(own, D[HOISTED] * D[ROWS], {share}.few, direct);")
        return lines


def _lines(of: list[str], indent: int) -> str:
    return ("\n" + " " * indent).join(of)
