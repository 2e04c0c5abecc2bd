"""Load the recurrent layers of a weight file or a stored model, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unrolled.cells.base import Cell
from unrolled.io.keras_files import find_keras_layers
from unrolled.io.onnx_import import from_onnx
from unrolled.io.state_dicts import find_layers, find_other_cells, recurrent_keys
from unrolled.io.weight_files import detect_format, read_weights
from unrolled.layers.recurrent import Recurrent


@dataclass
class LayerFile:
    """The recurrent layers of a file.

    Attributes:
        layers: The layers, by the prefix of their tensor names or by their names in the model.
        notes: What was assumed, and which layers were left out and why.
        ambiguous: The names of the cells that some tensors fit, by prefix, if they fit several.
        keys: The keys that look like parameters of recurrent layers.
        stores_cells: Whether the file says which cells its layers have, so that nothing has to be inferred.
        stores_options: Whether the file contains the options of the cells, such as a nonlinearity.
    """

    layers: dict[str, Recurrent]
    notes: list[str] = field(default_factory=list)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    stores_cells: bool = False
    stores_options: bool = False


def load_layers(
    path: Path, cells: Sequence[type[Cell]] = (), options: Mapping[str, Any] | None = None
) -> LayerFile:
    """Load the recurrent layers of a file. The content of the file tells its format, not its name.

    Args:
        path: A file of torch.save, safetensors, ONNX, NumPy (.npz) or Keras.
        cells: Cell classes to look for in addition to those of torch.nn. Without them, cells of
            `unrolled.cells` are found if no other cell has parameters of the same names and shapes.
        options: Options of the cells that the file doesn't contain.

    Raises:
        OSError: If the file can't be read.
        ImportError: If a package that the format needs isn't installed.
        ValueError: If the file has another format, is damaged, or contains code.
    """
    file_format, options = detect_format(path), options or {}
    if file_format == "onnx":
        return _load_onnx(path)
    file = read_weights(path)
    if file_format in ("keras", "hdf5"):
        layers, notes = find_keras_layers(file, options)
        if layers or notes:
            return LayerFile(layers, notes, stores_cells=True, stores_options=file.config is not None)
    layers = find_layers(file.tensors, cells, options)
    ambiguous: dict[str, list[str]] = {}
    if not cells:
        others, ambiguous = find_other_cells(file.tensors, layers, options)
        layers |= others
    return LayerFile(layers, [], ambiguous, recurrent_keys(file.tensors, cells))


def _load_onnx(path: Path) -> LayerFile:
    try:
        nodes = from_onnx(path)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    layers, notes = {}, []
    for name, node in nodes.items():
        if node.direction == "reverse":
            notes.append(f"{name}: it reads the sequence from its end (direction='reverse')")
        else:
            layers[name] = node.layer.requires_grad_(False).eval()
    return LayerFile(layers, notes, stores_cells=True, stores_options=True)
