"""Inference runtimes that read an ONNX graph, built from the layer's weights."""

from __future__ import annotations

import importlib
from typing import Any

import numpy
import torch

from unrolled.bench.work import Call, Work

# The operators' order of the gates, as places in torch's, by how many gates there are:
# r z n becomes z r h; i f g o becomes i o f c (https://onnx.ai/onnx/operators).
_ORDER: dict[int, tuple[int, ...]] = {1: (0,), 3: (1, 0, 2), 4: (0, 3, 1, 2)}
_OPSET, _IR = 14, 8


def model(work: Work) -> bytes:
    """The ONNX model of a row: the input ``x`` to the output and the final states."""
    onnx: Any = importlib.import_module("onnx")
    helper, row = onnx.helper, work.row
    weight_ih, weight_hh, bias_ih, bias_hh = work.weights()
    order = _ORDER[len(weight_hh) // row.hidden]
    held = {
        "weight_ih": _ordered(weight_ih, order)[None],
        "weight_hh": _ordered(weight_hh, order)[None],
        "bias": numpy.concatenate([_ordered(bias_ih, order), _ordered(bias_hh, order)])[None],
    }
    states = [f"final_{name}" for name in work.ours.cell(row.input, row.hidden).state]
    options = {"linear_before_reset": 1} if len(order) == 3 else {}
    operator = type(work.theirs).__name__
    node = helper.make_node(operator, ["x", *held], ["output", *states], hidden_size=row.hidden, **options)
    outputs: dict[str, tuple[int, ...]] = {"output": (row.time, 1, row.batch, row.hidden)}
    outputs |= dict.fromkeys(states, (1, row.batch, row.hidden))

    def info(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        "layer",
        [info("x", (row.time, row.batch, row.input))],
        [info(name, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(numpy.ascontiguousarray(v), name) for name, v in held.items()],
    )
    made = helper.make_model(graph, ir_version=_IR, opset_imports=[helper.make_opsetid("", _OPSET)])
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def onnxruntime(work: Work) -> Call:
    """A call of ONNX Runtime's CPU provider, on torch's number of threads."""
    ort: Any = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")  # leave the cores to the next
    session = ort.InferenceSession(model(work), options, providers=["CPUExecutionProvider"])
    given = {"x": work.x.detach().numpy()}
    return lambda: session.run(None, given)


def openvino(work: Work) -> Call:
    """A call of OpenVINO's CPU plugin, in float32 on torch's number of threads."""
    library: Any = importlib.import_module("openvino")
    core = library.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # the thread that calls is shared with the other runtimes
    }
    request = core.compile_model(core.read_model(model(work), b""), "CPU", options).create_infer_request()
    given = [work.x.detach().numpy()]
    return lambda: list(request.infer(given, share_inputs=True, share_outputs=True).values())


def _ordered(array: Any, order: tuple[int, ...]) -> Any:
    gates = array.reshape(len(order), -1, *array.shape[1:])
    return gates[list(order)].reshape(array.shape)
