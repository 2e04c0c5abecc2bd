"""The random numbers of one call of a layer, and of the calls of a stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import DrawsWrapper
from unrolled.engines.draws import planned_draws
from unrolled.engines.torch_ops import draws as operators
from unrolled.engines.torch_ops import transforms


@dataclass
class DrawPosition:
    """Where the random numbers of a layer's next call begin.

    Attributes:
        seed: The seed. None if the next call draws one.
        step: The number of the call's first time step.
    """

    seed: Tensor | None = None
    step: int = 0


_position: ContextVar[DrawPosition | None] = ContextVar("position", default=None)


def next_position() -> DrawPosition | None:
    """Return where the random numbers of the next call begin, if it continues earlier calls."""
    position = _position.get()
    return None if position is None else replace(position)


@contextlib.contextmanager
def continue_draws(position: DrawPosition | None) -> Iterator[None]:
    """Let the next call of a layer in this block continue the random numbers of earlier calls.

    Args:
        position: Where its numbers begin; the call changes it. None: it draws a seed.
    """
    token = _position.set(position)
    try:
        yield
    finally:
        _position.reset(token)


class CallDraws:
    """The random numbers of one call of a layer or of a single-step cell.

    Args:
        order: The user's row for each row of the batch. None if the order is the same.
    """

    _seed: Tensor | None = None
    _first_step = 0
    _layer = 0  # the number of layers that have drawn numbers

    def __init__(self, order: Tensor | None = None) -> None:
        self._order = order

    def arguments(self, cells: Sequence[Cell], x: Tensor, sizes: Any) -> dict[str, Any]:
        """Draw the random numbers of the next layer.

        Args:
            cells: The bound cell of each direction.
            x: The input of the layer.
            sizes: The batch sizes if the input is packed, else None.

        Returns:
            Arguments of :func:`unrolled.engines.dispatch.run`. Empty if the steps draw no random numbers.
        """
        cell = cells[0]
        draws = planned_draws(cell.unbound, cell.training, x.dtype)
        if not draws or (transforms.maybe_autocast() and transforms.autocast_enabled(x.device.type)):
            return {}
        if self._seed is None:
            self._start(x, x.shape[0] if sizes is None else len(sizes))
        assert self._seed is not None
        directions = len(cells)
        values = operators.draw_values(
            draws, x, self._seed, sizes, self._order, self._first_step, self._layer, directions
        )
        self._layer += 1
        specs = [((DrawsWrapper.stored_name, (draws, k == 1, directions)),) for k in range(directions)]
        return {"wrapper_specs": specs, "extra_inputs": values}

    def _start(self, x: Tensor, steps: int) -> None:
        """Draw the seed, or continue a stream."""
        position = None if torch.compiler.is_compiling() else _position.get()
        if position is None:
            self._seed = operators.draw_seed(x)
            return
        _position.set(None)  # for this call only
        if position.seed is None:
            position.seed = operators.draw_seed(x)
        self._seed, self._first_step = position.seed, position.step
        position.step += steps
