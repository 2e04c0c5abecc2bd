"""The layout of diagrams: of the library's cells, and of random ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unrolled as ur
from diagram.layout_checks import check_layout
from diagram.random_diagrams import random_diagram
from unrolled.diagram.graph import build
from unrolled.diagram.groups import fold
from unrolled.diagram.lanes import wire
from unrolled.diagram.layout import ORIENTATIONS, ROUNDS, layout
from unrolled.diagram.model import Diagram, DiagramNode, DiagramState, Term
from unrolled.diagram.placed import Layout
from unrolled.diagram.routing import Router
from unrolled.diagram.search import first_placement, search
from unrolled.diagram.stored import stored_placement

FEW = ("LSTM", "GRU", "RNN", "PeepholeLSTM")
LARGEST = 3000  # evaluated placements: about a second


def diagram_of(cell: str, hidden: int = 4, **options: object) -> Diagram:
    layer = ur.Recurrent(getattr(ur.cells, cell), 3, hidden, **options)
    return build(ur.trace(layer, torch.randn(2, 3)).layers[0]).diagram


def unlabeled(diagram: Diagram, placed: Layout) -> list[str]:
    """The nodes whose number is shown nowhere."""
    ends = {state.end for state in diagram.states}
    return [
        node.id
        for node, place in zip(diagram.nodes, placed.nodes, strict=True)
        if node.kind != "layer" and node.id not in ends and place.label is None
    ]


@pytest.mark.parametrize("cell", FEW)
def test_a_few_cells(cell: str) -> None:
    diagram = diagram_of(cell)
    placed = layout(diagram)
    check_layout(diagram, placed)
    assert not unlabeled(diagram, placed)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ur.cells.__all__)
def test_every_cell(cell: str) -> None:
    whole = diagram_of(cell)
    for diagram in dict.fromkeys((whole, fold(whole))):
        for orientation in ORIENTATIONS:
            placed = layout(diagram, orientation)
            check_layout(diagram, placed)
            assert not unlabeled(diagram, placed)
            most = 11 if len(diagram.nodes) > 13 else 7
            assert placed.crossings <= (most if orientation == "horizontal" else most + 5)


@pytest.mark.parametrize("seed", range(2))
def test_random_diagrams(seed: int) -> None:
    diagram = random_diagram(seed)
    check_layout(diagram, layout(diagram))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 40))
def test_more_random_diagrams(seed: int) -> None:
    diagram = random_diagram(seed)
    check_layout(diagram, layout(diagram))
    check_layout(diagram, layout(diagram, "vertical"))


def test_textbook_lstm() -> None:
    """The cell state is a straight line on top, the gates are in the lowest row, x and h below them."""
    diagram = diagram_of("LSTM")
    placed = layout(diagram)
    nodes = {node.name or node.glyph: place for node, place in zip(diagram.nodes, placed.nodes, strict=True)}
    gates = [nodes[name] for name in "figo"]
    assert placed.crossings == 0
    assert [name for name, _ in placed.belts] == ["c"]
    assert len({gate.y for gate in gates}) == 1
    assert all(gate.y >= node.y for gate in gates for node in placed.nodes)
    assert nodes["c"].y < gates[0].y
    rails = [route for route in placed.routes if route.kind == "rail"]
    assert {source for rail in rails for source in rail.sources} == {"x", "before:h"}
    assert len({rail.points[-1][1] for rail in rails}) == 1


@pytest.mark.parametrize(("cell", "widest"), [("LSTM", 340), ("GRU", 340), ("RNN", 200)])
def test_upright_layouts(cell: str, widest: float) -> None:
    """They fit on a phone, and are checked like all others."""
    diagram = diagram_of(cell)
    placed = layout(diagram, "vertical")
    check_layout(diagram, placed)
    assert not unlabeled(diagram, placed)
    assert placed.width <= widest
    assert placed.crossings <= layout(diagram).crossings + 1
    starts, ends = ([port.y for port in placed.ports if port.side == side] for side in ("in", "out"))
    assert max(starts) < min(node.y for node in placed.nodes)
    assert min(ends) > max(node.y for node in placed.nodes)


def test_wrong_orientation() -> None:
    with pytest.raises(ValueError, match="orientation must be horizontal or vertical, but got 'upright'"):
        layout(diagram_of("RNN"), "upright")


def test_a_product_that_layers_read_is_a_rail() -> None:
    diagram = diagram_of("MultiplicativeLSTM")
    m = next(node.id for node in diagram.nodes if node.name == "m")
    placed = layout(diagram)
    rail = next(route for route in placed.routes if route.kind == "rail" and route.sources == (m,))
    lowest = max(node.y + node.height / 2 for node in placed.nodes)
    assert rail.points[-1][1] > lowest
    assert sum(route.kind == "tap" and m in route.sources for route in placed.routes) == 4


def test_states_without_nodes() -> None:
    """States that stay as they are, take the old value of another or the input, or share their new value."""
    nodes = (
        DiagramNode("n0", "layer", "tanh", "h", (Term("x", weighted=True), Term("before:h", weighted=True))),
    )
    states = (
        DiagramState("h", "n0", 1),
        DiagramState("same", "before:same", 2),
        DiagramState("last", "before:h", 3),
        DiagramState("input", "x", 4),
        DiagramState("twin", "n0", 5),
        DiagramState("delayed", "before:same", 6),
    )
    diagram = Diagram("Delays", states, nodes, 0)
    check_layout(diagram, layout(diagram))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("ends", [("before:s0",), ("x",), ("before:s1", "x")])
def test_diagrams_without_nodes(ends: tuple[str, ...], orientation: str) -> None:
    states = tuple(DiagramState(f"s{k}", end, k) for k, end in enumerate(ends))
    diagram = Diagram("Delay", states, (), len(ends))
    check_layout(diagram, layout(diagram, orientation))


def test_a_node_without_terms() -> None:
    """Random numbers that a step draws are read from nowhere."""
    nodes = (
        DiagramNode("n0", "function", "rand", "", ()),
        DiagramNode("n1", "operation", "×", "h", (Term("n0"), Term("before:h"))),
    )
    diagram = Diagram("Noise", (DiagramState("h", "n1", 0),), nodes, 0)
    check_layout(diagram, layout(diagram))


def test_many_nodes_in_a_row() -> None:
    """More columns than the search takes: the order of computation decides."""
    nodes = [DiagramNode("n0", "layer", "tanh", "", (Term("x", weighted=True), Term("before:h")))]
    nodes += [DiagramNode(f"n{k}", "function", "tanh", "", (Term(f"n{k - 1}"),)) for k in range(1, 40)]
    diagram = Diagram("Deep", (DiagramState("h", "n39", 0),), tuple(nodes), 0)
    check_layout(diagram, layout(diagram))


@pytest.mark.slow
def test_layouts_are_deterministic() -> None:
    """In another process, with another hash seed."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from diagram.random_diagrams import random_diagram; from unrolled.diagram.layout import layout;"
        "import json; print(json.dumps(layout(random_diagram(2)).to_json()))"
    )
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, tests]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(other) == layout(random_diagram(2)).to_json()


