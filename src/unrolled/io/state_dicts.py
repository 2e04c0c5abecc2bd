"""Find recurrent layers in a state_dict: infer the cell and all sizes from tensor names and shapes."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from unrolled import cells as all_cells
from unrolled.cells.base import Cell
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS

# Keys of a layer, such as encoder.weight_ih_l0_reverse, and of a single cell, such as cell.weight_ih.
_LAYER_KEY = re.compile(r"(?P<prefix>.*\.)?(?P<name>\w+)_l(?P<layer>\d+)(?P<reverse>_reverse)?", re.DOTALL)
_CELL_KEY = re.compile(r"(?P<prefix>.*\.)?(?P<name>\w+)", re.DOTALL)


def find_layers(
    weights: Mapping[str, Tensor],
    cells: Iterable[type[Cell]] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Recurrent]:
    """Build every recurrent layer found in a state_dict, with its weights.

    The cell, the sizes, the number of layers and the directions are inferred from keys and shapes.

    Args:
        weights: Tensors by dotted key.
        cells: Cell classes to look for in addition to those of torch.nn.
        options: Cell options that can't be inferred from shapes, such as a nonlinearity. A layer ignores
            them if its cell doesn't accept one of them or its shapes imply another value.

    Returns:
        The layers, keyed by the prefix of their tensor names.

    Raises:
        ValueError: If the tensors of a recurrent layer have inconsistent shapes.
    """
    layers = {}
    for prefix, tensors in _group_by_prefix(weights).items():
        for cell in dict.fromkeys([*cells, *(layer.cell_class for layer in LAYERS)]):
            layer = _build_layer(cell, prefix, tensors, dict(options or {}))
            if layer is not None:
                layers[prefix.rstrip(".")] = layer
                break
    return layers


def find_other_cells(
    weights: Mapping[str, Tensor], found: Iterable[str] = (), options: Mapping[str, Any] | None = None
) -> tuple[dict[str, Recurrent], dict[str, list[str]]]:
    """Look for layers of the cells in `unrolled.cells` that torch.nn doesn't have.

    Args:
        weights: Tensors by dotted key.
        found: Prefixes that belong to layers which were found already.
        options: Cell options that can't be inferred from shapes, as for :func:`find_layers`.

    Returns:
        The layers whose tensors fit exactly one cell, by prefix; and for each other prefix whose tensors fit
        several cells, the names of these.
    """
    layers: dict[str, Recurrent] = {}
    ambiguous: dict[str, list[str]] = {}
    for prefix, tensors in _group_by_prefix(weights).items():
        name = prefix.rstrip(".")
        if name in found or all(len(by_name) == 1 for by_name in tensors.values()):
            continue  # a single parameter is more likely a part of a layer
        candidates = []
        for cell in (getattr(all_cells, cell_name) for cell_name in all_cells.__all__):
            with contextlib.suppress(ValueError):  # the shapes of the layers don't fit together
                candidates.append(_build_layer(cell, prefix, tensors, dict(options or {})))
        fitting = [layer for layer in candidates if layer is not None]
        if len(fitting) == 1:
            layers[name] = fitting[0]
        elif fitting:
            ambiguous[name] = [layer.cell.__name__ for layer in fitting]
    return layers, ambiguous


def recurrent_keys(weights: Mapping[str, Tensor], cells: Iterable[type[Cell]] = ()) -> list[str]:
    """Return the keys that look like parameters of a recurrent layer, to explain why none was found."""
    names = {name for cell in (*cells, *(layer.cell_class for layer in LAYERS)) for name in cell.params()}
    matches = ((key, _LAYER_KEY.fullmatch(key)) for key in weights)
    return [key for key, match in matches if match and match["name"] in names]


def _group_by_prefix(weights: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Group tensors by prefix, suffix (``_l0``, ``_l0_reverse``, or empty for a single cell) and name."""
    groups: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in weights.items():
        layer_match = _LAYER_KEY.fullmatch(key)
        match = layer_match or _CELL_KEY.fullmatch(key)
        if match is None or not tensor.is_floating_point():
            continue
        suffix = f"_l{int(match['layer'])}{match['reverse'] or ''}" if layer_match else ""
        groups.setdefault(match["prefix"] or "", {}).setdefault(suffix, {})[match["name"]] = tensor
    return groups


