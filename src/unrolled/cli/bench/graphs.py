"""Inference runtimes that read an ONNX graph, built from the layer's weights."""

from __future__ import annotations

import importlib
from typing import Any

import numpy
import torch

from unrolled.cli.bench.work import Call, Work

# The operators' order of the gates, as places in torch's, by how many gates there are:
# r z n becomes z r h; i f g o becomes i o f c (https://onnx.ai/onnx/operators).
_ORDER: dict[int, tuple[int, ...]] = {1: (0,), 3: (1, 0, 2), 4: (0, 3, 1, 2)}
_OPSET, _IR = 14, 8


def model(work: Work) -> bytes:
    """The ONNX model of a row: the input ``x`` to the output and the final states.

    Where it is streamed that is a model of one step, which takes the initial states too.
    """
    onnx: Any = importlib.import_module("onnx")
    helper, row = onnx.helper, work.row
    weight_ih, weight_hh, bias_ih, bias_hh = work.weights()
    order = _ORDER[len(weight_hh) // row.hidden]
    held = {
        "weight_ih": _ordered(weight_ih, order)[None],
        "weight_hh": _ordered(weight_hh, order)[None],
        "bias": numpy.concatenate([_ordered(bias_ih, order), _ordered(bias_hh, order)])[None],
    }
    names = work.ours.cell(row.input, row.hidden).state
    states = [f"final_{name}" for name in names]
    streamed = row.mode == "streaming"
    starts, time = ([f"initial_{name}" for name in names], 1) if streamed else ([], row.time)
    options = {"linear_before_reset": 1} if len(order) == 3 else {}
    operator = type(work.theirs).__name__
    given = ["x", *held, *(["", *starts] if starts else ())]  # between them the lengths of rows, left out
    node = helper.make_node(operator, given, ["output", *states], hidden_size=row.hidden, **options)
    outputs: dict[str, tuple[int, ...]] = {"output": (time, 1, row.batch, row.hidden)}
    outputs |= dict.fromkeys(states, (1, row.batch, row.hidden))

    def info(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        "layer",
        [
            info("x", (time, row.batch, row.input)),
            *(info(name, (1, row.batch, row.hidden)) for name in starts),
        ],
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
    if work.row.mode == "streaming":
        return _bound(ort, session, work)
    given = {"x": work.x.detach().numpy()}
    return lambda: session.run(None, given)


def _bound(ort: Any, session: Any, work: Work) -> Call:
    """Step by step in memory bound beforehand, states to and fro between two places: its fastest way."""
    x, row = work.x.detach().numpy(), work.row
    starts = [given.name for given in session.get_inputs()[1:]]

    def made(*shape: int) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(numpy.zeros(shape, numpy.float32))

    now, output = made(1, row.batch, row.input), made(1, 1, row.batch, row.hidden)
    places = [[made(1, row.batch, row.hidden) for _ in starts] for _ in range(2)]
    bindings = []
    for before, after in ((0, 1), (1, 0)):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", now)
        binding.bind_ortvalue_output("output", output)
        for name, a, b in zip(starts, places[before], places[after], strict=True):
            binding.bind_ortvalue_input(name, a)
            binding.bind_ortvalue_output(name.replace("initial", "final"), b)
        bindings.append(binding)
    zeros = numpy.zeros((1, row.batch, row.hidden), numpy.float32)
    steps = [x[t : t + 1] for t in range(row.time)]

    def call() -> list[Any]:
        for place in places[0]:
            place.update_inplace(zeros)
        outputs = []
        for t, step in enumerate(steps):
            now.update_inplace(step)
            session.run_with_iobinding(bindings[t % 2])
            outputs.append(output.numpy().copy())  # which is a view
        return [numpy.concatenate(outputs), *(place.numpy().copy() for place in places[row.time % 2])]

    return call


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
    x = work.x.detach().numpy()
    if work.row.mode != "streaming":
        return lambda: list(request.infer([x], share_inputs=True, share_outputs=True).values())
    zeros = numpy.zeros((1, work.row.batch, work.row.hidden), numpy.float32)
    count = len(request.model_inputs) - 1
    steps = [x[t : t + 1] for t in range(work.row.time)]

    def call() -> list[Any]:
        outputs, state = [], [zeros] * count
        for step in steps:
            # outputs that are not shared: they are the next step's inputs
            output, *state = request.infer([step, *state], share_inputs=True, share_outputs=False).values()
            outputs.append(output)
        return [numpy.concatenate(outputs), *state]

    return call


def _ordered(array: Any, order: tuple[int, ...]) -> Any:
    gates = array.reshape(len(order), -1, *array.shape[1:])
    return gates[list(order)].reshape(array.shape)
