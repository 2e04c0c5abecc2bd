"""Protocols for the loops of a backend: generated, loaded and called."""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.kept_captures import Store
from unrolled.engines.compiler.kernel_ir import KernelIR
from unrolled.engines.compiler.partition import LoopPartition


class Loop(Protocol):
    """A loop that is ready to run.

    Attributes:
        needs: Values that it reads: of all rows of all time steps, or of parameters.
    """

    needs: list[fx.Node]

    def call(
        self,
        values: dict[fx.Node, Any],
        initial: Sequence[Tensor | None],
        all_steps: Sequence[Tensor | None],
        final: Sequence[Tensor | None],
        like: Tensor,
        layout: Layout,
        reverse: bool,
        threads: int,
    ) -> Any:
        """Prepare a call for :meth:`Backend.launch`. Add the values that it saves to ``values``.

        Args:
            values: Values that the loop reads. A state before each step may be a
                :class:`~unrolled.engines.compiler.batch_layout.ShiftedState`, filled in by an earlier call.
            initial: States before the first step, each ``(batch, width)``; None means zeros.
            all_steps: Memory for each state's values after every step, ``(all rows, width)``, or None.
            final: Memory for each row's last state, ``(batch, width)``, or None.
            like: A tensor of the right dtype and device.
            layout: Memory layout of the rows.
            reverse: Whether to run from the last time step to the first.
            threads: Maximum number of threads, on a CPU.

        Returns:
            The call, in a form that only the backend knows.
        """


class GeneratedLoop(Protocol):
    """A loop whose code is generated, but perhaps not compiled yet."""

    def start(self) -> None:
        """Start to compile it in the background, if that is possible."""

    def load(self) -> Loop:
        """Compile it, if need be, and return it.

        Raises:
            UnavailableError: If it can't be compiled on this machine.
        """


class LoopBackend(Protocol):
    """The part of a backend that generates and runs loops."""

    @property
    def captures(self) -> Store | None:
        """Where captured steps are stored for other processes. None if they aren't."""

    def generate(self, partition: LoopPartition, kernel: KernelIR) -> GeneratedLoop:
        """Generate the code of a loop.

        Raises:
            UnsupportedError: If it contains an unsupported operation.
        """

    def bulk_runner(self, dtype: torch.dtype) -> Callable[[array.array[int]], None] | None:
        """Return a function that computes matrix products around loops; see ``BulkOps``.

        If it is None, torch computes them.
        """

    def launch(self, calls: Sequence[Any]) -> None:
        """Run independent calls of loops.

        Raises:
            MemoryError: If there is not enough memory for a loop's buffers.
        """
