"""Gradients that reach a state of a single-step cell from inside of the step.

A tensor hook on a state that a cell returned sees the sum of all its gradients. If the cell computes another
state from this very tensor, as an LSTM computes h from c, part of them comes from inside of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from unrolled.layers.tensors import tensors

_MAX_NODES = 2000  # of the graph of one step


def on_internal_gradient(
    outputs: Sequence[Tensor], inputs: Any, callback: Callable[[int, Tensor], None]
) -> None:
    """Call a function with each gradient that an output of a call gets from other outputs of the same call.

    Args:
        outputs: What the call returned.
        inputs: Its arguments, where its part of the autograd graph ends.
        callback: Receives the index of the output and the gradient, during a backward pass.
    """
    index_of = {(tensor.grad_fn, tensor.output_nr): k for k, tensor in enumerate(outputs) if tensor.grad_fn}
    visited: set[Any] = {tensor.grad_fn for tensor in tensors(inputs)}
    pending: list[Any] = [node for node, _ in index_of]
    while pending and len(visited) < _MAX_NODES:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        internal = {}
        for position, edge in enumerate(node.next_functions):
            if edge in index_of:
                internal[position] = index_of[edge]
            pending.append(edge[0])
        if internal:
            node.register_hook(_reporter(internal, callback))


def _reporter(internal: dict[int, int], callback: Callable[[int, Tensor], None]) -> Any:
    def report(gradients: Sequence[Tensor | None], _: Any) -> None:
        for position, index in internal.items():
            gradient = gradients[position]
            if gradient is not None:
                callback(index, gradient)

    return report
