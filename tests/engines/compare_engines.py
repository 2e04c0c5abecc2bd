"""Layers for the tests of the native engine, and the comparison of a layer on both engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import unrolled as ur
from helpers.layer_pairs import assert_close_within_rounding, gradients, pair, tensors
from helpers.user_cell import MGU


def make_layer(kind: str, *sizes: int, **arguments: Any) -> Any:
    """Return one of our layers, or for the kind ``"mgu"`` a layer with a user's own cell."""
    if kind == "mgu":
        return ur.Recurrent(MGU, *sizes, **arguments)
    return pair(kind, *sizes, **arguments)[0]


def assert_engines_agree(layer: Any, x: torch.Tensor, state: Any = None) -> None:
    """Compare outputs, final states and all gradients of the native and the reference engine."""

    def results() -> list[torch.Tensor]:
        values = [part.detach() for part in tensors(layer(x, state))]
        return [*values, *gradients(layer, x, state, weights)]

    def expected() -> list[torch.Tensor]:
        with ur.engine("reference"):
            return results()

    with ur.engine("reference"):
        weights = [torch.randn_like(part) for part in tensors(layer(x, state))]
    with ur.engine("native"):
        actual = results()
    leaves = [*tensors((x, state)), *layer.parameters()]
    assert_close_within_rounding(actual, expected(), expected, leaves)


class PackedLayer(nn.Module):
    """A layer that takes padded sequences of different lengths, runs them packed and returns them padded."""

    def __init__(self, layer: nn.Module, lengths: list[int]) -> None:
        super().__init__()
        self.layer, self.lengths = layer, lengths

    def forward(self, x: torch.Tensor, *_: Any) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        output, state = self.layer(packed)
        return nn.utils.rnn.pad_packed_sequence(output)[0], state
