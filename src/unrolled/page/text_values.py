"""The states at all steps of a long text, for pages that contain only some steps in full."""

from __future__ import annotations

import base64
from typing import Any

import torch

from unrolled.tracing.colors import ColorScale
from unrolled.tracing.layer_trace import LayerTrace


def text_values(part: LayerTrace, batch: int, length: int, limit: int) -> dict[str, Any]:
    """Encode the states of a row at all steps in 8 bits, which is enough for colors.

    Args:
        part: The layer.
        batch: The row of the batch.
        length: The number of time steps of the row.
        limit: The maximum number of values. States that don't fit are left out.

    Returns:
        For each state, ``{"largest", "data"}``: the largest magnitude, and a byte for each step and unit as
        base64. A byte of 1 is minus the largest magnitude, 255 is plus, and 0 is NaN or infinity.
    """
    encoded = {}
    for name in part.cell.state:
        values = part.values[name][:length, batch].reshape(length, -1)
        if values.is_complex() or values.numel() > limit:
            continue
        limit -= values.numel()
        largest = ColorScale.of([values]).largest or 1.0
        levels = (values.detach().cpu().double() * (127 / largest)).round() + 128
        data = levels.where(levels.isfinite(), 0).to(torch.uint8).numpy().tobytes()
        encoded[name] = {"largest": largest, "data": base64.b64encode(data).decode()}
    return encoded
