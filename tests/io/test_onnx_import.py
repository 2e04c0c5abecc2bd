"""Recurrent nodes of ONNX models: in nested graphs, with computed weights, and quantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import unrolled as ur

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper, from_array, FLOAT = onnx.helper, onnx.numpy_helper.from_array, onnx.TensorProto.FLOAT


@pytest.fixture(autouse=True)
def reference_engine() -> Iterator[None]:
    """The layers are tiny: compiling their kernels would take longer than all tests."""
    with ur.engine("reference"):
        yield


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def weights_of(operator: str, inputs: int, hidden: int, directions: int = 1) -> dict[str, numpy.ndarray]:
    draw, gates = numpy.random.default_rng(inputs * 100 + hidden), GATES[operator] * hidden
    shapes = {
        "W": (directions, gates, inputs),
        "R": (directions, gates, hidden),
        "B": (directions, 2 * gates),
    }
    return {name: draw.uniform(-0.7, 0.7, shape).astype(numpy.float32) for name, shape in shapes.items()}


def recurrent_node(operator: str, hidden: int, **options: Any) -> Any:
    options = {"linear_before_reset": 1, **options} if operator == "GRU" else options
    return helper.make_node(operator, ["X", "W", "R", "B"], ["Y"], "rec", hidden_size=hidden, **options)


def expected_output(operator: str, weights: dict[str, numpy.ndarray], x: Any, **options: Any) -> Any:
    """The output of ONNX Runtime for a model with plain weights."""
    initializers = [from_array(value, name) for name, value in weights.items()]
    node = recurrent_node(operator, weights["R"].shape[2], **options)
    return run(model_of([node], initializers), x)


def model_of(nodes: list[Any], initializers: Any = (), functions: Any = (), **options: Any) -> Any:
    infos = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("X", "Y")]
    infos[0] = helper.make_tensor_value_info("X", FLOAT, ["t", "b", "i"])
    graph = helper.make_graph(nodes, "model", infos[:1], infos[1:], list(initializers))
    opsets = [
        helper.make_opsetid(domain, version)
        for domain, version in (("", 17), ("com.microsoft", 1), ("own", 1))
    ]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets, functions=list(functions), **options)


def run(model: Any, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"X": x})[0]


def random_input(time: int, batch: int, features: int) -> Any:
    return numpy.random.default_rng(time).normal(size=(time, batch, features)).astype(numpy.float32)


def check_import(model: Any, names: list[str], x: Any, expected: Any, **tolerance: float) -> None:
    modules = ur.io.from_onnx(model)
    assert list(modules) == names
    for module in modules.values():
        with torch.no_grad():
            actual = module(torch.from_numpy(x))[0].numpy()
        numpy.testing.assert_allclose(actual, expected, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


@pytest.mark.parametrize(("operator", "sizes"), [("RNN", (3, 2)), ("GRU", (2, 5)), ("LSTM", (4, 3))])
def test_nodes_inside_if_and_loop(operator: str, sizes: tuple[int, int]) -> None:
    weights, x = weights_of(operator, *sizes), random_input(6, 2, sizes[0])
    expected = expected_output(operator, weights, x)
    initializers = [from_array(value, name) for name, value in weights.items()]
    node, y = recurrent_node(operator, sizes[1]), helper.make_tensor_value_info("Y", FLOAT, None)

    branch = helper.make_graph([node], "branch", [], [y], initializers[:1])  # R and B are of the main graph
    choice = helper.make_node("If", ["c"], ["Y"], "choice", then_branch=branch, else_branch=branch)
    condition = from_array(numpy.array(True), "c")
    model = model_of([choice], [condition, *initializers[1:]])
    numpy.testing.assert_allclose(run(model, x), expected, atol=1e-6)
    check_import(model, ["choice.else_branch.rec", "choice.then_branch.rec"], x, expected)

    # A loop that passes W on from one iteration to the next without changing it, and computes R in its body.
    bool_info = [helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("go", "gone")]
    inputs = [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), bool_info[0]]
    inputs += [helper.make_tensor_value_info(name, FLOAT, None) for name in ("W", "last")]
    body = [
        helper.make_node("Identity", ["go"], ["gone"]),
        helper.make_node("Identity", ["W"], ["W_next"]),
        helper.make_node("Neg", ["R_negative"], ["R"]),
        node,
    ]
    outputs = [bool_info[1], helper.make_tensor_value_info("W_next", FLOAT, None), y]
    loop = helper.make_node(
        "Loop",
        ["count", "c", "W_first", "W_first"],
        ["W_last", "Y"],
        body=helper.make_graph(body, "body", inputs, outputs),
    )
    constants = {"count": numpy.array(3), "c": numpy.array(True), "W_first": weights["W"]}
    constants |= {"R_negative": -weights["R"], "B": weights["B"]}
    model = model_of([loop], [from_array(value, name) for name, value in constants.items()])
    check_import(model, ["Loop_0.body.rec"], x, expected)


def test_weights_that_a_loop_changes() -> None:
    bool_info = [helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("go", "gone")]
    inputs = [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), bool_info[0]]
    inputs += [helper.make_tensor_value_info("W", FLOAT, None)]
    body = [
        helper.make_node("Identity", ["go"], ["gone"]),
        helper.make_node("Add", ["W", "W"], ["W_next"]),
        recurrent_node("RNN", 2),
    ]
    outputs = [bool_info[1], helper.make_tensor_value_info("W_next", FLOAT, None)]
    graph = helper.make_graph(body, "body", inputs, outputs)
    loop = helper.make_node("Loop", ["count", "c", "first"], ["last"], "times", body=graph)
    weights = weights_of("RNN", 3, 2)
    initializers = [from_array(weights[name], name) for name in ("R", "B")]
    with pytest.raises(ValueError, match=r"times.body.rec \(RNN\): .* W from 'W', which the Loop around"):
        ur.io.from_onnx(model_of([loop], initializers))


def test_nodes_inside_functions() -> None:
    weights, x = weights_of("LSTM", 3, 4), random_input(5, 2, 3)
    node = recurrent_node("LSTM", 4)
    function = helper.make_function(
        "own", "Wrapped", ["X", "W", "R", "B"], ["Y"], [node], [helper.make_opsetid("", 17)]
    )
    call = helper.make_node("Wrapped", ["X", "W", "R", "B"], ["Y"], domain="own")
    model = model_of([call], [from_array(value, name) for name, value in weights.items()], [function])
    modules = ur.io.from_onnx(model)
    check_import(model, list(modules), x, expected_output("LSTM", weights, x))
    assert len(modules) == 1


COMPUTED = {
    "transposed": (
        lambda w: {"WT": w.transpose(0, 2, 1).copy()},
        [("Transpose", ["WT"], {"perm": [0, 2, 1]})],
    ),
    "unsqueezed": (lambda w: {"W2": w[0], "axes": numpy.array([0])}, [("Unsqueeze", ["W2", "axes"], {})]),
    "joined": (
        lambda w: {"first": w[:, :2], "second": w[:, 2:]},
        [("Concat", ["first", "second"], {"axis": 1})],
    ),
    "sliced": (
        lambda w: {
            "long": numpy.concatenate([w, w], 2),
            "start": numpy.array([w.shape[2]]),
            "end": numpy.array([99]),
            "axes": numpy.array([2]),
        },
        [("Slice", ["long", "start", "end", "axes"], {})],
    ),
    "several": (
        lambda w: {"flat": w.astype(numpy.float16).astype(numpy.float64).ravel(), "axes": numpy.array([0])},
        [
            ("Cast", ["flat"], {"to": FLOAT}),
            ("Shape", ["like"], {}),
            ("Reshape", ["0", "1"], {}),
            ("Identity", ["2"], {}),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_weights(case: str) -> None:
    arrays, steps = COMPUTED[case]
    operator, sizes, directions = ("LSTM", (3, 2), 1) if case == "unsqueezed" else ("GRU", (5, 3), 2)
    weights, x = weights_of(operator, *sizes, directions), random_input(4, 3, sizes[0])
    if case == "several":
        weights["W"] = weights["W"].astype(numpy.float16).astype(numpy.float32)
    options = {"direction": "bidirectional"} if directions == 2 else {}
    constants = {**arrays(weights["W"]), "like": weights["W"]}
    names = [str(k) for k in range(len(steps) - 1)] + ["W"]
    nodes = [
        helper.make_node(kind, inputs, [name], **attributes)
        for (kind, inputs, attributes), name in zip(steps, names, strict=True)
    ]
    # One as an initializer, the others as nodes.
    first, *others = constants.items()
    nodes = [
        helper.make_node("Constant", [], [name], value=from_array(value)) for name, value in others
    ] + nodes
    initializers = [
        from_array(value, name) for name, value in (first, ("R", weights["R"]), ("B", weights["B"]))
    ]
    model = model_of([*nodes, recurrent_node(operator, sizes[1], **options)], initializers)
    check_import(model, ["rec"], x, expected_output(operator, weights, x, **options))


def test_other_constants() -> None:
    """Values of a Constant that are no tensor, and sparse ones."""
    node = helper.make_node("RNN", ["X", "W", "R", "B"], ["Y"], "rec", hidden_size=1)
    shape = helper.make_node("Constant", [], ["shape"], value_ints=[1, 1, 2])
    flat = helper.make_node("Constant", [], ["flat"], value_floats=[0.5, -0.25])
    reshape = helper.make_node("Reshape", ["flat", "shape"], ["W"])
    values = from_array(numpy.array([0.75], numpy.float32), "R")
    sparse = helper.make_sparse_tensor(values, from_array(numpy.array([[0, 0, 0]])), [1, 1, 1])
    model = model_of([shape, flat, reshape, node], [from_array(numpy.zeros((1, 2), numpy.float32), "B")])
    model.graph.sparse_initializer.append(sparse)
    layer = ur.io.from_onnx(model)["rec"].layer
    assert layer.weight_ih_l0.tolist() == [[0.5, -0.25]]
    assert layer.weight_hh_l0.tolist() == [[0.75]]


def test_weights_that_are_not_constant() -> None:
    weights = weights_of("RNN", 3, 2)
    initializers = [from_array(weights[name], name) for name in ("R", "B")]
    for node, message in (
        (helper.make_node("Relu", ["X"], ["W"]), "computes W from the input 'X' of the model"),
        (
            helper.make_node("RandomNormal", [], ["W"], shape=[1, 2, 3]),
            "the random numbers of a Rand",
        ),
        (helper.make_node("Wild", ["R"], ["W"], domain="own"), "the operator Wild, which onnx's reference"),
    ):
        with pytest.raises(ValueError, match=rf"rec \(RNN\): expected constant weights, but .*{message}"):
            ur.io.from_onnx(model_of([node, recurrent_node("RNN", 2)], initializers))


def test_models_without_recurrent_nodes() -> None:
    relu = helper.make_node("Relu", ["X"], ["Y"])
    with pytest.raises(ValueError, match=r"no RNN, GRU or LSTM node: its operators are Relu\. Rec"):
        ur.io.from_onnx(model_of([relu]))
    own = helper.make_node("LSTM", ["X"], ["Y"], domain="own")
    with pytest.raises(ValueError, match=r"its operators are own.LSTM"):
        ur.io.from_onnx(model_of([own]))


def quantized(weights: dict[str, numpy.ndarray], per_channel: bool, signed: bool) -> dict[str, numpy.ndarray]:
    """Inputs W, R, their scales and zero points of a DynamicQuantizeLSTM."""
    result = {"B": weights["B"]}
    low, high = (-128, 127) if signed else (0, 255)
    for kind in "WR":
        columns = weights[kind].transpose(0, 2, 1)
        axes = 1 if per_channel else (1, 2)
        smallest, largest = columns.min(axes), columns.max(axes)
        scale = ((largest - smallest) / 255).astype(numpy.float32)
        zero = numpy.clip(numpy.round(low - smallest / scale), low, high)
        shape = (len(scale), 1, -1)
        rounded = numpy.round(columns / scale.reshape(shape)) + zero.reshape(shape)
        dtype = numpy.int8 if signed else numpy.uint8
        result[kind] = numpy.clip(rounded, low, high).astype(dtype)
        result[f"{kind}_scale"], result[f"{kind}_zero_point"] = scale, zero.astype(dtype)
    return result


@pytest.mark.parametrize(("per_channel", "signed", "directions"), [(False, False, 1), (True, True, 2)])
def test_quantized_lstm(per_channel: bool, signed: bool, directions: int) -> None:
    weights, x = weights_of("LSTM", 6, 4, directions), random_input(7, 3, 6)
    arrays = quantized(weights, per_channel, signed)
    names = ["X", "W", "R", "B", "", "", "", "", "W_scale", "W_zero_point", "R_scale", "R_zero_point"]
    direction = "bidirectional" if directions == 2 else "forward"
    node = helper.make_node(
        "DynamicQuantizeLSTM", names, ["Y"], "rec", "", "com.microsoft", hidden_size=4, direction=direction
    )
    model = model_of([node], [from_array(value, name) for name, value in arrays.items()])
    # The weights were rounded to steps of at most 0.0056, and ONNX Runtime rounds inputs and states, too.
    if not per_channel:
        check_import(model, ["rec"], x, run(model, x), atol=0.05, rtol=0)
    check_import(
        model, ["rec"], x, expected_output("LSTM", weights, x, direction=direction), atol=0.05, rtol=0
    )
    layer = ur.io.from_onnx(model)["rec"].layer
    order = [0, 2, 3, 1]
    exact = weights["R"][0].reshape(4, 4, 4)[order].reshape(16, 4)
    error = numpy.abs(layer.weight_hh_l0.detach().numpy() - exact).max()
    assert error <= arrays["R_scale"].max() * 0.51
    del arrays["R_scale"]
    node.input[10] = ""
    with pytest.raises(ValueError, match=r"rec \(DynamicQuantizeLSTM\): expected R of .* no such input"):
        ur.io.from_onnx(model_of([node], [from_array(value, name) for name, value in arrays.items()]))


@pytest.mark.filterwarnings("ignore")
def test_torch_export_with_constant_folding_off(tmp_path: Path) -> None:
    """torch.onnx builds the weights by Slice, Concat and Unsqueeze if it isn't told to fold them."""
    pytest.importorskip("onnxscript")
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    torch.onnx.export(lstm, (x,), str(tmp_path / "m.onnx"), dynamo=False, do_constant_folding=False)
    [node] = ur.io.from_onnx(tmp_path / "m.onnx").values()
    with torch.no_grad():
        torch.testing.assert_close(node(x)[0].squeeze(1), lstm(x)[0])
