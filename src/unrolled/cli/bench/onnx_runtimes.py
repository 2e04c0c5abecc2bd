"""Inference runtimes that run an ONNX model built from the layer's weights: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import importlib
from typing import Any

import numpy
import torch

from unrolled.cli.bench.workload import Call, Workload

# For each ONNX gate, its index in torch's order, by the number of gates: r z n becomes z r h, i f g o becomes
# i o f c (https://onnx.ai/onnx/operators).
_GATE_ORDER: dict[int, tuple[int, ...]] = {1: (0,), 3: (1, 0, 2), 4: (0, 3, 1, 2)}
_OPSET, _IR = 14, 8


def onnx_model(workload: Workload) -> bytes:
    """Build the ONNX model of a row, from the input ``x`` to the output and the final states.

    For streaming, build a model of a single step, which also takes the initial states.
    """
    onnx: Any = importlib.import_module("onnx")
    helper, row = onnx.helper, workload.row
    weight_ih, weight_hh, bias_ih, bias_hh = workload.weights()
    order = _GATE_ORDER[len(weight_hh) // row.hidden]
    weights = {
        "weight_ih": _reorder_gates(weight_ih, order)[None],
        "weight_hh": _reorder_gates(weight_hh, order)[None],
        "bias": numpy.concatenate([_reorder_gates(bias_ih, order), _reorder_gates(bias_hh, order)])[None],
    }
    names = workload.ours.cell(row.input, row.hidden).state
    finals = [f"final_{name}" for name in names]
    streaming = row.mode == "streaming"
    initials, time = ([f"initial_{name}" for name in names], 1) if streaming else ([], row.time)
    options = {"linear_before_reset": 1} if len(order) == 3 else {}
    operator = type(workload.theirs).__name__
    inputs = ["x", *weights, *(["", *initials] if initials else ())]  # the empty input: no sequence lengths
    node = helper.make_node(operator, inputs, ["output", *finals], hidden_size=row.hidden, **options)
    outputs: dict[str, tuple[int, ...]] = {"output": (time, 1, row.batch, row.hidden)}
    outputs |= dict.fromkeys(finals, (1, row.batch, row.hidden))

    def value_info(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        "layer",
        [
            value_info("x", (time, row.batch, row.input)),
            *(value_info(name, (1, row.batch, row.hidden)) for name in initials),
        ],
        [value_info(name, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(numpy.ascontiguousarray(v), name) for name, v in weights.items()],
    )
    model = helper.make_model(graph, ir_version=_IR, opset_imports=[helper.make_opsetid("", _OPSET)])
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def prepare_onnxruntime(workload: Workload) -> Call:
    """Prepare ONNX Runtime's CPU provider with torch's number of threads."""
    ort: Any = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # free the cores for the next runtime
    session = ort.InferenceSession(onnx_model(workload), options, providers=["CPUExecutionProvider"])
    if workload.row.mode == "streaming":
        return _prepare_io_binding(ort, session, workload)
    inputs = {"x": workload.x.detach().numpy()}
    return lambda: session.run(None, inputs)


def _prepare_io_binding(ort: Any, session: Any, workload: Workload) -> Call:
    """Stream with preallocated memory and two buffers for the states, the fastest way of ONNX Runtime."""
    x, row = workload.x.detach().numpy(), workload.row
    initials = [value.name for value in session.get_inputs()[1:]]

    def allocate(*shape: int) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(numpy.zeros(shape, numpy.float32))

    x_t, output = allocate(1, row.batch, row.input), allocate(1, 1, row.batch, row.hidden)
    buffers = [[allocate(1, row.batch, row.hidden) for _ in initials] for _ in range(2)]
    bindings = []
    for source, target in ((0, 1), (1, 0)):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x_t)
        binding.bind_ortvalue_output("output", output)
        for name, old, new in zip(initials, buffers[source], buffers[target], strict=True):
            binding.bind_ortvalue_input(name, old)
            binding.bind_ortvalue_output(name.replace("initial", "final"), new)
        bindings.append(binding)
    zeros = numpy.zeros((1, row.batch, row.hidden), numpy.float32)
    steps = [x[t : t + 1] for t in range(row.time)]

    def call() -> list[Any]:
        for state in buffers[0]:
            state.update_inplace(zeros)
        outputs = []
        for t, step in enumerate(steps):
            x_t.update_inplace(step)
            session.run_with_iobinding(bindings[t % 2])
            outputs.append(output.numpy().copy())  # numpy() is a view
        return [numpy.concatenate(outputs), *(state.numpy().copy() for state in buffers[row.time % 2])]

    return call


def prepare_openvino(workload: Workload) -> Call:
    """Prepare OpenVINO's CPU plugin in float32 with torch's number of threads."""
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # the calling thread also runs the other runtimes
    }
    model = core.compile_model(core.read_model(onnx_model(workload), b""), "CPU", options)
    request = model.create_infer_request()
    x = workload.x.detach().numpy()
    if workload.row.mode != "streaming":
        return lambda: list(request.infer([x], share_inputs=True, share_outputs=True).values())
    zeros = numpy.zeros((1, workload.row.batch, workload.row.hidden), numpy.float32)
    state_count = len(request.model_inputs) - 1
    steps = [x[t : t + 1] for t in range(workload.row.time)]

    def call() -> list[Any]:
        outputs, state = [], [zeros] * state_count
        for step in steps:
            # don't share the outputs: they are the inputs of the next step
            output, *state = request.infer([step, *state], share_inputs=True, share_outputs=False).values()
            outputs.append(output)
        return [numpy.concatenate(outputs), *state]

    return call


def _reorder_gates(array: Any, order: tuple[int, ...]) -> Any:
    gates = array.reshape(len(order), -1, *array.shape[1:])
    return gates[list(order)].reshape(array.shape)
