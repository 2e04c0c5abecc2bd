"""Calls of a quantized module. Its weights stay packed between calls."""

from __future__ import annotations

from typing import Any

from unrolled.inference.frozen import FrozenCalls, FrozenCell
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep


class PackedCalls:
    """Run a module with packed weights. The first call packs them, and so does the first call after a change.

    Args:
        module: The layer or single-step cell.
    """

    def __init__(self, module: Recurrent | SingleStep) -> None:
        self._module = module
        self._calls: FrozenCalls | FrozenCell | None = None

    def __call__(self, x: Any, state: Any) -> Any:
        """Return what the module returns, or None if it must run as usual."""
        if self._module.training:
            return None  # an error
        if self._calls is None:
            is_layer = isinstance(self._module, Recurrent)
            create: Any = FrozenCalls if is_layer else FrozenCell
            self._calls = create(self._module, allow_changes=True)
        return self._calls(x, state)

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self._module, "_calls": None}  # a copy packs its own weights
