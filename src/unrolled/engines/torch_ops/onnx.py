"""Compiled loops in ``torch.onnx.export``: ONNX's own operators, or a Scan over the step of the cell.

torch.onnx decomposes operators that it doesn't know. ``unrolled::recurrence`` decomposes to an ``RNN``,
``GRU`` or ``LSTM`` if ONNX has the cell, and otherwise to torch's scan, which becomes a Scan.
Weights in int8 are computed before the Scan, from the parameters in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.onnx_operators import OnnxOperator, onnx_attributes, onnx_operator
from unrolled.cells.onnx_products import float_equivalent, is_quantized, quantized_factors, use_factors
from unrolled.engines._torch_private import (
    get_proxy_mode,
    in_onnx_export,
    register_decomposition,
    scan_operator,
)
from unrolled.engines.torch_ops.operators import (
    SerializedDirection,
    checked_directions,
    fake_infer,
)


class OnnxExportError(RuntimeError):
    """``torch.onnx.export`` can't export a call."""


PACKED = (
    "torch.onnx.export doesn't support packed sequences of {}: pass a padded input and lengths, or export "
    "the model after unrolled.revert(model)"
)


@register_decomposition(torch.ops.unrolled.recurrence.default)
def _decompose(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, lanes: str) -> Any:
    """Decompose ``unrolled::recurrence`` for torch.onnx.

    torch also calls decompositions when it only needs the shapes of the results.
    """
    if get_proxy_mode() is None:
        return fake_infer(x, tensors, sizes, lanes)
    if not in_onnx_export():
        return NotImplemented
    directions = checked_directions(x, tensors, sizes, lanes)
    if sizes is not None:
        raise OnnxExportError(PACKED.format(type(directions[0].cell.innermost).__name__))
    operator = onnx_operator(float_equivalent(directions[0].cell), x.dtype)
    if operator is not None and [one.reverse for one in directions] in ([False], [False, True]):
        return _standard_node(operator, directions, x)
    return [result for direction in directions for result in _scan(direction, x)]


def _standard_node(operator: OnnxOperator, directions: list[SerializedDirection], x: Tensor) -> list[Tensor]:
    """Return the results of one node for one or both directions, in the order of ``unrolled::recurrence``."""
    cell, count = float_equivalent(directions[0].cell), len(directions)
    bound = [direction.bound() for direction in directions]
    inputs: list[Tensor | None] = [x]
    inputs += [
        torch.stack([operator.reorder(getattr(one, name)) for one in bound])
        for name in ("weight_ih", "weight_hh")
    ]
    biases = [
        torch.cat([operator.reorder(one.bias_ih), operator.reorder(one.bias_hh)])  # type: ignore[attr-defined]
        for one in bound
        if cell.bias
    ]
    inputs += [torch.stack(biases) if biases else None, None]
    if directions[0].stateful:
        inputs += [torch.stack(parts) for parts in zip(*[one.states for one in directions], strict=True)]
    time, batch = x.shape[:2]
    states = [(count, batch, cell.hidden)] * len(cell.state)
    y, *final = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        inputs,
        onnx_attributes(cell, count),
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(time, count, batch, cell.hidden), *states],
    )
    return [
        result for k in range(count) for result in (y.select(1, k), *[part.select(0, k) for part in final])
    ]


def _scan(direction: SerializedDirection, x: Tensor) -> list[Tensor]:
    """Return the output and the final states of a direction."""
    cell, x = direction.cell, x.detach()
    states = [state.detach() for state in direction.states]
    states = states or [x.new_zeros(x.shape[1], width) for width in direction.widths]
    # Without gradients: torch would add what a backward pass needs to the results of the scan.
    tensors = [tensor.detach() for tensor in direction.tensors[len(direction.states) :]]
    names = (*cell.shapes(), *direction.tensor_attributes)
    factors = []
    if is_quantized(cell):
        factors = quantized_factors(cell.bind(dict(zip(names, tensors, strict=True))), x[0], states)

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        old, row, own = values[: len(states)], values[len(states)], values[len(states) + 1 :]
        bound = cell.bind(dict(zip(names, own, strict=False)))
        matrices = iter(own[len(names) :])
        use_factors(bound, [tuple(next(matrices) for _ in factor) for factor in factors])
        new = bound.step(row, *old)
        new = new if isinstance(new, tuple) else (new,)
        # Copies: the results of a scan must not share memory, nor be one of its inputs.
        return tuple([part.clone() for part in (*new, new[0])])

    # Floats that were rounded to 16 bits are converted once, and not in each step.
    tensors += [part.float() if part.is_floating_point() else part for factor in factors for part in factor]
    if isinstance(x.shape[0], int) and x.shape[0] == 1:
        *final, output = step(*states, x[0], *tensors)
        return [output.unsqueeze(0), *final]
    *final, output = scan_operator(step, states, [x.flip(0) if direction.reverse else x], tuple(tensors))
    return [output.flip(0) if direction.reverse else output, *final]
