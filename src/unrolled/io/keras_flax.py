"""Convert layers from and to the weight layouts of Keras and flax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.io.weights import Array, array_to_tensor, layer_weights
from unrolled.layers.recurrent import Recurrent

# For each of our gates, its index in the Keras order: z r h becomes r z n; i f c o stays.
_KERAS: dict[type[Cell], tuple[int, ...]] = {
    cells.RNN: (0,),
    cells.GRU: (1, 0, 2),
    cells.ResetBeforeGRU: (1, 0, 2),
    cells.LSTM: (0, 1, 2, 3),
}
# For each of our gates, its letter in flax; empty for a cell without gates.
_FLAX: dict[type[Cell], tuple[str, ...]] = {
    cells.RNN: ("",),
    cells.GRU: ("r", "z", "n"),
    cells.LSTM: ("i", "f", "g", "o"),
}


def from_keras(weights: Sequence[Any], reset_after: bool = True) -> Recurrent:
    """Create a layer from the weights of a Keras ``SimpleRNN``, ``GRU`` or ``LSTM``.

    Args:
        weights: The arrays of ``get_weights()``: the kernel ``(input, gates × hidden)``, the recurrent kernel
            ``(hidden, gates × hidden)`` and, if the layer has one, the bias.
        reset_after: The argument ``reset_after`` of a Keras GRU. If True, the reset gate is applied after the
            matrix product, and the bias has shape ``(2, 3 × hidden)``.

    Returns:
        The layer.

    Raises:
        ValueError: If the arrays aren't the weights of one of these layers.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(f"expected the arrays of get_weights(), got a {type(weights).__name__}")
    arrays = [array_to_tensor(array, f"array {k} of the weights") for k, array in enumerate(weights)]
    shapes = [tuple(array.shape) for array in arrays]
    if len(arrays) not in (2, 3) or arrays[0].dim() != 2 or arrays[1].dim() != 2:
        raise ValueError(
            f"expected a kernel, a recurrent kernel and an optional bias, got arrays of shapes {shapes}"
        )
    (features, columns), hidden = shapes[0], shapes[1][0]
    gates = columns // hidden if hidden else 0
    cell_classes = {1: cells.RNN, 3: cells.GRU if reset_after else cells.ResetBeforeGRU, 4: cells.LSTM}
    if gates not in cell_classes or shapes[1] != (hidden, columns) or columns != gates * hidden:
        raise ValueError(f"expected 1, 3 or 4 gates of the same size, got arrays of shapes {shapes}")
    order = _KERAS[cell_classes[gates]]
    layer = Recurrent(cell_classes[gates], features, hidden, bias=len(arrays) == 3, dtype=arrays[0].dtype)
    parameters = {
        "weight_ih_l0": _reorder_gates(arrays[0].T, order),
        "weight_hh_l0": _reorder_gates(arrays[1].T, order),
    }
    if len(arrays) == 3:
        two_biases = gates == 3 and reset_after
        expected = (2, columns) if two_biases else (columns,)
        if shapes[2] != expected:
            setting = f" with reset_after={reset_after}" if gates == 3 else ""
            raise ValueError(f"expected a bias of shape {expected}{setting}, got {shapes[2]}")
        biases = arrays[2] if two_biases else torch.stack((arrays[2], torch.zeros_like(arrays[2])))
        parameters |= {
            "bias_ih_l0": _reorder_gates(biases[0], order),
            "bias_hh_l0": _reorder_gates(biases[1], order),
        }
    layer.load_state_dict(parameters)
    return layer


def to_keras(layer: Recurrent) -> list[Array]:
    """Return the weights of a layer for ``set_weights`` of a Keras ``SimpleRNN``, ``GRU`` or ``LSTM``.

    Our two biases are added up, because Keras has one. A GRU that resets after the product keeps both.

    Args:
        layer: A layer with one layer, one direction and a cell that Keras has.

    Returns:
        The kernel, the recurrent kernel and, if the layer has biases, the bias.

    Raises:
        TypeError: If `layer` isn't a recurrent layer of unrolled.
        ValueError: If Keras has no such layer.
    """
    order = _gate_layout(layer, _KERAS, "Keras")
    inverse = [order.index(k) for k in range(len(order))]
    weights = {name.removesuffix("_l0"): value for name, value in layer_weights(layer, "to_keras").items()}
    arrays = [
        _reorder_gates(weights["weight_ih"], inverse).T,
        _reorder_gates(weights["weight_hh"], inverse).T,
    ]
    if layer.bias:
        biases = [_reorder_gates(weights[name], inverse) for name in ("bias_ih", "bias_hh")]
        arrays.append(torch.stack(biases) if layer.cell is cells.GRU else biases[0] + biases[1])
    return [array.contiguous().numpy().copy() for array in arrays]


