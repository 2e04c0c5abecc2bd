from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import unrolled as ur
from conformance import mutants
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.io import RecurrentNode

cases = pytest.importorskip("conformance.onnx_models", reason="needs onnx and onnxruntime")
ENGINES = pytest.mark.parametrize(
    "engine",
    [pytest.param("native", marks=NEEDS_COMPILER), pytest.param("reference", marks=pytest.mark.exhaustive)],
)


@ENGINES
def test_onnxs_own_cases(engine: str) -> None:
    assert len(cases.official()) == 18
    with ur.engine(engine):
        cases.check_official(RecurrentNode)


@ENGINES
def test_random_models_in_onnx_runtime(engine: str) -> None:
    with ur.engine(engine):
        cases.check_random(RecurrentNode)
        cases.check_models(None)


@pytest.mark.parametrize(("what", "kind"), mutants.MUTANTS)
def test_a_wrong_cell_is_noticed(what: str, kind: str) -> None:
    class Wrong(RecurrentNode):
        def _cell(self, peepholes: bool) -> Any:
            return mutants.mutated(super()._cell(peepholes), mutants.CHANGES[what][0])

    with ur.engine("reference"), pytest.raises(AssertionError):
        cases.check_random(Wrong, only=kind)


@pytest.mark.parametrize(
    ("operator", "attributes", "why"),
    [
        ("LSTM", {"clip": 3.0}, r"the node \(LSTM\): clip is not supported, it is 3.0"),
        ("LSTM", {"input_forget": 1}, "input_forget is not supported, it is 1"),
        (
            "GRU",
            {"activations": ["Sigmoid", "Softsign"]},
            "Softsign are not supported, expected Sigmoid, Tanh",
        ),
        (
            "RNN",
            {"activations": ["Tanh", "Relu"], "direction": "bidirectional"},
            "Tanh, Relu are not supported",
        ),
        ("RNN", {"shape": 1}, "the attribute shape is not known"),
        (
            "RNN",
            {"direction": "bidirectional"},
            "'bidirectional' doesn't go with weights of 1 direction",
        ),
        ("RNN", {"direction": "sideways"}, "the direction 'sideways' is none of forward, reverse, bidirect"),
        ("LSTM", {"hidden_size": 9}, "hidden_size is 9, and R has 2 units"),
    ],
)
def test_what_cannot_be_read(operator: str, attributes: dict[str, Any], why: str) -> None:
    gates = cases.GATES[operator]
    lanes = 2 if len(attributes.get("activations", [])) == 2 and operator == "RNN" else 1
    weights = {"W": torch.randn(lanes, gates * 2, 3), "R": torch.randn(lanes, gates * 2, 2)}
    with pytest.raises(ValueError, match=why):
        RecurrentNode(operator, weights, attributes)


def test_computed_weights_are_told() -> None:
    node = cases.helper.make_node("RNN", ["X", "W", "R"], ["Y"], "mine", hidden_size=2)
    graph = cases.helper.make_graph([node], "model", [], [])
    with pytest.raises(ValueError, match=r"mine \(RNN\): its weights W are computed in the model, not held"):
        ur.io.from_onnx(cases.helper.make_model(graph))


def model_of(*nodes: Any, held: Any = ()) -> Any:
    return cases.helper.make_model(cases.helper.make_graph(list(nodes), "model", [], [], list(held)))


def test_weights_that_do_not_go_together() -> None:
    good = {"W": torch.randn(1, 8, 3), "R": torch.randn(1, 8, 2)}
    for change, why in (
        ({"W": torch.randn(1, 6, 3)}, r"W should have the shape \(1, 8, 3\) for 2 units, it has \(1, 6, 3\)"),
        ({"B": torch.randn(1, 8)}, r"B should have the shape \(1, 16\)"),
        ({"P": torch.randn(2, 6)}, r"P should have the shape \(1, 6\)"),
        (
            {"R": torch.randn(8, 2)},
            r"R should be \(directions, gates × hidden, features\), got the shape",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            RecurrentNode("LSTM", good | change, {})
    with pytest.raises(ValueError, match=r"the node \(Foo\): expected the operator RNN, GRU or LSTM"):
        RecurrentNode("Foo", good, {})


def test_where_nodes_and_their_weights_are(tmp_path: Path) -> None:
    helper = cases.helper
    W, R = (cases.onnx.numpy_helper.from_array(numpy.ones(s, numpy.float32), n) for n, s in SIZES.items())
    node = helper.make_node("RNN", ["X", "W", "R"], ["Y"], "mine", hidden_size=2, activation_alpha=[1.0])
    constant = helper.make_node("Constant", [], ["W"], value=W)
    [found] = ur.io.from_onnx(model_of(constant, node, held=[R])).values()
    assert torch.equal(found.layer.weight_ih_l0, torch.ones(2, 3))
    with pytest.raises(ValueError, match="two nodes of the model have the name mine"):
        ur.io.from_onnx(model_of(node, node, held=[W, R]))
    branch = helper.make_graph([node], "branch", [], [], [W, R])
    both = {"then_branch": branch, "else_branch": branch}
    with pytest.raises(ValueError, match=r"mine \(RNN\) lies inside the If node 'choice'"):
        ur.io.from_onnx(model_of(helper.make_node("If", ["c"], ["Y"], "choice", **both)))
    with pytest.raises(TypeError, match=r"a path or an onnx.ModelProto, got bytes"):
        ur.io.from_onnx(b"")
    (tmp_path / "bad.onnx").write_text("hello")
    with pytest.raises(ValueError, match=r"bad.onnx is no ONNX model"):
        ur.io.from_onnx(tmp_path / "bad.onnx")


SIZES = {"W": (1, 2, 3), "R": (1, 2, 2)}
