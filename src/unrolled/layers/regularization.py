"""Regularization of recurrent layers: variational dropout, recurrent dropout and zoneout."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecurrentRegularization:
    """The probabilities of dropout and zoneout of a layer.

    Attributes:
        variational: Probability of zeroing an input feature of every layer. Each row has one mask for all
            time steps (Gal & Ghahramani, 2016).
        recurrent: The same for the hidden state where it enters a matrix product (Gal & Ghahramani, 2016).
        zoneout: For each state, the probability that a unit keeps its value in a time step (Krueger et al.,
            2017).
    """

    variational: float
    recurrent: float
    zoneout: tuple[float, ...]

    @classmethod
    def from_options(
        cls, variational: Any, recurrent: Any, zoneout: Any, states: Sequence[str]
    ) -> RecurrentRegularization | None:
        """Check the options of a layer. Return None if all probabilities are 0.

        Args:
            variational: A probability.
            recurrent: A probability.
            zoneout: A probability for all states, or a mapping from state names to probabilities.
            states: The names of the cell's states.

        Raises:
            ValueError: If an option isn't a probability or ``zoneout`` names an unknown state.
        """
        rates = zoneout if isinstance(zoneout, Mapping) else dict.fromkeys(states, zoneout)
        for name in rates:
            if name not in states:
                raise ValueError(
                    f"zoneout has a probability for the state {name!r}, but the cell's states are "
                    f"{', '.join(states)}"
                )
        regularization = cls(
            _probability("variational_dropout", variational),
            _probability("recurrent_dropout", recurrent),
            tuple(_probability("zoneout", rates.get(name, 0.0)) for name in states),
        )
        active = regularization.variational or regularization.recurrent or any(regularization.zoneout)
        return regularization if active else None

    def is_active(self, training: bool) -> bool:
        """Return whether results differ from those of the cell alone, as with zoneout even in eval mode."""
        return training or any(self.zoneout)

    def dropout_mask(self, like: Tensor, rate: float, rows: int, size: int) -> Tensor:
        """Draw a dropout mask ``(rows, size)``: 0, or 1 / (1 - rate) to preserve the mean.

        Args:
            like: A tensor with the dtype and device of the mask.
            rate: Probability of 0.
            rows: Number of rows.
            size: Number of features.
        """
        kept = torch.rand(rows, size, device=like.device) >= rate
        return kept.to(like.dtype) / (1 - rate) if rate < 1 else torch.zeros_like(kept, dtype=like.dtype)

    def zoneout_mask(self, x: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Draw which units keep their values, for every row and time step of the input ``x``.

        Args:
            x: The input of the layer, whose last dimension is the features.
            sizes: The sizes of the cell's states.

        Returns:
            Booleans of shape ``(*x.shape[:-1], width)``, where states without zoneout are left out. None if
            no state has zoneout.
        """
        shape = x.shape[:-1]
        masks = [
            torch.rand(*shape, size, device=x.device) < rate
            for size, rate in zip(sizes, self.zoneout, strict=True)
            if rate
        ]
        return torch.cat(masks, -1) if masks else None


def _probability(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"{name} should be a probability, a number from 0 to 1, got {value!r}")
    return number
