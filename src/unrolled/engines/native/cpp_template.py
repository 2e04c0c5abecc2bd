"""The C++ source of a kernel, around the functions that compute its values.

Names in the source: ``a0``, ``a1``, … are inputs of a step; ``o`` and ``n`` are states before and after it;
``m`` are where the next step stores its states; ``k`` are values saved for the caller; ``b`` are scratch
buffers; and ``z`` are scalars, which are one number per row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PhaseText:
    """The text of a pass over the columns of one width.

    Attributes:
        name: Suffix of its functions' names.
        width: Its number of columns.
        rows: For each group of products, the pointer that it reads, at the first row of a step.
        hoisted: For each hoisted group, the pointer that it reads, at row ``begin``.
        groups: The groups of every step, then the hoisted groups. Each comes with the pointer to its packed
            matrices, which is null unless the caller keeps them.
        sizes: Numbers of the sizes ``d0``, ``d1``, … that the statements read.
        prefetches: Addresses of the per-step inputs to prefetch.
        lines: Statements that compute a panel and store the results.
        columnwise: Whether a call of its functions runs several steps.
        deferred: Whether it runs after the steps of a block, on all their rows.
    """

    name: str
    width: str
    rows: list[str]
    hoisted: list[str]
    groups: list[tuple[str, str]]
    sizes: list[int]
    prefetches: list[str]
    lines: list[str]
    columnwise: bool
    deferred: bool

    @property
    def cpp_type(self) -> str:
        """The C++ type of the phase."""
        return f"Phase<{len(self.rows)}, {len(self.hoisted)}>"

    def hoist(self) -> str:
        """Return the statement that computes the hoisted groups."""
        rows = ", ".join([*["nullptr"] * len(self.rows), *self.hoisted])
        return f"{{ const T* const x[] = {{{rows}}}; p{self.name}.hoist(range, x, row_count, block_rows); }}"

    def functions(self, slots: str, states: list[State]) -> str:
        """Return the function that computes a tile, and the one that runs the pass.

        Args:
            slots: Declarations of the pointers of a step.
            states: The states.
        """
        body = [f"const int64_t d{k} = D[{k}];" for k in self.sizes]
        body.append(f"const int64_t W = {self.width};")
        if self.prefetches:
            body.append("const PrefetchDistance prefetch(s, W, rows);")
        row, depth = "r", 0
        if self.columnwise:
            row = "(r + step_offset)"
            body += ["for (int64_t k = 0; k < steps; k++) {", "  const int64_t step_offset = k * s.stride();"]
            body += [f"  {line}" for number, state in enumerate(states) for line in state.at_step(number)]
            depth = 1
        loops = ["for (int u = 0; u < panels; u++)", "for (int r = 0; r < rows; r++)"]
        if not self.rows:  # memory order
            loops.reverse()
        body += ["  " * depth + loops[0], "  " * (depth + 1) + f"{loops[1]} {{"]
        inner = [f"const int64_t i = (panel + u) * L, n = W - i, at = row + {row};"]
        if self.prefetches:
            inner.append("const int64_t ahead = prefetch.from(r);")
        inner += [f"__builtin_prefetch({address});" for address in self.prefetches]
        inner += self.lines
        body += ["  " * (depth + 2) + line for line in inner]
        body += ["  " * (depth + 1) + "}", *["}"] * depth]
        return f"""
static void pointwise{self.name}(const Step& s, int64_t row, int rows, int64_t panel, int panels,
                            [[maybe_unused]] const V* sums, [[maybe_unused]] const V* const* hoisted,
                            [[maybe_unused]] int64_t steps) {{
  {slots}
  {_join(body, 2)}
}}

static void pass{self.name}(const Loop& loop, const Step& s, const ThreadRange& range, int64_t shift,
                            int64_t block_rows, int64_t steps) {{
  {slots}
  const T* const x[] = {{{", ".join(self.rows) or "nullptr"}}};
  loop.p{self.name}.sweep(s, range, x, shift, block_rows, steps, pointwise{self.name});
}}
"""


@dataclass
class ScalarsText:
    """The text of the scalars of a level.

    Attributes:
        level: The level.
        blocks: For each scalar the statements that compute ``one[r]`` for R rows from ``from`` on.
            ``FOR_ROWS`` is a loop over these rows.
    """

    level: int
    blocks: list[list[str]]

    def functions(self, slots: str) -> str:
        """Return the functions that compute them. ``slots`` declares the pointers of a step."""
        lines = "\n".join("  {\n    " + "\n    ".join(block) + "\n  }" for block in self.blocks)
        return f"""
template <int R>
static void scalars_of{self.level}(const Step& s, [[maybe_unused]] const ThreadRange& range,
                                   const int64_t from) {{
  {slots}
  [[maybe_unused]] T one[R];
{lines}
}}

