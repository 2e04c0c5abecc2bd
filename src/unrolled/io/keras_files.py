"""Find recurrent layers in the weight files and models of Keras."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unrolled.io.keras_flax import from_keras
from unrolled.io.state_dicts import accepts_option, new_layer
from unrolled.io.weight_files import WeightFile
from unrolled.layers.recurrent import Recurrent

_KERNELS = ("kernel", "recurrent_kernel", "bias")
_NUMBERED = ("0", "1", "2")  # the same, in files of Keras 3
_CELL = re.compile(r"(?:.*_)?cell(?:_\d+)?")
_DIRECTION = re.compile(r"(forward|backward)_\w+")
_CLASSES = ("SimpleRNN", "GRU", "LSTM")
_CELL_NAMES = {"simple_rnn_cell": 1, "gru_cell": 3, "lstm_cell": 4, "cell": 0}  # and the numbers of gates


class UnsupportedKerasLayerError(ValueError):
    """A layer of Keras computes something that no layer of this library does."""


@dataclass(eq=False)
class _KerasLayer:
    """A recurrent layer of Keras.

    Attributes:
        path: The parts of its key in the file.
        name: The parts of its name in the model.
        cell: The name of its cell, "cell" if the file doesn't have it.
        weights: Kernel, recurrent kernel and, if it has one, the bias.
    """

    path: list[str]
    name: list[str]
    cell: str
    weights: list[Tensor]


def find_keras_layers(file: WeightFile, options: Mapping[str, Any]) -> tuple[dict[str, Recurrent], list[str]]:
    """Build every recurrent layer of a Keras model, with its weights.

    The two directions of a ``Bidirectional`` become one layer.

    Args:
        file: The content of the file.
        options: Cell options that the file doesn't contain, such as a nonlinearity.

    Returns:
        The layers by name, and notes about layers that were left out and what was assumed.
    """
    configs = _layer_configs(file.config)
    layers: dict[str, Recurrent] = {}
    notes: list[str] = []
    for parts in _group_directions(list(_keras_layers(file))):
        name = ".".join(parts[0].name if len(parts) == 1 else parts[0].name[:-1])
        if name in layers:
            name = ".".join(parts[0].path)
        try:
            layers[name] = _build_layer(parts, configs, options)
        except UnsupportedKerasLayerError as error:
            notes.append(f"{name}: {error}")
    if layers and file.config is None:
        notes.append("The file has no configuration of the layers: the defaults of Keras are assumed.")
    return layers, notes


def _keras_layers(file: WeightFile) -> Iterator[_KerasLayer]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        group, _, leaf = key.rpartition(".")
        groups.setdefault(group, {})[leaf] = tensor
    for group, tensors in groups.items():
        path = group.split(".")
        for leaves in (_KERNELS, _NUMBERED):
            weights = [tensors[leaf] for leaf in leaves if leaf in tensors]
            if not {*leaves[:2]} <= tensors.keys() <= {*leaves}:
                continue
            if leaves is _KERNELS:
                cell = path[-1] if _CELL.fullmatch(path[-1]) and len(path) > 1 else "cell"
                path = path if cell == "cell" else path[:-1]
                yield _KerasLayer(path, _legacy_name(path), cell, weights)
            elif len(path) > 1 and path[-1] == "vars" and _CELL.fullmatch(path[-2]):
                cell = file.names.get(group, path[-2])
                path = path[:-2] if path[-2] == "cell" else path[:-1]
                yield _KerasLayer(path, _keras3_name(path, file.names), cell, weights)


def _legacy_name(path: list[str]) -> list[str]:
    """Return the name of a layer: the file repeats the name of the top layer before the names of weights."""
    path = path[1:] if path[0] == "model_weights" else path
    last = max(index for index, part in enumerate(path) if part == path[0])
    return path[last:]


def _keras3_name(path: list[str], names: Mapping[str, str]) -> list[str]:
    """Return the name of a layer, which the group ``vars`` of each layer has, if the file is new enough."""
    keys = [".".join([*path[: index + 1], "vars"]) for index in range(len(path))]
    return [
        names.get(key, part)
        for key, part in zip(keys, path, strict=True)
        if key in names or part not in ("layers", "layer")
    ]


def _group_directions(layers: list[_KerasLayer]) -> Iterator[list[_KerasLayer]]:
    """Yield the layers, with the forward and backward layer of a Bidirectional together."""
    pairs: dict[tuple[str, ...], dict[str, _KerasLayer]] = {}
    for layer in layers:
        match = _DIRECTION.fullmatch(layer.path[-1])
        if match:
            pairs.setdefault(tuple(layer.path[:-1]), {})[match[1]] = layer
    for layer in layers:
        pair = pairs.get(tuple(layer.path[:-1]), {})
        if len(pair) < 2 or layer not in pair.values():
            yield [layer]
        elif layer is pair["forward"]:
            yield [pair["forward"], pair["backward"]]


def _build_layer(
    parts: list[_KerasLayer], configs: Mapping[str, Any], options: Mapping[str, Any]
) -> Recurrent:
    directions, chosen = [], dict[str, Any]()
    for part in parts:
        class_name, config = configs.get(part.name[-1], (None, {}))
        if class_name is None:  # an older Keras has the configuration of only one layer of a Bidirectional
            class_name, config = configs.get(re.sub("^(forward|backward)_", "", part.name[-1]), (None, {}))
        if config.get("go_backwards") and len(parts) == 1:
            raise UnsupportedKerasLayerError("it reads the sequence from its end (go_backwards=True)")
        chosen = _activations(class_name, config)
        directions.append(_one_direction(part, config))
    first = directions[0]
    if any((one.cell, one.hidden_size) != (first.cell, first.hidden_size) for one in directions):
        raise UnsupportedKerasLayerError("its directions have different cells or sizes")
    accepted = {name: value for name, value in options.items() if accepts_option(first.cell, name, value)}
    layer = new_layer(
        first.cell,
        first.input_size,
        first.hidden_size,
        bias=first.bias,
        bidirectional=len(parts) == 2,
        dtype=next(first.parameters()).dtype,
        **accepted | chosen,
    )
    weights = first.state_dict()
    for backward in directions[1:]:
        weights |= {f"{name}_reverse": value for name, value in backward.state_dict().items()}
    layer.load_state_dict(weights)
    return layer.requires_grad_(False).eval()


def _one_direction(part: _KerasLayer, config: Mapping[str, Any]) -> Recurrent:
    gates = _CELL_NAMES.get(re.sub(r"_\d+$", "", part.cell))
    if gates is None:
        raise UnsupportedKerasLayerError(f"its cell {part.cell!r} is not the SimpleRNN, GRU or LSTM of Keras")
    kernel, recurrent_kernel, *bias = part.weights
    if gates and kernel.shape[-1] != gates * recurrent_kernel.shape[0]:
        raise UnsupportedKerasLayerError(f"its cell {part.cell!r} doesn't have {gates} gates")
    reset_after = bias[0].dim() == 2 if bias else config.get("reset_after", True)
    try:
        return from_keras([weight.numpy() for weight in part.weights], reset_after)
    except ValueError as error:
        raise UnsupportedKerasLayerError(str(error)) from None


def _activations(class_name: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for the activations of a layer.

    Raises:
        UnsupportedKerasLayerError: If there are no such options.
    """
    for name, default in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        value = config.get(name, default)
        if name == "activation" and class_name == "SimpleRNN" and value == "relu":
            return {"nonlinearity": "relu"}
        if value != default:
            raise UnsupportedKerasLayerError(f"its {name} is {value!r}, and unrolled has only {default!r}")
    return {"nonlinearity": "tanh"} if class_name == "SimpleRNN" else {}


def _layer_configs(config: str | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the class and the configuration of each recurrent layer by its name."""
    layers: dict[str, tuple[str, dict[str, Any]]] = {}

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            own = value.get("config")
            if value.get("class_name") in _CLASSES and isinstance(own, dict):
                layers[str(own.get("name"))] = value["class_name"], own
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                visit(part)

    visit(json.loads(config) if config else None)
    return layers