def test_layouts_are_cached_by_wiring() -> None:
    assert layout(diagram_of("MinGRU")) is layout(diagram_of("MinGRU", hidden=7))
    diagram = diagram_of("MinGRU")
    renamed = replace(diagram, nodes=tuple(replace(node, name=node.name and "q") for node in diagram.nodes))
    assert layout(renamed) is not layout(diagram)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["NAS", "HGRN", "SLSTM", "RHN"])
def test_effort(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search of the largest cells is bounded, counted in placements instead of seconds."""
    evaluated = []
    costs = Router.costs
    monkeypatch.setattr(Router, "costs", lambda self, p: evaluated.append(len(p)) or costs(self, p))
    router = Router(wire(diagram_of(cell)))
    found = search(router, ROUNDS)
    assert 100 < sum(evaluated) <= LARGEST
    assert costs(router, found[:1]) < costs(router, [first_placement(router.wiring)])


@pytest.mark.slow
@pytest.mark.parametrize("cell", ur.cells.__all__)
def test_placements_are_stored(cell: str) -> None:
    """If a change of a cell makes this fail, run benchmarks/diagrams.py."""
    whole = diagram_of(cell)
    for diagram in (whole, fold(whole)):
        placement = stored_placement(wire(diagram))
        assert placement is not None
        router = Router(wire(diagram))
        first = first_placement(router.wiring)
        assert router.costs([placement]) <= 1.01 * router.costs([first])  # of simple routes


def test_json() -> None:
    plain = layout(diagram_of("GRU")).to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {
        "width", "height", "nodes", "routes", "ports", "dots", "belts", "output", "crossings", "bends",
        "orientation",
    }  # fmt: skip
