"""ONNX's recurrent operators as modules that compute with our layers, weights and all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.layers.recurrent import Recurrent

# The gates of each operator in the order of ours, as places in ONNX's order (https://onnx.ai/onnx/operators):
# z r h becomes r z n; i o f c becomes i f g o.
_GATES: dict[str, tuple[int, ...]] = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1)}
_PEEPHOLES = ("peep_i", "peep_o", "peep_f")
_USUAL = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
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
    """An RNN, GRU or LSTM operator of ONNX.

    Args:
        operator: ``"RNN"``, ``"GRU"`` or ``"LSTM"``.
        weights: the operator's inputs ``W``, ``R`` and perhaps ``B`` and ``P``.
        attributes: the operator's attributes.
        name: of the node, for messages.

    Attributes:
        layer: what computes it.

    Raises:
        ValueError: an attribute, or a value of it, that our layers don't have.
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
        options = self._options(attributes)
        self._check(weights)
        recurrent, inputs = weights["R"], weights["W"]
        directions, _, hidden = recurrent.shape
        self.direction = attributes.get("direction", "forward")
        if self.direction not in _DIRECTIONS:
            raise ValueError(
                f"{self._name}: the direction {self.direction!r} is none of {', '.join(_DIRECTIONS)}"
            )
        if attributes.get("hidden_size", hidden) != hidden:
            raise ValueError(
                f"{self._name}: hidden_size is {attributes['hidden_size']}, and R has {hidden} units"
            )
        if directions != 1 + (self.direction == "bidirectional"):
            raise ValueError(
                f"{self._name}: the direction {self.direction!r} doesn't go with weights of {directions} "
                f"direction{'s' * (directions != 1)}"
            )
        self.batch_first = attributes.get("layout", 0) == 1
        self.layer = Recurrent(
            self._cell("P" in weights),
            inputs.shape[2],
            hidden,
            bidirectional=directions == 2,
            dtype=recurrent.dtype,
            **options,
        )
        self._fill(weights)

    def _options(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the cell that attributes ask for."""
        operator = self._operator
        for attribute in attributes:
            if attribute not in _ATTRIBUTES:
                raise ValueError(f"{self._name}: the attribute {attribute} is not known")
        for attribute in ("clip", "input_forget"):
            if attributes.get(attribute):
                raise ValueError(f"{self._name}: {attribute} is not supported, it is {attributes[attribute]}")
        given = list(attributes.get("activations") or ())
        each = len(_USUAL[operator])
        names = {tuple(name.capitalize() for name in given[k : k + each]) for k in range(0, len(given), each)}
        allowed = {_USUAL[operator]} | ({("Relu",)} if operator == "RNN" else set())
        if len(names) > 1 or not names <= allowed:
            usual = " or ".join(", ".join(functions) for functions in sorted(allowed))
            raise ValueError(
                f"{self._name}: the activations {', '.join(given)} are not supported, expected {usual} in "
                "every direction"
            )
        return {"nonlinearity": "relu"} if names == {("Relu",)} else {}

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise where the weights don't go together."""
        for kind in ("W", "R"):
            if kind not in weights or weights[kind].dim() != 3:
                got = f"the shape {tuple(weights[kind].shape)}" if kind in weights else "none"
                raise ValueError(
                    f"{self._name}: {kind} should be (directions, gates × hidden, features), got {got}"
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
                    f"{self._name}: {kind} should have the shape {shapes[kind]} for {hidden} units, it has "
                    f"{tuple(value.shape)}"
                )

    def _cell(self, peepholes: bool) -> type[Cell]:
        if self._operator == "GRU" and not self._attributes.get("linear_before_reset"):
            return cells.ResetBeforeGRU
        if self._operator == "LSTM" and peepholes:
            return cells.PeepholeLSTM
        found: type[Cell] = getattr(cells, self._operator)
        return found

    def _fill(self, weights: Mapping[str, Tensor]) -> None:
        """Give the layer the weights of the node."""
        layer, hidden, order = self.layer, self.layer.hidden_size, _GATES[self._operator]

        def ours(blocks: Tensor) -> Tensor:
            parts = torch.split(blocks, hidden)
            return torch.cat([parts[k] for k in order])

        with torch.no_grad():
            for k, suffix in enumerate(layer._cells):
                held = dict(layer.named_parameters())
                held[f"weight_ih{suffix}"].copy_(ours(weights["W"][k]))
                held[f"weight_hh{suffix}"].copy_(ours(weights["R"][k]))
                both = weights["B"][k] if "B" in weights else weights["W"].new_zeros(2 * len(order) * hidden)
                bias_ih, bias_hh = map(ours, both.chunk(2))
                if f"bias_hh{suffix}" not in held:
                    bias_ih = bias_ih + bias_hh
                else:
                    held[f"bias_hh{suffix}"].copy_(bias_hh)
                held[f"bias_ih{suffix}"].copy_(bias_ih)
                if "P" in weights and self._operator == "LSTM":
                    for name, part in zip(_PEEPHOLES, weights["P"][k].chunk(3), strict=True):
                        held[f"{name}{suffix}"].copy_(part)

    def forward(
        self,
        x: Tensor,
        sequence_lens: Tensor | None = None,
        initial_h: Tensor | None = None,
        initial_c: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the node.

        Args:
            x: ``(time, batch, input)``, with the attribute layout 1 ``(batch, time, input)``.
            sequence_lens: ``(batch,)``; None: all steps. The final state of a row without steps is its
                initial one, of which ONNX says nothing.
            initial_h: ``(directions, batch, hidden)``, with layout 1 the batch first; None: zeros.
            initial_c: of an LSTM, the same.

        Returns:
            ``Y``, ``Y_h`` and of an LSTM ``Y_c``, laid out as in ONNX.
        """
        if self.batch_first:
            x = x.transpose(0, 1)
            initial_h = None if initial_h is None else initial_h.transpose(0, 1)
            initial_c = None if initial_c is None else initial_c.transpose(0, 1)
        state: Any = initial_h
        if len(self.layer._first.state) > 1:
            given = initial_h if initial_h is not None else initial_c
            state = None
            if given is not None:
                state = tuple(torch.zeros_like(given) if t is None else t for t in (initial_h, initial_c))
        back = self._turned(x, sequence_lens) if self.direction == "reverse" else None
        if back is not None:
            x = x.take_along_dim(back, 0)
        output, final = self.layer(x, state, lengths=sequence_lens)
        if back is not None:
            output = output.take_along_dim(back, 0)
        y = output.unflatten(-1, (len(self.layer._cells), -1))  # (time, batch, directions, hidden)
        finals = final if isinstance(final, tuple) else (final,)
        if self.batch_first:
            return (y.transpose(0, 1), *(part.transpose(0, 1) for part in finals))
        return (y.transpose(1, 2), *finals)

    @staticmethod
    def _turned(x: Tensor, lengths: Tensor | None) -> Tensor:
        """For every step of every row the step that stands in its place when the row is turned round."""
        time, batch, _ = x.shape
        steps = torch.arange(time, device=x.device).view(-1, 1, 1)
        ends = torch.full((1, batch, 1), time) if lengths is None else lengths.to(torch.int64).view(1, -1, 1)
        return torch.where(steps < ends, ends - 1 - steps, steps)


def from_onnx(model: Any) -> dict[str, RecurrentNode]:
    """The recurrent nodes of an ONNX model, with their weights.

    Args:
        model: a path, or an ``onnx.ModelProto``.

    Returns:
        A module for every RNN, GRU and LSTM node, by its name, or by its operator and number where it has
        none.

    Raises:
        ImportError: the package onnx is not installed.
        TypeError: neither a path nor a model.
        ValueError: a node has an attribute that our layers don't have, weights that are computed, the name
            of another one, or lies inside an If, Loop or Scan.
    """
    import onnx

    if isinstance(model, (str, Path)):
        path = model
        try:
            model = onnx.load(str(path))
        except OSError:
            raise
        except Exception as error:  # of the format's own kind
            raise ValueError(f"{path} is no ONNX model: {error}") from error
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"from_onnx takes a path or an onnx.ModelProto, got {type(model).__name__}")
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                held[node.output[0]] = attribute.t
            for graph in (attribute.g, *attribute.graphs):
                _check_inside(graph, node)
    found: dict[str, RecurrentNode] = {}
    for number, node in enumerate(model.graph.node):
        if node.op_type not in _GATES or node.domain not in ("", "ai.onnx"):
            continue
        name = node.name or f"{node.op_type}_{number}"
        if name in found:
            raise ValueError(f"two nodes of the model have the name {name}: give each one its own")
        inputs = {kind: given for kind, given in zip(_INPUTS, node.input, strict=False) if given}
        weights: dict[str, Tensor] = {}
        for kind in ("W", "R", "B", "P"):
            if kind in inputs and inputs[kind] not in held:
                raise ValueError(
                    f"{name} ({node.op_type}): its weights {kind} are computed in the model, not held"
                )
            if kind in inputs:
                array = numpy.array(onnx.numpy_helper.to_array(held[inputs[kind]]))
                weights[kind] = torch.from_numpy(array)
        attributes = {a.name: _plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        found[name] = RecurrentNode(node.op_type, weights, attributes, name)
    return found


def _check_inside(graph: Any, outer: Any) -> None:
    """Raise where a graph within a node holds a recurrent node."""
    for node in graph.node:
        if node.op_type in _GATES and node.domain in ("", "ai.onnx"):
            raise ValueError(
                f"{node.name or node.op_type} ({node.op_type}) lies inside the {outer.op_type} node "
                f"{outer.name!r}: only nodes of the model itself can be read"
            )
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _check_inside(inner, node)


def _plain(value: Any) -> Any:
    """An attribute's value with its texts as such."""
    if isinstance(value, bytes):
        return value.decode()
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