def _build_layer(
    cell_class: type[Cell], prefix: str, groups: dict[str, dict[str, Tensor]], options: dict[str, Any]
) -> Recurrent | None:
    """Build a layer of this cell from tensors grouped by suffix; None if they don't fit such a layer."""
    if "_l0" in groups:
        groups = {suffix: tensors for suffix, tensors in groups.items() if suffix}
    elif set(groups) != {""}:
        return None
    first = next(iter(groups.values())) if "" in groups else groups["_l0"]
    accepted = {name: value for name, value in options.items() if accepts_option(cell_class, name, value)}
    shapes = {name: tuple(tensor.shape) for name, tensor in first.items()}
    cell = _infer_cell(cell_class, shapes, accepted) or (
        _infer_cell(cell_class, shapes, {}) if accepted else None
    )
    if cell is None:
        return None
    suffixes = [suffix or "_l0" for suffix in groups]
    num_layers = 1 + max(int(suffix.split("_")[1][1:]) for suffix in suffixes)
    layer = new_layer(
        cell_class,
        cell.input,
        cell.hidden,
        num_layers=num_layers,
        bias=cell.bias,
        bidirectional="_l0_reverse" in suffixes,
        device="meta",
        dtype=next(iter(first.values())).dtype,
        **cell.chosen_options(),
    )
    tensors = {
        name + (suffix or "_l0"): value
        for suffix, by_name in groups.items()
        for name, value in by_name.items()
    }
    expected = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    actual = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in [*expected, *actual]:
        if expected.get(name) != actual.get(name):
            raise ValueError(
                f"{prefix}{name}: expected {_format_shape(expected.get(name))} for {layer}, "
                f"got {_format_shape(actual.get(name))}"
            )
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False).eval()


def new_layer(cell: type[Cell], input_size: int, hidden_size: int, **arguments: Any) -> Recurrent:
    """Create a layer of this cell, as a drop-in class such as `LSTM` if there is one."""
    layer_class = drop_in_layer(cell)
    if layer_class is None:
        return Recurrent(cell, input_size, hidden_size, **arguments)
    return layer_class(input_size, hidden_size, **arguments)


def _infer_cell(cell: type[Cell], shapes: dict[str, tuple[int, ...]], options: dict[str, Any]) -> Cell | None:
    """Search for sizes that give this cell parameters of exactly these shapes; None if there are none."""
    if not shapes or not set(shapes) <= set(cell.params()):
        return None
    bias = any(name.startswith("bias") for name in shapes)
    axes = sorted({size for shape in shapes.values() for size in shape})
    hidden_sizes = sorted({size // k for size in axes for k in range(1, 17) if size % k == 0}, reverse=True)
    defaults = {name: value for name, value in cell.options().items() if type(value) is int}
    free = [name for name in defaults if name not in options]
    choices = [defaults] + [
        dict(zip(free, sizes, strict=True)) for sizes in itertools.product(axes, repeat=len(free))
    ]
    for choice, hidden in itertools.product(choices, hidden_sizes):
        arguments = {"bias": bias, **choice, **options}
        one, two = (_parameter_shapes(cell, size, hidden, arguments) for size in (1, 2))
        if any(shapes.get(name) != shape for name, shape in one.items() if two.get(name) == shape):
            continue  # a mismatch in a shape that doesn't depend on the input size
        for size in {*axes, *(axis - hidden for axis in axes if axis > hidden)}:
            if _parameter_shapes(cell, size, hidden, arguments) == shapes:
                return cell(size, hidden, **arguments)
    return None


def accepts_option(cell: type[Cell], name: str, value: Any) -> bool:
    """Return whether a cell has an option and accepts this value for it."""
    try:
        cell.check_options({name: value})
    except (TypeError, ValueError):
        return False
    return name in cell.options()


def _parameter_shapes(
    cell: type[Cell], size: int, hidden: int, arguments: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the parameter shapes of a cell; empty if the cell rejects these sizes."""
    try:
        return cell(size, hidden, **arguments).shapes()
    except ValueError:
        return {}


def _format_shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"shape {shape}"
