"""Recurrent layers among the tensors of a state_dict: kind and sizes from keys and shapes alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS

_STACKED = re.compile(r"(?P<prefix>.*\.)?(?P<name>\w+)_l(?P<layer>\d+)(?P<reverse>_reverse)?", re.DOTALL)
_SINGLE = re.compile(r"(?P<prefix>.*\.)?(?P<name>\w+)", re.DOTALL)


def find_layers(
    weights: Mapping[str, Tensor],
    cells: Iterable[type[Cell]] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Recurrent]:
    """Every recurrent layer among these tensors, by the prefix of its keys, with its weights.

    Kind, sizes, layers and directions follow from the keys and shapes.

    Args:
        weights: tensors by dotted key.
        cells: what to look for beside the cells of torch.nn.
        options: options of the cells that no shape tells, such as a nonlinearity. A layer whose cell
            can't have one of them, or whose shapes tell another value, is found without it.

    Raises:
        ValueError: keys of a recurrent layer whose shapes don't go together.
    """
    found = {}
    for prefix, parts in _groups(weights).items():
        for cell in dict.fromkeys([*cells, *(layer.cell_class for layer in LAYERS)]):
            layer = _match(cell, prefix, parts, dict(options or {}))
            if layer is not None:
                found[prefix.rstrip(".")] = layer
                break
    return found


def parts_of_layers(weights: Mapping[str, Tensor], cells: Iterable[type[Cell]] = ()) -> list[str]:
    """The keys that look like parts of a recurrent layer, for a file in which no whole one is found."""
    names = {name for cell in (*cells, *(layer.cell_class for layer in LAYERS)) for name in cell.params()}
    matches = ((key, _STACKED.fullmatch(key)) for key in weights)
    return [key for key, match in matches if match and match["name"] in names]


def _groups(weights: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Tensors by prefix, by suffix (``_l0``, ``_l0_reverse``, or none for a single cell), by name."""
    groups: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in weights.items():
        stacked = _STACKED.fullmatch(key)
        parts = stacked or _SINGLE.fullmatch(key)
        if parts is None or not tensor.is_floating_point():
            continue
        suffix = f"_l{int(parts['layer'])}{parts['reverse'] or ''}" if stacked else ""
        groups.setdefault(parts["prefix"] or "", {}).setdefault(suffix, {})[parts["name"]] = tensor
    return groups


def _match(
    cell: type[Cell], prefix: str, parts: dict[str, dict[str, Tensor]], options: dict[str, Any]
) -> Recurrent | None:
    """The layer of this cell that has these tensors; None where they are no such layer's."""
    if "_l0" in parts:
        parts = {suffix: tensors for suffix, tensors in parts.items() if suffix}
    elif set(parts) != {""}:
        return None
    first = next(iter(parts.values())) if "" in parts else parts["_l0"]
    known = {name: value for name, value in options.items() if takes(cell, name, value)}
    shapes = {name: tuple(tensor.shape) for name, tensor in first.items()}
    made = _solve(cell, shapes, known) or (_solve(cell, shapes, {}) if known else None)
    if made is None:
        return None
    suffixes = [suffix or "_l0" for suffix in parts]
    layers = 1 + max(int(suffix.split("_")[1][1:]) for suffix in suffixes)
    layer = new_layer(
        cell,
        made.input,
        made.hidden,
        num_layers=layers,
        bias=made.bias,
        bidirectional="_l0_reverse" in suffixes,
        device="meta",
        dtype=next(iter(first.values())).dtype,
        **made.chosen_options(),
    )
    tensors = {
        name + (suffix or "_l0"): value
        for suffix, by_name in parts.items()
        for name, value in by_name.items()
    }
    expected = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in [*expected, *given]:
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"{prefix}{name}: expected {_shape(expected.get(name))} in {layer}, "
                f"got {_shape(given.get(name))}"
            )
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False).eval()


def new_layer(cell: type[Cell], input_size: int, hidden_size: int, **arguments: Any) -> Recurrent:
    """A layer of this cell: torch.nn's drop-in where there is one."""
    ours = drop_in_layer(cell)
    if ours is None:
        return Recurrent(cell, input_size, hidden_size, **arguments)
    return ours(input_size, hidden_size, **arguments)


def _solve(cell: type[Cell], shapes: dict[str, tuple[int, ...]], options: dict[str, Any]) -> Cell | None:
    """The sizes with which this cell has parameters of exactly these shapes, found by trying."""
    if not shapes or not set(shapes) <= set(cell.params()):
        return None
    bias = any(name.startswith("bias") for name in shapes)
    axes = sorted({size for shape in shapes.values() for size in shape})
    parts = sorted({size // k for size in axes for k in range(1, 17) if size % k == 0}, reverse=True)
    defaults = {name: value for name, value in cell.options().items() if type(value) is int}
    free = [name for name in defaults if name not in options]
    choices = [defaults] + [
        dict(zip(free, sizes, strict=True)) for sizes in itertools.product(axes, repeat=len(free))
    ]
    for chosen, hidden in itertools.product(choices, parts):
        arguments = {"bias": bias, **chosen, **options}
        one, two = (_shapes_of(cell, size, hidden, arguments) for size in (1, 2))
        if any(shapes.get(name) != shape for name, shape in one.items() if two.get(name) == shape):
            continue  # a shape that the input size has no part in
        for size in {*axes, *(axis - hidden for axis in axes if axis > hidden)}:
            if _shapes_of(cell, size, hidden, arguments) == shapes:
                return cell(size, hidden, **arguments)
    return None


def takes(cell: type[Cell], name: str, value: Any) -> bool:
    """Whether a cell has an option and can have this value for it."""
    try:
        cell.check_options({name: value})
    except (TypeError, ValueError):
        return False
    return name in cell.options()


def _shapes_of(
    cell: type[Cell], size: int, hidden: int, arguments: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    try:
        return cell(size, hidden, **arguments).shapes()
    except ValueError:  # sizes that don't go together
        return {}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"the shape {shape}"
