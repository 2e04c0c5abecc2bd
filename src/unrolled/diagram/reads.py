"""Which parts of each tensor of a step are read: where to push slices down, and where to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from unrolled.diagram.indices import ElementMaps, Index, operand_map
from unrolled.tracing.provenance import Node

ELEMENTWISE = ("infix", "negated", "call")


@dataclass(eq=False)
class _Reads:
    """How a node is read.

    Attributes:
        by_layers: The elements that weighted sums read.
        by_others: The elements that anything else reads.
    """

    by_layers: set[Index] = field(default_factory=set)
    by_others: set[Index] = field(default_factory=set)


def nodes_read_whole(
    outputs: Sequence[Node],
    resolve: Callable[[Node], Node],
    is_static: Callable[[Node], bool],
    maps: ElementMaps,
) -> set[int]:
    """Find the nodes whose slices can't be computed separately.

    A slice of an elementwise function or of weighted sums can be pushed down to its operands, so that each
    gate has a weighted sum of its own. That isn't possible if the whole tensor is read as well, or if slices
    overlap.

    Args:
        outputs: The nodes of the new states.
        resolve: Returns the node that computes a node, for one that only stands for it.
        is_static: Whether a node depends neither on the input nor on a state.
        maps: The element maps.

    Returns:
        The ids of the nodes.
    """
    order = _consumers_first(outputs, resolve)
    reads = {id(node): _Reads() for node in order}
    whole: set[int] = set()

    def read(node: Node, index: Index | None, by_layer: bool = False) -> None:
        node = resolve(node)
        if node.kind != "constant":
            of_node = reads[id(node)]
            elements = range(node.numbers.numel()) if index is None else index
            (of_node.by_layers if by_layer else of_node.by_others).add(elements)

    for output in outputs:
        read(output, None)
    for node in order:
        if is_static(node):
            continue
        of_node = reads[id(node)]
        if node.kind == "moved":
            for by_layer, indices in ((True, of_node.by_layers), (False, of_node.by_others)):
                for index in indices:
                    for number, elements in maps.pieces(node, index):
                        read(node.operands[number], elements, by_layer)
            continue
        if node.kind == "value" or node.kind == "rows" or _reads_whole(of_node):
            whole.add(id(node))
            indices = {range(node.numbers.numel())}
        else:
            indices = of_node.by_layers | of_node.by_others
        for number, operand in enumerate(node.operands):
            if node.kind not in ELEMENTWISE or resolve(operand).kind == "constant":
                read(operand, None, by_layer=node.kind == "sum")
            else:
                same_shape = operand_map(node, number) is None
                for part in indices if same_shape else (None,):
                    read(operand, part)
    return whole


def _reads_whole(reads: _Reads) -> bool:
    """Return whether all elements of a node must be computed together.

    This is so if the elements that other nodes read overlap or aren't ranges.
    """
    indices = reads.by_layers | reads.by_others
    if len(indices) > 1 and not reads.by_others:
        return True  # the blocks of a block-diagonal weight, which are drawn as one
    end = 0
    for index in sorted(indices, key=lambda index: index[0] if index else 0):
        if not isinstance(index, range) or index.start < end:
            return True
        end = index.stop
    return False


def _consumers_first(outputs: Sequence[Node], resolve: Callable[[Node], Node]) -> list[Node]:
    """Return all nodes that the outputs depend on, each before its operands."""
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(resolve(output), False) for output in outputs]
    while stack:
        node, operands_done = stack.pop()
        if operands_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(resolve(operand), False) for operand in node.operands]
    return order[::-1]
