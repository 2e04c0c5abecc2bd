"""The step of a quantized cell as a module that torch.onnx can export, with matrices in int8 or 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from unrolled.cells.base import Cell
from unrolled.cells.onnx_products import quantized_factors, use_factors


def quantized_step(cell: Cell, example: Sequence[Tensor]) -> nn.Module:
    """Return the step as a module from the states and x to the new states, for any batch size.

    The modes of a step have no effect while torch.export runs it. So the step is traced before.

    Args:
        cell: The cell, bound to its parameters.
        example: States and x, with a batch size of 2.
    """
    *states, x = example
    names = list(cell.shapes())
    parameters = [getattr(cell, name).detach() for name in names]
    factors = quantized_factors(cell.bind(dict(zip(names, parameters, strict=True))), x, states)
    constants = [*parameters, *(part for factor in factors for part in factor)]

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        *old, row = values[: len(example)]
        own = values[len(example) :]
        bound = cell.bind(dict(zip(names, own, strict=False)))
        matrices = iter(own[len(names) :])
        use_factors(bound, [tuple(next(matrices) for _ in factor) for factor in factors])
        new = bound.step(row, *old)
        return new if isinstance(new, tuple) else (new,)

    fakes = _with_any_batch_size(example)
    mode = fakes[0].fake_mode  # type: ignore[attr-defined]
    program = make_fx(step)(*fakes, *(mode.from_tensor(one, static_shapes=True) for one in constants))
    program.graph.eliminate_dead_code()
    unused = [not node.users for node in program.graph.find_nodes(op="placeholder")][len(example) :]
    for node in program.graph.find_nodes(op="placeholder")[len(example) :]:
        if not node.users:
            program.graph.erase_node(node)
    program.recompile()
    return _TracedStep(program, [one for one, skip in zip(constants, unused, strict=True) if not skip])


def _with_any_batch_size(example: Sequence[Tensor]) -> list[Tensor]:
    """Return fake tensors whose first axis has any size, and the others those of an example."""
    axes = tuple({0: torch.export.Dim("batch")} for _ in example)
    program = torch.export.export(_Copies(), tuple(example), dynamic_shapes=(axes,), strict=False)
    return [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]


class _Copies(nn.Module):
    """Return copies of all inputs."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the copies."""
        return tuple(one.clone() for one in inputs)


class _TracedStep(nn.Module):
    """A traced step with its constants.

    Args:
        program: The step as a function of the states, x and the constants.
        constants: The constants.
    """

    def __init__(self, program: fx.GraphModule, constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.program = program
        for number, constant in enumerate(constants):
            self.register_buffer(f"constant_{number}", constant)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the new states."""
        return tuple(self.program(*inputs, *self.buffers()))
