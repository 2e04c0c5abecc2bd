"""Weights in the layouts of Keras and flax: arrays as those libraries hold them, and layers of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.io.weights import Array, tensor_of, weights_of
from unrolled.layers.recurrent import Recurrent

# The gates in the order of ours, as places in Keras' order, by cell: z r h becomes r z n; i f c o stay.
_KERAS: dict[type[Cell], tuple[int, ...]] = {
    cells.RNN: (0,),
    cells.GRU: (1, 0, 2),
    cells.ResetBeforeGRU: (1, 0, 2),
    cells.LSTM: (0, 1, 2, 3),
}
# The letters of the gates in flax, in the order of ours; no letter where there is one gate.
_FLAX: dict[type[Cell], tuple[str, ...]] = {
    cells.RNN: ("",),
    cells.GRU: ("r", "z", "n"),
    cells.LSTM: ("i", "f", "g", "o"),
}


def from_keras(weights: Sequence[Any], reset_after: bool = True) -> Recurrent:
    """A layer with the weights of a Keras ``SimpleRNN``, ``GRU`` or ``LSTM``, those of its ``get_weights()``.

    Args:
        weights: the kernel ``(input, gates × hidden)``, the recurrent kernel ``(hidden, gates × hidden)``,
            and the bias unless there is none.
        reset_after: of a GRU, whether it resets after the product, as Keras' argument of this name says; then
            its bias is ``(2, 3 × hidden)``.

    Raises:
        ValueError: arrays that are no weights of these layers.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(f"expected the arrays of get_weights(), got a {type(weights).__name__}")
    arrays = [tensor_of(array, f"array {k} of the weights") for k, array in enumerate(weights)]
    shapes = [tuple(array.shape) for array in arrays]
    if len(arrays) not in (2, 3) or arrays[0].dim() != 2 or arrays[1].dim() != 2:
        raise ValueError(
            f"expected a kernel, a recurrent kernel and perhaps a bias, got arrays of shapes {shapes}"
        )
    (features, columns), hidden = shapes[0], shapes[1][0]
    gates = columns // hidden if hidden else 0
    kinds = {1: cells.RNN, 3: cells.GRU if reset_after else cells.ResetBeforeGRU, 4: cells.LSTM}
    if gates not in kinds or shapes[1] != (hidden, columns) or columns != gates * hidden:
        raise ValueError(f"expected 1, 3 or 4 gates of one size, got arrays of shapes {shapes}")
    order = _KERAS[kinds[gates]]
    layer = Recurrent(kinds[gates], features, hidden, bias=len(arrays) == 3, dtype=arrays[0].dtype)
    held = {"weight_ih_l0": _gates(arrays[0].T, order), "weight_hh_l0": _gates(arrays[1].T, order)}
    if len(arrays) == 3:
        twice = gates == 3 and reset_after
        if shapes[2] != ((2, columns) if twice else (columns,)):
            which = f" with reset_after={reset_after}" if gates == 3 else ""
            wanted = (2, columns) if twice else (columns,)
            raise ValueError(f"expected a bias of the shape {wanted}{which}, got {shapes[2]}")
        both = arrays[2] if twice else torch.stack((arrays[2], torch.zeros_like(arrays[2])))
        held |= {"bias_ih_l0": _gates(both[0], order), "bias_hh_l0": _gates(both[1], order)}
    layer.load_state_dict(held)
    return layer


def to_keras(layer: Recurrent) -> list[Array]:
    """The weights of a layer as Keras' ``set_weights`` takes them: of SimpleRNN, GRU or LSTM.

    The two biases of ours are added where Keras has one: not in a GRU that resets after the product.

    Args:
        layer: of one layer and one direction, of a cell that Keras has.

    Raises:
        ValueError: another layer.
    """
    order = _order_of(layer, _KERAS, "Keras")
    back = [order.index(k) for k in range(len(order))]
    held = {name.removesuffix("_l0"): value for name, value in weights_of(layer, "to_keras").items()}
    arrays = [_gates(held["weight_ih"], back).T, _gates(held["weight_hh"], back).T]
    if layer.bias:
        biases = [_gates(held[name], back) for name in ("bias_ih", "bias_hh")]
        arrays.append(torch.stack(biases) if layer.cell is cells.GRU else biases[0] + biases[1])
    return [array.contiguous().numpy().copy() for array in arrays]


