"""The protocol of backends. A backend runs the loops of a cell on one kind of device.

``engines.autograd`` and the torch operators know backends by this protocol only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.loops import LoopBackend


class Backend(LoopBackend, Protocol):
    """A backend.

    Attributes:
        name: Its name, as in ``unrolled.engine(name)``.
        dtypes: Dtypes of inputs that it supports.
    """

    name: str
    dtypes: Sequence[torch.dtype]

    def tensor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype to convert the tensors of a call to, given their dtype."""

    def supports(self, tensors: Sequence[Tensor], dtype: torch.dtype, in_graph: bool = False) -> str | None:
        """Return why it can't run a call, or None if it can.

        Args:
            tensors: The input, the initial states and the parameters.
            dtype: The dtype that all of them should have.
            in_graph: Whether the call is recorded as an operator of a graph, so that the tensors may be fake.
        """

    def unavailable(self, device: torch.device) -> str | None:
        """Return why this backend can't run on a device at all, or None if it can."""

    def explain(self, compiled: CompiledCell, training: bool) -> str:
        """Generate the loops of a cell, and return how this backend runs them, and why."""

    def prepare(self, dtype: torch.dtype) -> None:
        """Start compiling the code that all cells share in the background, before a step is captured."""

    def compile(self, cell: Cell, dtype: torch.dtype, device: torch.device) -> CompiledCell:
        """Compile a cell for a device and a dtype to which tensors are converted.

        Raises:
            UnsupportedError: If its step can't be compiled.
            UnavailableError: If there is no compiler for it on this machine.
        """