static void scalars{self.level}(const Step& s, const ThreadRange& range) {{
  const int64_t to = std::min(range.to, s.rows);
  int64_t at = range.from;
  for (; at + SCALAR_ROWS <= to; at += SCALAR_ROWS) scalars_of{self.level}<SCALAR_ROWS>(s, range, at);
  for (; at < to; at++) scalars_of{self.level}<1>(s, range, at);
}}
"""


@dataclass
class State:
    """The text of a state.

    Attributes:
        width: Its number of columns.
        initial: Pointer to the state before the first step.
        all_steps: Pointer to the memory for its values of all steps.
        final: Pointer to the memory for each row's last value.
        read_by_deferred: Whether deferred values read it.
        deferred: Whether it is deferred itself.
    """

    width: str
    initial: str
    all_steps: str
    final: str
    read_by_deferred: bool
    deferred: bool

    def at_step(self, number: int) -> list[str]:
        """Return the declarations of its pointers in the k-th of several steps, ``step_offset`` rows on."""
        if self.deferred:
            return []
        now, other, old, width = f"s.n{number}", f"s.m{number}", f"s.o{number}", self.width
        alternate = f"(k & 1 ? {{}} : {{}}) - step_offset * {width}"
        after = f"{other} ? {alternate.format(other, now)} : {now}"
        before = f"{other} ? {alternate.format(now, other)} : {now} - s.stride() * {width}"
        return [
            f"[[maybe_unused]] T* const n{number} = {after};",
            f"[[maybe_unused]] const T* const o{number} = k == 0 ? {old} : {before};",
        ]


@dataclass
class KernelSource:
    """The parts of a kernel's source.

    Attributes:
        scalar: C++ type of all values.
        functions: Scalars and phases, in the order in which their functions are defined.
        calls: Statements of a step.
        deferred: Statements that run after the steps of a block, for all their rows.
        arrays: Names of the inputs, and the pointers to them.
        saved: Names of the values saved for the caller, and the pointers to them.
        scratch: Names of scratch buffers, their widths, and whether they hold all rows of a block.
        scalars: Names of the scalars.
        states: The states.
        columnwise: Whether each column of a step depends only on the same column of the previous step. Then
            threads that split the columns needn't synchronize after each step.
    """

    scalar: str
    functions: list[PhaseText | ScalarsText]
    calls: list[str]
    deferred: list[str]
    arrays: list[tuple[str, str]]
    saved: list[tuple[str, str]]
    scratch: list[tuple[str, str, bool]]
    scalars: list[str]
    states: list[State]
    columnwise: bool

    @property
    def phases(self) -> list[PhaseText]:
        """The phases."""
        return [one for one in self.functions if isinstance(one, PhaseText)]

    def text(self) -> str:
        """Return the source."""
        members, slots = self._members()
        deferred = [k for k, state in enumerate(self.states) if state.deferred]
        stepwise = [k for k, state in enumerate(self.states) if not state.deferred]
        functions = "".join(
            one.functions(slots, self.states) if isinstance(one, PhaseText) else one.functions(slots)
            for one in self.functions
        )
        return f"""using T = {self.scalar};
#include "loop.h"

namespace {{

// Pointers to the values of a step.
struct Step : StepContext {{
  {_join(members, 2)}
}};

// What a thread needs in all steps.
struct Loop {{
  static constexpr bool COLUMNWISE = {_bool(self.columnwise)}, DEFERRED = {_bool(bool(self.deferred))};
  ThreadRange range, block_range;
  {_join(self._loop_members(), 2)}

  void allocate(const Call& c, const ThreadRange& thread_range, Arena& shared, Arena& own) {{
    [[maybe_unused]] const int64_t* const D = c.sizes;
    void* const* const P = c.pointers;
    range = thread_range;
    block_range = thread_range.of_block(c);
    {_join(self._allocations(), 4)}
  }}

  void clear_zeros(int64_t rows) const {{
    {_join([f"s{k}.clear_zeros(rows);" for k in range(len(self.states))], 4)}
  }}

  void pack() const {{
    {_join([f"p{phase.name}.pack(range);" for phase in self.phases], 4)}
  }}

  void set_scratch(Step& s) const {{
    {_join([f"s.{name} = {name};" for name in (*(n for n, *_ in self.scratch), *self.scalars)], 4)}
  }}

  void set_pointers(Step& s, const Call& c, const StepPosition& at) const {{
    [[maybe_unused]] const int64_t* const D = c.sizes;
    [[maybe_unused]] void* const* const P = c.pointers;
    {_join(self._pointers(), 4)}
  }}

