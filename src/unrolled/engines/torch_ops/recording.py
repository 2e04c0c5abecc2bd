"""Whether torch records a graph, in which values of tensors must not become constants."""

from __future__ import annotations

import torch
from torch import Tensor

_tracing = torch._C._get_tracing_state
_dispatch_mode = torch._C._get_dispatch_mode
_MODES = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
_pre_dispatch_modes = torch._ops.mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]


def in_pre_dispatch() -> bool:
    """Return whether torch records a graph above its dispatcher, as ``make_fx(pre_dispatch=True)``."""
    return _pre_dispatch_modes.get(0) is not None


def in_jit_trace() -> bool:
    """Return whether ``torch.jit.trace`` records a graph."""
    return not torch.compiler.is_compiling() and _tracing() is not None


def active() -> bool:
    """Return whether torch records a graph: compile, export, jit.trace, make_fx, or fake tensors."""
    return (
        torch.compiler.is_compiling()
        or in_jit_trace()
        or any(map(_dispatch_mode, _MODES))
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
