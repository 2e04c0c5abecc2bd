"""The kernel IR: it computes what the step computes, and the verifier finds faults in it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur
from helpers.kernel_interpreter import interpreted
from helpers.sampling import sample
from helpers.user_cell import MGU
from unrolled.engines.compiler.kernel_builder import build_kernel
from unrolled.engines.compiler.kernel_dump import KernelDump
from unrolled.engines.compiler.kernel_ir import (
    Apply,
    KernelIR,
    Level,
    Load,
    Memory,
    Phase,
    ReadScalar,
    Register,
    Store,
    Sum,
)
from unrolled.engines.compiler.kernel_verifier import KernelError, verify
from unrolled.engines.native.backend import BACKEND, NativeCell

CELLS: list[Any] = [*(getattr(ur.cells, name) for name in ur.cells.__all__), MGU]
CELLS = [cell for cell in CELLS if isinstance(cell, type) and issubclass(cell, ur.Cell)]
FAST = [ur.cells.LSTM, ur.cells.HGRN, ur.cells.LayerNormGRU, ur.cells.MinGRU, MGU]


def results(layer: Any, data: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Return the output, the final states and the gradients of a layer, and its output without gradients."""
    x: Any = data if lengths is None else pack_padded_sequence(data, lengths)
    output, state = layer(x)
    values = output if lengths is None else output.data
    states = state if isinstance(state, tuple) else (state,)
    weights = torch.linspace(-1, 1.5, values.numel(), dtype=values.dtype).view_as(values)
    loss = (values * weights).sum() + sum(part.sin().sum() for part in states)
    gradients = torch.autograd.grad(loss, [data, *layer.parameters()])
    with torch.no_grad():
        inferred = layer(x)[0]
    inferred = inferred if lengths is None else inferred.data
    return [values.detach(), *(part.detach() for part in states), *gradients, inferred]


def check_interpreter(layer: Any, data: Tensor, lengths: Tensor | None = None) -> None:
    """Compare the interpreted kernels of a layer with the reference engine, in float64."""
    with ur.engine("reference"):
        expected = results(layer, data, lengths)
    with interpreted() as backend, ur.engine("native"):
        actual = results(layer, data, lengths)
    assert len(backend.kernels) == 3 * (2 if layer.bidirectional else 1)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", sample(CELLS, FAST), ids=lambda cell: cell.__name__)
def test_the_ir_of_every_cell_computes_what_the_step_computes(cell: Any) -> None:
    layer = ur.Recurrent(cell, 5, 6).double()
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    x = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    check_interpreter(layer, x)


@pytest.mark.parametrize("name", sample(["LSTM", "HGRN", "LayerNormGRU", "LRU"], ["HGRN"]))
def test_the_ir_of_both_directions_and_packed_input(name: str) -> None:
    layer = ur.Recurrent(getattr(ur.cells, name), 4, 6, bidirectional=True).double()
    data = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    check_interpreter(layer, data, torch.tensor([6, 4, 1]))