  void set_state_before(Step& s, int64_t step, int64_t rows, int64_t last_rows) const {{
    {_join([f"s.o{k} = state_before(range, s{k}, s.n{k}, step, rows, last_rows);" for k in stepwise], 4)}
  }}

  void store_final_states(const Step& s, int64_t from, int64_t to) const {{
    {_join([f"store_final(range, s{k}, s.n{k}, from, to);" for k in stepwise], 4)}
  }}

  void store_final_deferred(const Step& s, int64_t row, int64_t from, int64_t to) const {{
    {_join([f"store_final(range, s{k}, s.n{k} + row * s{k}.width, from, to);" for k in deferred], 4)}
  }}

  void hoist(const Call& c, int64_t begin, int64_t row_count, int64_t block_rows) const {{
    [[maybe_unused]] const int64_t* const D = c.sizes;
    [[maybe_unused]] void* const* const P = c.pointers;
    {_join([phase.hoist() for phase in self.phases if phase.hoisted], 4)}
  }}

  void step(const Step& s, int64_t shift, int64_t block_rows, int64_t steps) const;
  void deferred(const Step& s, int64_t block_rows) const;
}};
{functions}
void Loop::step(const Step& s, int64_t shift, int64_t block_rows, int64_t steps) const {{
  {_join(self.calls, 2)}
}}

void Loop::deferred(const Step& s, int64_t block_rows) const {{
  [[maybe_unused]] const ThreadRange& range = block_range;
  {_join(self.deferred, 2)}
}}

}}  // namespace

EXPORT bool run(const CallArguments* arguments) {{ return call<Loop, Step>(*arguments); }}
"""

    def _members(self) -> tuple[list[str], str]:
        """Return the members of a step, and the statements that declare them as local variables."""
        count = range(len(self.states))
        read = [*(name for name, _ in self.arrays), *(f"o{k}" for k in count)]
        written = (
            [name for name, *_ in (*self.saved, *self.scratch)] + self.scalars + [f"n{k}" for k in count]
        )
        members = [f"const T* {name};" for name in read]
        members += [f"T* {name};" for name in (*written, *(f"m{k}" for k in count))]
        slots = ["[[maybe_unused]] const int64_t* const D = s.D;"]
        slots += [f"[[maybe_unused]] auto* const {name} = s.{name};" for name in (*read, *written)]
        return members, " ".join(slots)

    def _loop_members(self) -> list[str]:
        lines = [f"T* {name};" for name in (*(n for n, *_ in self.scratch), *self.scalars)]
        lines += [f"State s{k};" for k in range(len(self.states))]
        return lines + [f"{phase.cpp_type} p{phase.name};" for phase in self.phases]

    def _pointers(self) -> list[str]:
        lines = [f"s.{name} = {pointer};" for name, pointer in (*self.arrays, *self.saved)]
        of_blocks = [(name, width) for name, width, whole_block in self.scratch if whole_block]
        lines += [f"s.{name} = {name} + (at.row - at.block_row) * {width};" for name, width in of_blocks]
        lines += [f"s.n{k} = s{k}.after(at);" for k in range(len(self.states))]
        return lines + [f"s.m{k} = s{k}.other_buffer(at.step);" for k in range(len(self.states))]

    def _allocations(self) -> list[str]:
        lines = [
            f"{name} = shared.take<T>({'c.block_steps * ' if whole_block else ''}c.rows * {width});"
            for name, width, whole_block in self.scratch
        ]
        steps = "c.block_steps * " if self.deferred else ""
        lines += [f"{name} = own.take<T>({steps}c.rows);" for name in self.scalars]
        for k, state in enumerate(self.states):
            steps = "c.block_steps" if state.read_by_deferred or state.deferred else "0"
            pointers = f"{state.initial}, {state.all_steps}, {state.final}"
            lines.append(f"s{k}.allocate(shared, c, {state.width}, {pointers}, {steps});")
        for phase in self.phases:
            name = f"p{phase.name}"
            thread_range = "block_range" if phase.deferred else "range"
            for number, (group, _) in enumerate(phase.groups):
                lines.append(f"{name}.groups[{number}] = Group{group};")
            threads = "c.by_rows || c.turns ? 1 : c.threads"
            lines.append(f"{name}.partition({thread_range}, {threads}, {phase.width});")
            if phase.groups:
                packed = ", ".join(f"(T*){pointer}" for _, pointer in phase.groups)
                allocate = f"{name}.allocate_packed(shared, c.pack_per_step, packed);"
                lines.append(f"{{ T* const packed[] = {{{packed}}}; {allocate} }}")
                rows = f"c.block_steps * c.rows, {thread_range}.batch"
                lines.append(f"{name}.allocate_sums(own, {rows}, c.pack_per_step);")
        return lines


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _join(lines: list[str], indent: int) -> str:
    return ("\n" + " " * indent).join(lines)
