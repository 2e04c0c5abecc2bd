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

ROUNDS = 26
_TRIED = 6  # placements that are laid out in full
_SPACINGS = (1.0, 1.2, 1.5)
_LABEL_ON_LINE, _CROSSING = 1000, 200


def layout(diagram: Diagram) -> Layout:
    """Lay out a diagram. The same diagram always gives the same layout, on every platform.

    Args:
        diagram: The diagram.

    Returns:
        Its layout. It is cached: diagrams that only differ in their sizes or numbers share one.
    """
    return _layout(drawn_part(diagram))


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
def _layout(diagram: Diagram) -> Layout:
    router = Router(wire(diagram))
    stored = stored_placement(router.wiring)
    placements = [stored] if stored else search(router, ROUNDS)[:_TRIED]
    return best_layout(diagram, router, placements).layout


@dataclass(frozen=True)
class Rated:
    """A layout, its placement, and how good it is: first few labels without a place, then a low cost."""

    rating: tuple[int, float]
    placement: Placement
    layout: Layout


def best_layout(diagram: Diagram, router: Router, placements: Sequence[Placement]) -> Rated:
    """Lay out each of some placements and return the best one.

    Args:
        diagram: The diagram.
        router: The router of its wiring.
        placements: The placements.
    """
    best: Rated | None = None
    for spacing in _SPACINGS:
        for placement in placements:
            geometry = Geometry(diagram, router, placement, spacing)
            placed, missing, on_lines = place_labels(diagram, geometry.layout())
            cost = float(geometry.cost + _LABEL_ON_LINE * on_lines + _CROSSING * placed.crossings)
            rated = Rated((missing, cost + placed.width + placed.height), placement, placed)
            if best is None or rated.rating < best.rating:
                best = rated
        assert best is not None
        if not best.rating[0]:
            break
    assert best is not None
    return best
