"""Print the step of a cell as C functions: one for each pass over columns, and one that calls them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from unrolled.engines.compiler.kernel_ir import (
    Apply,
    Buffer,
    Group,
    Instruction,
    Load,
    Memory,
    Operand,
    Phase,
    ReadScalar,
    Register,
    Scalar,
    Sum,
)
from unrolled.export.c_ops import C, literal, reduction
from unrolled.export.kernels import PlacedGroup, QuantizedRow, StepKernel, quantized_row

# The arguments of all functions of a step: weights, quantized matrices if there are any, input, states before
# and after, memory between passes.
_WEIGHTS, _WORDS = ("const float *w",), ("const uint32_t *words",)
_VALUES = ("const float *x", "const float *old", "float *next", "float *work")
_POINTERS = {Memory.STATE: "old", Memory.NEW_STATE: "next", Memory.SCRATCH: "work"}


def step_functions(name: str, step: StepKernel) -> str:
    """Return the C functions of a step.

    Args:
        name: Name of the function for the whole step. Those for its passes have names derived from it.
        step: The step.
    """
    functions: list[str] = []
    body: list[str] = []
    kernel = step.kernel
    arguments = _arguments(step)
    ready: set[QuantizedRow] = set()
    count = 0
    for level in kernel.levels:
        ready = {row for row in ready if row[0].memory in (Memory.INPUT, Memory.STATE)}
        for scalar in level.scalars:
            body += _scalar(step, scalar)
        for phase in level.phases:
            functions += [*_phase(f"{name}_{count}", step, phase, step.groups[count]), ""]
            body += _quantized_rows(step, phase, ready)
            passed = ", ".join([*_names(arguments), "scalars"])
            body.append(f"RUN({name}_{count}, {_product_count(phase)}, {phase.width}, {passed});")
            count += 1
    lines = [
        *functions,
        f"static void {name}({', '.join(arguments)}) {{",
        f"  float scalars[{max(1, kernel.scalar_count)}];",
        f"  {_unused(arguments)}",
        *_indented(body),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _product_count(phase: Phase) -> str:
    """Return the size of the largest group of products of a phase, as C."""
    count = max([len(group.products) for group in phase.groups], default=1)
    has_int8 = any(group.dtype is torch.int8 for group in phase.groups)
    return f"INT8_SUMS({count})" if has_int8 else str(count)


def _arguments(step: StepKernel) -> tuple[str, ...]:
    """Return the declarations of the arguments."""
    return (*_WEIGHTS, *(_WORDS if step.words.numel() else ()), *_VALUES)


def _names(arguments: Sequence[str]) -> list[str]:
    return [argument.rpartition("*")[2] for argument in arguments]


def _unused(arguments: Sequence[str]) -> str:
    """Return a statement that keeps compilers from warning of arguments that aren't read."""
    return ", ".join(f"(void){name}" for name in [*_names(arguments), "scalars"]) + ";"


def _quantized_rows(step: StepKernel, phase: Phase, ready: set[QuantizedRow]) -> Iterator[str]:
    """Yield the statements that quantize the rows that products of a phase read in int8.

    Args:
        step: The step.
        phase: The phase.
        ready: The rows that are quantized already. Those of the phase are added.
    """
    for group in phase.groups:
        if group.dtype is not torch.int8 or (row := quantized_row(group)) in ready:
            continue
        ready.add(row)
        source, to = _pointer(step, row[0], 0), _sum("work", step.row_offsets[row])
        yield f"v_quantize_row({source}, {group.depth}, {literal(row[1])}, {to});"


def _phase(name: str, step: StepKernel, phase: Phase, places: list[PlacedGroup]) -> Iterator[str]:
    """Yield the function that computes some panels of columns of a phase.

    Args:
        name: Its name.
        step: The step.
        phase: The phase.
        places: Where the matrices of each group lie.
    """
    arguments = _arguments(step)
    yield (
        f"ALWAYS_INLINE void {name}({', '.join(arguments)}, const float *scalars, const int first, "
        "const int panels) {"
    )
    yield f"  {_unused(arguments)}"
    if phase.groups:
        yield "  V " + ", ".join(f"sum{k}[16]" for k in range(len(phase.groups))) + ";"
    for number, (group, place) in enumerate(zip(phase.groups, places, strict=True)):
        function, operands = _product(step, group, place)
        sizes = f"{group.depth}, {len(group.products)}, {phase.width}"
        yield f"  {function}(sum{number}, {', '.join(operands)}, {sizes}, first, panels);"
    yield "  UNROLL for (int u = 0; u < panels; u++) {"
    yield f"    const int i = first + u * LANES, n = {phase.width} - i;"
    yield from _indented(_instructions(step, phase.instructions, phase), 4)
    for store in phase.stores:
        yield f"    v_store({_pointer(step, store.buffer, store.offset)} + i, {_operand(store.value)}, n);"
    yield "  }"
    yield "}"


