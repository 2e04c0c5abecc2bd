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


@pytest.mark.slow
@ENGINES
def test_official_onnx_cases(engine: str) -> None:
    assert len(cases.official_cases()) == 18
    with ur.engine(engine):
        cases.check_official_cases(RecurrentNode)


@pytest.mark.slow
@ENGINES
def test_random_models_in_onnx_runtime(engine: str) -> None:
    with ur.engine(engine):
        cases.check_random_nodes(RecurrentNode)
        cases.check_models()


@pytest.mark.parametrize(("change", "kind"), mutants.MUTANTS)
def test_mutants_are_detected(change: str, kind: str) -> None:
    class Wrong(RecurrentNode):
        def _cell_class(self, peepholes: bool) -> Any:
            return mutants.mutate(super()._cell_class(peepholes), mutants.CHANGES[change][0])

    with ur.engine("reference"), pytest.raises(AssertionError):
        cases.check_random_nodes(Wrong, only=kind)


@pytest.mark.parametrize(
    ("operator", "attributes", "message"),
    [
        ("LSTM", {"clip": 3.0}, r"the node \(LSTM\): clip=3.0 is not supported"),
        ("LSTM", {"input_forget": 1}, "input_forget=1 is not supported"),
        (
            "GRU",
            {"activations": ["Sigmoid", "Softsign"]},
            "expected the activations Sigmoid, Tanh in every direction, got Sigmoid, Softsign",
        ),
        (
            "RNN",
            {"activations": ["Tanh", "Relu"], "direction": "bidirectional"},
            "got Tanh, Relu",
        ),
        ("RNN", {"shape": 1}, "unknown attribute shape"),
        (
            "RNN",
            {"direction": "bidirectional"},
            "the direction is 'bidirectional', but the weights have 1 direction",
        ),
        ("RNN", {"direction": "sideways"}, "the direction forward, reverse or bidirectional, got 'sideways'"),
        ("LSTM", {"hidden_size": 9}, "hidden_size is 9, but R has 2 units"),
    ],
)
def test_unsupported_attributes(operator: str, attributes: dict[str, Any], message: str) -> None:
    gates = cases.GATES[operator]
    directions = 2 if len(attributes.get("activations", [])) == 2 and operator == "RNN" else 1
    weights = {"W": torch.randn(directions, gates * 2, 3), "R": torch.randn(directions, gates * 2, 2)}
    with pytest.raises(ValueError, match=message):
        RecurrentNode(operator, weights, attributes)


def model_of(*nodes: Any, weights: Any = ()) -> Any:
    return cases.helper.make_model(cases.helper.make_graph(list(nodes), "model", [], [], list(weights)))


def test_weights_of_inconsistent_shapes() -> None:
    valid = {"W": torch.randn(1, 8, 3), "R": torch.randn(1, 8, 2)}
    for change, message in (
        ({"W": torch.randn(1, 6, 3)}, r"expected W of shape \(1, 8, 3\) for 2 units, got \(1, 6, 3\)"),
        ({"B": torch.randn(1, 8)}, r"expected B of shape \(1, 16\)"),
        ({"P": torch.randn(2, 6)}, r"expected P of shape \(1, 6\)"),
        (
            {"R": torch.randn(8, 2)},
            r"expected R of shape \(directions, gates × hidden, features\), got",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            RecurrentNode("LSTM", valid | change, {})
    with pytest.raises(ValueError, match=r"the node \(Foo\): expected the operator RNN, GRU or LSTM"):
        RecurrentNode("Foo", valid, {})


def test_finding_nodes_and_weights(tmp_path: Path) -> None:
    helper = cases.helper
    W, R = (cases.onnx.numpy_helper.from_array(numpy.ones(s, numpy.float32), n) for n, s in SIZES.items())
    node = helper.make_node("RNN", ["X", "W", "R"], ["Y"], "mine", hidden_size=2, activation_alpha=[1.0])
    constant = helper.make_node("Constant", [], ["W"], value=W)
    [module] = ur.io.from_onnx(model_of(constant, node, weights=[R])).values()
    assert torch.equal(module.layer.weight_ih_l0, torch.ones(2, 3))
    with pytest.raises(ValueError, match="two nodes of the model are named mine"):
        ur.io.from_onnx(model_of(node, node, weights=[W, R]))
    with pytest.raises(TypeError, match=r"a path or an onnx.ModelProto, got bytes"):
        ur.io.from_onnx(b"")
    (tmp_path / "bad.onnx").write_text("hello")
    with pytest.raises(ValueError, match=r"bad.onnx is not an ONNX model"):
        ur.io.from_onnx(tmp_path / "bad.onnx")


SIZES = {"W": (1, 2, 3), "R": (1, 2, 2)}
