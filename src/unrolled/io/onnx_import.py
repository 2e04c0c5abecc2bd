"""Import the RNN, GRU and LSTM nodes of an ONNX model, with their weights, as modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.io.onnx_graph import (
    QUANTIZED,
    FoundNode,
    NotConstantError,
    describe_operators,
    recurrent_nodes,
)
from unrolled.io.onnx_packages import import_package
from unrolled.layers.recurrent import Recurrent

# For each of our gates, its index in ONNX's order (https://onnx.ai/onnx/operators): z r h becomes r z n,
# i o f c becomes i f g o.
_GATES: dict[str, tuple[int, ...]] = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1)}
_PEEPHOLES = ("peep_i", "peep_o", "peep_f")
_DEFAULT_ACTIVATIONS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
# A DynamicQuantizeLSTM has all of them, an LSTM those up to P, an RNN and a GRU those up to initial_h.
_QUANTIZATION = ("W_scale", "W_zero_point", "R_scale", "R_zero_point")
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P", *_QUANTIZATION)
_WEIGHTS = {"W", "R", "B", "P", *_QUANTIZATION}
_ATTRIBUTES = (
    "activation_alpha",
    "activation_beta",
    "activations",
    "clip",
    "direction",
    "hidden_size",
    "input_forget",
    "layout",
    "linear_before_reset",
)
_DIRECTIONS = ("forward", "reverse", "bidirectional")


class RecurrentNode(nn.Module):
    """A module that computes an RNN, GRU or LSTM operator of ONNX.

    Args:
        operator: ``"RNN"``, ``"GRU"`` or ``"LSTM"``.
        weights: The inputs ``W`` and ``R`` of the operator, and optionally ``B`` and ``P``.
        attributes: The attributes of the operator.
        name: The name of the node, for error messages.

    Attributes:
        layer: The recurrent layer that holds the weights.

    Raises:
        ValueError: If the operator has an attribute, or a value of one, that isn't supported, or if the
            weights have inconsistent shapes.
    """

    def __init__(
        self,
        operator: str,
        weights: Mapping[str, Tensor],
        attributes: Mapping[str, Any],
        name: str = "the node",
    ) -> None:
        super().__init__()
        self._name = f"{name} ({operator})"
        self._operator, self._attributes = operator, dict(attributes)
        if operator not in _GATES:
            raise ValueError(f"{self._name}: expected the operator RNN, GRU or LSTM")
        options = self._cell_options(attributes)
        self._check_shapes(weights)
        recurrent, inputs = weights["R"], weights["W"]
        directions, _, hidden = recurrent.shape
        self.direction = attributes.get("direction", "forward")
        if self.direction not in _DIRECTIONS:
            raise ValueError(
                f"{self._name}: expected the direction {', '.join(_DIRECTIONS[:-1])} or {_DIRECTIONS[-1]}, "
                f"got {self.direction!r}"
            )
        if attributes.get("hidden_size", hidden) != hidden:
            raise ValueError(
                f"{self._name}: hidden_size is {attributes['hidden_size']}, but R has {hidden} units"
            )
        if directions != 1 + (self.direction == "bidirectional"):
            raise ValueError(
                f"{self._name}: the direction is {self.direction!r}, but the weights have {directions} "
                f"direction{'s' * (directions != 1)}"
            )
        self.batch_first = attributes.get("layout", 0) == 1
        self.layer = Recurrent(
            self._cell_class("P" in weights),
            inputs.shape[2],
            hidden,
            bidirectional=directions == 2,
            dtype=recurrent.dtype,
            **options,
        )
        self._load_weights(weights)

    def _cell_options(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the cell options for the attributes; raise an error if one isn't supported."""
        operator = self._operator
        for attribute in attributes:
            if attribute not in _ATTRIBUTES:
                raise ValueError(f"{self._name}: unknown attribute {attribute}")
        for attribute in ("clip", "input_forget"):
            if attributes.get(attribute):
                raise ValueError(f"{self._name}: {attribute}={attributes[attribute]} is not supported")
        activations = list(attributes.get("activations") or ())
        count = len(_DEFAULT_ACTIVATIONS[operator])
        by_direction = {
            tuple(name.capitalize() for name in activations[k : k + count])
            for k in range(0, len(activations), count)
        }
        supported = {_DEFAULT_ACTIVATIONS[operator]} | ({("Relu",)} if operator == "RNN" else set())
        if len(by_direction) > 1 or not by_direction <= supported:
            expected = " or ".join(", ".join(names) for names in sorted(supported))
            raise ValueError(
                f"{self._name}: expected the activations {expected} in every direction, got "
                f"{', '.join(activations)}"
            )
        return {"nonlinearity": "relu"} if by_direction == {("Relu",)} else {}

    def _check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an error if the weights have inconsistent shapes."""
        for kind in ("W", "R"):
            if kind not in weights or weights[kind].dim() != 3:
                actual = tuple(weights[kind].shape) if kind in weights else "no such input"
                raise ValueError(
                    f"{self._name}: expected {kind} of shape (directions, gates × hidden, features), "
                    f"got {actual}"
                )
        directions, _, hidden = weights["R"].shape
        gates = len(_GATES[self._operator])
        shapes = {
            "W": (directions, gates * hidden, weights["W"].shape[2]),
            "R": (directions, gates * hidden, hidden),
            "B": (directions, 2 * gates * hidden),
            "P": (directions, 3 * hidden),
        }
        for kind, value in weights.items():
            if kind in shapes and tuple(value.shape) != shapes[kind]:
                raise ValueError(
                    f"{self._name}: expected {kind} of shape {shapes[kind]} for {hidden} units, got "
                    f"{tuple(value.shape)}"
                )

    def _cell_class(self, peepholes: bool) -> type[Cell]:
        if self._operator == "GRU" and not self._attributes.get("linear_before_reset"):
            return cells.ResetBeforeGRU
        if self._operator == "LSTM" and peepholes:
            return cells.PeepholeLSTM
        cell: type[Cell] = getattr(cells, self._operator)
        return cell

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of the node into the layer."""
        layer, hidden, order = self.layer, self.layer.hidden_size, _GATES[self._operator]

        def reorder_gates(blocks: Tensor) -> Tensor:
            gates = torch.split(blocks, hidden)
            return torch.cat([gates[k] for k in order])

        with torch.no_grad():
            for k, suffix in enumerate(layer._cells):
                parameters = dict(layer.named_parameters())
                parameters[f"weight_ih{suffix}"].copy_(reorder_gates(weights["W"][k]))
                parameters[f"weight_hh{suffix}"].copy_(reorder_gates(weights["R"][k]))
                bias = weights["B"][k] if "B" in weights else weights["W"].new_zeros(2 * len(order) * hidden)
                bias_ih, bias_hh = map(reorder_gates, bias.chunk(2))
                if f"bias_hh{suffix}" not in parameters:
                    bias_ih = bias_ih + bias_hh
                else:
                    parameters[f"bias_hh{suffix}"].copy_(bias_hh)
                parameters[f"bias_ih{suffix}"].copy_(bias_ih)
                if "P" in weights and self._operator == "LSTM":
                    for name, part in zip(_PEEPHOLES, weights["P"][k].chunk(3), strict=True):
                        parameters[f"{name}{suffix}"].copy_(part)

    def forward(
        self,
        x: Tensor,
        sequence_lens: Tensor | None = None,
        initial_h: Tensor | None = None,
        initial_c: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the operator.

        Args:
            x: Input of shape ``(time, batch, input)``, or ``(batch, time, input)`` if ``layout`` is 1.
            sequence_lens: Sequence lengths of shape ``(batch,)``. All steps by default. A row of length 0
                keeps its initial state; ONNX doesn't specify this case.
            initial_h: Initial hidden state of shape ``(directions, batch, hidden)``, or
                ``(batch, directions, hidden)`` if ``layout`` is 1. Zeros by default.
            initial_c: Initial cell state of an LSTM, of the same shape. Zeros by default.

        Returns:
            ``Y``, ``Y_h`` and, for an LSTM, ``Y_c``, in the layout of ONNX.
        """
        if self.batch_first:
            x = x.transpose(0, 1)
            initial_h = None if initial_h is None else initial_h.transpose(0, 1)
            initial_c = None if initial_c is None else initial_c.transpose(0, 1)
        state: Any = initial_h
        if len(self.layer._first.state) > 1:
            either = initial_h if initial_h is not None else initial_c
            state = None
            if either is not None:
                state = tuple(torch.zeros_like(either) if t is None else t for t in (initial_h, initial_c))
        reversal = self._reversal_index(x, sequence_lens) if self.direction == "reverse" else None
        if reversal is not None:
            x = x.take_along_dim(reversal, 0)
        output, final = self.layer(x, state, lengths=sequence_lens)
        if reversal is not None:
            output = output.take_along_dim(reversal, 0)
        y = output.unflatten(-1, (len(self.layer._cells), -1))  # (time, batch, directions, hidden)
        finals = final if isinstance(final, tuple) else (final,)
        if self.batch_first:
            return (y.transpose(0, 1), *(part.transpose(0, 1) for part in finals))
        return (y.transpose(1, 2), *finals)

    @staticmethod
    def _reversal_index(x: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the index that reverses each row over time and leaves its padding in place."""
        time, batch, _ = x.shape
        steps = torch.arange(time, device=x.device).view(-1, 1, 1)
        ends = torch.full((1, batch, 1), time) if lengths is None else lengths.to(torch.int64).view(1, -1, 1)
        return torch.where(steps < ends, ends - 1 - steps, steps)


def from_onnx(model: Any) -> dict[str, RecurrentNode]:
    """Import the recurrent nodes of an ONNX model, with their weights.

    Nodes are also found in functions and in the bodies of If, Loop and Scan. Weights that the model computes
    from constants, by Concat or Transpose for instance, are computed with onnx's reference evaluator.

    A ``DynamicQuantizeLSTM`` of ONNX Runtime becomes an LSTM with the dequantized weights. Unlike ONNX
    Runtime, the LSTM doesn't quantize its inputs and states.

    Args:
        model: A path or an ``onnx.ModelProto``.

    Returns:
        A module for every RNN, GRU and LSTM node, keyed by the name of the node. A node without a name is
        keyed by its operator and its index in the graph, such as ``LSTM_3``. For a node inside of another
        one, the name of the outer node and of the attribute come first: ``If_7.then_branch.LSTM_3``.

    Raises:
        ImportError: If the package onnx is missing.
        TypeError: If `model` is neither a path nor a model.
        ValueError: If the file isn't an ONNX model, or the model has no recurrent node. If a recurrent node
            has an unsupported attribute, weights that depend on the input, or the name of another node.
    """
    onnx = import_package("onnx", "from_onnx")
    if isinstance(model, (str, Path)):
        path = model
        try:
            model = onnx.load(str(path))
        except OSError:
            raise
        except Exception as error:  # onnx raises protobuf's own exceptions
            raise ValueError(f"{path} is not an ONNX model: {error}") from error
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"from_onnx expects a path or an onnx.ModelProto, got {type(model).__name__}")
    modules: dict[str, RecurrentNode] = {}
    for found in recurrent_nodes(model):
        if found.name in modules:
            raise ValueError(f"two nodes of the model are named {found.name}; give each node its own name")
        modules[found.name] = _import_node(found)
    if not modules:
        raise ValueError(
            f"the model has no RNN, GRU or LSTM node: its operators are {describe_operators(model)}. "
            "Recurrent layers that were exported as loops of other operators can't be imported"
        )
    return modules


