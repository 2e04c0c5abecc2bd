"""The diagrams of cells: nodes, formulas, constants, groups, and steps without a diagram."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

import unrolled as ur
from helpers.user_cell import MGU
from unrolled.diagram.graph import build
from unrolled.diagram.groups import fold
from unrolled.diagram.model import Diagram, DiagramError, DiagramNode, DiagramTrace


def build_cell(
    cell: str | type[ur.Cell], features: int = 3, hidden: int = 4, **options: object
) -> DiagramTrace:
    torch.manual_seed(1)
    cell = getattr(ur.cells, cell) if isinstance(cell, str) else cell
    layer = ur.Recurrent(cell, features, hidden, **options)
    return build(ur.trace(layer, torch.randn(2, 2, features)).layers[0], batch=1)


def named(diagram: Diagram) -> dict[str, DiagramNode]:
    return {node.name: node for node in diagram.nodes if node.name}


def texts(node: DiagramNode) -> list[str]:
    return [term.text for term in node.terms]


def test_lstm() -> None:
    diagram = build_cell("LSTM").diagram
    nodes = named(diagram)
    for position, (gate, glyph) in enumerate(zip("ifgo", ("σ", "σ", "tanh", "σ"), strict=True)):
        node = nodes[gate]
        assert (node.kind, node.glyph, node.operation) == ("layer", glyph, "activation")
        assert node.range == ("tanh" if gate == "g" else "gate")
        assert texts(node) == [f"W_i{gate}·{{}} + b_i{gate}", f"W_h{gate}·{{}} + b_h{gate}"]
        rows = (4 * position, 4 * position + 4)
        for term, source, name in zip(node.terms, ("x", "before:h"), ("ih", "hh"), strict=True):
            assert (term.source, term.weighted, term.rows) == (source, True, rows)
            assert (term.parameter, term.bias, term.bias_rows) == (f"weight_{name}", f"bias_{name}", rows)
    assert [node.glyph for node in diagram.nodes if not node.name] == ["×", "×", "tanh"]
    assert (nodes["c"].glyph, nodes["c"].kind, nodes["h"].glyph) == ("+", "operation", "×")
    assert [(state.name, state.end) for state in diagram.states] == [
        ("h", nodes["h"].id),
        ("c", nodes["c"].id),
    ]


def test_gru() -> None:
    diagram = build_cell("GRU").diagram
    nodes = named(diagram)
    assert texts(nodes["r"]) == ["W_ir·{} + b_ir", "W_hr·{} + b_hr"]
    assert texts(nodes["hidden_n"]) == ["W_hn·{} + b_hn"]
    assert nodes["hidden_n"].glyph == "W"
    inputs = [(term.text, term.weighted) for term in nodes["n"].terms]
    assert inputs == [("W_in·{} + b_in", True), ("{}", False)]
    complement = next(node for node in diagram.nodes if node.glyph == "1−")
    assert (complement.operation, complement.range, complement.formula) == ("difference", "gate", "1 − {}")


def test_rows_are_named_by_gate() -> None:
    nodes = named(build_cell("UGRNN").diagram)
    assert texts(nodes["candidate"]) == ["W_ih[candidate]·{} + b_ih[candidate]", "W_hh[candidate]·{}"]
    peephole = named(build_cell("SRU").diagram)["f"].terms[1]
    assert (peephole.source, peephole.weighted, peephole.text) == ("before:c", False, "W_c[f]⊙{}")
    assert texts(named(build_cell("RNN").diagram)["h"]) == ["W_ih·{} + b_ih", "W_hh·{} + b_hh"]


def test_heads_are_one_weighted_sum() -> None:
    for cell, sizes in (("RGLRU", (3, 4)), ("RGLRU", (4, 4)), ("SLSTM", (3, 4))):
        with_heads, without = (build_cell(cell, *sizes, heads=heads).diagram for heads in (2, 1))
        assert [node.glyph for node in with_heads.nodes] == [node.glyph for node in without.nodes]
        assert {term.blocks for node in with_heads.nodes for term in node.terms} == {1, 2}


def test_joined_source_is_split() -> None:
    """W · [h, x] is drawn as a weighted sum of h and one of x."""
    nodes = named(build_cell(MGU).diagram)
    terms = [(term.source, term.text, term.columns) for term in nodes["f"].terms]
    assert terms == [("before:h", "W_f[:, 0:4]·{} + b_f", (0, 4)), ("x", "W_f[:, 4:7]·{}", (4, 7))]


def test_normalized_terms() -> None:
    nodes = named(build_cell("LayerNormLSTM").diagram)
    assert texts(nodes["i"]) == ["W_ih·{}", "W_hh·{}"]
    norms = [term.normalization for term in nodes["f"].terms]
    assert all(norm is not None and norm.rows == (4, 8) and norm.size == 16 for norm in norms)
    assert [norm.text for norm in norms if norm] == [
        "LayerNorm({}, gain_ih, b_ih)[f]",
        "LayerNorm({}, gain_hh)[f]",
    ]
    gru = named(build_cell("LayerNormGRU").diagram)
    assert texts(gru["z"]) == ["W_ih·{} + b_ih", "W_hh·{}", "1"]
    assert [term.sign for term in gru["z"].terms] == [1, 1, -1]
    assert {t.normalization.text for t in gru["z"].terms if t.normalization} == {
        "LayerNorm({}, gain, b_norm)[z]"
    }


def test_constants_are_labels() -> None:
    trace = build_cell("LRU")
    gain = trace.diagram.nodes[0]
    assert (gain.kind, gain.glyph, gain.formula) == ("gain", "×across", "across·{}")
    part = ur.trace(ur.Recurrent(ur.cells.LRU, 3, 4), torch.randn(2, 2, 3)).layers[0]
    lru, factor = build(part), gain.terms[1].value
    assert factor is not None
    cell = part.cell
    assert isinstance(cell, ur.cells.LRU)
    across = torch.exp(-torch.exp(cell.nu)) * torch.cos(torch.exp(cell.theta))
    torch.testing.assert_close(lru.values[0][factor], across)
    assert lru.values[0][factor].equal(lru.values[1][factor])
    glyphs = {node.glyph for node in build_cell("FastGRNN").diagram.nodes}
    assert {"×σ(ζ)", "+σ(ν)"} <= glyphs
    assert {node.glyph for node in build_cell("SCRN").diagram.nodes} == {"W", "×0.95", "+", "σ"}
    assert "σ(·−1)" in {node.glyph for node in build_cell("JANET").diagram.nodes}
    turn = build_cell("AntisymmetricRNN").diagram.nodes[0].terms[0]
    assert (turn.parameter, turn.text) == ("", "turn·{}")


def test_condition_is_part_of_the_choice() -> None:
    choice = named(build_cell("SLSTM").diagram)["m"]
    assert (choice.glyph, texts(choice)) == ("if", ["{} = 0", "{}", "{}"])
    assert choice.terms[0].source == "before:n"


class Given(ur.Cell):
    """Its states are the input and the other state of the step before."""

    state = ("a", "b")

    def step(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return x, a


def test_states_without_a_computation() -> None:
    diagram = build_cell(Given, 4, 4).diagram
    ends = {state.name: state.end for state in diagram.states}
    sources = {node.id: [term.source for term in node.terms] for node in diagram.nodes}
    assert {name: sources[end] for name, end in ends.items()} == {"a": ["x"], "b": ["before:a"]}
    assert {node.glyph for node in diagram.nodes} == {"="}


class InPlace(ur.Cell):
    state = ("h",)
    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        sums[:, 0] = 0
        return tanh(sums)


class Statistics(InPlace):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        return tanh(sums - sums.mean(0))


class Other(InPlace):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        return tanh(sums) if not h.any() else sigmoid(sums)


class Largest(InPlace):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        return sums - sums.max(-1, keepdim=True).values


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (InPlace, "a tensor was changed in place or computed in a way that isn't recorded."),
        (Statistics, "h depends on other rows of the batch or on random numbers that weren't recorded."),
        (Other, "step 1 computes other operations than step 0."),
        (Largest, "max returns several tensors or takes a list of them."),
    ],
)
def test_refused(cell: type[ur.Cell], reason: str) -> None:
    with pytest.raises(DiagramError) as caught:
        build_cell(cell)
    assert str(caught.value) == f"{cell.__name__} has no diagram, because {reason}"


@pytest.mark.slow
def test_refused_long_step() -> None:
    with pytest.raises(DiagramError, match="because its step has too many operations"):
        build_cell("RHN", depth=90)


@pytest.mark.slow
def test_refused_traces() -> None:
    model, x = torch.nn.Sequential(ur.LSTM(3, 4)), torch.randn(6, 2, 3)
    part = ur.trace(model[0], x).layers[0]
    with pytest.raises(IndexError, match="time step 6 is out of range"):
        build(part, steps=[6])
    with pytest.raises(IndexError, match="row 2 is out of range"):
        build(part, batch=2)
    with ur.record(model, names=["c"]) as recorded:
        model(x)
    with pytest.raises(DiagramError, match="because the trace has only some quantities or units"):
        build(recorded["0"].layers[0])
    with ur.record(model, steps=[1, 4]) as recorded:
        model(x)
    trace = build(recorded["0"].layers[0])
    assert trace.steps == (1, 4)
    assert trace.diagram == build(part).diagram
    with pytest.raises(IndexError, match="step 2 wasn't recorded"):
        build(recorded["0"].layers[0], steps=[2])
    empty = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    short = ur.trace(model[0], empty).layers[0]
    with pytest.raises(DiagramError, match="because row 1 has no recorded step"):
        build(short, batch=1, steps=[])


LARGE = ("NAS", "HGRN", "SLSTM", "RHN")


def sizes(diagram: Diagram) -> dict[str, int]:
    return {group.name: len(group.nodes) for group in diagram.groups}


def test_groups() -> None:
    slstm = build_cell("SLSTM").diagram
    assert sizes(slstm) == {"log_f": 2, "m": 2, "f": 2, "i": 2}
    assert [group.title for group in slstm.groups] == ["log σ …", "if …", "exp …", "exp …"]
    assert sizes(build_cell("NAS").diagram) == {"first": 4, "second": 5, "third": 4, "fourth": 4}
    assert sizes(build_cell("RHN", depth=4).diagram) == {f"pass {k}": 6 for k in (1, 2, 3, 4)}
    assert sizes(build_cell("RHN", depth=2).diagram) == {}


@pytest.mark.parametrize("cell", LARGE)
def test_fold(cell: str) -> None:
    diagram = build_cell(cell).diagram
    folded = fold(diagram)
    assert len(folded.nodes) <= 15 < len(diagram.nodes)
    assert folded.states == diagram.states
    check_fold(diagram, folded)
    names = [group.name for group in diagram.groups]
    assert fold(diagram, names) == diagram
    some = fold(diagram, names[:1])
    assert len(some.nodes) == len(folded.nodes) + len(diagram.groups[0].nodes) - 1
    with pytest.raises(KeyError, match="no group 'absent'"):
        fold(diagram, ["absent"])


def check_fold(diagram: Diagram, folded: Diagram) -> None:
    """A folded node has the values of its group's output, and its terms are all that the group reads."""
    before = {node.id: node for node in diagram.nodes}
    outputs = {group.nodes[-1]: group for group in diagram.groups}
    for node in folded.nodes:
        if node.id not in outputs:
            assert node == before[node.id]
            continue
        group = outputs[node.id]
        assert (node.operation, node.glyph, node.value) == ("group", group.title, before[node.id].value)
        read = {(t.source, t.weighted) for name in group.nodes for t in before[name].terms if t.source}
        read = {(source, weighted) for source, weighted in read if source not in group.nodes}
        assert {(term.source, term.weighted) for term in node.terms} == read


