"""How nodes are connected: lanes for states, rails for what layers read, edges for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from unrolled.diagram.model import Diagram, DiagramNode

INPUT = "x"
BEFORE = "before:"
_SPINE_COST = {
    "layer": 6,
    "function": 3,
}  # an operation costs 1: a state passes through as few layers as possible
_COMPLEMENT_COST = 20  # "1−" computes a gate, which is not a part of the state's path


@dataclass(frozen=True)
class Tap:
    """A line from a rail up to a node."""

    rail: str
    node: int
    weighted: bool
    sign: int


@dataclass(frozen=True)
class Edge:
    """A line from a source to a node, or to the right end of the diagram.

    Attributes:
        source: Id of a node, ``"x"`` or ``"before:NAME"``.
        start: Index of the source node; None if the source is the input or a state before the step.
        end: Index of the node that reads it; None at the right end.
        weighted: Whether the whole vector is read.
        sign: 1, or -1 if it is subtracted.
        state: The state whose new value it is, at the right end.
        rail: The rail that it leads to, if a node feeds a rail.
    """

    source: str
    start: int | None
    end: int | None
    weighted: bool = False
    sign: int = 1
    state: str | None = None
    rail: str | None = None


@dataclass(frozen=True)
class Wiring:
    """What is drawn as a lane, a rail, a tap or an edge.

    Attributes:
        ids: Id of each node.
        kinds: Kind of each node.
        lanes: States with a straight lane. Their new value is computed from the old one element by element.
        floor: The other states. Their old value enters on a rail, their new value leaves at the bottom.
        spines: For each lane, the nodes on it in their order.
        lane_of: For each node, the index of its lane, or -1.
        rails: The sources that run below the nodes.
        groups: The rails by line: rails that the same nodes read are one line.
        taps: Lines from rails to nodes.
        edges: All other lines, except those along a lane.
    """

    ids: tuple[str, ...]
    kinds: tuple[str, ...]
    lanes: tuple[str, ...]
    floor: tuple[str, ...]
    spines: tuple[tuple[int, ...], ...]
    lane_of: tuple[int, ...]
    rails: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    taps: tuple[Tap, ...]
    edges: tuple[Edge, ...]

    def group_of(self, rail: str) -> int:
        """Return the index of the line that a rail is part of."""
        return next(index for index, group in enumerate(self.groups) if rail in group)

    def leaves_lane(self, rail: str) -> bool:
        """Whether a rail branches off the lane of a state."""
        return rail.startswith(BEFORE) and rail.removeprefix(BEFORE) in self.lanes


def wire(diagram: Diagram) -> Wiring:
    """Decide how each connection of a diagram is drawn.

    Args:
        diagram: The diagram.

    Returns:
        Its wiring.
    """
    index = {node.id: k for k, node in enumerate(diagram.nodes)}
    spines = _spines(diagram)
    names = [state.name for state in diagram.states]
    lanes = tuple(name for name in names if name in spines)
    floor = tuple(name for name in names if name not in spines)
    lane_of = [-1] * len(diagram.nodes)
    for lane, name in enumerate(lanes):
        for node in spines[name]:
            lane_of[node] = lane
    rails = _rails(diagram, lanes, floor)
    taps, edges = _connections(diagram, index, rails, floor)
    for rail in rails:
        if rail in index:
            edges.append(Edge(rail, index[rail], None, True, rail=rail))
    along = {
        (f"{BEFORE}{name}" if k == 0 else diagram.nodes[spines[name][k - 1]].id, node)
        for name in lanes
        for k, node in enumerate(spines[name])
    }
    edges = [edge for edge in edges if (edge.source, edge.end) not in along or edge.weighted]
    edges += [
        Edge(state.end, index.get(state.end), None, state=state.name)
        for state in diagram.states
        if state.name in floor
    ]
    return Wiring(
        ids=tuple(index),
        kinds=tuple(node.kind for node in diagram.nodes),
        lanes=lanes,
        floor=floor,
        spines=tuple(spines[name] for name in lanes),
        lane_of=tuple(lane_of),
        rails=rails,
        groups=_groups(rails, taps, index, floor),
        taps=tuple(taps),
        edges=tuple(edges),
    )


def _spines(diagram: Diagram) -> dict[str, tuple[int, ...]]:
    """Find the path of each state from its old value to its new one, element by element."""
    taken: set[int] = set()
    spines: dict[str, tuple[int, ...]] = {}
    for state in (*diagram.states[1:], diagram.states[0]):
        old = BEFORE + state.name
        paths: dict[str, tuple[int, tuple[int, ...]]] = {old: (0, ())}
        for k, node in enumerate(diagram.nodes):
            if k in taken:
                continue
            found = [paths[t.source] for t in node.terms if not t.weighted and t.source in paths]
            if found:
                cost, path = min(found)
                paths[node.id] = (cost + _step_cost(node), (*path, k))
        if state.end in paths:
            spines[state.name] = paths[state.end][1]
            taken.update(spines[state.name])
    return spines


def _step_cost(node: DiagramNode) -> int:
    return _SPINE_COST.get(node.kind, 1) + (_COMPLEMENT_COST if node.glyph == "1−" else 0)


def _rails(diagram: Diagram, lanes: tuple[str, ...], floor: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the sources that run as rails below: what layers read, and what has no lane."""
    readers: dict[str, set[str]] = {}
    weighted: dict[str, set[str]] = {}
    for node in diagram.nodes:
        for term in node.terms:
            if term.source is not None:
                readers.setdefault(term.source, set()).add(node.id)
                if term.weighted:
                    weighted.setdefault(term.source, set()).add(node.id)
    rails = [INPUT] if INPUT in readers or any(s.end == INPUT for s in diagram.states) else []
    for k, state in enumerate(diagram.states):
        old = BEFORE + state.name
        is_read = old in readers or any(other.end == old for other in diagram.states)
        count = len(weighted.get(old, ()))
        if (state.name in floor and is_read) or count > 1 or (k == 0 and count):
            rails.append(old)
    rails += [node.id for node in diagram.nodes if len(weighted.get(node.id, ())) > 1]
    return tuple(rails)


