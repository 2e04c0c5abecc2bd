"""Indices of elements: which elements of one tensor another one uses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unrolled.tracing.provenance import Node

Index = range | tuple[int, ...]  # a range where the elements are next to each other


def as_index(numbers: Sequence[int]) -> Index:
    """Return numbers as a range if they are consecutive, else as a tuple."""
    if isinstance(numbers, range) and numbers.step == 1:
        return numbers
    if numbers:
        consecutive = range(numbers[0], numbers[0] + len(numbers))
        if list(numbers) == list(consecutive):
            return consecutive
    return tuple(numbers)


def compose(element_map: Index | None, index: Index) -> Index:
    """Return the elements of an operand that the elements ``index`` of its result use.

    Args:
        element_map: For each element of the result, the element of the operand; None for the same one.
        index: The elements of the result.
    """
    if element_map is None:
        return index
    if isinstance(index, range):
        return as_index(element_map[index.start : index.stop])
    return as_index([element_map[element] for element in index])


def select(flat: Tensor, index: Index) -> Tensor:
    """Return some elements of a flat tensor."""
    return flat[index.start : index.stop] if isinstance(index, range) else flat[list(index)]


class ElementMaps:
    """The element maps of computation graphs as indices. Those of moved elements are cached.

    Graphs that share a cache of moves also share the tensors that are converted here.
    """

    def __init__(self) -> None:
        self._moves: dict[int, tuple[Tensor, list[int], list[Index]]] = {}

    def pieces(self, node: Node, index: Index) -> list[tuple[int, Index]]:
        """Split elements of a moved tensor into runs, each from one operand.

        Returns:
            The number of the operand, and the elements of that operand, for each run.
        """
        assert node.source_operands is not None
        key = id(node.source_operands)
        if key not in self._moves:
            maps = [as_index(part.tolist()) for part in node.element_maps if part is not None]
            self._moves[key] = (node.source_operands, node.source_operands.tolist(), maps)
        _, operands, maps = self._moves[key]
        if len(maps) == 1:
            return [(0, compose(maps[0], index))]
        runs: list[tuple[int, list[int]]] = []
        for element in index:
            operand = operands[element]
            if not runs or runs[-1][0] != operand:
                runs.append((operand, []))
            runs[-1][1].append(maps[operand][element])
        return [(operand, as_index(elements)) for operand, elements in runs]


def operand_map(node: Node, operand: int) -> Index | None:
    """Return the element map of an operand of an elementwise function; None if it is the identity."""
    element_map = node.element_maps[operand]
    if element_map is None:
        return None
    index = as_index(element_map.tolist())
    return None if index == range(node.operands[operand].numbers.numel()) else index
