"""Groups of nodes that fold into one, so that the diagram of a large cell stays readable."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from unrolled.diagram.model import Diagram, DiagramNode, Group, Term

READABLE = 15  # nodes in a diagram without groups
_SHORTEST_PASS = 3  # nodes


def find_groups(diagram: Diagram) -> tuple[Group, ...]:
    """Find the groups of a diagram.

    A group is one of several passes through layers with the same parameters, or a quantity of the step
    together with the unnamed nodes that nothing else reads.

    Args:
        diagram: The diagram. It has no groups if it is small.
    """
    if len(diagram.nodes) <= READABLE:
        return ()
    groups = _passes(diagram)
    grouped = {node for group in groups for node in group.nodes}
    return (*groups, *_quantities(diagram, grouped))


def fold(diagram: Diagram, open_groups: Collection[str] = ()) -> Diagram:
    """Replace groups by one node each.

    The node has the id and the values of the last node of its group. Its terms are the sources that the group
    reads.

    Args:
        diagram: The diagram.
        open_groups: The names of the groups to leave as they are.

    Returns:
        The diagram. It has the same groups.

    Raises:
        KeyError: If there is no group with such a name.
    """
    names = {group.name for group in diagram.groups}
    for name in open_groups:
        if name not in names:
            raise KeyError(f"no group {name!r} in this diagram: it has {', '.join(names) or 'none'}")
    nodes = {node.id: node for node in diagram.nodes}
    for group in diagram.groups:
        if group.name not in open_groups:
            members = [nodes.pop(name) for name in group.nodes]
            nodes[members[-1].id] = _folded(group, members)
    ordered = [nodes[node.id] for node in diagram.nodes if node.id in nodes]
    return replace(diagram, nodes=tuple(ordered))


def _folded(group: Group, members: list[DiagramNode]) -> DiagramNode:
    output = members[-1]
    terms: dict[tuple[str, bool], Term] = {}
    for node in members:
        for term in node.terms:
            if term.source is not None and term.source not in group.nodes:
                terms.setdefault((term.source, term.weighted), Term(term.source, weighted=term.weighted))
    return DiagramNode(
        output.id,
        "layer",
        group.title,
        output.name,
        tuple(terms.values()),
        output.range,
        output.value,
        formula="…",
        operation="group",
    )


def _readers(diagram: Diagram) -> dict[str, list[str]]:
    """Return the ids of the nodes that read each node. A new state is read by its state."""
    readers: dict[str, list[str]] = {node.id: [] for node in diagram.nodes}
    for node in diagram.nodes:
        for source in {term.source for term in node.terms}:
            if source in readers:
                readers[source].append(node.id)
    for state in diagram.states:
        if state.end in readers:
            readers[state.end].append(f"after:{state.name}")
    return readers


def _passes(diagram: Diagram) -> list[Group]:
    """Find the longest run of equal passes."""
    finder = _PassFinder(diagram)
    count = len(diagram.nodes)
    longest: list[tuple[str, ...]] = []
    for length in range(_SHORTEST_PASS, count // 2 + 1):
        for start in range(count - 2 * length + 1):
            end = start + length
            while end + length <= count and finder.is_same_pass(start, end, length):
                end += length
            if end - start < 2 * length or end - start <= sum(map(len, longest)):
                continue
            passes = [
                tuple(node.id for node in diagram.nodes[k : k + length]) for k in range(start, end, length)
            ]
            if all(map(finder.has_one_output, passes)):
                longest = passes
    return [Group(f"pass {k}", f"pass {k}", nodes) for k, nodes in enumerate(longest, 1)]


class _PassFinder:
    """Compares parts of a diagram."""

    def __init__(self, diagram: Diagram) -> None:
        positions = {node.id: k for k, node in enumerate(diagram.nodes)}
        self._readers = _readers(diagram)
        self._forms = [(node.kind, node.glyph, node.operation) for node in diagram.nodes]
        self._parameters = [{t.parameter for t in node.terms if t.parameter} for node in diagram.nodes]
        self._sources = [
            [positions[term.source] for term in node.terms if term.source in positions]
            for node in diagram.nodes
        ]

    def is_same_pass(self, first: int, second: int, length: int) -> bool:
        """Return whether nodes from two positions on are the same operations with the same parameters."""
        has_parameters = False
        for a, b in zip(range(first, first + length), range(second, second + length), strict=True):
            if self._forms[a] != self._forms[b]:
                return False
            inner_a = [source - first for source in self._sources[a] if source >= first]
            inner_b = [source - second for source in self._sources[b] if source >= second]
            both = self._parameters[a] & self._parameters[b]
            if inner_a != inner_b or (not both and self._parameters[a] | self._parameters[b]):
                return False
            has_parameters |= bool(both)
        return has_parameters

    def has_one_output(self, nodes: tuple[str, ...]) -> bool:
        """Return whether only the last of some nodes is read by others."""
        return all({*self._readers[node]} <= {*nodes} for node in nodes[:-1])


def _quantities(diagram: Diagram, grouped: set[str]) -> list[Group]:
    """Find the named nodes with unnamed ones that nothing else reads.

    A new state that arithmetic computes stays a line through its operations, and so does the output.
    """
    readers = _readers(diagram)
    by_id = {node.id: node for node in diagram.nodes}
    ends = {state.end for state in diagram.states}
    hosts: dict[str, str] = {}
    for node in reversed(diagram.nodes):
        if node.name or node.id in grouped or len(readers[node.id]) != 1 or node.id in ends:
            continue
        reader = by_id[readers[node.id][0]]
        is_line = reader.id in ends and (reader.kind != "function" or reader.id == diagram.states[0].end)
        if reader.id in hosts:
            hosts[node.id] = hosts[reader.id]
        elif reader.name and not is_line and reader.id not in grouped:
            hosts[node.id] = reader.id
    groups = []
    for host in [node for node in diagram.nodes if node.id in hosts.values()]:
        members = [node.id for node in diagram.nodes if hosts.get(node.id) == host.id]
        inner = [by_id[member].glyph for member in members if by_id[member].kind in ("layer", "function")]
        glyph = inner[-1] if inner and host.kind == "operation" else host.glyph
        groups.append(Group(host.name, f"{glyph} …", (*members, host.id)))
    return groups
