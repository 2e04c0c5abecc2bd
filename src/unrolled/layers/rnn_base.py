"""What other code finds on torch.nn's recurrent layers besides their arguments and parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class RNNBaseAttributes(nn.RNNBase):
    """The attributes of torch.nn.RNNBase, for a layer that keeps its weights only as parameters.

    torch.nn's layers have a second list of their weights, ``_flat_weights``, and keep it up to date. Here it
    is computed when it is read. ``__init__`` must not be called.
    """

    @property
    def _all_weights(self) -> list[list[str]]:  # type: ignore[override]
        """The names of the parameters of every layer and direction."""
        cells: Any = self._cells
        return [[name + suffix for name in cell.shapes()] for suffix, cell in cells.items()]

    @property
    def _flat_weights_names(self) -> list[str]:  # type: ignore[override]
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if getattr(self, name, None) is not weight:
                setattr(self, name, weight)

    def _init_flat_weights(self) -> None:
        """Do nothing, because there is no list to update."""

    def _update_flat_weights(self) -> None:
        """Do nothing, because there is no list to update."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        apply: Any = nn.Module._apply
        result = apply(self, fn, recurse)
        self.flatten_parameters()
        return result

    # Those of torch.nn.RNNBase update the list, or store it.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    __getstate__ = nn.Module.__getstate__
    __setstate__ = nn.Module.__setstate__
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel
