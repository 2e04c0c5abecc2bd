"""Generate the Triton source of a loop from its kernel IR, and choose where its values are."""

from __future__ import annotations

from torch import fx

from unrolled.engines.compiler.ir import is_batched
from unrolled.engines.compiler.kernel_ir import KernelIR
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.views import TensorView, resolve_views
from unrolled.engines.gpu.in_registers import RegisterKernel
from unrolled.engines.gpu.kernel_source import KernelSpec
from unrolled.engines.gpu.pieces import Pieces
from unrolled.engines.gpu.streamed import StreamedKernel
from unrolled.engines.gpu.triton_ops import check
from unrolled.engines.gpu.tuning import MAX_BYTES, MAX_COLUMNS, MAX_PIECES


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
    kernels = [StreamedKernel(kernel, views).emit()]
    if fits_in_registers(kernel):
        kernels.insert(0, RegisterKernel(kernel, views).emit())
    return kernels


def fits_in_registers(kernel: KernelIR) -> bool:
    """Return whether values of a step may be kept in registers, and the matrices of a loop on chip."""
    pieces = Pieces(kernel, MAX_PIECES)
    return pieces.fit and pieces.columns <= MAX_COLUMNS and pieces.matrix_bytes <= MAX_BYTES


def parameter_views(kernel: KernelIR) -> dict[fx.Node, TensorView]:
    """Return the inputs and matrices without rows as views of tensors that are none."""
    inputs = [one.node for one in kernel.inputs if not is_batched(one.node)]
    groups = [group for phase in kernel.phases() for group in (*phase.groups, *phase.hoisted)]
    matrices = [product.matrix for group in groups for product in group.products]
    return resolve_views([*inputs, *matrices])
