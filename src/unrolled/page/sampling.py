"""What a page keeps of a trace: all of a small one, and of a large one as much as there is room for."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.layer_trace import LayerTrace

STEPS = 1000  # kept at most: each one runs again to see how its numbers are made
COLUMNS, ROWS = 256, 96  # of the heat map of a quantity whose numbers are not all kept


@dataclass(frozen=True)
class Kept:
    """What there is room for.

    Attributes:
        steps: the time steps whose numbers are kept, in order.
        parameters: whether the parameters are.
        all: whether everything is.
    """

    steps: list[int]
    parameters: bool
    all: bool

    @classmethod
    def of(cls, part: LayerTrace, length: int, room: int) -> Kept:
        """What of a row of so many steps fits into the room: so many numbers.

        The parameters come first, if they take no more than four fifths; then as many steps as fit, evenly
        spread, the first and the last among them in any case.
        """
        weights = sum(math.prod(shape) for shape in part.cell.shapes().values())
        states = sum(part.cell.state_sizes().values())
        width = sum(math.prod(values.shape[2:]) for values in (part.input, *part.values.values())) + states
        parameters = weights <= 0.8 * room or weights + width * length <= room
        count = min(length, STEPS, max(2, (room - weights * parameters) // max(1, width)))
        spread = sorted({round(k * (length - 1) / max(1, count - 1)) for k in range(count)})
        return cls(spread, parameters, parameters and count == length)


def packed(values: Tensor) -> dict[str, Any]:
    """Numbers as the page reads them: base64 of little-endian floats, wide enough to hold them exactly."""
    narrow = values.dtype.itemsize < 4 or values.dtype == torch.float32
    flat = values.detach().cpu().to(torch.float32 if narrow else torch.float64).contiguous()
    data = base64.b64encode(flat.numpy().astype("<f4" if narrow else "<f8").tobytes()).decode()
    return {"wide": not narrow, "data": data}


def unit_order(states: Tensor) -> list[int]:
    """Units sorted by what they do: those whose numbers go up and down together stand together.

    By the angle in the plane of the two principal components of their courses over time.

    Args:
        states: ``(time, units)``.
    """
    if states.shape[1] < 3 or len(states) < 2:
        return list(range(states.shape[1]))
    courses = states.detach().cpu().double().nan_to_num(0, 0, 0)
    courses = courses[torch.linspace(0, len(courses) - 1, min(len(courses), 512)).long()]
    courses = courses - courses.mean(0)
    courses = courses / courses.norm(dim=0).clamp(min=1e-12)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        _, _, axes = torch.svd_lowrank(courses, q=min(6, *courses.shape), niter=4)
    angle = torch.atan2(axes[:, 1], axes[:, 0])
    return angle.argsort(stable=True).tolist()


def spread_order(order: Sequence[int], size: int) -> list[int]:
    """The order of the features of a quantity that has one number, or several in blocks, for each unit."""
    units = len(order)
    if units == 0 or size % units:
        return list(range(size))
    return [block * units + unit for block in range(size // units) for unit in order]


def binned(grid: Tensor) -> tuple[Tensor, int, int]:
    """A grid ``(time, features)`` as means over bins of steps and of features, and the sizes of the bins."""
    time, features = grid.shape
    tall, wide = math.ceil(time / COLUMNS), math.ceil(features / ROWS)
    grid = grid.detach().cpu().to(torch.float64)
    down = torch.stack([part.mean(0) for part in torch.split(grid, tall)])
    across = torch.stack([part.mean(1) for part in torch.split(down, wide, 1)], 1)
    return across.to(torch.float32), tall, wide