def from_flax(params: Mapping[str, Any]) -> Recurrent:
    """Create a layer from the parameters of a flax ``SimpleCell``, ``GRUCell`` or ``LSTMCell``.

    Args:
        params: The parameters of the cell: a mapping from names such as ``hi`` to a mapping with a ``kernel``
            and optionally a ``bias``.

    Returns:
        The layer.

    Raises:
        ValueError: If the names or shapes don't belong to one of these cells.
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"expected the parameters of a cell by name, got a {type(params).__name__}")
    names = {cell: {side + letter for side in "ih" for letter in letters} for cell, letters in _FLAX.items()}
    cell = next((cell for cell, expected in names.items() if set(params) == expected), None)
    if cell is None:
        raise ValueError(
            f"expected the parameters of a SimpleCell, GRUCell or LSTMCell, got "
            f"{', '.join(sorted(map(str, params))) or 'nothing'}"
        )
    letters = _FLAX[cell]
    first = array_to_tensor(params["i" + letters[0]].get("kernel"), f"kernel of i{letters[0]}")
    if first.dim() != 2:
        raise ValueError(
            f"kernel of i{letters[0]}: expected the shape (input, hidden), got {tuple(first.shape)}"
        )
    features, hidden = first.shape

    def join_gates(side: str, kind: str) -> Tensor:
        gates = []
        for letter in letters:
            name, array = side + letter, params[side + letter].get(kind)
            if array is None and kind == "bias":
                gates.append(first.new_zeros(hidden))
                continue
            gate = array_to_tensor(array, f"{kind} of {name}")
            shape = (hidden,) if kind == "bias" else (features if side == "i" else hidden, hidden)
            if gate.shape != shape:
                raise ValueError(f"{kind} of {name}: expected the shape {shape}, got {tuple(gate.shape)}")
            gates.append(gate.mT if kind == "kernel" else gate)
        return torch.cat(gates)

    layer = Recurrent(cell, features, hidden, dtype=first.dtype)
    kinds = {"weight": "kernel", "bias": "bias"}
    layer.load_state_dict(
        {f"{ours}_{side}h_l0": join_gates(side, theirs) for ours, theirs in kinds.items() for side in "ih"}
    )
    return layer


def to_flax(layer: Recurrent) -> dict[str, dict[str, Array]]:
    """Return the parameters of a layer for a flax ``SimpleCell``, ``GRUCell`` or ``LSTMCell``.

    Args:
        layer: A layer with one layer, one direction, biases and a cell that flax has.

    Returns:
        A mapping from names such as ``hi`` to the ``kernel`` and, where flax has one, the ``bias``.

    Raises:
        TypeError: If `layer` isn't a recurrent layer of unrolled.
        ValueError: If flax has no such cell.
    """
    letters = _gate_layout(layer, _FLAX, "flax")
    if not layer.bias:
        raise ValueError("flax cells have biases, but the layer has none")
    weights = {name.removesuffix("_l0"): value for name, value in layer_weights(layer, "to_flax").items()}
    params: dict[str, dict[str, Array]] = {}
    bias_side = {cells.RNN: "i", cells.GRU: "i", cells.LSTM: "h"}[
        layer.cell
    ]  # the side that has a bias in flax
    gates = {name: torch.split(value, layer.hidden_size) for name, value in weights.items()}
    for k, letter in enumerate(letters):
        bias_i, bias_h = gates["bias_ih"][k], gates["bias_hh"][k]
        for side in "ih":
            params[side + letter] = {"kernel": gates[f"weight_{side}h"][k].T.contiguous().numpy().copy()}
        if letter == "n":  # the reset gate scales only the hidden bias, so the two can't be added
            params["in"]["bias"], params["hn"]["bias"] = bias_i.numpy().copy(), bias_h.numpy().copy()
        else:
            params[bias_side + letter]["bias"] = (bias_i + bias_h).numpy().copy()
    return params


def _reorder_gates(blocks: Tensor, order: Sequence[int]) -> Tensor:
    gates = blocks.chunk(len(order))
    return torch.cat([gates[k] for k in order])


def _gate_layout(layer: Any, layouts: Mapping[type[Cell], Any], library: str) -> Any:
    """Return the gate layout of a layer in another library; raise an error if it has no such layer."""
    if not isinstance(layer, Recurrent):
        raise TypeError(f"expected a recurrent layer of unrolled, got {type(layer).__name__}")
    if layer.cell not in layouts:
        names = ", ".join(cell.__name__ for cell in layouts)
        raise ValueError(f"{library} has no {layer.cell.__name__} cell, only {names}")
    if layer.num_layers > 1 or layer.bidirectional or not layer.plain:
        raise ValueError(
            f"{library} stores each layer and direction separately, without extra options; got {layer}"
        )
    if layer.chosen_options().get("proj_size"):
        raise ValueError(f"{library} has no projections; got {layer}")
    return layouts[layer.cell]
