"""Noise that a recurrent layer is trained with: dropout that stays the same over time, and zoneout."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecurrentRegularization:
    """What a layer is trained with.

    Attributes:
        variational: of the input of every layer, the probability that a feature is left out, in all time
            steps of a row alike (Gal & Ghahramani, 2016).
        recurrent: the same of the hidden state, where it enters a product (Gal & Ghahramani, 2016).
        zoneout: for each state, the probability that a unit keeps its value in a time step (Krueger et al.,
            2017).
    """

    variational: float
    recurrent: float
    zoneout: tuple[float, ...]

    @classmethod
    def of(
        cls, variational: Any, recurrent: Any, zoneout: Any, states: Sequence[str]
    ) -> RecurrentRegularization | None:
        """What these options of a layer say; None where they say nothing.

        Args:
            variational: a probability.
            recurrent: a probability.
            zoneout: a probability for all states, or one for each of some states by name.
            states: the names of the cell's states.

        Raises:
            ValueError: an option that is no probability, or names no state.
        """
        rates = zoneout if isinstance(zoneout, Mapping) else dict.fromkeys(states, zoneout)
        for name in rates:
            if name not in states:
                raise ValueError(f"zoneout names a state {name!r}, the cell's states are {', '.join(states)}")
        made = cls(
            _probability("variational_dropout", variational),
            _probability("recurrent_dropout", recurrent),
            tuple(_probability("zoneout", rates.get(name, 0.0)) for name in states),
        )
        return made if made.variational or made.recurrent or any(made.zoneout) else None

    def acts(self, training: bool) -> bool:
        """Whether a layer computes something else than its cells: zoneout does outside of training too."""
        return training or any(self.zoneout)

    def mask(self, like: Tensor, rate: float, rows: int, size: int) -> Tensor:
        """Which features of each row stay, times what makes up for the others: ``(rows, size)``."""
        kept = torch.rand(rows, size, device=like.device) >= rate
        return kept.to(like.dtype) / (1 - rate) if rate < 1 else torch.zeros_like(kept, dtype=like.dtype)

    def kept(self, like: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Which units of the states keep their values, for every row of every step; None: zoneout is off."""
        shape = like.shape[:-1]
        parts = [
            torch.rand(*shape, size, device=like.device) < rate
            for size, rate in zip(sizes, self.zoneout, strict=True)
            if rate
        ]
        return torch.cat(parts, -1) if parts else None


def _probability(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"{name} should be a probability, a number from 0 to 1, got {value!r}")
    return number
