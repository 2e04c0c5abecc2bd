"""Lowering rules for reflection and replication padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from unrolled.engines.compiler.lowering.columns import ColumnIds, Columns, ColumnView
from unrolled.engines.compiler.lowering.movement import write

aten = torch.ops.aten

_Mode = Literal["reflect", "edge"]


def _pad(ids: ColumnIds, padding: Sequence[int], mode: _Mode) -> ColumnIds:
    """Pad the last dimensions, or crop them by negative sizes.

    ``padding`` has the sizes before and after each dimension, the last dimension first.
    """
    for k in range(0, len(padding), 2):
        axis = ids.ndim - 1 - k // 2
        size = ids.shape[axis]
        positions = np.arange(-padding[k], size + padding[k + 1])
        if mode == "edge":
            positions = positions.clip(0, size - 1)
        else:
            positions = size - 1 - abs(size - 1 - abs(positions))
        ids = ids.take(positions, axis)
    return ids


def _forward(mode: _Mode) -> Callable[..., ColumnView]:
    def rule(columns: Columns, x: ColumnView, padding: Sequence[int]) -> ColumnView:
        return ColumnView(_pad(x.ids, padding, mode), tuple(columns.node.meta["val"].shape))

    return rule


def _backward(mode: _Mode) -> Callable[..., ColumnView]:
    def rule(columns: Columns, gradient: ColumnView, x: ColumnView, padding: Sequence[int]) -> ColumnView:
        zeros = columns.constant(0, x.shape)
        positions = _pad(np.arange(zeros.ids.size).reshape(zeros.ids.shape), padding, mode)
        return write(columns, zeros, positions, gradient.ids, accumulate=True)

    return rule


PADDING_RULES: dict[Any, Callable[..., Any]] = {}
for _name, _mode in (("reflection", "reflect"), ("replication", "edge")):
    for _rank in (1, 2, 3):
        _operation = getattr(aten, f"{_name}_pad{_rank}d")
        PADDING_RULES[_operation.default] = _forward(_mode)  # type: ignore[arg-type]
        PADDING_RULES[getattr(aten, f"{_name}_pad{_rank}d_backward").default] = _backward(_mode)  # type: ignore[arg-type]
