"""Calls inside a transform of torch: compile and export, vmap and torch.func, forward mode, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import WrapperSpec
from unrolled.engines.native.compiled_cell import DTYPES
from unrolled.engines.torch_ops import operators

States = tuple[Tensor, ...]

_ops: Any = torch.ops.unrolled
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
_AUTOCASTING = frozenset(device for device in _DEVICES if torch.amp.is_autocast_available(device))
_is_compiling, _tracing = torch.compiler.is_compiling, torch._C._get_tracing_state
_any_autocast = torch._C._is_any_autocast_enabled
_functorch = torch._C._functorch.peek_interpreter_stack


def active() -> bool:
    """Whether a transform of torch is, so that the loops are to be called as operators."""
    return (
        _is_compiling()
        or _tracing() is not None
        or _functorch() is not None
        or _get_current_dispatch_mode() is not None
        or forward_ad._current_level >= 0
    )


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is, for which the operators have no rule."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    jvp = torch._C._functorch.TransformType.Jvp
    return forward_ad._current_level >= 0 or any(level.key() == jvp for level in levels)


def vectorises() -> bool:
    """Whether a transform of torch.func is, vmap perhaps, so that a tensor's numbers can't be asked for."""
    return _functorch() is not None


vectorises._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see :func:`engines._now`


def may_autocast() -> bool:
    """Whether autocast may be on, for some type of device: the quickest of all questions about it."""
    return _any_autocast() or _is_compiling()


def autocasts(device: str) -> bool:
    """Whether autocast is on, for this type of device."""
    return device in _AUTOCASTING and torch.is_autocast_enabled(device)


def in_autocast(
    cells: Sequence[Cell], x: Tensor, states: Sequence[States | None]
) -> tuple[list[Cell], Tensor, list[States | None]]:
    """Bound cells and their inputs in autocast's dtype: all of them, so that a state keeps one dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    bound = [cell.bind({name: cast(getattr(cell, name)) for name in cell.shapes()}) for cell in cells]
    begun = [None if state is None else tuple([cast(part) for part in state]) for state in states]
    return bound, cast(x), begun


def run(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | Tensor | None,
    chains: Sequence[WrapperSpec],
) -> list[tuple[Tensor, States]] | str:
    """Run bound cells over a sequence by an operator; or why none takes them, in words.

    The arguments are those of :func:`unrolled.engines.dispatch.run`.
    """
    given = x.dtype
    if given not in DTYPES:
        return f"it takes float32, float64 and bfloat16, not {given}"
    wide = torch.float32 if given is torch.bfloat16 else given
    texts: list[str] = []
    tensors: list[Tensor] = []
    counts: list[int] = []
    for cell, chain, state, back in zip(cells, chains, states, (False, True), strict=False):
        described = operators.described(cell.unbound, chain, cell.training, wide, state is not None, back)
        text, own, count, why = described
        if why:
            return str(why)
        counts.append(1 + count)
        texts.append(text)
        mine = [*(state or ()), *[getattr(cell, name) for name in cell.shapes()]]
        for tensor in (x, *mine):
            if tensor.device.type != "cpu":
                return "its tensors are not on the CPU"
            if tensor.dtype != given:
                return f"its tensors are of several dtypes, {given} and {tensor.dtype}"
        tensors += mine if wide is given else [tensor.to(wide) for tensor in mine]
        tensors += [getattr(cell, name) for name in own]
    steps = torch.tensor(sizes, device="cpu") if isinstance(sizes, list) else sizes
    x = x if wide is given else x.to(wide)
    flat: list[Tensor] = _ops.recurrence(x, tensors, steps, f"[{', '.join(texts)}]")
    results: list[tuple[Tensor, States]] = []
    for count in counts:
        made, flat = flat[:count], flat[count:]
        output, *final = made if wide is given else [tensor.to(given) for tensor in made]
        results.append((output, tuple(final)))
    return results
