"""The layout of a diagram: where its nodes, lines and texts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from unrolled.diagram.geometry import Geometry
from unrolled.diagram.labels import place_labels
from unrolled.diagram.lanes import wire
from unrolled.diagram.model import Diagram, DiagramNode, DiagramState, Term
from unrolled.diagram.placed import Layout
from unrolled.diagram.routing import Placement, Router
from unrolled.diagram.search import search
from unrolled.diagram.stored import stored_placement
from unrolled.diagram.upright import turned_upright

ORIENTATIONS = ("horizontal", "vertical")
ROUNDS = 22
_TRIED = 6  # placements that are laid out in full
_SPACINGS = (1.0, 1.2, 1.5)
_LABEL_ON_LINE, _CROSSING = 1000, 200


def layout(diagram: Diagram, orientation: str = "horizontal") -> Layout:
    """Lay out a diagram. The same diagram always gives the same layout, on every platform.

    Args:
        diagram: The diagram.
        orientation: ``"horizontal"``, or ``"vertical"`` for narrow screens: then time runs down.

    Returns:
        Its layout. It is cached: diagrams that only differ in their sizes or numbers share one.

    Raises:
        ValueError: If there is no such orientation.
    """
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be horizontal or vertical, but got {orientation!r}.")
    return _layout(drawn_part(diagram), orientation == "vertical")


def drawn_part(diagram: Diagram) -> Diagram:
    """Return the diagram without anything that doesn't change its layout."""
    nodes = tuple(
        DiagramNode(
            node.id,
            node.kind,
            node.glyph,
            node.name,
            tuple(
                Term(t.source, weighted=t.weighted, sign=t.sign, normalized=t.normalized) for t in node.terms
            ),
        )
        for node in diagram.nodes
    )
    states = tuple(DiagramState(state.name, state.end, 0) for state in diagram.states)
    return Diagram("", states, nodes, 0)


@lru_cache(maxsize=256)
def _layout(diagram: Diagram, upright: bool) -> Layout:
    router = Router(wire(diagram), narrow=upright)
    stored = None if upright else stored_placement(router.wiring)
    placements = [stored] if stored else search(router, ROUNDS)[:_TRIED]
    return best_layout(diagram, router, placements, upright).layout


@dataclass(frozen=True)
class Rated:
    """A layout, its placement, and how good it is: first few labels without a place, then a low cost."""

    rating: tuple[int, float]
    placement: Placement
    layout: Layout


def best_layout(
    diagram: Diagram, router: Router, placements: Sequence[Placement], upright: bool = False
) -> Rated:
    """Lay out each of some placements and return the best one.

    Args:
        diagram: The diagram.
        router: The router of its wiring.
        placements: The placements.
        upright: Whether time runs down.
    """
    best: Rated | None = None
    for spacing in _SPACINGS:
        for placement in placements:
            geometry = Geometry(diagram, router, placement, spacing, upright)
            bare = turned_upright(geometry.layout()) if upright else geometry.layout()
            placed, missing, on_lines = place_labels(diagram, bare)
            cost = float(geometry.cost + _LABEL_ON_LINE * on_lines + _CROSSING * placed.crossings)
            rated = Rated((missing, cost + placed.width + placed.height), placement, placed)
            if best is None or rated.rating < best.rating:
                best = rated
        assert best is not None
        if not best.rating[0]:
            break
    assert best is not None
    return best
