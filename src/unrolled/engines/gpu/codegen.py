"""Generate the Triton source of a loop from its kernel IR."""

from __future__ import annotations

from torch import fx

from unrolled.engines.compiler.ir import is_batched
from unrolled.engines.compiler.kernel_ir import KernelIR
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.views import TensorView, resolve_views
from unrolled.engines.gpu.choice import PERSISTENT, REGISTERS, SCAN, choose
from unrolled.engines.gpu.in_registers import RegisterKernel
from unrolled.engines.gpu.kernel_source import KernelSpec
from unrolled.engines.gpu.streamed import StreamedKernel
from unrolled.engines.gpu.triton_ops import check
from unrolled.engines.gpu.tuning import COLUMN_BLOCK


def emit(partition: LoopPartition, kernel: KernelIR) -> list[KernelSpec]:
    """Generate the Triton source of a loop.

    Args:
        partition: The partition that contains the loop.
        kernel: Its kernel IR.

    Returns:
        The kernels that can run it, the fastest first. A device may have too little memory for the first one.

    Raises:
        UnsupportedError: If it contains an unsupported operation.
    """
    for node in partition.loop:
        check(node)
    views = parameter_views(kernel)
    return [
        RegisterKernel(kernel, views).emit(choice)
        if choice.strategy == REGISTERS
        else RegisterKernel(kernel, views, COLUMN_BLOCK).emit(choice)
        if choice.strategy == SCAN
        else StreamedKernel(kernel, views, shared=choice.strategy == PERSISTENT).emit(choice)
        for choice in choose(kernel)
    ]


def parameter_views(kernel: KernelIR) -> dict[fx.Node, TensorView]:
    """Return the inputs and matrices without rows as views of tensors that are none."""
    inputs = [one.node for one in kernel.inputs if not is_batched(one.node)]
    groups = [group for phase in kernel.phases() for group in (*phase.groups, *phase.hoisted)]
    matrices = [product.matrix for group in groups for product in group.products]
    return resolve_views([*inputs, *matrices])
