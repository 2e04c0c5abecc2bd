"""The layer and the sequence that ``unrolled show`` opens when it is given nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.cell import Cell
from unrolled.layers import Recurrent
from unrolled.recognise import new_layer

INPUT = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
"""Four time steps of two features, ``(time, input)``."""

WEIGHTS = {
    "weight_ih_l0": torch.tensor([[0.5407, -0.1051], [0.1025, 0.3401], [-0.1288, 0.4972]]),
    "weight_hh_l0": torch.tensor(
        [[-0.2017, -0.4285, -0.0833], [0.4595, 0.3113, -0.0283], [-0.5705, -0.0535, -0.1654]]
    ),
    "bias_ih_l0": torch.tensor([-0.5645, 0.1087, -0.1245]),
    "bias_hh_l0": torch.tensor([0.3875, 0.5334, -0.2906]),
}
"""The weights of the simple layer with 2 inputs and 3 units, rounded to four places."""


def example(
    cell: type[Cell], x: Tensor | None, seed: int, options: dict[str, Any]
) -> tuple[Recurrent, Tensor]:
    """A small layer of this cell and an input for it.

    The layer has three units. It has the weights above where they fit, else it is drawn with
    this seed; the random state stays as it was.

    Args:
        cell: the class of the cell.
        x: ``(time, input)``; None: the input above.
        seed: of the draw.
        options: of the cell.

    Returns:
        The layer, with ``batch_first=True``, and the input: ``(1, time, input)`` where the layer
        keeps one state, ``(time, input)``, without a batch axis, where it keeps several.
    """
    x = INPUT if x is None else x.to(torch.float32)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layer = new_layer(cell, x.shape[1], 3, batch_first=True, **options)
    drawn = {name: parameter.shape for name, parameter in layer.named_parameters()}
    if drawn == {name: weight.shape for name, weight in WEIGHTS.items()}:
        layer.load_state_dict(WEIGHTS)
    return layer, x.unsqueeze(0) if len(cell.state) == 1 else x
