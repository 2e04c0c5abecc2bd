"""Comparison of a recorded run with torch.nn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from unrolled.layers.convert import to_torch
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.tensors import tensors
from unrolled.tracing.indexing import absolute_differences
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.random_state import RandomState, cuda_devices, replay_random_state


def difference_from_torch(
    recurrent: Recurrent,
    layers: Sequence[LayerTrace],
    call: tuple[Any, Any],
    result: tuple[Any, Any],
    random_state: RandomState,
) -> float:
    """Run a call with torch.nn and return the largest absolute difference in output and final state.

    Args:
        recurrent: The layer.
        layers: The traces of its layers and directions, with their parameters.
        call: Input and initial state.
        result: Output and final state of the recorded run.
        random_state: Random state before the call.

    Raises:
        ValueError: If torch.nn has no layer for this cell.
    """
    weights: dict[str, Any] = {}
    for part in layers:
        suffix = f"_l{part.layer}{'_reverse' if part.direction == 'backward' else ''}"
        weights |= {name + suffix: getattr(part.cell, name) for name in part.cell.shapes()}
    torch_layer = to_torch(recurrent, weights)
    devices = cuda_devices(call[0])
    with torch.no_grad(), replay_random_state(random_state, devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*with projections is not supported with oneDNN")
        expected = torch_layer(*call)
    pairs = zip(tensors(result), tensors(expected), strict=True)
    return float(torch.cat([absolute_differences(a, b) for a, b in pairs]).max())