def _import_node(found: FoundNode) -> RecurrentNode:
    """Create the module for a node."""
    helper = import_package("onnx", "from_onnx").helper
    node = found.proto
    inputs = {kind: value for kind, value in zip(_INPUTS, node.input, strict=False) if value}
    weights: dict[str, Tensor] = {}
    for kind in inputs.keys() & _WEIGHTS:
        try:
            weights[kind] = _to_tensor(found.graph.constant(inputs[kind]))
        except NotConstantError as error:
            raise ValueError(
                f"{found.name} ({node.op_type}): expected constant weights, but the model computes {kind} "
                f"from {error}"
            ) from error
    attributes = {a.name: _decode(helper.get_attribute_value(a)) for a in node.attribute}
    if node.op_type != QUANTIZED:
        return RecurrentNode(node.op_type, weights, attributes, found.name)
    return RecurrentNode("LSTM", _dequantize(weights, found.name), attributes, found.name)


def _dequantize(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights of an LSTM node from those of a DynamicQuantizeLSTM.

    Its ``W`` and ``R`` are 8-bit integers of shape ``(directions, features, 4 × hidden)``, with scales and
    zero points of shape ``(directions,)`` or ``(directions, 4 × hidden)``.
    """
    dequantized = {kind: value for kind, value in weights.items() if kind in ("B", "P")}
    for kind in ("W", "R"):
        parts = [weights.get(key) for key in (kind, f"{kind}_scale", f"{kind}_zero_point")]
        shapes = ", ".join("no such input" if part is None else str(tuple(part.shape)) for part in parts)
        quantized, scale, zero = (torch.empty(0) if part is None else part for part in parts)
        sizes = tuple(quantized.shape[::2])  # directions and columns
        if quantized.dim() != 3 or scale.shape != zero.shape or tuple(scale.shape) not in (sizes[:1], sizes):
            raise ValueError(
                f"{name} ({QUANTIZED}): expected {kind} of shape (directions, features, 4 × hidden), its "
                f"scale and its zero point of shape (directions,) or (directions, 4 × hidden), got {shapes}"
            )
        scale, zero = (part.view(len(part), 1, -1) for part in (scale, zero))
        difference = quantized.to(scale.dtype) - zero.to(scale.dtype)
        dequantized[kind] = (difference * scale).transpose(1, 2)
    return dequantized


def _to_tensor(array: numpy.ndarray[Any, Any]) -> Tensor:
    """Convert an array to a tensor; one of bfloat16, which NumPy doesn't have, too."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(numpy.float32)).bfloat16()
    return torch.from_numpy(numpy.array(array))


def _decode(value: Any) -> Any:
    """Decode the bytes in the value of an attribute to text."""
    if isinstance(value, bytes):
        return value.decode()
    return [_decode(part) for part in value] if isinstance(value, (list, tuple)) else value