class Gated(ur.Cell):
    """The gate of all columns is a product with a single column, which no step needs to compute."""

    weight = ur.Param("hidden", "input")
    weight_gate = ur.Param(1, "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight) + linear(x, self.weight_gate) * h)


class Shifted(ur.Cell):
    """The same with a sum, so that the backward doesn't read the single column."""

    weight_shift = ur.Param(1, "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight_shift) + h)


class NormalizedInput(ur.Cell):
    """Reductions of a product that no step needs to compute, also with a single column."""

    weight = ur.Param("hidden", "input")
    weight_gate = ur.Param(1, "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        z = layer_norm(linear(x, self.weight), (self.hidden,))
        scale = h.mean(-1, keepdim=True) * linear(x, self.weight_gate)
        return torch.softmax(linear(x, self.weight), -1) * h + torch.tanh(z * scale)


class NormalizedOutput(ur.Cell):
    """Two equal states that no step reads: a normalized product, scaled by a column of another state."""

    state = ("y", "z", "h")
    weight = ur.Param("hidden", "input")
    weight_y = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, y: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(linear(x, self.weight) + linear(h, self.weight_y))
        y = layer_norm(linear(h, self.weight_y) + linear(x, self.weight), (self.hidden,))
        y = torch.softmax(y * linear(h, self.weight_y)[:, :1], -1)
        return y, y, h


@pytest.mark.parametrize("cell", [Gated, Shifted, NormalizedInput, NormalizedOutput])
@pytest.mark.parametrize("lengths", [None, [6, 4, 1]], ids=["", "packed"])
def test_the_ir_of_products_outside_and_after_the_loop(cell: Any, lengths: list[int] | None) -> None:
    layer = ur.Recurrent(cell, 4, 5).double()
    data = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    check_interpreter(layer, data, None if lengths is None else torch.tensor(lengths))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [Gated, Shifted, NormalizedInput, NormalizedOutput])
def test_products_outside_and_after_the_loop(cell: Any) -> None:
    layer = ur.Recurrent(cell, 4, 20).double()
    data = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    with ur.engine("reference"):
        expected = results(layer, data, None)
    with ur.engine("native"):
        actual = results(layer, data, None)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@functools.cache
def compiled_cell(name: str) -> NativeCell:
    return BACKEND.compile(getattr(ur.cells, name)(5, 6), torch.float32)


def kernel_of(name: str, training: bool = True) -> KernelIR:
    """Return a new kernel: forward for training, or backward."""
    compiled = compiled_cell(name)
    if training:
        return build_kernel(compiled._forward, torch.float32, whole=compiled._read_by_backward)
    return build_kernel(compiled._backward, torch.float32, shifted=compiled.captured.states)


def first(kernel: KernelIR, kind: type) -> tuple[list[Any], int]:
    """Return the instructions of a phase, and the position of the first one of a kind."""
    for phase in kernel.phases():
        for k, instruction in enumerate(phase.instructions):
            if isinstance(instruction, kind):
                return phase.instructions, k
    raise AssertionError(f"no {kind.__name__}")


def load_beyond_the_end(kernel: KernelIR) -> None:
    instructions, k = first(kernel, Load)
    instructions[k] = replace(instructions[k], offset=instructions[k].buffer.width)


def read_later_register(kernel: KernelIR) -> None:
    instructions, k = first(kernel, Apply)
    instructions[k] = replace(instructions[k], operands=(Register(k),))


def read_missing_sum(kernel: KernelIR) -> None:
    instructions, k = first(kernel, Sum)
    instructions[k] = Sum(9, 0)


def forget_a_store(kernel: KernelIR) -> None:
    next(kernel.phases()).stores.pop()


def store_twice(kernel: KernelIR) -> None:
    phase = next(kernel.phases())
    phase.stores.append(phase.stores[0])


def store_into_an_input(kernel: KernelIR) -> None:
    phase = next(kernel.phases())
    phase.stores.append(Store(Register(0), kernel.inputs[0].buffer, 0))


def store_beyond_the_end(kernel: KernelIR) -> None:
    phase = next(kernel.phases())
    phase.stores[0] = replace(phase.stores[0], offset=1)


def reverse_the_levels(kernel: KernelIR) -> None:
    kernel.levels.reverse()


def read_the_previous_state_later(kernel: KernelIR) -> None:
    kernel.levels[-1].deferred = True
    buffer = replace(kernel.inputs[0].buffer, memory=Memory.STATE, index=0, width=kernel.states[0].width)
    kernel.levels[-1].phases[0].instructions.append(Load(buffer, 0))


def read_a_scalar_too_early(kernel: KernelIR) -> None:
    level = next(level for level in kernel.levels if level.scalars)
    level.scalars.reverse()


def read_a_scalar_of_a_step_after_the_block(kernel: KernelIR) -> None:
    kernel.levels.append(Level([], [Phase(1, instructions=[ReadScalar(0)])], deferred=True))


def sum_halves_in_halves(kernel: KernelIR) -> None:
    phase = next(phase for phase in kernel.phases() if phase.groups)
    phase.groups[0] = replace(phase.groups[0], dtype=torch.float16, sum_dtype=torch.float16)


def read_part_of_a_row(kernel: KernelIR) -> None:
    phase = next(phase for phase in kernel.phases() if phase.groups)
    phase.groups[0] = replace(phase.groups[0], depth=phase.groups[0].depth - 1)


FAULTS: list[tuple[Callable[[KernelIR], None], str, str]] = [
    (load_beyond_the_end, "LSTM", "has no columns"),
    (read_later_register, "LSTM", "is read before it is computed"),
    (read_missing_sum, "LSTM", "there is no sum 9.0"),
    (forget_a_store, "LSTM", "are never stored"),
    (store_twice, "LSTM", "are stored twice"),
    (store_into_an_input, "LSTM", "can't be written"),
    (store_beyond_the_end, "LSTM", "has no columns"),
    (reverse_the_levels, "LayerNormGRU", "level 0: "),
    (read_the_previous_state_later, "LSTM", "is unknown when it is read"),
    (read_a_scalar_too_early, "LayerNormGRU", "is read before it is computed"),
    (read_a_scalar_of_a_step_after_the_block, "LayerNormGRU", "scalar 0 has rows of one step only"),
    (sum_halves_in_halves, "LSTM", "can't be summed in torch.float16"),
    (read_part_of_a_row, "LSTM", "permute_1 has 6 rows"),
]


@pytest.mark.parametrize(
    ("change", "name", "message"), FAULTS, ids=[change.__name__ for change, *_ in FAULTS]
)
def test_the_verifier_finds_a_fault(change: Callable[[KernelIR], None], name: str, message: str) -> None:
    kernel = kernel_of(name)
    verify(kernel)
    change(kernel)
    with pytest.raises(KernelError, match=message) as error:
        verify(kernel)
    assert "level 0" in str(error.value)
    assert str(KernelDump(kernel)) in str(error.value)


def test_products_in_lower_precision_can_be_expressed() -> None:
    kernel = kernel_of("LSTM")
    for dtype, sum_dtype in ((torch.bfloat16, torch.float32), (torch.int8, torch.int32)):
        changed = copy.copy(kernel)
        for phase in changed.phases():
            phase.groups = [replace(group, dtype=dtype, sum_dtype=sum_dtype) for group in phase.groups]
        verify(changed)
        assert f", {dtype} in {sum_dtype}" in str(KernelDump(changed))


def test_the_backward_reads_the_state_of_the_step_before() -> None:
    text = str(KernelDump(kernel_of("GRU", training=False)))
    assert "of the step before" in text
    assert "level 1" in text  # the gradient of a product reads a whole row
