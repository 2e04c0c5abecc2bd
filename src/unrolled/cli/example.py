"""The layer and the sequence that ``unrolled show`` opens when it is given nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.io.state_dicts import new_layer
from unrolled.layers.recurrent import Recurrent

INPUT = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
"""Four time steps of two features, ``(time, input)``."""

WEIGHTS = {
    "weight_ih_l0": torch.tensor([[0.5406791, -0.1051374], [0.1025, 0.3400626], [-0.1288374, 0.4972]]),
    "weight_hh_l0": torch.tensor(
        [
            [-0.2017374, -0.4285374, -0.0833374],
            [0.4594626, 0.3112626, -0.0283374],
            [-0.5705374, -0.0534767, -0.1654374],
        ]
    ),
    "bias_ih_l0": torch.tensor([-0.5645044, 0.1087121, -0.1244626]),
    "bias_hh_l0": torch.tensor([0.3875111, 0.5333741, -0.2905712]),
}
"""The weights of the simple layer with 2 inputs and 3 units.

The walk-through prints weights, sums and outputs rounded to four places; sums of rounded weights
differ from rounded sums in the last place. These weights give every printed digit of all of them.
"""


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
