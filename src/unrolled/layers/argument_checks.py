"""Checks of the arguments of layers."""

from __future__ import annotations

import difflib
import inspect
import numbers
import warnings
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell

# The options that torch.nn's layers don't have, and their defaults.
NOT_IN_TORCH: dict[str, Any] = {
    "initial_state": "zeros",
    "variational_dropout": 0.0,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
}


def check_dropout(dropout: float) -> None:
    """Raise ValueError if ``dropout`` isn't a probability."""
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element "
            f"being zeroed, got {dropout!r}"
        )


def warn_of_unused_dropout(dropout: float, layer: type[nn.Module], base: type[nn.Module]) -> None:
    """Warn that a layer has dropout, but no layer below the last. Called by the constructor of ``base``."""
    warnings.warn(
        "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
        f"expects num_layers greater than 1, but got dropout={dropout} and num_layers=1",
        stacklevel=2 + constructor_depth(layer, base),
    )


def check_initial_state(initial_state: str) -> None:
    """Raise ValueError if the option ``initial_state`` isn't ``"zeros"`` or ``"learned"``."""
    if initial_state not in ("zeros", "learned"):
        raise ValueError(f"initial_state should be 'zeros' or 'learned', got {initial_state!r}")


def check_flags(**flags: Any) -> None:
    """Raise TypeError if one of the arguments isn't a bool."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_checkpoint(checkpoint: Any, x: object, layer: str) -> None:
    """Raise TypeError or ValueError if ``checkpoint`` isn't a segment length, or the input is packed."""
    if not isinstance(checkpoint, int) or isinstance(checkpoint, bool):
        raise TypeError(f"{layer}: checkpoint should be a number of time steps, got {checkpoint!r}")
    if checkpoint < 1:
        raise ValueError(f"{layer}: checkpoint should be at least one time step, got {checkpoint}")
    if isinstance(x, PackedSequence):
        raise ValueError(f"{layer}: checkpoint doesn't support packed sequences: pass a padded input")


def constructor_depth(layer: type[nn.Module], base: type[nn.Module]) -> int:
    """Count the constructors that run, from ``layer`` up to and including its base class."""
    classes = layer.__mro__[: layer.__mro__.index(base) + 1]
    return sum("__init__" in vars(cls) for cls in classes)


def check_cell_options(layer: type[nn.Module], cell: type[Cell], options: dict[str, Any]) -> None:
    """Raise TypeError if the cell doesn't have one of the options."""
    known = [
        name
        for name in inspect.signature(layer).parameters
        if name not in ("cell", "cell_options", "options", "unknown")
    ]
    known += [name for name in (*NOT_IN_TORCH, *cell.options()) if name not in known]
    for name in options:
        if name not in cell.options():
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its options are {', '.join(known)}"
            owner = layer.__name__
            if "cell" in inspect.signature(layer).parameters:
                owner += f" of {cell.__name__}"
            raise TypeError(f"{owner} has no option {name!r}: {hint}")


def changed_arguments(layer: Any, cell_options: dict[str, Any]) -> list[str]:
    """Return the arguments of a layer that differ from their defaults, as torch.nn formats them.

    Args:
        layer: The layer.
        cell_options: The options of its cell to include.
    """
    parts = [str(layer.input_size), str(layer.hidden_size)]
    parts += [f"{name}={value!r}" for name, value in cell_options.items()]
    defaults: dict[str, Any] = {"num_layers": 1, "bias": True, "batch_first": False}
    defaults |= {"dropout": 0.0, "bidirectional": False} | NOT_IN_TORCH
    for name, default in defaults.items():
        if getattr(layer, name) != default:
            parts.append(f"{name}={getattr(layer, name)}")
    return parts
