"""The example layer and input sequence that ``unrolled show`` uses by default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.io.state_dicts import new_layer
from unrolled.layers.recurrent import Recurrent

INPUT = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
"""The input of the walk-through, four time steps with two features, of shape ``(time, input)``."""

VARIED_INPUT = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.5, -1.5], [0.0, 0.0]])
"""The input of other layers. The features differ, the signs change, and the last input is zero: what a
layer outputs there is what it remembers.
"""

_DECIMALS = 2  # of the weights, unless they are `WEIGHTS`, so that sums are easy to check by hand

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
"""The weights of a simple recurrent layer with 2 inputs and 3 units.

``unrolled show`` prints weights, pre-activations and outputs with four decimals. The weights have more
decimals, because sums of rounded weights would differ from the rounded sums in the last digit.
"""


def example(
    cell: type[Cell], x: Tensor | None, seed: int, options: dict[str, Any]
) -> tuple[Recurrent, Tensor]:
    """Create an example layer with three units, and an input for it.

    The layer has the weights `WEIGHTS` if their names and shapes fit. Otherwise it is initialized with the
    seed, and its weights are rounded to two decimals. The global random state doesn't change.

    Args:
        cell: The class of the cell.
        x: An input of shape ``(time, input)``, or None for `INPUT` with `WEIGHTS`, else `VARIED_INPUT`.
        seed: The random seed for the weights.
        options: Options of the cell.

    Returns:
        The layer, with ``batch_first=True``, and its input. The input has shape ``(1, time, input)`` if the
        cell has one state, and ``(time, input)``, without a batch axis, if it has several.
    """
    size = VARIED_INPUT.shape[1] if x is None else x.shape[1]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layer = new_layer(cell, size, 3, batch_first=True, **options)
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    is_walkthrough = shapes == {name: weight.shape for name, weight in WEIGHTS.items()}
    if is_walkthrough:
        layer.load_state_dict(WEIGHTS)
    else:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter.round(decimals=_DECIMALS) + 0.0)  # without negative zeros
    if x is None:
        x = INPUT if is_walkthrough else VARIED_INPUT
    x = x.to(torch.float32)
    return layer, x.unsqueeze(0) if len(cell.state) == 1 else x
