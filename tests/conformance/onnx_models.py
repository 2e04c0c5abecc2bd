"""ONNX's own cases of its recurrent operators, and random models in ONNX Runtime, by our layers."""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import onnx
import onnx.backend.test.loader
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import unrolled as ur

Node = Callable[..., Any]  # RecurrentNode, or one with wrong cells
OPERATORS = ("RNN", "GRU", "LSTM")
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@functools.cache
def official() -> dict[str, Any]:
    """ONNX's cases of the operators, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cases of other operators
        cases = onnx.backend.test.loader.load_node_model_tests()
    named = {case.name.removeprefix("test_"): case for case in cases}
    return {
        name: case
        for name, case in named.items()
        if name.startswith(("rnn_", "simple_rnn_", "gru_", "lstm_"))
    }


def text(value: Any) -> Any:
    """Bytes as text."""
    if isinstance(value, list):
        return [text(part) for part in value]
    return value.decode() if isinstance(value, bytes) else value


def run_node(make: Node, node: Any, inputs: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """The outputs of a node by name, from all its inputs by kind."""
    tensors = {kind: torch.from_numpy(value) for kind, value in inputs.items()}
    attributes = {a.name: text(helper.get_attribute_value(a)) for a in node.attribute}
    module = make(node.op_type, {k: v for k, v in tensors.items() if k in "WRBP"}, attributes)
    rest = {k: v for k, v in tensors.items() if k in ("sequence_lens", "initial_h", "initial_c")}
    with torch.no_grad():
        results: tuple[Tensor, ...] = module(tensors["X"], **rest)
    return {name: value.numpy() for name, value in zip(("Y", "Y_h", "Y_c"), results, strict=False)}


KINDS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def check_official(make: Node, only: str = "") -> None:
    for name, case in official().items():
        node = case.model.graph.node[0]
        if only and node.op_type != only:
            continue
        for inputs, outputs in case.data_sets:
            given = dict(zip([k for k, n in zip(KINDS, node.input, strict=False) if n], inputs, strict=True))
            found = run_node(make, node, given)
            names = [k for k, n in zip(("Y", "Y_h", "Y_c"), node.output, strict=False) if n]
            for kind, expected in zip(names, outputs, strict=True):
                assert found[kind].shape == expected.shape, f"{name}: {kind}"
                numpy.testing.assert_allclose(found[kind], expected, case.rtol, case.atol, err_msg=name)


def random_nodes(seed: int) -> Iterator[tuple[Any, dict[str, numpy.ndarray]]]:
    """A node of each operator and direction, with random sizes, options and inputs."""
    rng, draw = random.Random(seed), numpy.random.default_rng(seed)
    for operator, direction in itertools.product(OPERATORS, ("forward", "reverse", "bidirectional")):
        lanes, gates = 1 + (direction == "bidirectional"), GATES[operator]
        time, batch, features, hidden = (rng.randint(1, 9) for _ in range(4))
        shapes = {
            "X": (time, batch, features),
            "W": (lanes, gates * hidden, features),
            "R": (lanes, gates * hidden, hidden),
            "B": (lanes, 2 * gates * hidden),
            "initial_h": (lanes, batch, hidden),
        }
        if operator == "LSTM":
            shapes |= {"initial_c": (lanes, batch, hidden), "P": (lanes, 3 * hidden)}
        optional = ["B", "initial_h", "initial_c", "P"]
        inputs = {
            kind: draw.uniform(-1, 1, shape).astype(numpy.float32)
            for kind, shape in shapes.items()
            if kind not in optional or rng.random() < 0.7
        }
        if rng.random() < 0.6:
            inputs["sequence_lens"] = draw.integers(1, time + 1, batch).astype(numpy.int32)
        attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
        if operator == "GRU":
            attributes["linear_before_reset"] = rng.randint(0, 1)
        if operator == "RNN" and rng.random() < 0.5:
            attributes["activations"] = ["Relu"] * lanes
        taken = KINDS if operator == "LSTM" else KINDS[:6]
        order = [kind if kind in inputs else "" for kind in taken]
        results = ["Y", "Y_h", "Y_c"][: 3 if operator == "LSTM" else 2]
        yield helper.make_node(operator, order, results, **attributes), inputs


def by_onnxruntime(node: Any, inputs: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """The outputs of a node in ONNX Runtime."""
    kinds = {numpy.dtype(numpy.float32): TensorProto.FLOAT, numpy.dtype(numpy.int32): TensorProto.INT32}
    given = [helper.make_tensor_value_info(k, kinds[v.dtype], v.shape) for k, v in inputs.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "node", given, made)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 14)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(node.output, session.run(None, inputs), strict=True))


def check_random(make: Node, only: str = "", seeds: int = 3) -> None:
    for seed in range(seeds):
        for node, inputs in random_nodes(seed):
            if only and node.op_type != only:
                continue
            expected, found = by_onnxruntime(node, inputs), run_node(make, node, inputs)
            for kind, value in expected.items():
                what = f"seed {seed}, {node.op_type}, {kind}"
                numpy.testing.assert_allclose(found[kind], value, rtol=1e-4, atol=2e-6, err_msg=what)


def check_models(model: Any) -> None:
    """Whole models, read from their files' form."""
    for node, inputs in random_nodes(50):
        held = [numpy_helper.from_array(v, k) for k, v in inputs.items() if k in "WRBP"]
        x = helper.make_tensor_value_info("X", TensorProto.FLOAT, inputs["X"].shape)
        graph = helper.make_graph([node], "model", [x], [], held)
        [(name, module)] = ur.io.from_onnx(helper.make_model(graph)).items()
        assert name.startswith(node.op_type), model
        rest = {k: torch.from_numpy(v) for k, v in inputs.items() if k not in "WRBP" and k != "X"}
        expected = by_onnxruntime(node, inputs)["Y"]
        with torch.no_grad():
            found = module(torch.from_numpy(inputs["X"]), **rest)[0].numpy()
        numpy.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)
