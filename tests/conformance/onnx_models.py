"""ONNX's test cases for recurrent operators, and random models compared with ONNX Runtime."""

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

Node = Callable[..., Any]  # RecurrentNode, or a subclass with wrong cells
OPERATORS = ("RNN", "GRU", "LSTM")
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@functools.cache
def official_cases() -> dict[str, Any]:
    """Return ONNX's test cases for recurrent operators by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases give warnings
        cases = onnx.backend.test.loader.load_node_model_tests()
    named = {case.name.removeprefix("test_"): case for case in cases}
    return {
        name: case
        for name, case in named.items()
        if name.startswith(("rnn_", "simple_rnn_", "gru_", "lstm_"))
    }


def decode(value: Any) -> Any:
    """Convert bytes, also in lists, to text."""
    if isinstance(value, list):
        return [decode(part) for part in value]
    return value.decode() if isinstance(value, bytes) else value


def run_node(construct: Node, node: Any, inputs: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Run a node.

    Args:
        construct: Creates the module.
        node: The ONNX node.
        inputs: All inputs by ONNX's names, weights included.

    Returns:
        The outputs by ONNX's names.
    """
    tensors = {kind: torch.from_numpy(value) for kind, value in inputs.items()}
    attributes = {a.name: decode(helper.get_attribute_value(a)) for a in node.attribute}
    module = construct(node.op_type, {k: v for k, v in tensors.items() if k in "WRBP"}, attributes)
    optional = {k: v for k, v in tensors.items() if k in ("sequence_lens", "initial_h", "initial_c")}
    with torch.no_grad():
        results: tuple[Tensor, ...] = module(tensors["X"], **optional)
    return {name: value.numpy() for name, value in zip(("Y", "Y_h", "Y_c"), results, strict=False)}


KINDS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def check_official_cases(construct: Node, only: str = "") -> None:
    """Run ONNX's test cases, or those of one operator."""
    for name, case in official_cases().items():
        node = case.model.graph.node[0]
        if only and node.op_type != only:
            continue
        for inputs, outputs in case.data_sets:
            kinds = [kind for kind, name in zip(KINDS, node.input, strict=False) if name]
            actual = run_node(construct, node, dict(zip(kinds, inputs, strict=True)))
            names = [k for k, n in zip(("Y", "Y_h", "Y_c"), node.output, strict=False) if n]
            for kind, expected in zip(names, outputs, strict=True):
                assert actual[kind].shape == expected.shape, f"{name}: {kind}"
                numpy.testing.assert_allclose(actual[kind], expected, case.rtol, case.atol, err_msg=name)


def random_nodes(seed: int) -> Iterator[tuple[Any, dict[str, numpy.ndarray]]]:
    """Yield a node for each operator and direction, with random sizes, options and inputs."""
    rng, draw = random.Random(seed), numpy.random.default_rng(seed)
    for operator, direction in itertools.product(OPERATORS, ("forward", "reverse", "bidirectional")):
        directions, gates = 1 + (direction == "bidirectional"), GATES[operator]
        time, batch, features, hidden = (rng.randint(1, 9) for _ in range(4))
        shapes = {
            "X": (time, batch, features),
            "W": (directions, gates * hidden, features),
            "R": (directions, gates * hidden, hidden),
            "B": (directions, 2 * gates * hidden),
            "initial_h": (directions, batch, hidden),
        }
        if operator == "LSTM":
            shapes |= {"initial_c": (directions, batch, hidden), "P": (directions, 3 * hidden)}
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
            attributes["activations"] = ["Relu"] * directions
        kinds = KINDS if operator == "LSTM" else KINDS[:6]
        order = [kind if kind in inputs else "" for kind in kinds]
        results = ["Y", "Y_h", "Y_c"][: 3 if operator == "LSTM" else 2]
        yield helper.make_node(operator, order, results, **attributes), inputs


def run_onnxruntime(node: Any, inputs: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Return the outputs of a node in ONNX Runtime."""
    kinds = {numpy.dtype(numpy.float32): TensorProto.FLOAT, numpy.dtype(numpy.int32): TensorProto.INT32}
    graph_inputs = [helper.make_tensor_value_info(k, kinds[v.dtype], v.shape) for k, v in inputs.items()]
    graph_outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "node", graph_inputs, graph_outputs)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 14)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(node.output, session.run(None, inputs), strict=True))


def check_random_nodes(construct: Node, only: str = "", seeds: int = 3) -> None:
    """Compare random nodes, or those of one operator, with ONNX Runtime."""
    for seed in range(seeds):
        for node, inputs in random_nodes(seed):
            if only and node.op_type != only:
                continue
            expected, actual = run_onnxruntime(node, inputs), run_node(construct, node, inputs)
            for kind, value in expected.items():
                case = f"seed {seed}, {node.op_type}, {kind}"
                numpy.testing.assert_allclose(actual[kind], value, rtol=1e-4, atol=2e-6, err_msg=case)


def check_models() -> None:
    """Read random nodes from models with ``from_onnx``, and compare them with ONNX Runtime."""
    for node, inputs in random_nodes(50):
        weights = [numpy_helper.from_array(v, k) for k, v in inputs.items() if k in "WRBP"]
        x = helper.make_tensor_value_info("X", TensorProto.FLOAT, inputs["X"].shape)
        graph = helper.make_graph([node], "model", [x], [], weights)
        [(name, module)] = ur.io.from_onnx(helper.make_model(graph)).items()
        assert name.startswith(node.op_type)
        optional = {k: torch.from_numpy(v) for k, v in inputs.items() if k not in "WRBP" and k != "X"}
        expected = run_onnxruntime(node, inputs)["Y"]
        with torch.no_grad():
            output = module(torch.from_numpy(inputs["X"]), **optional)[0].numpy()
        numpy.testing.assert_allclose(output, expected, rtol=1e-4, atol=2e-6)
