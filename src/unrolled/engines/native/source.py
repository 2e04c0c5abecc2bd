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
    """

    name: str
    width: str
    rows: list[str]
    hoisted: list[str]
    groups: list[tuple[str, str]]
    lines: str

    @property
    def kind(self) -> str:
        """Its type in C++."""
        return f"Phase<{len(self.rows)}, {len(self.hoisted)}>"

    def function(self) -> str:
        """Its function of one tile, and the pass."""
        lines = _SIZE.sub(r"d\1", self.lines)
        read = sorted(set(map(int, _SIZE.findall(self.lines))))
        sizes = " ".join(f"const long d{k} = D[SIZES + {k}];" for k in read)  # a store might change them
        over = ["for (int u = 0; u < panels; u++)", "for (int r = 0; r < rows; r++) {"]
        if not self.rows:
            over = ["for (int r = 0; r < rows; r++)", "for (int u = 0; u < panels; u++) {"]
        return f"""
static void point{self.name}(const Step& s, long row, int rows, long panel, int panels,
                        [[maybe_unused]] const V* sums, [[maybe_unused]] const V* const* hoisted) {{
  SLOTS
  {sizes}
  const long W = {self.width};
  [[maybe_unused]] const long ahead = s.ahead(W);
  {over[0]}
    {over[1]}
      const long i = (panel + u) * L, n = W - i, at = row + r;
      {lines}
    }}
}}

