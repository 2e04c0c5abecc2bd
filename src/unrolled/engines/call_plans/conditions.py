"""What must hold in a call so that a plan can replace it, apart from its tensors."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.engines import log
from unrolled.engines._torch_private import (
    any_autocast_enabled,
    dispatch_mode_count,
    forward_mode_active,
    forward_mode_inactive,
    function_mode_count,
    functorch_interpreter,
    jit_tracing_state,
    pre_dispatch_modes,
)
from unrolled.engines.call_plans.native_replay import Condition, Item
from unrolled.engines.memory import LOW_ADDRESS
from unrolled.engines.selection import current_engine

_INFO = logging.INFO


def runs_as_usual() -> bool:
    """Return whether torch and this library run operations as usual.

    False inside a transform, a mode or autocast, on the reference engine, and if the engine of each call is
    logged.
    """
    return not (
        any_autocast_enabled()
        or functorch_interpreter() is not None
        or function_mode_count()
        or dispatch_mode_count()
        or jit_tracing_state() is not None
        or forward_mode_active()
        or pre_dispatch_modes.get(0) is not None
        or current_engine() == "reference"
        or log.engine.isEnabledFor(_INFO)
    )


def native_conditions() -> tuple[list[Condition], list[Item]]:
    """Return the conditions of :func:`runs_as_usual` for compiled code, which compares objects by identity.

    They may also fail although it holds, such as after a change of the logging configuration.
    """
    functions: list[Condition] = [
        (any_autocast_enabled, False),
        (functorch_interpreter, None),
        (function_mode_count, 0),
        (dispatch_mode_count, 0),
        (jit_tracing_state, None),
        (functools.partial(pre_dispatch_modes.get, 0), None),
        (current_engine, sys.intern("auto")),
    ]
    items: list[Item] = [
        forward_mode_inactive,
        (log.engine._cache, _INFO, False),  # type: ignore[attr-defined]  # what isEnabledFor has returned
    ]
    return functions, items


def address_of(tensor: Any, shape: torch.Size, dtype: torch.dtype) -> int:
    """Return the address of a tensor with this shape and dtype, contiguous in the memory of the CPU.

    Returns:
        The address, or 0 if the value is anything else: a subclass, a tensor that is sparse, lazily negated
        or zero, or wrapped by a transform, or one whose memory was freed.

    Raises:
        RuntimeError: By torch, if it has no memory or no shape.
    """
    kind = type(tensor)
    if (
        (kind is not Tensor and kind is not Parameter)
        or tensor.shape != shape
        or tensor.dtype is not dtype
        or not tensor.is_cpu
        or not tensor.is_contiguous()
        or tensor.is_neg()
    ):
        return 0
    address: int = tensor.data_ptr()
    # Without memory, the address is the offset in the storage.
    if address > LOW_ADDRESS or address > tensor.storage_offset() * tensor.itemsize:
        return address
    return 0
