"""Generate the C++ of a loop: phases of matrix products, fused with the operations that read their sums.

Every value in the loop has shape ``(batch, width)``. A *slice* of it is a range of its columns, and a *panel*
is as many columns as a vector has lanes. The loop runs through the *levels* of :class:`Schedule`. At a level,
each thread first computes the scalars of its rows, which include the reductions. Then one phase per width
goes over the panels. It accumulates the phase's products, computes the panel while the sums are in registers,
and stores what a later level, a later step or the caller reads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.ir import is_batched, is_number, width
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.schedule import Phase, Schedule
from unrolled.engines.native.cpp_ops import ADDITIVE_OPS, CPP_OPS, CPP_REDUCTIONS, check, literal
from unrolled.engines.native.cpp_template import KernelSource, PhaseText, State, scalar_function
from unrolled.engines.native.kernel_spec import KernelSpec, Pack, Product

aten = torch.ops.aten

_MAX_GROUP = 8  # products accumulated together (MAX_STRIP in include/products.h)


def emit(
    partition: LoopPartition,
    dtype: torch.dtype,
    shifted: Collection[fx.Node] = (),
    whole: Collection[fx.Node] = (),
) -> KernelSpec:
    """Generate the C++ of a loop.

    Args:
        partition: The partition that contains the loop.
        dtype: Dtype of all values.
        shifted: States of another loop. This loop reads their value before each step.
        whole: Products to compute for all steps before the loop, because others read them, too.

    Raises:
        UnsupportedError: If the loop contains an unsupported operation.
    """
    stored: list[fx.Node] = []
    while True:
        try:
            return _Emitter(replace(partition, loop=[*stored, *partition.loop]), dtype, shifted, whole).emit()
        except _NotStoredError as error:
            stored.append(error.args[0])


class _NotStoredError(Exception):
    """The hoisted product in ``args[0]`` has to be stored in every step, because a reduction reads it."""


@dataclass
class _Body:
    """The body of a function that computes panels.

    Attributes:
        level: Level of the function.
        has_products: Whether the function can read sums of products.
        lines: Its statements.
        names: For each value and its first column, the variable that holds this slice.
        groups: Groups of products that read the same row.
        hoisted: The same for hoisted products.
        inputs: Addresses of the per-step inputs that it reads, for prefetching.
    """

    level: int
    has_products: bool
    lines: list[str] = field(default_factory=list)
    names: dict[tuple[fx.Node, int], str] = field(default_factory=dict)
    groups: list[list[Product]] = field(default_factory=list)
    hoisted: list[list[Product]] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def assign_group(self, product: Product, groups: list[list[Product]]) -> tuple[int, int]:
        """Add a product to a group. Return the group's number and the product's index in it."""
        for number, group in enumerate(groups):
            if product in group:
                return number, group.index(product)
        for number, group in enumerate(groups):
            if group[0].row is product.row and len(group) < _MAX_GROUP:
                group.append(product)
                return number, len(group) - 1
        groups.append([product])
        return len(groups) - 1, 0


class _Emitter:
    def __init__(
        self,
        partition: LoopPartition,
        dtype: torch.dtype,
        shifted: Collection[fx.Node],
        whole: Collection[fx.Node],
    ) -> None:
        self.partition = partition
        self.scalar_type = {torch.float32: "float", torch.float64: "double"}[dtype]
        self.shifted = shifted
        # Only products of this prologue: in the backward, those of the forward are saved values.
        products = (n for n in partition.prologue if n.target is aten.mm.default)
        self.hoisted = {n for n in products if n in partition.inputs and n not in whole}
        for node in partition.loop:
            check(node)
        # Only the forward loop has deferred values, and only the backward loop has shifted states.
        self.schedule = Schedule(partition, allow_deferred=not shifted)
        self.inside, self.stored = self.schedule.inside, self.schedule.stored
        self.levels, self.scalars = self.schedule.levels, self.schedule.scalars
        self.sizes: list[int] = []
        self.strides: list[tuple[fx.Node, int]] = []
        self.pointers: list[tuple[str, Any]] = [("starts", None)]
        self.packs: list[Pack] = []
        self.shifts: list[tuple[fx.Node, int]] = []
        self.phases: list[PhaseText] = []
        self.mixes_columns = False  # whether a column reads another column of a state
        self.input_slots: dict[fx.Node, str] = {}  # in the order of their first use
        self.saved_slots = {n: f"k{k}" for k, n in enumerate(partition.saved)}
        scratch = [n for n in self.stored if n not in partition.saved and n not in partition.new_states]
        self.scratch_slots = {n: f"b{k}" for k, n in enumerate(scratch)}

    def emit(self) -> KernelSpec:
        source = self._source().text()
        arguments = (self.sizes, self.strides, self.shifts, self.pointers, self.packs)
        return KernelSpec(
            source, *arguments, frozenset(self.hoisted), self.columnwise, bool(self.schedule.deferred)
        )

    @property
    def columnwise(self) -> bool:
        """Whether a step is a single phase without products, in which each column depends only on itself."""
        phases = [phase for phase in self.phases if not phase.deferred]
        is_single = not phases or (len(phases) == 1 and not phases[0].rows)
        return is_single and not self.mixes_columns and self.schedule.deferred.issuperset(self.scalars)

    # --- values ---

    def _size(self, value: int) -> str:
        self.sizes.append(value)
        return f"D[SIZES + {len(self.sizes) - 1}]"

    def _pointer(self, kind: str, target: Any) -> str:
        self.pointers.append((kind, target))
        return f"P[{len(self.pointers) - 1}]"

    def _store_slots(self, node: fx.Node) -> list[str]:
        """Return the pointers to which a stored value is written."""
        slots = [f"n{k}" for k, new in enumerate(self.partition.new_states) if new is node]
        if node in self.saved_slots:
            slots.append(self.saved_slots[node])
        return slots or [self.scratch_slots[node]]

    def _slot(self, node: fx.Node) -> str:
        """Return the pointer to a value in memory, at the first row of this step."""
        if node in self.partition.old_states:
            return f"o{self.partition.old_states.index(node)}"
        if node in self.inside:
            return self._store_slots(node)[0]
        return self.input_slots.setdefault(node, f"a{len(self.input_slots)}")

    def _slice(self, body: _Body, value: object, offset: int, columns: int) -> str:
        """Return an expression for columns ``offset + i`` of a value: a variable or a constant."""
        if not isinstance(value, fx.Node):
            return f"splat(T({literal(value)}))"
        if is_number(value):
            return f"splat(T({literal(value.args[1])}))"
        if (value, offset) not in body.names:
            text = self._expression(body, value, offset, columns)
            body.names[value, offset] = f"v{len(body.names)}"
            body.lines.append(f"const V {body.names[value, offset]} = {text};")
        return body.names[value, offset]

    def _expression(
        self, body: _Body, node: fx.Node, offset: int, columns: int, defines: bool = False
    ) -> str:
        """Return the expression that computes or loads a slice; with ``defines``, never load it."""
        if node in self.scalars and not defines:
            return f"splat(z{self.scalars[node]}[at])"
        is_stored = node in self.stored and self.levels[node] < body.level and not defines
        if node in self.hoisted and not is_stored:
            if not body.has_products:
                raise _NotStoredError(node)
            return self._product_sum(body, node, offset, hoisted=True)
        if node not in self.inside or is_stored:
            return self._load(body, node, offset, columns)
        target, args = node.target, node.args

        def operand(value: object) -> str:
            is_broadcast = isinstance(value, fx.Node) and width(value) == 1
            return self._slice(body, value, 0 if is_broadcast else offset, columns)

        if target in ADDITIVE_OPS:
            scale = node.kwargs.get("alpha", 1)
            right = operand(args[1]) if scale == 1 else f"({operand(args[1])} * splat(T({literal(scale)})))"
            return f"({operand(args[0])} {ADDITIVE_OPS[target]} {right})"
        if target is aten.mm.default:
            if not body.has_products:
                raise AssertionError(f"{node} should have been stored")
            return self._product_sum(body, node, offset, hoisted=False)
        if target is aten.slice.Tensor:
            start = args[2] if len(args) > 2 and args[2] else 0
            assert isinstance(start, int)
            return self._slice(body, args[0], offset + start, columns)
        if target is aten.cat.default:
            for value in args[0]:  # type: ignore[union-attr]
                if offset < width(value):  # type: ignore[arg-type]
                    return self._slice(body, value, offset, columns)
                offset -= width(value)  # type: ignore[arg-type]
        operands = 1 if target in (aten.expand.default, aten.clone.default) else 3
        return CPP_OPS[target].format(*map(operand, args[:operands]))

    def _product_sum(self, body: _Body, node: fx.Node, offset: int, hoisted: bool) -> str:
        """Return the sum of a product's panel. :meth:`_phase` replaces the placeholder in its index."""
        row, matrix = node.args[:2]
        product = Product(row, matrix, offset)  # type: ignore[arg-type]
        group, index = body.assign_group(product, body.hoisted if hoisted else body.groups)
        return f"hoisted[{group}][HOISTED{group}; + {index}]" if hoisted else f"sums[GROUP{group}; + {index}]"

    def _load(self, body: _Body, node: fx.Node, offset: int, columns: int) -> str:
        slot, own_width = self._slot(node), width(node)
        if node in self.partition.old_states and (offset or own_width != columns):
            self.mixes_columns = True
        row_size = self._size(own_width) if is_batched(node) else ""
        if own_width == 1 and columns > 1:
            return f"splat({slot}[{f'at * {row_size}' if row_size else 0}])"
        column = f"{self._size(offset)} + i"
        if not row_size:
            return f"load({slot} + {column}, n)"
        if node in self.input_slots:
            body.inputs.append(f"{slot} + (at + ahead) * {row_size} + {column}")
        return f"load({slot} + at * {row_size} + {column}, n)"

    # --- functions ---

    def _scalar_function(self, level: int) -> str:
        """Return the function that computes a level's scalars, for R rows at once.

        The terms of a row are added in order. The other rows hide the latency of these additions.
        """
        blocks = []
        for node, number in self.scalars.items():
            if self.levels[node] != level:
                continue
            body = _Body(level, has_products=False)
            if node.target in CPP_REDUCTIONS:
                operand = node.args[0]
                assert isinstance(operand, fx.Node)
                value = self._slice(body, operand, 0, width(operand))
                combine, neutral = CPP_REDUCTIONS[node.target]
                masked = f"first_lanes(n, {value}, splat(T({neutral})))"
                block = [
                    f"const int64_t W = {self._size(width(operand))};",
                    "V all[R];",
                    f"FOR_ROWS all[r] = splat(T({neutral}));",
                    "for (int64_t i = 0; i < W; i += L) {",
                    "  const int64_t n = W - i;",
                    "  FOR_ROWS {",
                    "    [[maybe_unused]] const int64_t at = from + r;",
                    *(f"    {line}" for line in body.lines),
                    f"    all[r] = {combine.format('all[r]', masked)};",
                    "  }",
                    "}",
                    "FOR_ROWS one[r] = all[r][0];",
                    "for (int j = 1; j < L; j++)",
                    f"  FOR_ROWS one[r] = {combine.format('splat(one[r])', 'splat(all[r][j])')}[0];",
                ]
            else:
                text = self._expression(body, node, 0, 1, defines=True)
                block = [
                    "[[maybe_unused]] const int64_t i = 0, n = 1;",
                    "FOR_ROWS {",
                    "  [[maybe_unused]] const int64_t at = from + r;",
                    *(f"  {line}" for line in body.lines),
                    f"  one[r] = ({text})[0];",
                    "}",
                ]
            block.append(f"FOR_ROWS z{number}[from + r] = one[r];")
            if node in self.stored:
                size = self._size(1)
                block.append("if (range.by_rows || range.id == 0) {")
                block += [
                    f"  FOR_ROWS {slot}[(from + r) * {size}] = one[r];" for slot in self._store_slots(node)
                ]
                block.append("}")
            blocks.append(block)
        return scalar_function(level, blocks) if blocks else ""

    def _phase(self, name: str, level: int, phase: Phase, deferred: bool) -> PhaseText:
        body, stores = _Body(level, has_products=True), []
        for value, stored, column in phase.stores:
            text = self._slice(body, value, 0, phase.width)
            stores += [
                f"store({slot} + at * {self._size(width(stored))} + {self._size(column)} + i, {text}, n);"
                for slot in self._store_slots(stored)
            ]
        prefetches = [] if body.groups else [f"__builtin_prefetch({a});" for a in dict.fromkeys(body.inputs)]
        lines = "\n".join([*prefetches, *body.lines, *stores])
        preceding = 0  # products of the preceding groups
        for number, group in enumerate(body.groups):
            start = f"{preceding} * rows * panels + " if preceding else ""
            lines = lines.replace(f"GROUP{number};", f"{start}(r * panels + u) * {len(group)}")
            preceding += len(group)
        for number, group in enumerate(body.hoisted):
            lines = lines.replace(f"HOISTED{number};", f"(HERE * panels + u) * {len(group)}")
        return PhaseText(
            name,
            self._size(phase.width),
            [self._slot(group[0].row) for group in body.groups],
            [self._hoisted_row(group[0].row) for group in body.hoisted],
            [self._group(tuple(group), phase.width) for group in (*body.groups, *body.hoisted)],
            lines,
            deferred,
        )

    def _hoisted_row(self, row: fx.Node) -> str:
        return f"(const T*){self._pointer('array', row)} + begin * {self._size(width(row))}"

    def _group(self, products: tuple[Product, ...], columns: int) -> tuple[str, str]:
        """Return the initializer of a group in C++, and the pointer to its packed matrices."""
        pack = Pack(products, columns)
        self.packs.append(pack)
        matrices = []
        for product in products:
            self.strides.append((product.matrix, len(self.sizes)))
            k, n = self._size(0), self._size(0)
            offset = self._size(product.offset)
            data = self._pointer("matrix", product.matrix)
            matrices.append(f"{{(T*){data} + {offset} * {n}, {k}, {n}}}")
        text = f"{{{len(products)}, {self._size(pack.depth)}, nullptr, {{{', '.join(matrices)}}}, nullptr}}"
        return text, self._pointer("pack", pack)

    def _source(self) -> KernelSource:
        partition, schedule = self.partition, self.schedule
        functions: list[PhaseText | str] = []
        step_calls: list[str] = []
        deferred_calls: list[str] = []
        for level, phases in enumerate(schedule.phases()):
            is_deferred = bool(schedule.deferred) and level >= schedule.first_deferred_level
            calls = deferred_calls if is_deferred else step_calls
            if calls:
                calls.append("range.synchronize();")
            scalars = self._scalar_function(level)
            if scalars:
                functions.append(scalars)
                calls.append(f"scalars{level}(s, range);")
            for number, phase in enumerate(phases):
                text = self._phase(f"{level}_{number}", level, phase, is_deferred)
                self.phases.append(text)
                functions.append(text)
                steps = "0, block_rows, 1" if is_deferred else "shift, block_rows, steps"
                calls.append(f"pass{text.name}(*this, s, range, {steps});")
        states = zip(partition.old_states, partition.new_states, strict=True)
        whole_block = {*schedule.read_by_deferred, *schedule.deferred}
        return KernelSource(
            scalar=self.scalar_type,
            functions=functions,
            phases=self.phases,
            calls=step_calls,
            deferred=deferred_calls,
            arrays=[self._array(node, name) for node, name in self.input_slots.items()],
            saved=[
                (name, f"(T*){self._pointer('saved', node)} + at.row * {self._size(width(node))}")
                for node, name in self.saved_slots.items()
            ],
            scratch=[
                (name, self._size(width(node)), node in whole_block)
                for node, name in self.scratch_slots.items()
            ],
            scalars=[f"z{number}" for number in self.scalars.values()],
            states=[
                State(
                    self._size(width(old)),
                    initial=self._pointer("initial", k),
                    all_steps=self._pointer("all_steps", k),
                    final=self._pointer("final", k),
                    read_by_deferred=new in schedule.read_by_deferred,
                    deferred=new in schedule.deferred,
                )
                for k, (old, new) in enumerate(states)
            ],
            columnwise=self.columnwise,
        )

    def _array(self, node: fx.Node, name: str) -> tuple[str, str]:
        """Return the name of an input, and the pointer to it in a step."""
        base = self._pointer("array", node)
        if not is_batched(node):
            return name, f"(const T*){base}"
        columns = self._size(width(node))
        if node not in self.shifted:
            return name, f"(const T*){base} + at.row * {columns}"
        initial, shift = self._pointer("shifted_initial", node), self._size(0)
        self.shifts.append((node, len(self.sizes) - 1))
        return name, f"array({base}, {initial}, {shift}, c, at, {columns})"