static void pass{self.name}(const Work& w, const Step& s, long shift, long room_rows) {{
  SLOTS
  const T* const x[] = {{{", ".join(self.rows) or "nullptr"}}};
  w.p{self.name}.sweep(s, w.h, x, shift, room_rows, point{self.name});
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
class File:
    """A loop: pairs are names and what they begin as.

    ``apart``: a column of a step follows from the same column of the step before alone, so that threads which
    share columns need not wait for one another.
    """

    scalar: str
    functions: list[str]
    phases: list[PhaseText]
    calls: list[str]
    arrays: list[tuple[str, str]]
    kept: list[tuple[str, str]]
    scratch: list[tuple[str, str]]
    scalars: list[str]
    states: list[tuple[str, ...]]
    apart: bool

    def text(self) -> str:
        """The source of the library."""
        old = [f"o{k}" for k in range(len(self.states))]
        new = [f"n{k}" for k in range(len(self.states))]
        written = [name for name, _ in (*self.kept, *self.scratch)] + self.scalars + new
        read = [name for name, _ in self.arrays] + old
        members = [f"const T* {name};" for name in read] + [f"T* {name};" for name in written]
        slots = " ".join(
            ["[[maybe_unused]] const int64_t* const D = s.D;"]
            + [f"[[maybe_unused]] auto* const {name} = s.{name};" for name in (*read, *written)]
        )
        every = [f"s.{name} = {place};" for name, place in (*self.arrays, *self.kept)]
        for k in range(len(self.states)):
            every.append(f"s.o{k} = before(h, w.s{k}, last, step, rows, rows_last);")
            every.append(f"s.n{k} = w.s{k}.after(first, step);")
        once = [f"s.{name} = w.{name};" for name in (*(n for n, _ in self.scratch), *self.scalars)]
        own = [f"T* {name};" for name in (*(n for n, _ in self.scratch), *self.scalars)]
        own += [f"State s{k};" for k in range(len(self.states))]
        own += [f"{phase.kind} p{phase.name};" for phase in self.phases]
        names = [f"w.p{phase.name}" for phase in self.phases]
        hoists = [
            f"{{ const T* const x[] = {{{', '.join(['nullptr'] * len(p.rows) + p.hoisted)}}}; "
            f"w.p{p.name}.hoist(h, x, many, room_rows); }}"
            for p in self.phases
            if p.hoisted
        ]
        finish = [f"finish(h, w.s{k}, s.n{k}, std::min(next, rows), rows);" for k in range(len(self.states))]

        def lines(of: list[str], indent: int) -> str:
            return ("\n" + " " * indent).join(of)

        return f"""using T = {self.scalar};
#include "loop.h"

namespace {{

// What changes from step to step.
struct Step {{
  const int64_t* D;
  long rows;
  bool turned;  // from the last strip to the first
  {lines(members, 2)}

  // The rows until what a step some KiB from here reads: one step, or several narrow ones.
  long ahead(long width) const {{
    const long steps = 1 + AHEAD / (rows * width);
    return D[BACK] ? -steps * rows : steps * rows;
  }}
}};

// What a thread keeps for all steps.
struct Work {{
  Share h;
  {lines(own, 2)}

  void lay(const Call& c, const Share& share, Room& shared, Room& own) {{
    [[maybe_unused]] const int64_t* const D = c.D;
    void* const* const P = c.P;
    const bool direct = D[DIRECT];
    h = share;
    {lines(self._lay(), 4)}
  }}
}};
{"".join(self.functions).replace("SLOTS", slots)}
bool prepare(void* what, int count) {{
  Call& c = *(Call*)what;
  Room shared{{nullptr}};
  size_t most = 0;
  for (int id = 0; id < count; id++) {{
    Work w;
    Room own{{nullptr}};
    shared.used = 0;
    w.lay(c, share(c, id, count), shared, own);
    most = std::max(most, own.used);
  }}
  c.own = most;
  c.shared = shared.used;
  c.room = c.products->room(shared.used + count * most);
  if (!c.room) return false;
  Room all{{c.room}}, own{{c.room}};
  Work w;
  w.lay(c, share(c, 0, count), all, own);
  {lines([f"w.s{k}.begin(c.D[ROWS]);" for k in range(len(self.states))], 2)}
  return true;
}}

void work(void* what, int id, int count) {{
  Call& c = *(Call*)what;
  const int64_t* const D = c.D;
  void* const* const P = c.P;
  Work w;
  Room shared{{c.room}}, own{{c.room + c.shared + id * c.own}};
  w.lay(c, share(c, id, count), shared, own);
  const Share& h = w.h;
  if (!D[DIRECT] && !D[PACKED]) {{
    {lines([f"{name}.pack(h);" for name in names], 4)}
    if (h.by_rows) c.meeting.wait(count);
  }}
  Step s;
  s.D = D;
  {lines(once, 2)}
  const auto* const starts = (const int64_t*)P[0];
  const auto start = [&](long t) {{ return starts ? starts[t] : t * D[ROWS]; }};
  [[maybe_unused]] const long room_rows = D[HOISTED] * (h.by_rows ? h.to - h.from : D[ROWS]);
  [[maybe_unused]] long known = 0, last = 0, rows_last = 0;
  for (long step = 0; step < D[STEPS]; step++) {{
    const long t = D[BACK] ? D[STEPS] - 1 - step : step;
    const long first = start(t), rows = start(t + 1) - first;
    if (step % D[HOISTED] == 0) {{
      const long steps = std::min<long>(D[HOISTED], D[STEPS] - step);
      const long from = D[BACK] ? t + 1 - steps : t;
      known = start(from);
      [[maybe_unused]] const long begin = known + h.from;
      [[maybe_unused]] const long many = h.by_rows ? h.to - h.from : start(from + steps) - known;
      {lines(hoists, 6)}
    }}
    [[maybe_unused]] const long shift = first - known;
    s.rows = rows;
    s.turned = step & 1;
    {lines(every, 4)}
    if (rows_last && rows_last < rows) h.meet();
    {lines(self.calls, 4)}
    {"if (starts || step + 1 == D[STEPS]) " if self.apart else ""}h.meet();
    const long after = D[BACK] ? t - 1 : t + 1;
    const long next = step + 1 < D[STEPS] ? start(after + 1) - start(after) : 0;
    {lines(finish, 4)}
    last = first;
    rows_last = rows;
  }}
}}

}}  // namespace

extern "C" bool run(const int64_t* sizes, void* const* pointers, const Products* products) {{
  Call c{{sizes, pointers, products, nullptr, 0, 0, {{}}}};
  return products->team((int)sizes[THREADS], prepare, work, &c);
}}
"""

    def _lay(self) -> list[str]:
        lines = [f"{name} = {place};" for name, place in self.scratch]
        lines += [f"{name} = own.take<T>(D[ROWS]);" for name in self.scalars]
        for k, (width, initial, kept, final) in enumerate(self.states):
            lines.append(f"s{k}.lay(shared, c, {width}, {initial}, {kept}, {final});")
        for phase in self.phases:
            name = f"p{phase.name}"
            for number, (group, _) in enumerate(phase.groups):
                lines.append(f"{name}.groups[{number}] = Group{group};")
            lines.append(f"{name}.cut(h, D[BY_ROWS] ? 1 : D[THREADS], {phase.width});")
            if phase.groups:
                kept = ", ".join(f"(T*){where}" for _, where in phase.groups)
                lines.append(f"{{ T* const kept[] = {{{kept}}}; {name}.share_room(shared, direct, kept); }}")
                lines.append(f"{name}.own_room(own, D[HOISTED] * D[ROWS], D[ROWS], direct);")
        return lines
