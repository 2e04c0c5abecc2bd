"""Layers as ONNX models: the standard operators where ONNX has the cell, a Scan over its step elsewhere."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.io.weights import weights_of
from unrolled.layers.recurrent import Recurrent

# The operator of a cell, and its gates in ONNX's order, as places in ours (https://onnx.ai/onnx/operators).
_OPERATORS: dict[type[Cell], tuple[str, tuple[int, ...]]] = {
    cells.RNN: ("RNN", (0,)),
    cells.GRU: ("GRU", (1, 0, 2)),
    cells.ResetBeforeGRU: ("GRU", (1, 0, 2)),
    cells.LSTM: ("LSTM", (0, 3, 1, 2)),
}
_OPSET, _IR = 18, 9


def to_onnx(layer: Recurrent, file: str | Path | None = None, states: bool = False) -> Any:
    """A layer as an ONNX model, of any number of time steps and rows.

    Its input is ``x``, laid out as the layer takes it; its outputs are ``output``, and ``final_h`` for a
    state ``h`` and so on, ``(K, batch, H)``. An RNN, GRU or LSTM is the operator of that name. Any other cell
    is a Scan whose body is its step, as torch's exporter writes it.

    Args:
        layer: a layer in evaluation mode or without dropout.
        file: where to write the model; None: nowhere.
        states: whether the initial states are inputs too: ``initial_h`` and so on, laid out as the final
            ones.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        TypeError: no recurrent layer of ours.
        ImportError: the package onnx, or for other cells onnxscript, is not installed.
        ValueError: a layer that computes something at random, or in a dtype that ONNX' operators don't take.
    """
    import onnx

    weights = weights_of(layer, "to_onnx")
    layer.check_noise("an ONNX model")
    if layer.training and layer.dropout:
        raise ValueError(
            f"{type(layer).__name__}: dropout is random: export the layer in evaluation mode, .eval()"
        )
    model = _Graph(layer, onnx, weights, states).model()
    if file is not None:
        onnx.save(model, str(file))
    return model


class _Graph:
    """An ONNX graph in the making."""

    def __init__(self, layer: Recurrent, onnx: Any, weights: dict[str, Tensor], states: bool) -> None:
        self._layer, self._onnx, self._weights, self._given = layer, onnx, weights, states
        self._dtype = next(iter(weights.values())).dtype
        self._nodes: list[Any] = []
        self._held: list[Any] = []
        self._numbers = itertools.count()
        self._sizes = layer._first.state_sizes()

    def model(self) -> Any:
        """The whole model."""
        layer, helper = self._layer, self._onnx.helper
        ahead = ["batch", "time"] if layer.batch_first else ["time", "batch"]
        count = len(layer._cells)
        x = self._node("Transpose", ["x"], perm=[1, 0, 2]) if layer.batch_first else "x"
        starts = {name: f"initial_{name}" if self._given else self._start(name, x) for name in self._sizes}
        finals: dict[str, list[str]] = {name: [] for name in self._sizes}
        operator = self._operator()
        for number, suffixes in enumerate(layer._stack):
            at = number * len(suffixes)
            mine = {name: self._part(starts[name], at, len(suffixes)) for name in self._sizes}
            make = self._scans if operator is None else self._standard
            x, last = make(suffixes, x, mine)
            for name, value in zip(finals, last, strict=True):
                finals[name].append(value)
        x = self._node("Transpose", [x], perm=[1, 0, 2]) if layer.batch_first else x
        self._nodes.append(helper.make_node("Identity", [x], ["output"]))
        for name, values in finals.items():
            self._nodes.append(helper.make_node("Concat", values, [f"final_{name}"], axis=0))
        lanes = len(layer._stack[0])
        outputs = [self._info("output", [*ahead, lanes * next(iter(self._sizes.values()))])]
        outputs += [self._info(f"final_{name}", [count, "batch", size]) for name, size in self._sizes.items()]
        inputs = [self._info("x", [*ahead, layer.input_size])]
        if self._given:
            inputs += [self._info(starts[name], [count, "batch", size]) for name, size in self._sizes.items()]
        graph = helper.make_graph(self._nodes, "layer", inputs, outputs, self._held)
        opsets = [helper.make_opsetid("", _OPSET)]
        made = helper.make_model(graph, ir_version=_IR, opset_imports=opsets, producer_name="unrolled")
        self._onnx.checker.check_model(made)
        return made

    # --- ONNX' own operators ---

    def _operator(self) -> str | None:
        found = _OPERATORS.get(self._layer.cell)
        projected = len(set(self._sizes.values())) > 1
        return None if found is None or projected or self._dtype is not torch.float32 else found[0]

    def _standard(self, suffixes: list[str], x: str, starts: dict[str, str]) -> tuple[str, list[str]]:
        """All directions of a layer as one node; the outputs side by side, and the final states."""
        layer = self._layer
        operator, order = _OPERATORS[layer.cell]

        def gates(name: str) -> Tensor:
            """Of all directions, in ONNX's order."""
            each = []
            for suffix in suffixes:
                parts = self._weights[name + suffix].chunk(len(order))
                each.append(torch.cat([parts[k] for k in order]))
            return torch.stack(each)

        inputs = [x, self._constant(gates("weight_ih")), self._constant(gates("weight_hh"))]
        both = torch.cat((gates("bias_ih"), gates("bias_hh")), 1) if layer.bias else None
        inputs += ["" if both is None else self._constant(both), "", *starts.values()]
        options: dict[str, Any] = {"hidden_size": layer.hidden_size}
        options["direction"] = "bidirectional" if len(suffixes) == 2 else "forward"
        if layer.cell is cells.GRU:
            options["linear_before_reset"] = 1
        if layer.chosen_options().get("nonlinearity") == "relu":
            options["activations"] = ["Relu"] * len(suffixes)
        outputs = [self._name() for _ in range(1 + len(starts))]
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, outputs, **options))
        y = self._node("Transpose", [outputs[0]], perm=[0, 2, 1, 3])  # (time, batch, directions, hidden)
        return self._node("Reshape", [y, self._constant(torch.tensor([0, 0, -1]))]), outputs[1:]

    # --- any other cell ---

    def _scans(self, suffixes: list[str], x: str, starts: dict[str, str]) -> tuple[str, list[str]]:
        """Each direction of a layer as a Scan; the outputs side by side, and the final states."""
        helper, outputs = self._onnx.helper, []
        finals: list[list[str]] = [[] for _ in starts]
        for direction, suffix in enumerate(suffixes):
            prefix = f"step{suffix}_"
            body = self._onnx.compose.add_prefix_graph(self._body(suffix), prefix)
            body.name = prefix + "body"
            first = [self._squeezed(self._part(start, direction, 1)) for start in starts.values()]
            last, y = [self._name() for _ in starts], self._name()
            scan = helper.make_node(
                "Scan",
                [*first, x],
                [*last, y],
                body=body,
                num_scan_inputs=1,
                scan_input_directions=[direction],
                scan_output_directions=[direction],
            )
            self._nodes.append(scan)
            outputs.append(y)
            axis = self._constant(torch.tensor([0]))
            for parts, value in zip(finals, last, strict=True):
                parts.append(self._node("Unsqueeze", [value, axis]))
        output = outputs[0] if len(outputs) == 1 else self._node("Concat", outputs, axis=2)
        return output, [self._node("Concat", parts, axis=0) for parts in finals]

    def _body(self, suffix: str) -> Any:
        """The step as a graph: the states and x to the new states and the output."""
        cell = self._layer._bind(suffix)
        cell.training = False
        states = [torch.zeros(2, size, dtype=self._dtype) for size in cell.state_sizes().values()]
        example = (*states, torch.zeros(2, cell.input, dtype=self._dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names of axes, and of the exporter's own making
            program: Any = torch.onnx.export(
                _Step(cell).eval(),
                example,
                dynamo=True,
                dynamic_shapes=(tuple({0: "batch"} for _ in example),),
                opset_version=_OPSET,
                verbose=False,
            )
        graph, helper = program.model_proto.graph, self._onnx.helper
        given = [output.name for output in graph.output]
        del graph.output[:]
        for number, name in enumerate((*given, given[0])):  # each of its own: a state may come back unchanged
            graph.node.append(helper.make_node("Identity", [name], [f"new_{number}"]))
        sizes = [*(state.shape[1] for state in states), states[0].shape[1]]
        graph.output.extend(self._info(f"new_{k}", ["batch", size]) for k, size in enumerate(sizes))
        return graph

    # --- small things ---

    def _start(self, name: str, x: str) -> str:
        """The initial states of all directions of all layers, where they are no inputs."""
        layer, size = self._layer, self._sizes[name]
        suffixes = list(layer._cells)
        if layer.initial_state == "learned":
            starts = [self._weights[f"initial_{name}{suffix}"] for suffix in suffixes]
            value = torch.stack(starts).unsqueeze(1)
        else:
            value = torch.zeros(1, 1, 1, dtype=self._dtype)
        shape = self._node("Shape", [x])
        batch = self._node("Gather", [shape, self._constant(torch.tensor([1]))], axis=0)
        ends = self._constant(torch.tensor([len(suffixes)])), self._constant(torch.tensor([size]))
        whole = self._node("Concat", [ends[0], batch, ends[1]], axis=0)
        return self._node("Expand", [self._constant(value), whole])

    def _part(self, value: str, at: int, many: int) -> str:
        """Some of the first axis."""
        ends = [self._constant(torch.tensor([k])) for k in (at, at + many, 0)]
        return self._node("Slice", [value, *ends])

    def _squeezed(self, value: str) -> str:
        return self._node("Squeeze", [value, self._constant(torch.tensor([0]))])

    def _node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = self._name()
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def _constant(self, value: Tensor) -> str:
        name = self._name()
        self._held.append(self._onnx.numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def _info(self, name: str, shape: Sequence[str | int]) -> Any:
        proto = self._onnx.TensorProto
        kind = proto.FLOAT if self._dtype is torch.float32 else proto.DOUBLE
        return self._onnx.helper.make_tensor_value_info(name, kind, list(shape))

    def _name(self) -> str:
        return f"v{next(self._numbers)}"


class _Step(nn.Module):
    """A step as a module of the states and x, its parameters as such."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self._cell = cell
        for name in cell.shapes():
            self.register_parameter(name, nn.Parameter(getattr(cell, name).detach(), requires_grad=False))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The new states."""
        *states, x = given
        bound = self._cell.bind({name: getattr(self, name) for name in self._cell.shapes()})
        new = bound.step(x, *states)
        return new if isinstance(new, tuple) else (new,)
