"""Where the values of expressions are in the tensors of the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.diagram.indices import Index, select

Origin = tuple[tuple[Tensor, tuple[int, ...]], ...]  # tensors of the step, and elements of each
_LARGEST = 2**40  # above the size of any tensor


class Origins:
    """Keeps the tensor and the flat index that each element of a value comes from.

    Args:
        active: Whether to keep them.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # by the id of the tensor
        self._codes: dict[int, Tensor] = {}  # by the id of the value
        self._alive: list[Tensor] = []

    def whole(self, tensor: Tensor) -> Tensor:
        """Return all values of a tensor, flat."""
        value = tensor.flatten()
        self.add(value, tensor, range(tensor.numel()))
        return value

    def add(self, value: Tensor, tensor: Tensor, index: Index) -> None:
        """Keep that a value consists of some elements of a tensor."""
        if not self._active:
            return
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
        if isinstance(index, range):
            elements = torch.arange(index.start, index.stop, index.step)
        else:
            elements = torch.tensor([*index])
        self._keep(value, elements + self._numbers[id(tensor)] * _LARGEST)

    def selected(self, value: Tensor, index: Index) -> Tensor:
        """Return some elements of a value."""
        result = select(value, index)
        codes = self._codes.get(id(value))
        if codes is not None:
            self._keep(result, select(codes, index))
        return result

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return values one after the other."""
        result = torch.cat([*values])
        codes = [self._codes.get(id(value)) for value in values]
        known = [part for part in codes if part is not None]
        if len(known) == len(codes):
            self._keep(result, torch.cat(known))
        return result

    def find(self, value: Tensor) -> Origin | None:
        """Return the tensors and the elements of each that a value consists of, in order."""
        codes = self._codes.get(id(value))
        if codes is None:
            return None
        pieces: list[tuple[Tensor, list[int]]] = []
        for code in codes.tolist():
            tensor = self._tensors[code // _LARGEST]
            if not pieces or pieces[-1][0] is not tensor:
                pieces.append((tensor, []))
            pieces[-1][1].append(code % _LARGEST)
        return tuple((tensor, tuple(elements)) for tensor, elements in pieces)

    def _keep(self, value: Tensor, codes: Tensor) -> None:
        self._codes[id(value)] = codes
        self._alive.append(value)  # so that no id is reused
