"""Generate the C++ of a kernel from its IR.

A *panel* is as many columns as a vector has lanes. A phase goes over the panels of its width. It accumulates
its products for a tile of rows and panels, computes the panels while the sums are in registers, and stores
them. Scalars are computed for several rows at once. Only the functions that compute tiles and scalars are
generated; ``include/loop.h`` contains the loop around them.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.ir import width
from unrolled.engines.compiler.kernel_ir import KernelIR, Phase
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.native.cpp_functions import MEMBERS, phase_function, scalars_class, wrapped
from unrolled.engines.native.cpp_ops import check
from unrolled.engines.native.kernel_spec import WEIGHT_FORMATS, KernelSpec, Pack

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
    arguments = _Arguments(kernel)
    source = _source(kernel, arguments.sizes)
    hoisted = {
        product.row for phase in kernel.phases() for group in phase.hoisted for product in group.products
    }
    return KernelSpec(
        source,
        arguments.sizes,
        arguments.strides,
        arguments.pointers,
        arguments.packs,
        frozenset(hoisted),
        kernel.columnwise,
        kernel.has_deferred,
    )


class _Arguments:
    """The sizes and pointers of a kernel, in the order in which ``Loop::set_up`` in loop.h reads them."""

    def __init__(self, kernel: KernelIR) -> None:
        self.sizes: list[int] = []
        self.strides: list[tuple[fx.Node, int]] = []
        self.pointers: list[tuple[str, Any]] = [("starts", None)]
        self.packs: list[Pack] = []
        for one in kernel.inputs:
            self.sizes += [width(one.node) if one.buffer.per_row else 0, one.shifted]
            self.pointers.append(("array", one.node))
            if one.shifted:
                self.pointers.append(("shifted_initial", one.node))
        for number, state in enumerate(kernel.states):
            self.sizes += [state.width, state.deferred, state.deferred or state.read_by_deferred]
            self.pointers += [(kind, number) for kind in ("initial", "all_steps", "final")]
        for node in kernel.saved:
            self.sizes.append(width(node))
            self.pointers.append(("saved", node))
        for buffer in kernel.scratch:
            self.sizes += [buffer.width, buffer.whole_block]
        for deferred in (False, True):
            for phase in kernel.phases(deferred):
                self._add_phase(phase)

    def _add_phase(self, phase: Phase) -> None:
        self.sizes.append(phase.width)
        for group in (*phase.groups, *phase.hoisted):
            pack = Pack(group.products, phase.width, group.dtype)
            self.packs.append(pack)
            self.sizes += [len(group.products), group.depth, WEIGHT_FORMATS.get(group.dtype, 0)]
            self.sizes.append(_bits(group.row_scale))
            self.pointers.append(("pack", pack))
            if group.buffer is None:
                self.pointers.append(("array", group.products[0].row))
            for product in group.products:
                self.pointers.append(("matrix", product))
                self.strides.append((product.matrix, len(self.sizes)))
                self.sizes += [0, 0]  # the strides


def _bits(number: float) -> int:
    """Return the bits of a number in float32."""
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits


def _source(kernel: KernelIR, sizes: list[int]) -> str:
    """Return the source of a kernel, and add the numbers that its functions read to ``sizes``."""
    own_sizes: list[int] = []
    functions: list[str] = []
    parts: dict[bool, list[str]] = {False: [], True: []}
    phase_count = scalars_count = 0
    for level in kernel.levels:
        calls = parts[level.deferred]
        if calls:
            calls.append("Barrier")
        if level.scalars:
            name = f"Scalars{scalars_count}"
            functions += ["", *scalars_class(name, level, own_sizes)]
            calls.append(f"Scalars<{name}>")
            scalars_count += 1
        for phase in level.phases:
            name = f"phase{phase_count}"
            functions += ["", *phase_function(name, phase, own_sizes)]
            calls.append(_phase_type(name, phase))
            phase_count += 1
    sizes += own_sizes
    buffers = (kernel.inputs, kernel.states, kernel.saved, kernel.scratch)
    counts = ", ".join(str(count) for count in (*(len(part) for part in buffers), kernel.scalar_count))
    lines = [
        f"using T = {_SCALAR_TYPES[kernel.dtype]};",
        '#include "loop.h"',
        "",
        "namespace {",
        "",
        "// The numbers of inputs, states, saved values, scratch buffers and scalars.",
        f"using Step = StepValues<{counts}>;",
        *functions,
        "",
        *wrapped("using EveryStep = Sequence<", parts[False], ">;"),
        *wrapped("using EveryBlock = Sequence<", parts[True], ">;"),
        f"using Kernel = Loop<Step, {'true' if kernel.columnwise else 'false'}, EveryStep, EveryBlock>;",
        "",
        "}  // namespace",
        "",
        "EXPORT bool run(const CallArguments* arguments, void* const* pointers) {",
        "  return call<Kernel>(*arguments, pointers);",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _phase_type(name: str, phase: Phase) -> str:
    """Return the type of a phase: its function, its number of hoisted groups, and what the others read."""
    buffers = [group.buffer for group in phase.groups if group.buffer is not None]
    reads = [f"Reads<&Step::{MEMBERS[buffer.memory]}, {buffer.index}>" for buffer in buffers]
    return f"Phase<{', '.join([name, str(len(phase.hoisted)), *reads])}>"