def from_flax(params: Mapping[str, Any]) -> Recurrent:
    """A layer with the parameters of a flax cell: ``SimpleCell``, ``GRUCell`` or ``LSTMCell``.

    Args:
        params: the cell's parameters: a mapping from names such as ``hi`` to ``kernel`` and perhaps ``bias``.

    Raises:
        ValueError: names that are none of these cells'.
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
    first = tensor_of(params["i" + letters[0]].get("kernel"), f"the kernel of i{letters[0]}")
    if first.dim() != 2:
        raise ValueError(f"the kernel of i{letters[0]} should be (input, hidden), got {tuple(first.shape)}")
    features, hidden = first.shape

    def joined(side: str, what: str) -> Tensor:
        parts = []
        for letter in letters:
            name, array = side + letter, params[side + letter].get(what)
            if array is None and what == "bias":
                parts.append(first.new_zeros(hidden))
                continue
            part = tensor_of(array, f"the {what} of {name}")
            shape = (hidden,) if what == "bias" else (features if side == "i" else hidden, hidden)
            if part.shape != shape:
                raise ValueError(f"the {what} of {name} should be {shape}, got {tuple(part.shape)}")
            parts.append(part.mT if what == "kernel" else part)
        return torch.cat(parts)

    layer = Recurrent(cell, features, hidden, dtype=first.dtype)
    kinds = {"weight": "kernel", "bias": "bias"}
    layer.load_state_dict(
        {f"{ours}_{side}h_l0": joined(side, theirs) for ours, theirs in kinds.items() for side in "ih"}
    )
    return layer


def to_flax(layer: Recurrent) -> dict[str, dict[str, Array]]:
    """The parameters of a layer as a flax ``SimpleCell``, ``GRUCell`` or ``LSTMCell`` takes them.

    Args:
        layer: of one layer and one direction, with biases, of a cell that flax has.

    Raises:
        ValueError: another layer.
    """
    letters = _order_of(layer, _FLAX, "flax")
    if not layer.bias:
        raise ValueError("flax's cells have biases, the layer has none")
    held = {name.removesuffix("_l0"): value for name, value in weights_of(layer, "to_flax").items()}
    found: dict[str, dict[str, Array]] = {}
    with_bias = {cells.RNN: "i", cells.GRU: "i", cells.LSTM: "h"}[layer.cell]  # on which side flax has it
    parts = {name: torch.split(value, layer.hidden_size) for name, value in held.items()}
    for k, letter in enumerate(letters):
        bias_i, bias_h = parts["bias_ih"][k], parts["bias_hh"][k]
        for side in "ih":
            found[side + letter] = {"kernel": parts[f"weight_{side}h"][k].T.contiguous().numpy().copy()}
        if letter == "n":  # what the reset gate scales stays apart
            found["in"]["bias"], found["hn"]["bias"] = bias_i.numpy().copy(), bias_h.numpy().copy()
        else:
            found[with_bias + letter]["bias"] = (bias_i + bias_h).numpy().copy()
    return found


def _gates(blocks: Tensor, order: Sequence[int]) -> Tensor:
    parts = blocks.chunk(len(order))
    return torch.cat([parts[k] for k in order])


def _order_of(layer: Any, known: Mapping[type[Cell], Any], library: str) -> Any:
    """The gates of a layer that a library has."""
    if not isinstance(layer, Recurrent):
        raise TypeError(f"expected a recurrent layer of unrolled, got {type(layer).__name__}")
    if layer.cell not in known:
        names = ", ".join(cell.__name__ for cell in known)
        raise ValueError(f"{library} has no cell {layer.cell.__name__}, only {names}")
    if layer.num_layers > 1 or layer.bidirectional or not layer.plain:
        raise ValueError(
            f"{library} holds each layer and direction by itself, and no options beside: got {layer}"
        )
    if layer.chosen_options().get("proj_size"):
        raise ValueError(f"{library} has no projections: got {layer}")
    return known[layer.cell]
