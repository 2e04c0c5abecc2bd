"""Split a captured step around its loop over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from unrolled.engines.compiler.capture import Captured
from unrolled.engines.compiler.ir import BATCH_SYMBOL, ancestors, dependents, inputs_of, per_row

aten = torch.ops.aten

_CHEAP = {
    aten.neg.default, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar,
    aten.mul.Tensor, aten.mul.Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class LoopPartition:
    """A graph around its loop, forward or backward.

    Attributes:
        before: nodes to compute for all time steps at once, first; those of parameters alone too.
        loop: nodes to compute in the loop, in order.
        after: nodes to compute for all time steps at once, last.
        reads: nodes that the loop takes from outside: of every time step, or parameters.
        keeps: nodes of the loop whose value of every time step is needed outside.
        old, new: the states before and after a step of the loop.
    """

    before: list[fx.Node]
    loop: list[fx.Node]
    after: list[fx.Node]
    reads: list[fx.Node]
    keeps: list[fx.Node]
    old: list[fx.Node]
    new: list[fx.Node]

    def alone(self) -> LoopPartition:
        """The loop as it is where nothing but its states is wanted."""
        wanted = ancestors(self.new)
        loop = [node for node in self.loop if node in wanted]
        read = inputs_of(loop)
        return replace(self, loop=loop, reads=[node for node in self.reads if node in read], keeps=[])


def split(captured: Captured) -> tuple[LoopPartition, LoopPartition]:
    """Split the forward and the backward of a step around their loops."""
    order = {node: k for k, node in enumerate(captured.graph.nodes)}
    gradients = [node for node in (*captured.grad_params, captured.grad_x) if node is not None]
    back_new = [node for node in captured.grad_states if node is not None]

    from_gradients = dependents([*captured.carries, captured.grad_output], order)
    from_carries = dependents(captured.carries, order)
    from_states = dependents(captured.states, order)

    def in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(set(nodes), key=order.__getitem__)

    # the backward: its loop computes the carries of the time step before, and computes anew what
    # follows from the values that the forward keeps
    wanted = ancestors([*gradients, *back_new])
    forward_loop = ancestors(captured.new_states) & from_states
    anew = {n for n in wanted & from_states - from_gradients if n not in forward_loop}
    carried = ancestors(back_new)
    loop = {n for n in carried & (from_carries | anew) if n.op == "call_function"} | set(back_new)
    rest = {n for n in wanted & (from_carries | from_gradients | anew) if n.op == "call_function"} - loop
    early = {n for n in rest & ancestors(loop) if n not in from_carries and n not in anew}
    before = rest & ancestors(n for n in early if _time_parallel(n)) & early
    after: set[fx.Node] = set()
    for node in in_order(rest - before):
        if _time_parallel(node) or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
        else:
            loop.add(node)
    columns = {n for n in captured.x.users if n.target is aten.slice.Tensor}
    twice = _recomputable(in_order((forward_loop | columns) - set(captured.new_states)), loop, before | after)
    loop |= twice
    anew |= twice
    made = loop | before | after
    for node in in_order(ancestors(n for n in gradients if n not in made)):  # they are constants
        if node.op == "call_function" and node not in made and node not in from_states:
            after.add(node)
    outside = {n for node in after for n in node.all_input_nodes} | set(gradients)
    backward = LoopPartition(
        before=in_order(before),
        loop=in_order(loop),
        after=in_order(after),
        reads=in_order(inputs_of(loop) - loop - set(captured.carries)),
        keeps=in_order(outside & loop),
        old=captured.carries,
        new=back_new,
    )

    # the forward: what its states need, and what the backward reads of it
    read_back = {n for n in inputs_of([*loop, *after, *before]) if n not in from_gradients and n not in anew}
    nodes = [n for n in in_order(ancestors([*captured.new_states, *read_back])) if n.op == "call_function"]
    hoisted = ancestors(n for n in nodes if n not in forward_loop and _time_parallel(n))
    inside = {n for n in nodes if n in forward_loop or (per_row(n) and n not in hoisted)}
    forward = LoopPartition(
        before=[n for n in nodes if n not in inside],
        loop=in_order(inside),
        after=[],
        reads=in_order(inputs_of(inside) - inside - set(captured.states)),
        keeps=in_order(read_back & inside - set(captured.new_states)),  # those are stored anyway
        old=captured.states,
        new=captured.new_states,
    )
    return forward, backward


def _recomputable(nodes: list[fx.Node], loop: set[fx.Node], around: set[fx.Node]) -> set[fx.Node]:
    """Of the nodes of the forward loop, those that the backward loop had better compute again than read.

    That is one operation on values that it reads anyway, or on what is the same in every row; or none, where
    they are columns of the input.
    """
    read = inputs_of(loop)
    found: set[fx.Node] = set()
    for node in nodes:
        given = node.all_input_nodes
        known = all((n in read and n not in found) or not per_row(n) for n in given)
        columns = node.target is aten.slice.Tensor and given[0].op == "placeholder"
        cheap = columns or (node.target in _CHEAP and known)
        if cheap and node in read and around.isdisjoint(node.users):
            found.add(node)
    return found


def _time_parallel(node: fx.Node) -> bool:
    """Whether a node is better computed for all time steps at once: products, and sums over the batch."""
    value = node.meta["val"]
    return node.target is aten.mm.default or not (per_row(node) and value.shape[0] == BATCH_SYMBOL)
