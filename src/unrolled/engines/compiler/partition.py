"""Partition a captured step into a loop over time and what can run before or after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from unrolled.engines.compiler.capture import CapturedStep
from unrolled.engines.compiler.ir import (
    BATCH_SYMBOL,
    ancestors,
    dependents,
    inputs_of,
    is_batched,
    is_product,
)

aten = torch.ops.aten

_CHEAP_OPS = {
    aten.neg.default, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar,
    aten.mul.Tensor, aten.mul.Scalar, aten._to_copy.default,
}  # fmt: skip


@dataclass(frozen=True)
class LoopPartition:
    """A forward or backward graph, split around its loop over time. All lists are in graph order.

    Attributes:
        prologue: Nodes computed before the loop, for all time steps at once or from parameters only.
        loop: Nodes computed in the loop.
        epilogue: Nodes computed after the loop, for all time steps at once.
        inputs: Nodes that the loop reads: values of every time step, or parameters.
        saved: Nodes of the loop whose values of every time step are needed outside of it.
        old_states: States before a step of the loop.
        new_states: States after a step of the loop.
    """

    prologue: list[fx.Node]
    loop: list[fx.Node]
    epilogue: list[fx.Node]
    inputs: list[fx.Node]
    saved: list[fx.Node]
    old_states: list[fx.Node]
    new_states: list[fx.Node]

    def states_only(self) -> LoopPartition:
        """Return the partition with a loop that computes the states and saves nothing."""
        needed = ancestors(self.new_states)
        loop = [node for node in self.loop if node in needed]
        operands = inputs_of(loop)
        return replace(self, loop=loop, inputs=[n for n in self.inputs if n in operands], saved=[])


def split(captured: CapturedStep) -> tuple[LoopPartition, LoopPartition]:
    """Partition the forward and the backward of a captured step.

    Returns:
        The forward and the backward partition.
    """
    splitter = _Splitter(captured)
    backward, recomputed = splitter.backward()
    return splitter.forward(backward, recomputed), backward


class _Splitter:
    """Splits the two graphs of a captured step."""

    def __init__(self, captured: CapturedStep) -> None:
        self.captured = captured
        self.order = {node: k for k, node in enumerate(captured.graph.nodes)}
        self.gradients = [node for node in (*captured.grad_params, captured.grad_x) if node is not None]
        self.from_gradients = dependents([*captured.carries, captured.grad_output], self.order)
        self.from_states = dependents(captured.states, self.order)
        self.forward_loop = ancestors(captured.new_states) & self.from_states

    def in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(set(nodes), key=self.order.__getitem__)

    def backward(self) -> tuple[LoopPartition, set[fx.Node]]:
        """Return the partition of the backward, and the nodes of the forward that its loop computes again.

        The loop computes the carries for the previous time step. It also recomputes what follows from the
        states but isn't part of the forward loop.
        """
        captured, from_states = self.captured, self.from_states
        new_carries = [node for node in captured.grad_states if node is not None]
        from_carries = dependents(captured.carries, self.order)
        needed = ancestors([*self.gradients, *new_carries])
        recomputed = {n for n in needed & from_states - self.from_gradients if n not in self.forward_loop}
        carried = ancestors(new_carries) & (from_carries | recomputed)
        loop = {n for n in carried if n.op == "call_function"} | set(new_carries)
        outside_loop = needed & (from_carries | self.from_gradients | recomputed)
        rest = {n for n in outside_loop if n.op == "call_function"} - loop
        early = {n for n in rest & ancestors(loop) if n not in from_carries and n not in recomputed}
        prologue = rest & ancestors(n for n in early if _time_parallel(n)) & early
        epilogue: set[fx.Node] = set()
        for node in self.in_order(rest - prologue):
            if _time_parallel(node) or not epilogue.isdisjoint(node.all_input_nodes):
                epilogue.add(node)
            else:
                loop.add(node)
        input_slices = {n for n in captured.x.users if n.target is aten.slice.Tensor}
        candidates = self.in_order((self.forward_loop | input_slices) - set(captured.new_states))
        computed_twice = _recomputable(candidates, loop, prologue | epilogue)
        loop |= computed_twice
        epilogue |= self._constant_gradients(loop | prologue | epilogue)
        partition = LoopPartition(
            prologue=self.in_order(prologue),
            loop=self.in_order(loop),
            epilogue=self.in_order(epilogue),
            inputs=self.in_order(inputs_of(loop) - loop - set(captured.carries)),
            saved=self.in_order((inputs_of(epilogue) | set(self.gradients)) & loop),
            old_states=captured.carries,
            new_states=new_carries,
        )
        return partition, recomputed | computed_twice

    def _constant_gradients(self, computed: set[fx.Node]) -> set[fx.Node]:
        """Return what computes the gradients that are not computed yet."""
        missing = ancestors(n for n in self.gradients if n not in computed)
        return {n for n in missing - computed - self.from_states if n.op == "call_function"}

    def forward(self, backward: LoopPartition, recomputed: set[fx.Node]) -> LoopPartition:
        """Return the partition of the forward: what the new states need, and what the backward reads."""
        captured, forward_loop = self.captured, self.forward_loop
        read = inputs_of([*backward.loop, *backward.epilogue, *backward.prologue])
        backward_inputs = read - self.from_gradients - recomputed
        required = ancestors([*captured.new_states, *backward_inputs])
        nodes = [n for n in self.in_order(required) if n.op == "call_function"]
        hoisted = ancestors(n for n in nodes if n not in forward_loop and _time_parallel(n))
        inside = {n for n in nodes if n in forward_loop or (is_batched(n) and n not in hoisted)}
        saved = backward_inputs & inside - set(captured.new_states)  # new states are always stored
        return LoopPartition(
            prologue=[n for n in nodes if n not in inside],
            loop=self.in_order(inside),
            epilogue=[],
            inputs=self.in_order(inputs_of(inside) - inside - set(captured.states)),
            saved=self.in_order(saved),
            old_states=captured.states,
            new_states=captured.new_states,
        )


def _recomputable(nodes: list[fx.Node], loop: set[fx.Node], around: set[fx.Node]) -> set[fx.Node]:
    """Select forward nodes that the backward loop should recompute instead of reading them.

    Recomputing pays for a single cheap operation on values that the loop reads anyway, or that are the same
    in every row. It costs nothing for slices of the input.

    Args:
        nodes: Candidates, in graph order.
        loop: Nodes of the backward loop.
        around: Nodes of the backward's prologue and epilogue.
    """
    loop_inputs = inputs_of(loop)
    recomputable: set[fx.Node] = set()
    for node in nodes:
        operands = node.all_input_nodes
        available = all((n in loop_inputs and n not in recomputable) or not is_batched(n) for n in operands)
        is_input_slice = node.target is aten.slice.Tensor and operands[0].op == "placeholder"
        cheap = is_input_slice or (node.target in _CHEAP_OPS and available)
        if cheap and node in loop_inputs and around.isdisjoint(node.users):
            recomputable.add(node)
    return recomputable


def _time_parallel(node: fx.Node) -> bool:
    """Return whether a node is faster for all time steps at once: products, and sums over the batch."""
    value = node.meta["val"]
    return is_product(node) or not (is_batched(node) and value.shape[0] == BATCH_SYMBOL)