def is_valid(diagram: Diagram) -> bool:
    """Return whether each node reads only what comes before it, and each node but new states is read."""
    available = {"x", *(f"before:{state.name}" for state in diagram.states)}
    for node in diagram.nodes:
        if {term.source for term in node.terms if term.source} - available:
            return False
        available.add(node.id)
    read = {term.source for node in diagram.nodes for term in node.terms}
    ends = {state.end for state in diagram.states}
    return {node.id for node in diagram.nodes} <= read | ends


@pytest.mark.slow
def test_all_cells() -> None:
    for name, bias in itertools.product(ur.cells.__all__, (True, False)):
        diagram = build_cell(name, bias=bias).diagram
        assert diagram.cell == name
        folded = fold(diagram)
        assert is_valid(diagram)
        assert is_valid(folded)
        assert len(folded.nodes) <= 15, name
        ids = [node.id for node in diagram.nodes]
        assert ids == [f"n{k}" for k in range(len(ids))]
        quantities = [node.name for node in diagram.nodes if node.name]
        assert len({*quantities}) == len(quantities)
        assert all(len(node.glyph) <= 24 for node in diagram.nodes)
        if bias and name not in LARGE:
            assert not diagram.groups


def test_wide_layer_has_the_same_diagram() -> None:
    small, wide = (build_cell("LSTM", size, size).diagram for size in (4, 200))
    assert [(n.glyph, n.name, [t.source for t in n.terms]) for n in small.nodes] == [
        (n.glyph, n.name, [t.source for t in n.terms]) for n in wide.nodes
    ]
