"""Sampling of large traces, so that their page stays within a limit, and the encoding of values."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.layer_trace import LayerTrace

MAX_STEPS = 1000  # of a page: each step is run again to record how its values are computed
COMPLETE_VALUES = 600_000  # of a layer above which its steps are computed on the page: a page of 3 MB
MAX_HEAT_MAP_COLUMNS, MAX_HEAT_MAP_ROWS = 256, 96  # of a quantity whose values are not all on the page
_MAX_CODE = 252  # of a finite mean in a heat map
_NAN_CODE, _INFINITY_CODE, _MINUS_INFINITY_CODE = 253, 254, 255
_SATURATED = 0.99  # as in sequence.js


@dataclass(frozen=True)
class PageSample:
    """The part of a layer's trace that a page contains.

    Attributes:
        steps: The time steps whose values are on the page, in order.
        parameters: Whether the parameters are.
        complete: Whether everything is.
    """

    steps: list[int]
    parameters: bool
    complete: bool

    @classmethod
    def within(cls, part: LayerTrace, length: int, per_step: int, limit: int) -> PageSample:
        """Choose what to include.

        The parameters are included if they take at most four fifths of the limit. The rest goes to evenly
        spaced time steps. The first and the last step are always included.

        Args:
            part: The layer.
            length: The number of time steps of the row.
            per_step: The number of values of a step.
            limit: The maximum number of values.
        """
        weights = sum(math.prod(shape) for shape in part.cell.shapes().values())
        parameters = weights <= 0.8 * limit or weights + per_step * length <= limit
        count = min(length, MAX_STEPS, max(2, (limit - weights * parameters) // max(1, per_step)))
        steps = sorted({round(k * (length - 1) / max(1, count - 1)) for k in range(count)})
        return cls(steps, parameters, parameters and count == length)


def encode_values(values: Tensor) -> dict[str, Any]:
    """Encode values as base64 of little-endian float32, or of float64 if float32 can't represent them."""
    fits_float32 = values.dtype.itemsize < 4 or values.dtype == torch.float32
    flat = values.detach().cpu().to(torch.float32 if fits_float32 else torch.float64).contiguous()
    data = base64.b64encode(flat.numpy().astype("<f4" if fits_float32 else "<f8").tobytes()).decode()
    return {"float64": not fits_float32, "data": data}


def unit_order(states: Tensor) -> list[int]:
    """Sort units so that similar ones are next to each other.

    Units are ordered by their angle in the plane of the first two principal components of their values
    over time.

    Args:
        states: The state of each unit at each step, ``(time, units)``.
    """
    if states.shape[1] < 3 or len(states) < 2:
        return list(range(states.shape[1]))
    series = states.detach().cpu().double().nan_to_num(0, 0, 0)
    series = series[torch.linspace(0, len(series) - 1, min(len(series), 512)).long()]
    series = series - series.mean(0)
    series = series / series.norm(dim=0).clamp(min=1e-12)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        _, _, components = torch.svd_lowrank(series, q=min(6, *series.shape), niter=4)
    angle = torch.atan2(components[:, 1], components[:, 0])
    return angle.argsort(stable=True).tolist()


def feature_order(unit_order: Sequence[int], size: int) -> list[int]:
    """Return the order of a quantity's features, given the order of the units.

    Args:
        unit_order: The order of the units.
        size: The number of features. If it is a multiple of the number of units, such as four gates, each
            block of units is sorted. Otherwise the order doesn't change.
    """
    units = len(unit_order)
    if units == 0 or size % units:
        return list(range(size))
    return [block * units + unit for block in range(size // units) for unit in unit_order]


def bin_means(values: Tensor) -> tuple[Tensor, int, int]:
    """Average values ``(time, features)`` over bins, so that they fit into a heat map.

    Returns:
        The means, the number of steps per bin, and the number of features per bin.
    """
    time, features = values.shape
    bin_steps = math.ceil(time / MAX_HEAT_MAP_COLUMNS)
    bin_features = math.ceil(features / MAX_HEAT_MAP_ROWS)
    values = values.detach().cpu().to(torch.float64)
    over_time = torch.stack([part.mean(0) for part in torch.split(values, bin_steps)])
    means = torch.stack([part.mean(1) for part in torch.split(over_time, bin_features, 1)], 1)
    return means.to(torch.float32), bin_steps, bin_features


def encode_map(values: Tensor, order: list[int]) -> dict[str, Any]:
    """Encode a heat map: the means over bins in 8 bits, and exact statistics of the values.

    Args:
        values: The values of a quantity, ``(time, features)``.
        order: The order of the features in the map.
    """
    means, bin_steps, bin_features = bin_means(values[:, order])
    finite = means[means.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    codes = ((means - low) / ((high - low) or 1) * _MAX_CODE).nan_to_num(0, 0, 0).round().to(torch.uint8)
    codes[means.isnan()] = _NAN_CODE
    codes[means == math.inf] = _INFINITY_CODE
    codes[means == -math.inf] = _MINUS_INFINITY_CODE
    return {
        "binSteps": bin_steps,
        "binFeatures": bin_features,
        "rows": means.shape[1],
        "low": low,
        "high": high,
        "codes": base64.b64encode(codes.numpy().tobytes()).decode(),
        "featureOrder": order,
        "statistics": _statistics(values.detach().cpu().double()),
    }


def _statistics(values: Tensor) -> dict[str, Any]:
    """Return what the page says about a heat map, of the finite values."""
    finite = values[values.isfinite()]
    saturated = {
        "gate": ((finite < 1 - _SATURATED) | (finite > _SATURATED)).sum(),
        "tanh": (finite.abs() > _SATURATED).sum(),
    }
    return {
        "low": float(finite.min()) if finite.numel() else 0.0,
        "high": float(finite.max()) if finite.numel() else 0.0,
        "sum": float(finite.sum()),
        "finite": finite.numel(),
        "count": values.numel(),
        "saturated": {name: int(count) for name, count in saturated.items()},
    }
