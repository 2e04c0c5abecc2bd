"""Search for good placements of the diagrams of all cells, and store them in the package.

Run it after a change of a cell, or of how diagrams are wired or rated, with the names of cells or for all:
``python benchmarks/diagrams.py [CELL ...]``. For all it takes about 20 minutes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import unrolled as ur
from unrolled.diagram import stored
from unrolled.diagram.graph import build
from unrolled.diagram.groups import fold
from unrolled.diagram.lanes import wire
from unrolled.diagram.layout import Rated, best_layout, drawn_part
from unrolled.diagram.model import Diagram
from unrolled.diagram.routing import Router
from unrolled.diagram.search import search

PATH = Path(stored.__file__).with_name(stored.FILE)
SEEDS, ROUNDS, TRIED = 10, 60, 12


def diagrams(cell: str) -> list[Diagram]:
    """Return the whole diagram of a cell and, if it has groups, the folded one."""
    layer = ur.Recurrent(getattr(ur.cells, cell), 3, 4)
    whole = build(ur.trace(layer, torch.randn(2, 3)).layers[0]).diagram
    return list(dict.fromkeys((whole, fold(whole))))


def find(diagram: Diagram) -> tuple[str, Rated]:
    """Return the key of a diagram's wiring and the best layout of several searches."""
    router = Router(wire(diagram))
    placements = [p for seed in range(1, SEEDS + 1) for p in search(router, ROUNDS, seed)[:TRIED]]
    return stored.wiring_key(router.wiring), best_layout(diagram, router, list(dict.fromkeys(placements)))


def main() -> None:
    """Search for the placements of the cells that are named, or of all."""
    chosen = sys.argv[1:]
    found = json.loads(PATH.read_text()) if chosen else {}
    for cell in chosen or ur.cells.__all__:
        for diagram in diagrams(cell):
            key, best = find(drawn_part(diagram))
            place = best.placement
            found[key] = [place.columns, place.rows, place.order]
            size = f"{best.layout.width:.0f}x{best.layout.height:.0f}"
            print(
                f"{cell:24} {len(diagram.nodes):3} nodes {best.layout.crossings:3} crossings {size}",
                flush=True,
            )
    lines = [f'"{key}": {json.dumps(place, separators=(",", ":"))}' for key, place in sorted(found.items())]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
