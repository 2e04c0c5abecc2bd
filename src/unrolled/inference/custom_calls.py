"""Whether a call of a layer or cell runs anything but the forward method of this library."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module

from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.layers.torch_layers import DropInCell, DropInLayer

_FORWARD_METHODS = Recurrent.forward, DropInLayer.forward, SingleStep.forward, DropInCell.forward


def has_custom_call(layer: nn.Module) -> bool:
    """Return whether a call of a layer runs hooks, or anything else than the forward method of our layers."""
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__:
        return True
    if type(layer).forward not in _FORWARD_METHODS:
        return True
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