def _product(step: StepKernel, group: Group, place: PlacedGroup) -> tuple[str, list[str]]:
    """Return the function for the products of a group, and its pointers to the row and the matrices."""
    assert group.buffer is not None
    row, words = _pointer(step, group.buffer, 0), _sum("words", place.words)
    if group.dtype is group.sum_dtype:
        return "multiply", [row, _sum("w", place.weights)]
    if group.dtype is not torch.int8:
        return f"v_multiply_{str(group.dtype).removeprefix('torch.')}", [row, words]
    row = _sum("work", step.row_offsets[quantized_row(group)])
    return "v_multiply_int8", [row, words, _sum("w", place.weights)]


def _scalar(step: StepKernel, scalar: Scalar) -> Iterator[str]:
    """Yield the statements that compute a scalar of the row."""
    instructions = _instructions(step, scalar.instructions, None)
    result = _operand(scalar.result)
    yield "{"
    if scalar.reduction is None:
        yield "  const int i = 0, n = 1;"
        yield from _indented(instructions)
        yield f"  scalars[{scalar.number}] = v_lane({result}, 0);"
        yield "  (void)i, (void)n;"
    else:
        combine, neutral = reduction(scalar.reduction)
        yield f"  V all = {neutral};"
        yield f"  for (int i = 0; i < {scalar.width}; i += LANES) {{"
        yield f"    const int n = {scalar.width} - i;"
        yield from _indented(instructions, 4)
        yield f"    all = {combine}(all, v_first(n, {result}, {neutral}));"
        yield "  }"
        yield f"  scalars[{scalar.number}] = v_over_lanes({combine}, all);"
    for buffer in scalar.buffers:
        yield f"  ({_pointer(step, buffer, 0)})[0] = scalars[{scalar.number}];"
    yield "}"


def _instructions(
    step: StepKernel, instructions: Sequence[Instruction], phase: Phase | None
) -> Iterator[str]:
    """Yield a definition for each register."""
    for index, one in enumerate(instructions):
        match one:
            case Load():
                text = _load(step, one)
            case Sum(group, product, _):
                assert phase is not None
                text = f"sum{group}[u * {len(phase.groups[group].products)} + {product}]"
            case ReadScalar(number):
                text = f"splat(scalars[{number}])"
            case Apply():
                text = C.apply(one, [_operand(operand) for operand in one.operands])
        yield f"const V v{index} = {text};"


def _load(step: StepKernel, load: Load) -> str:
    pointer = _pointer(step, load.buffer, 0 if load.broadcast else load.offset)
    if load.broadcast:
        return f"splat(({pointer})[0])"
    # Other memory may be read past the end of a buffer: the arrays have room for a vector at their end.
    is_x = load.buffer.memory is Memory.INPUT and step.inputs[load.buffer.index] is None
    return f"v_load_first({pointer} + i, n)" if is_x else f"v_load({pointer} + i)"


def _pointer(step: StepKernel, buffer: Buffer, offset: int) -> str:
    if buffer.memory is Memory.INPUT:
        start = step.inputs[buffer.index]
        return _sum("x", offset) if start is None else _sum("w", start + offset)
    return _sum(_POINTERS[buffer.memory], step.offset(buffer) + offset)


def _sum(pointer: str, offset: int) -> str:
    return f"{pointer} + {offset}" if offset else pointer


def _operand(operand: Operand) -> str:
    return f"v{operand.index}" if isinstance(operand, Register) else f"splat({literal(operand)})"


def _indented(lines: Iterator[str] | Sequence[str], columns: int = 2) -> Iterator[str]:
    for line in lines:
        yield " " * columns + line
