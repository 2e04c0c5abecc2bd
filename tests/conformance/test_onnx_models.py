from __future__ import annotations

from typing import Any

import pytest
import torch

import unrolled as ur
from conformance import mutants
from kinds import NEEDS_COMPILER
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
