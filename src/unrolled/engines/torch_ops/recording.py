"""Whether torch records a graph, in which values of tensors must not become constants."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled.engines._torch_private import (
    DispatchModeKey,
    dispatch_mode,
    jit_tracing_state,
    pre_dispatch_modes,
)

_MODES = (DispatchModeKey.PROXY, DispatchModeKey.FAKE)


def in_pre_dispatch() -> bool:
    """Return whether torch records a graph above its dispatcher, as ``make_fx(pre_dispatch=True)``."""
    return pre_dispatch_modes.get(0) is not None


def in_jit_trace() -> bool:
    """Return whether ``torch.jit.trace`` records a graph."""
    return not torch.compiler.is_compiling() and jit_tracing_state() is not None


def active() -> bool:
    """Return whether torch records a graph: compile, export, jit.trace, make_fx, or fake tensors."""
    return (
        torch.compiler.is_compiling()
        or in_jit_trace()
        or any(map(dispatch_mode, _MODES))
        or in_pre_dispatch()
    )


def read_sizes(sizes: Tensor) -> list[int]:
    """Return the values of batch sizes.

    Raises:
        RuntimeError: If torch records a graph, which would have them as constants.
    """
    if active():
        raise RuntimeError(
            "the lengths of a packed sequence can't be read while torch records a graph, because they would "
            "become constants of the graph: pass a padded input and lengths"
        )
    values: list[int] = sizes.tolist()
    return values