def _connections(
    diagram: Diagram, index: dict[str, int], rails: tuple[str, ...], floor: tuple[str, ...]
) -> tuple[list[Tap], list[Edge]]:
    old_values = {BEFORE + name for name in floor}
    taps: dict[tuple[str, int], Tap] = {}
    edges: dict[tuple[str, int], Edge] = {}
    for k, node in enumerate(diagram.nodes):
        for term in node.terms:
            source = term.source
            if source is None:
                continue
            below = source == INPUT or source in old_values
            if source in rails and (term.weighted or below):
                taps.setdefault((source, k), Tap(source, k, term.weighted, term.sign))
            else:
                edges.setdefault((source, k), Edge(source, index.get(source), k, term.weighted, term.sign))
    return list(taps.values()), list(edges.values())


def _groups(
    rails: tuple[str, ...], taps: list[Tap], index: dict[str, int], floor: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    """Join rails that the same nodes read through weights into one line; the input runs lowest."""
    lines: dict[tuple[object, ...], list[str]] = {}
    entered: set[tuple[object, ...]] = set()  # lines that start at the left end, for a state without a lane
    for rail in rails:
        of_rail = [tap for tap in taps if tap.rail == rail]
        key: tuple[object, ...] = tuple(sorted(tap.node for tap in of_rail))
        enters = rail.startswith(BEFORE) and rail.removeprefix(BEFORE) in floor
        if rail in index or not all(tap.weighted for tap in of_rail) or (enters and key in entered):
            key = (rail,)
        if enters:
            entered.add(key)
        lines.setdefault(key, []).append(rail)
    groups = [tuple(line) for line in lines.values()]
    return tuple(sorted(groups, key=lambda group: INPUT in group))
