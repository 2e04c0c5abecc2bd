"""Export layers to ONNX: as a standard operator if ONNX has the cell, otherwise as a Scan over its step."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.cells.onnx_operators import OnnxOperator, onnx_attributes, onnx_operator
from unrolled.cells.onnx_products import float_equivalent, is_quantized
from unrolled.io.onnx_packages import import_package
from unrolled.io.quantized_step import quantized_step
from unrolled.io.weights import layer_weights
from unrolled.layers.recurrent import Recurrent

_OPSET, _IR = 18, 9


def to_onnx(layer: Recurrent, file: str | Path | None = None, states: bool = False) -> Any:
    """Export a layer as an ONNX model with a dynamic batch size and sequence length.

    The model has the input ``x``, in the layout of the layer, and the outputs ``output`` and ``final_h``,
    ``final_c`` and so on, one for each state, of shape ``(num_layers * num_directions, batch, hidden)``.

    An RNN, GRU or LSTM in float32 becomes the ONNX operator of that name. Any other cell becomes a Scan whose
    body is the step of the cell, exported by torch.onnx. So do float64 layers, layers with projections, and
    layers with int8 weights, whose products become MatMulInteger. The model contains the quantized weights.

    Args:
        layer: The layer to export, in evaluation mode or without dropout.
        file: The file to write the model to, or None to not write it.
        states: If True, the initial states ``initial_h`` and so on are also inputs, with the shapes of the
            final states.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        TypeError: If `layer` isn't a recurrent layer of unrolled.
        ImportError: If the package onnx is missing, or onnxscript for a cell that needs a Scan.
        ValueError: If the layer is random, such as by dropout, or has a dtype that ONNX doesn't support.
    """
    onnx = import_package("onnx", "to_onnx")
    weights = layer_weights(layer, "to_onnx")
    layer.check_only_step("an ONNX model", allow_quantized=True)
    if layer.training and layer.dropout:
        raise ValueError(
            f"{type(layer).__name__}: dropout makes the model random; call .eval() before the export"
        )
    model = _Graph(layer, onnx, weights, states).model()
    if file is not None:
        onnx.save(model, str(file))
    return model


class _Graph:
    """Builder of an ONNX graph."""

    def __init__(self, layer: Recurrent, onnx: Any, weights: dict[str, Tensor], states: bool) -> None:
        self._layer, self._onnx, self._weights, self._state_inputs = layer, onnx, weights, states
        self._dtype = next(iter(weights.values())).dtype
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._counter = itertools.count()
        self._state_sizes = layer._first.state_sizes()

    def model(self) -> Any:
        """Build the whole model."""
        layer, helper, sizes = self._layer, self._onnx.helper, self._state_sizes
        leading_axes = ["batch", "time"] if layer.batch_first else ["time", "batch"]
        state_count = len(layer._cells)
        x = self._node("Transpose", ["x"], perm=[1, 0, 2]) if layer.batch_first else "x"
        initial = {
            name: f"initial_{name}" if self._state_inputs else self._initial_state(name, x) for name in sizes
        }
        finals: dict[str, list[str]] = {name: [] for name in sizes}
        add_layer = self._add_scans if self._operator() is None else self._add_operator
        for index, suffixes in enumerate(layer._stack):
            start = index * len(suffixes)
            layer_initial = {name: self._slice(initial[name], start, len(suffixes)) for name in sizes}
            x, layer_finals = add_layer(suffixes, x, layer_initial)
            for name, value in zip(finals, layer_finals, strict=True):
                finals[name].append(value)
        x = self._node("Transpose", [x], perm=[1, 0, 2]) if layer.batch_first else x
        self._nodes.append(helper.make_node("Identity", [x], ["output"]))
        for name, values in finals.items():
            self._nodes.append(helper.make_node("Concat", values, [f"final_{name}"], axis=0))
        directions = len(layer._stack[0])
        outputs = [self._value_info("output", [*leading_axes, directions * next(iter(sizes.values()))])]
        outputs += [
            self._value_info(f"final_{name}", [state_count, "batch", size]) for name, size in sizes.items()
        ]
        inputs = [self._value_info("x", [*leading_axes, layer.input_size])]
        if self._state_inputs:
            inputs += [
                self._value_info(initial[name], [state_count, "batch", size]) for name, size in sizes.items()
            ]
        graph = helper.make_graph(self._nodes, "layer", inputs, outputs, self._initializers)
        opsets = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, ir_version=_IR, opset_imports=opsets, producer_name="unrolled")
        self._onnx.checker.check_model(model)
        return model

    # --- ONNX's own operators ---

    def _operator(self) -> OnnxOperator | None:
        """Return the ONNX operator for this layer, or None if it needs a Scan."""
        return onnx_operator(float_equivalent(self._layer._first), self._dtype)

    def _add_operator(self, suffixes: list[str], x: str, initial: dict[str, str]) -> tuple[str, list[str]]:
        """Add one node for all directions of a layer; return the joined output and the final states."""
        layer = self._layer
        operator = self._operator()
        assert operator is not None

        def gates(name: str) -> Tensor:
            """Stack a parameter of all directions, with the gates in ONNX's order."""
            return torch.stack([operator.reorder(self._weights[name + suffix]) for suffix in suffixes])

        inputs = [x, *(self._weight(gates(name), name + suffixes[0]) for name in ("weight_ih", "weight_hh"))]
        bias = torch.cat((gates("bias_ih"), gates("bias_hh")), 1) if layer.bias else None
        inputs += ["" if bias is None else self._constant(bias), "", *initial.values()]
        options = onnx_attributes(float_equivalent(layer._first), len(suffixes))
        outputs = [self._new_name() for _ in range(1 + len(initial))]
        self._nodes.append(self._onnx.helper.make_node(operator.name, inputs, outputs, **options))
        y = self._node("Transpose", [outputs[0]], perm=[0, 2, 1, 3])  # (time, batch, directions, hidden)
        return self._node("Reshape", [y, self._constant(torch.tensor([0, 0, -1]))]), outputs[1:]

    # --- any other cell ---

    def _add_scans(self, suffixes: list[str], x: str, initial: dict[str, str]) -> tuple[str, list[str]]:
        """Add one Scan for each direction of a layer; return the joined output and the final states."""
        helper, outputs = self._onnx.helper, []
        finals: list[list[str]] = [[] for _ in initial]
        for direction, suffix in enumerate(suffixes):
            prefix = f"step{suffix}_"
            body = self._onnx.compose.add_prefix_graph(self._step_graph(suffix), prefix)
            body.name = prefix + "body"
            first_states = [self._squeeze(self._slice(state, direction, 1)) for state in initial.values()]
            last_states, y = [self._new_name() for _ in initial], self._new_name()
            scan = helper.make_node(
                "Scan",
                [*first_states, x],
                [*last_states, y],
                body=body,
                num_scan_inputs=1,
                scan_input_directions=[direction],
                scan_output_directions=[direction],
            )
            self._nodes.append(scan)
            outputs.append(y)
            axis = self._constant(torch.tensor([0]))
            for directions, value in zip(finals, last_states, strict=True):
                directions.append(self._node("Unsqueeze", [value, axis]))
        output = outputs[0] if len(outputs) == 1 else self._node("Concat", outputs, axis=2)
        return output, [self._node("Concat", directions, axis=0) for directions in finals]

    def _step_graph(self, suffix: str) -> Any:
        """Export the step of a cell as a graph from the states and x to the new states and the output."""
        import_package("onnxscript", f"to_onnx of {type(self._layer._first).__name__} as a Scan")
        cell = self._layer._bind(suffix)
        cell.training = False
        states = [torch.zeros(2, size, dtype=self._dtype) for size in cell.state_sizes().values()]
        example = (*states, torch.zeros(2, cell.input, dtype=self._dtype))
        axes = tuple({0: "batch"} for _ in example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about axis names and about its own internals
            step = quantized_step(cell, example) if is_quantized(cell) else _Step(cell)
            program: Any = torch.onnx.export(
                step.eval(),
                example,
                dynamo=True,
                dynamic_shapes=(axes,),
                opset_version=_OPSET,
                verbose=False,
            )
        graph, helper = program.model_proto.graph, self._onnx.helper
        names = [output.name for output in graph.output]
        del graph.output[:]
        for index, name in enumerate(
            (*names, names[0])
        ):  # outputs need distinct names, also if a state repeats
            graph.node.append(helper.make_node("Identity", [name], [f"new_{index}"]))
        sizes = [*(state.shape[1] for state in states), states[0].shape[1]]
        graph.output.extend(self._value_info(f"new_{k}", ["batch", size]) for k, size in enumerate(sizes))
        return graph

    # --- helpers ---

    def _initial_state(self, name: str, x: str) -> str:
        """Add the initial states of all layers and directions as constants, expanded to the batch size."""
        layer, size = self._layer, self._state_sizes[name]
        suffixes = list(layer._cells)
        if layer.initial_state == "learned":
            learned = [self._weights[f"initial_{name}{suffix}"] for suffix in suffixes]
            value = torch.stack(learned).unsqueeze(1)
        else:
            value = torch.zeros(1, 1, 1, dtype=self._dtype)
        x_shape = self._node("Shape", [x])
        batch = self._node("Gather", [x_shape, self._constant(torch.tensor([1]))], axis=0)
        count, width = self._constant(torch.tensor([len(suffixes)])), self._constant(torch.tensor([size]))
        shape = self._node("Concat", [count, batch, width], axis=0)
        return self._node("Expand", [self._constant(value), shape])

    def _slice(self, value: str, start: int, length: int) -> str:
        """Slice the first axis."""
        arguments = [self._constant(torch.tensor([k])) for k in (start, start + length, 0)]
        return self._node("Slice", [value, *arguments])

    def _squeeze(self, value: str) -> str:
        return self._node("Squeeze", [value, self._constant(torch.tensor([0]))])

    def _node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = self._new_name()
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def _weight(self, value: Tensor, name: str) -> str:
        """Add a weight: in the format of 16 bits in which the layer stores it, if there is one."""
        storage = self._layer.weight_storage
        if storage is None or not storage.is_stored(name):
            return self._constant(value)
        helper, proto, stored = self._onnx.helper, self._onnx.TensorProto, self._new_name()
        dtype = proto.FLOAT16 if storage.weights == "float16" else proto.BFLOAT16
        values = value.to(getattr(torch, storage.weights)).contiguous()
        content = values.view(torch.int16).numpy().astype("<i2").tobytes()
        self._initializers.append(helper.make_tensor(stored, dtype, value.shape, content, raw=True))
        return self._node("Cast", [stored], to=proto.FLOAT)

    def _constant(self, value: Tensor) -> str:
        name = self._new_name()
        self._initializers.append(self._onnx.numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def _value_info(self, name: str, shape: Sequence[str | int]) -> Any:
        proto = self._onnx.TensorProto
        element_type = proto.FLOAT if self._dtype is torch.float32 else proto.DOUBLE
        return self._onnx.helper.make_tensor_value_info(name, element_type, list(shape))

    def _new_name(self) -> str:
        return f"v{next(self._counter)}"


class _Step(nn.Module):
    """The step of a cell as a module from the states and x to the new states, for torch.onnx.export."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self._cell = cell
        for name in cell.shapes():
            self.register_parameter(name, nn.Parameter(getattr(cell, name).detach(), requires_grad=False))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the new states, given the states and x."""
        *states, x = inputs
        bound = self._cell.bind({name: getattr(self, name) for name in self._cell.shapes()})
        new = bound.step(x, *states)
        return new if isinstance(new, tuple) else (new,)
