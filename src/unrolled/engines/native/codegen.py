"""Generate the C++ of a kernel from its IR.

A *panel* is as many columns as a vector has lanes. A phase goes over the panels of its width. It accumulates
its products for a tile of rows and panels, computes the panels while the sums are in registers, and stores
them. Scalars are computed for several rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.ir import is_batched, width
from unrolled.engines.compiler.kernel_ir import (
    Apply,
    Buffer,
    Group,
    Instruction,
    KernelIR,
    Load,
    Memory,
    Operand,
    Phase,
    ReadScalar,
    Register,
    Scalar,
    Store,
    Sum,
)
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.native.cpp_ops import ADDITIVE_OPS, CPP_OPS, CPP_REDUCTIONS, check, literal
from unrolled.engines.native.cpp_template import KernelSource, PhaseText, ScalarsText, State
from unrolled.engines.native.kernel_spec import KernelSpec, Pack

_NAMES = {Memory.INPUT: "a", Memory.STATE: "o", Memory.NEW_STATE: "n", Memory.SAVED: "k", Memory.SCRATCH: "b"}
_SCALAR_TYPES = {torch.float32: "float", torch.float64: "double"}


def emit(partition: LoopPartition, kernel: KernelIR) -> KernelSpec:
    """Generate the C++ of a loop.

    Args:
        partition: The partition that contains the loop.
        kernel: Its kernel IR.

    Raises:
        UnsupportedError: If the loop contains an unsupported operation.
    """
    for node in partition.loop:
        check(node)
    return _Emitter(kernel).emit()


class _Emitter:
    def __init__(self, kernel: KernelIR) -> None:
        self.kernel = kernel
        self.sizes: list[int] = []
        self.strides: list[tuple[fx.Node, int]] = []
        self.pointers: list[tuple[str, Any]] = [("starts", None)]
        self.packs: list[Pack] = []

    def emit(self) -> KernelSpec:
        kernel = self.kernel
        source = self._source().text()
        arguments = (self.sizes, self.strides, self.pointers, self.packs)
        hoisted = {
            product.row for phase in kernel.phases() for group in phase.hoisted for product in group.products
        }
        return KernelSpec(source, *arguments, frozenset(hoisted), kernel.columnwise, kernel.has_deferred)

    def _source(self) -> KernelSource:
        kernel = self.kernel
        functions: list[PhaseText | ScalarsText] = []
        step_calls: list[str] = []
        deferred_calls: list[str] = []
        for number, level in enumerate(kernel.levels):
            calls = deferred_calls if level.deferred else step_calls
            if calls:
                calls.append("range.synchronize();")
            if level.scalars:
                functions.append(ScalarsText(number, [self._scalar(scalar) for scalar in level.scalars]))
                calls.append(f"scalars{number}(s, range);")
            for index, phase in enumerate(level.phases):
                name = f"{number}_{index}"
                functions.append(self._phase(name, phase, level.deferred))
                steps = "0, block_rows, 1" if level.deferred else "shift, block_rows, steps"
                calls.append(f"pass{name}(*this, s, range, {steps});")
        return KernelSource(
            scalar=_SCALAR_TYPES[kernel.dtype],
            functions=functions,
            calls=step_calls,
            deferred=deferred_calls,
            arrays=[(_name(one.buffer), self._array(one.node, one.shifted)) for one in kernel.inputs],
            saved=[
                (f"k{k}", f"(T*){self._pointer('saved', node)} + at.row * {self._size(width(node))}")
                for k, node in enumerate(kernel.saved)
            ],
            scratch=[
                (f"b{k}", self._size(one.width), one.whole_block) for k, one in enumerate(kernel.scratch)
            ],
            scalars=[f"z{number}" for number in range(kernel.scalar_count)],
            states=[
                State(
                    self._size(state.width),
                    initial=self._pointer("initial", k),
                    all_steps=self._pointer("all_steps", k),
                    final=self._pointer("final", k),
                    read_by_deferred=state.read_by_deferred,
                    deferred=state.deferred,
                )
                for k, state in enumerate(kernel.states)
            ],
            columnwise=kernel.columnwise,
        )

    # --- arguments of a call ---

    def _add_size(self, value: int) -> int:
        self.sizes.append(value)
        return len(self.sizes) - 1

    def _size(self, value: int) -> str:
        return f"D[{self._add_size(value)}]"

    def _pointer(self, kind: str, target: Any) -> str:
        self.pointers.append((kind, target))
        return f"P[{len(self.pointers) - 1}]"

    def _array(self, node: fx.Node, shifted: bool) -> str:
        """Return the pointer to an input in a step."""
        base = self._pointer("array", node)
        if not is_batched(node):
            return f"(const T*){base}"
        columns = self._size(width(node))
        if not shifted:
            return f"(const T*){base} + at.row * {columns}"
        initial = self._pointer("shifted_initial", node)
        return f"array({base}, {initial}, c, at, {columns})"

    def _hoisted_row(self, row: fx.Node) -> str:
        return f"(const T*){self._pointer('array', row)} + begin * {self._size(width(row))}"

    def _group(self, group: Group, columns: int) -> tuple[str, str]:
        """Return the initializer of a group in C++, and the pointer to its packed matrices."""
        pack = Pack(group.products, columns)
        self.packs.append(pack)
        matrices = []
        for product in group.products:
            k, n = self._add_size(0), self._add_size(0)
            self.strides.append((product.matrix, k))
            offset = self._size(product.offset)
            data = self._pointer("matrix", product.matrix)
            matrices.append(f"{{(T*){data} + {offset} * D[{n}], D[{k}], D[{n}]}}")
        count, depth = len(group.products), self._size(group.depth)
        return f"{{{count}, {depth}, nullptr, {{{', '.join(matrices)}}}, nullptr}}", self._pointer(
            "pack", pack
        )

    # --- functions ---

    def _scalar(self, scalar: Scalar) -> list[str]:
        """Return the statements that compute a scalar of R rows at once.

        The terms of a row are added in order. The other rows hide the latency of these additions.
        """
        writer = _Writer(self._size)
        lines = writer.lines(scalar.instructions)
        result = writer.operand(scalar.result)
        at = "[[maybe_unused]] const int64_t at = from + r;"
        if scalar.reduction is None:
            block = [
                "[[maybe_unused]] const int64_t i = 0, n = 1;",
                "FOR_ROWS {",
                *(f"  {line}" for line in (at, *lines)),
                f"  one[r] = ({result})[0];",
                "}",
            ]
        else:
            combine, neutral = CPP_REDUCTIONS[scalar.reduction]
            masked = f"first_lanes(n, {result}, splat(T({neutral})))"
            block = [
                f"const int64_t W = {self._size(scalar.width)};",
                "V all[R];",
                f"FOR_ROWS all[r] = splat(T({neutral}));",
                "for (int64_t i = 0; i < W; i += L) {",
                "  const int64_t n = W - i;",
                "  FOR_ROWS {",
                *(f"    {line}" for line in (at, *lines)),
                f"    all[r] = {combine.format('all[r]', masked)};",
                "  }",
                "}",
                "FOR_ROWS one[r] = all[r][0];",
                "for (int j = 1; j < L; j++)",
                f"  FOR_ROWS one[r] = {combine.format('splat(one[r])', 'splat(all[r][j])')}[0];",
            ]
        block.append(f"FOR_ROWS z{scalar.number}[from + r] = one[r];")
        if scalar.buffers:
            size = self._size(1)
            names = map(_name, scalar.buffers)
            block.append("if (range.by_rows || range.id == 0) {")
            block += [f"  FOR_ROWS {name}[(from + r) * {size}] = one[r];" for name in names]
            block.append("}")
        return block

    def _phase(self, name: str, phase: Phase, deferred: bool) -> PhaseText:
        columnwise = self.kernel.columnwise and not deferred
        sizes: list[int] = []

        def read_once(value: int) -> str:
            sizes.append(self._add_size(value))
            return f"d{sizes[-1]}"

        # As far as the compiler knows, a store may change the sizes.
        writer = _Writer(
            self._size if phase.groups else read_once, phase, "(r + step_offset)" if columnwise else "r"
        )
        lines = writer.lines(phase.instructions)
        stores = [writer.store(store) for store in phase.stores]
        prefetches = [] if phase.groups else writer.prefetches
        return PhaseText(
            name=name,
            width=self._size(phase.width),
            rows=[_name(group.buffer) for group in phase.groups if group.buffer is not None],
            hoisted=[self._hoisted_row(group.products[0].row) for group in phase.hoisted],
            groups=[self._group(group, phase.width) for group in (*phase.groups, *phase.hoisted)],
            sizes=sizes,
            prefetches=list(dict.fromkeys(prefetches)),
            lines=[*lines, *stores],
            columnwise=columnwise,
            deferred=deferred,
        )


class _Writer:
    """Writes the instructions of a phase or of a scalar.

    Args:
        size: Returns the expression for a width or an offset.
        phase: The phase, or None for a scalar.
        row: The expression for the row among the rows of the hoisted sums.
    """

    def __init__(self, size: Callable[[int], str], phase: Phase | None = None, row: str = "r") -> None:
        self.size = size
        self.phase = phase
        self.row = row
        self.prefetches: list[str] = []  # addresses of the inputs of every step

    def lines(self, instructions: list[Instruction]) -> list[str]:
        """Return a statement for each instruction."""
        return [f"const V v{k} = {self._expression(one)};" for k, one in enumerate(instructions)]

    def operand(self, operand: Operand) -> str:
        """Return the expression for a register or a number."""
        return f"v{operand.index}" if isinstance(operand, Register) else f"splat(T({literal(operand)}))"

    def store(self, store: Store) -> str:
        """Return the statement that stores a register."""
        columns, offset = self.size(store.buffer.width), self.size(store.offset)
        return (
            f"store({_name(store.buffer)} + at * {columns} + {offset} + i, {self.operand(store.value)}, n);"
        )

    def _expression(self, instruction: Instruction) -> str:
        match instruction:
            case Load():
                return self._load(instruction.buffer, instruction.offset, instruction.broadcast)
            case Sum():
                return self._sum(instruction)
            case ReadScalar(number):
                return f"splat(z{number}[at])"
            case Apply(target, operands, alpha):
                texts = [self.operand(operand) for operand in operands]
                if target in ADDITIVE_OPS:
                    right = texts[1] if alpha == 1 else f"({texts[1]} * splat(T({literal(alpha)})))"
                    return f"({texts[0]} {ADDITIVE_OPS[target]} {right})"
                return CPP_OPS[target].format(*texts)

    def _load(self, buffer: Buffer, offset: int, broadcast: bool) -> str:
        name = _name(buffer)
        row_size = self.size(buffer.width) if buffer.per_row else ""
        if broadcast:
            return f"splat({name}[{f'at * {row_size}' if row_size else 0}])"
        column = f"{self.size(offset)} + i"
        if not row_size:
            return f"load({name} + {column}, n)"
        if buffer.memory is Memory.INPUT:
            self.prefetches.append(f"{name} + (at + ahead) * {row_size} + {column}")
        return f"load({name} + at * {row_size} + {column}, n)"

    def _sum(self, value: Sum) -> str:
        assert self.phase is not None
        if value.hoisted:
            count = len(self.phase.hoisted[value.group].products)
            return f"hoisted[{value.group}][({self.row} * panels + u) * {count} + {value.index}]"
        preceding = sum(len(group.products) for group in self.phase.groups[: value.group])
        start = f"{preceding} * rows * panels + " if preceding else ""
        count = len(self.phase.groups[value.group].products)
        return f"sums[{start}(r * panels + u) * {count} + {value.index}]"


def _name(buffer: Buffer) -> str:
    return f"{_NAMES[buffer.memory]}{buffer.index}"
