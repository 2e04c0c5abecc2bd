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

    def function(self, several: list[State] | None = None) -> str:
        """Its function of one tile, and the pass; with ``several`` of several steps, and of these states."""
        lines = _SIZE.sub(r"d\1", self.lines)
        read = sorted(set(map(int, _SIZE.findall(self.lines))))
        sizes = " ".join(f"const long d{k} = D[SIZES + {k}];" for k in read)  # a store might change them
        over = ["for (int u = 0; u < panels; u++)", "for (int r = 0; r < rows; r++) {"]
        if not self.rows:
            over = ["for (int r = 0; r < rows; r++)", "for (int u = 0; u < panels; u++) {"]
        if several is None:
            over = ["const long moved = 0;", *over]
        else:
            over = [
                "for (long k = 0; k < steps; k++) {",
                "  const long moved = k * s.stride();",
                *(f"  {line}" for number, state in enumerate(several) for line in state.at_step(number)),
                *over,
            ]
        begin = "\n  ".join(over)
        return f"""
static void point{self.name}(const Step& s, long row, int rows, long panel, int panels,
                        [[maybe_unused]] const V* sums, [[maybe_unused]] const V* const* hoisted,
                        [[maybe_unused]] long steps) {{
  SLOTS
  {sizes}
  const long W = {self.width};
  [[maybe_unused]] const long ahead = s.ahead(W);
  {begin}
      [[maybe_unused]] const long here = r + moved;
      const long i = (panel + u) * L, n = W - i, at = row + r + moved;
      {lines}
    }}
  {"" if several is None else "}"}
}}

static void pass{self.name}(const Work& w, const Step& s, const Share& h, long shift, long room_rows, long steps) {{
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
        old = [f"o{k}" for k in range(len(self.states))]
        new = [f"n{k}" for k in range(len(self.states))]
        written = [name for name, *_ in (*self.kept, *self.scratch)] + self.scalars + new
        read = [name for name, _ in self.arrays] + old
        others = [f"m{k}" for k in range(len(self.states))]
        members = [f"const T* {name};" for name in read] + [f"T* {name};" for name in (*written, *others)]
        slots = " ".join(
            ["[[maybe_unused]] const int64_t* const D = s.D;"]
            + [f"[[maybe_unused]] auto* const {name} = s.{name};" for name in (*read, *written)]
        )
        every = [f"s.{name} = {place};" for name, place in (*self.arrays, *self.kept)]
        every += [f"s.{n} = w.{n} + (first - known) * {width};" for n, width, block in self.scratch if block]
        every += [f"s.{name} = w.s{k}.after(first, step, known);" for k, name in enumerate(new)]
        every += [f"s.{name} = w.s{k}.other(step);" for k, name in enumerate(others)]
        states = [k for k, state in enumerate(self.states) if not state.late]
        old_values = [f"s.o{k} = before(h, w.s{k}, s.n{k}, step, rows, rows_last);" for k in states]
        once = [f"s.{name} = w.{name};" for name in (*(n for n, *_ in self.scratch), *self.scalars)]
        own = [f"T* {name};" for name in (*(n for n, *_ in self.scratch), *self.scalars)]
        own += [f"State s{k};" for k in range(len(self.states))]
        own += [f"{phase.kind} p{phase.name};" for phase in self.phases]
        names = [f"w.p{phase.name}" for phase in self.phases]
        hoists = [
            f"{{ const T* const x[] = {{{', '.join(['nullptr'] * len(p.rows) + p.hoisted)}}}; "
            f"w.p{p.name}.hoist(h, x, many, room_rows); }}"
            for p in self.phases
            if p.hoisted
        ]
        finish = [f"finish(h, w.s{k}, s.n{k}, std::min(next(step), rows), rows);" for k in states]

        several = "1"
        if self.apart:
            several = "starts || step == 0 ? 1 : std::max(1L, std::min(step - step % D[HOISTED] + D[HOISTED], D[STEPS] - 1) - step)"

        turn = wait = done = ""
        if self.apart:
            turn = """
      if (h.turns && step / D[HOISTED] % count != id) {
        step += D[HOISTED] - 1;
        continue;
      }"""
            wait = """
      if (h.turns && step) {
        spin([&] { return c.blocks.load(std::memory_order_acquire) == step / D[HOISTED]; });
        place(s, time(step - 1), start(time(step - 1)), step - 1);
        rows_last = rows;
      }"""
            done = """
    if (h.turns && (step + 1) % D[HOISTED] == 0) c.blocks.store((step + 1) / D[HOISTED], std::memory_order_release);"""

        def text(function: PhaseText | str) -> str:
            if isinstance(function, str):
                return function
            return function.function(self.states if self.apart and not function.late else None)

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
  long ahead(long width) const {{ return stride() * (1 + AHEAD / (rows * width)); }}

  long stride() const {{ return D[BACK] ? -rows : rows; }}
}};

// What a thread keeps for all steps.
struct Work {{
  Share h, all;
  {lines(own, 2)}

  void lay(const Call& c, const Share& share, Room& shared, Room& own) {{
    [[maybe_unused]] const int64_t* const D = c.D;
    void* const* const P = c.P;
    const bool direct = D[DIRECT];
    h = share;
    all = share.of_block(D);
    {lines(self._lay(), 4)}
  }}
}};
{"".join(map(text, self.functions)).replace("SLOTS", slots)}
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
    if (h.all_panels()) c.meeting.wait(count);
  }}
  Step s;
  s.D = D;
  {lines(once, 2)}
  const auto* const starts = (const int64_t*)P[0];
  const auto start = [&](long t) {{ return starts ? starts[t] : t * D[ROWS]; }};
  [[maybe_unused]] const long room_rows = D[HOISTED] * (h.by_rows ? h.to - h.from : D[ROWS]);
  const auto time = [&](long step) {{ return D[BACK] ? D[STEPS] - 1 - step : step; }};
  const auto rows_of_step = [&](long step) {{ return start(time(step) + 1) - start(time(step)); }};
  [[maybe_unused]] const auto next = [&](long step) {{ return step + 1 < D[STEPS] ? rows_of_step(step + 1) : 0; }};
  long known = 0, rows_last = 0;
  const auto place = [&](Step& s, [[maybe_unused]] long t, [[maybe_unused]] long first, [[maybe_unused]] long step) {{
    {lines(every, 4)}
  }};
  for (long step = 0; step < D[STEPS]; step++) {{
    const long t = time(step), first = start(t), rows = rows_of_step(step);
    if (step % D[HOISTED] == 0) {{{turn}
      const long steps = std::min<long>(D[HOISTED], D[STEPS] - step);
      const long from = D[BACK] ? t + 1 - steps : t;
      known = start(from);
      [[maybe_unused]] const long begin = known + h.from;
      [[maybe_unused]] const long many = h.by_rows ? h.to - h.from : start(from + steps) - known;
      {lines(hoists, 6)}{wait}
    }}
    [[maybe_unused]] const long shift = first - known;
    s.rows = rows;
    s.turned = step & 1;
    {lines(old_values, 4)}
    place(s, t, first, step);
    if (rows_last && rows_last < rows) h.meet();
    [[maybe_unused]] const long steps = {several};
    {lines(self.calls, 4)}
    {"if (steps > 1) step += steps - 1, place(s, time(step), start(time(step)), step);" if self.apart else ""}
    {"if (starts || step + 1 == D[STEPS]) " if self.apart else ""}h.meet();
    {lines(finish, 4)}
    rows_last = rows;{done}{self._after_block()}
  }}
}}

}}  // namespace

extern "C" bool run(const int64_t* sizes, void* const* pointers, const Products* products) {{
  Call c{{sizes, pointers, products, nullptr, 0, 0, {{}}, {{}}}};
  return products->team((int)sizes[THREADS], prepare, work, &c);
}}
"""

    def _after_block(self) -> str:
        """What is done after the last step of a block."""
        if not self.late:
            return ""
        ends = [k for k, state in enumerate(self.states) if state.late]
        finish = "\n          ".join(
            f"finish(h, w.s{k}, s.n{k} + (start(time(of)) - known) * w.s{k}.width, std::min(next(of), rows), rows);"
            for k in ends
        )
        calls = "\n      ".join(self.late)
        return f"""
    if ((step + 1) % D[HOISTED] == 0 || step + 1 == D[STEPS]) {{
      const long begun = step - step % D[HOISTED], shift = 0;
      const Share& h = w.all;
      const Step one = s;
      h.meet();
      place(s, time(D[BACK] ? step : begun), known, step);
      s.rows = h.by_rows ? rows : start(time(D[BACK] ? begun : step) + 1) - known;
      {calls}
      h.meet();
      if (starts || step + 1 == D[STEPS])
        for (long of = begun; of <= step; of++) {{
          const long rows = rows_of_step(of);
          {finish}
        }}
      s = one;
    }}"""

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
