"""Print a kernel IR, for ``UNROLLED_LOG=kernel``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unrolled.engines.compiler.ir import label
from unrolled.engines.compiler.kernel_ir import Buffer, Instruction, KernelIR, Level, Phase, Scalar


@dataclass(frozen=True)
class KernelDump:
    """Text form of a kernel IR, built only by ``str()``, so that logging costs nothing if it is off.

    Buffers are ``in``, ``old`` and ``new`` states, ``saved`` and ``scratch``. Registers are ``%0``, ``%1``, …
    """

    kernel: KernelIR

    def __str__(self) -> str:
        kernel = self.kernel
        stored = "" if kernel.storage is kernel.dtype else f", stored in {kernel.storage}"
        lines = [f"kernel, {kernel.dtype}{stored}"]
        for one in kernel.inputs:
            before = ", of the step before" if one.shifted else ""
            lines.append(f"  {one.buffer} = {label(one.node)} {_shape(one.buffer)}{before}")
        for k, state in enumerate(kernel.states):
            lines.append(f"  old{k} -> new{k} (rows, {state.width})")
        for k, node in enumerate(kernel.saved):
            lines.append(f"  saved{k} = {label(node)} (rows, {node.meta['val'].shape[1]})")
        for k, scratch in enumerate(kernel.scratch):
            rows = "rows of a block" if scratch.whole_block else "rows"
            lines.append(f"  scratch{k} ({rows}, {scratch.width})")
        for number, level in enumerate(kernel.levels):
            lines.append(f"level {number}{', after a block of steps' if level.deferred else ''}")
            lines += _level(level)
        return "\n".join(lines)


def _level(level: Level) -> Iterator[str]:
    for scalar in level.scalars:
        yield from _scalar(scalar)
    for phase in level.phases:
        yield from _phase(phase)


def _scalar(scalar: Scalar) -> Iterator[str]:
    yield f"  scalar {scalar.number}"
    yield from _instructions(scalar.instructions)
    if scalar.reduction is None:
        yield f"    scalar {scalar.number} = {scalar.result}"
    else:
        name = str(scalar.reduction).split(".")[-2]
        yield f"    scalar {scalar.number} = {name} of {scalar.result} over {scalar.width} columns"
    for buffer in scalar.buffers:
        yield f"    store {buffer}[0:] = scalar {scalar.number}"


def _phase(phase: Phase) -> Iterator[str]:
    yield f"  phase of {phase.width} columns"
    for k, group in enumerate(phase.groups):
        yield f"    sum {k} = {group}"
    for k, group in enumerate(phase.hoisted):
        yield f"    hoisted sum {k} = {group}"
    yield from _instructions(phase.instructions)
    for store in phase.stores:
        yield f"    {store}"


def _instructions(instructions: Sequence[Instruction]) -> Iterator[str]:
    for k, instruction in enumerate(instructions):
        yield f"    %{k} = {instruction}"


def _shape(buffer: Buffer) -> str:
    return f"({'rows, ' if buffer.per_row else ''}{buffer.width})"
