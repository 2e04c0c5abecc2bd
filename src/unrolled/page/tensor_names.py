"""How the numbers of a layer are indexed in the input and the output of the module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace


def tensor_names(trace: Trace, part: LayerTrace, row: int) -> dict[str, Any]:
    """Return how one row of a layer's input and output is written, with ``{}`` for the time step.

    Args:
        trace: The trace.
        part: The layer in one direction.
        row: The row of the batch.

    Returns:
        The names of the ``input`` and the ``output``, such as ``output[0, {}, :3]`` for the forward direction
        of a batch-first layer. Both are None where there is no such index: for packed sequences, and for the
        input or the output of a layer that is joined with another layer. ``above`` is the number of the layer
        that reads the output, or None, and ``joined`` says whether it is joined with that of another
        direction.
    """
    top = max(other.layer for other in trace.layers)
    index = _index(trace, row)
    columns = ""
    if trace.recurrent.bidirectional:
        size = trace.layers[-1].values[next(iter(part.cell.state))].shape[-1]
        columns = f", :{size}" if part.direction == "forward" else f", {size}:"
    has_input, has_output = index is not None and not part.layer, index is not None and part.layer == top
    return {
        "input": f"input[{index}]" if has_input else None,
        "output": f"output[{index}{columns}]" if has_output else None,
        "joined": trace.recurrent.bidirectional,
        "above": None if part.layer == top else part.layer + 1,
    }


def _index(trace: Trace, row: int) -> str | None:
    """Return the index of a time step of one row, or None if the input is packed or wasn't kept."""
    x = trace.input
    if not isinstance(x, Tensor):
        return None
    if x.dim() == 2:
        return "{}"
    return f"{row}, {{}}" if trace.recurrent.batch_first else f"{{}}, {row}"
