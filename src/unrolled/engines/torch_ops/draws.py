"""The random numbers of a layer as torch operators; see ``engines/draws.py``."""

from __future__ import annotations

import itertools
import json
import operator
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.draws import Draws
from unrolled.engines import draws as drawing
from unrolled.engines import philox
from unrolled.engines._torch_private import constant_for_dynamo
from unrolled.engines.torch_ops import argument_checks, recording, transforms
from unrolled.engines.torch_ops.operators import library

_ops: Any = torch.ops.unrolled
_calls = itertools.count()

# Exported programs store these schemas, so the argument names never change. Each call of draw_seed has its
# own number, since torch's compiler merges operations with equal arguments. The tensor shows which generator
# the seed comes from: with activation checkpointing, a graph replays that of the device of the arguments.
library.define("draw_seed(Tensor device, int call) -> Tensor", tags=torch.Tag.nondeterministic_seeded)
library.define("draw(Tensor x, Tensor seed, Tensor? sizes, Tensor? order, str draws) -> Tensor")


def draw_seed(x: Tensor) -> Tensor:
    """Draw the seed of a call of a layer from torch's generator, inside a torch transform or not.

    Under vmap it is an error, the same for all mapped calls or another one for each, as for torch.randn.

    Args:
        x: The input of the layer.
    """
    if not transforms.active() or transforms.in_functorch():
        return drawing.draw_seed()
    # torch.jit.trace would make a result that depends on no input a constant.
    device = x.detach().new_empty(0) if recording.in_jit_trace() else torch.empty(0, device="cpu")
    seed: Tensor = _ops.draw_seed(device, _next_call())
    return seed


@constant_for_dynamo
def _next_call() -> int:
    return next(_calls)


def draw_values(
    draws: Draws,
    x: Tensor,
    seed: Tensor,
    sizes: list[int] | Tensor | None,
    order: Tensor | None,
    first_step: int,
    layer: int,
    directions: int,
) -> Tensor:
    """Return the random numbers of a layer for all directions, see :func:`drawing.draw_values`.

    Args:
        draws: The draws of the step.
        x: The input.
        seed: The seed.
        sizes: Number of sequences at each time step, or None.
        order: The user's row for each row of the batch, or None.
        first_step: The number of the first time step.
        layer: Index of the layer.
        directions: Number of directions.
    """
    if not transforms.active():
        return drawing.draw_values(
            x, seed, sizes, order, first_step, drawing.draw_entries(draws, layer, directions)
        )
    sizes = torch.tensor(sizes, device="cpu") if isinstance(sizes, list) else sizes
    values: Tensor = _ops.draw(
        x.detach(), seed, sizes, order, _serialize(draws, layer, directions, first_step)
    )
    return values


@constant_for_dynamo
def _serialize(draws: Draws, layer: int, directions: int, first_step: int) -> str:
    return json.dumps({"draws": draws, "layer": layer, "directions": directions, "first": first_step})


def _entries(text: str) -> tuple[int, list[philox.Entry]]:
    """Return the first time step and the entries that a text describes.

    Raises:
        ValueError: If the text doesn't describe draws.
    """
    try:
        data = json.loads(text)
        draws = [(kind, tuple(map(operator.index, shape))) for kind, shape in data["draws"]]
        first, layer, directions = (operator.index(data[name]) for name in ("first", "layer", "directions"))
        is_valid = directions in (1, 2) and min(first, layer) >= 0 and len(draws) > 0
        is_valid &= all(kind in philox.KINDS and any(size < 0 for size in shape) for kind, shape in draws)
    except (LookupError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            "the last argument of unrolled::draw should be the text that a layer has put into the graph, got "
            f"{text!r}"
        )
    return first, drawing.draw_entries(tuple(draws), layer, directions)


def _seed(device: Tensor, call: int) -> Tensor:
    return drawing.draw_seed()


def _values(x: Tensor, seed: Tensor, sizes: Tensor | None, order: Tensor | None, text: str) -> Tensor:
    first_step, entries = _entries(text)
    argument_checks.check_draw(x, seed, sizes, order)
    return drawing.draw_values(x, seed, sizes, order, first_step, entries)


def _fake_seed(device: Tensor, call: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _fake_values(x: Tensor, seed: Tensor, sizes: Tensor | None, order: Tensor | None, text: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(width for _, _, width, _ in _entries(text)[1]))


def _mapped_values(
    info: Any, in_dims: Any, x: Tensor, seed: Tensor, sizes: Any, order: Any, text: str
) -> tuple[Tensor, int | None]:
    """Map the draws over seeds. Mapped calls with the same seed have the same numbers."""
    x = x if in_dims[0] is None else x.select(in_dims[0], 0)
    if in_dims[1] is None:
        return _ops.draw(x, seed, sizes, order, text), None
    return torch.stack([_ops.draw(x, part, sizes, order, text) for part in seed.unbind(in_dims[1])]), 0


library.impl("draw_seed", _seed, "CompositeExplicitAutograd")
library.impl("draw", _values, "CompositeExplicitAutograd")
torch.library.register_fake("unrolled::draw_seed", _fake_seed, lib=library)
torch.library.register_fake("unrolled::draw", _fake_values, lib=library)
torch.library.register_vmap("unrolled::draw", _mapped_values, lib=library)
