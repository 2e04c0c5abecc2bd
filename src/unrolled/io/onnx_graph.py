"""Find the recurrent nodes of an ONNX model, also in nested graphs, and compute their constant inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy

from unrolled.io.onnx_packages import import_package

OPERATORS = ("RNN", "GRU", "LSTM")
QUANTIZED = "DynamicQuantizeLSTM"
_ONNX, _MICROSOFT = ("", "ai.onnx"), "com.microsoft"
_RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)


class NotConstantError(ValueError):
    """A value isn't constant. The message says what it is computed from."""


@dataclass(eq=False)
class Graph:
    """A graph of a model, which also sees the values of the graphs around it.

    Attributes:
        proto: The ``onnx.GraphProto``.
        model: The ``onnx.ModelProto`` that it belongs to.
        outer: The graph around it; None for the main graph.
        owner: The node that it is an attribute of; None for the main graph.
    """

    proto: Any
    model: Any
    outer: Graph | None = None
    owner: Any = None
    _constants: dict[str, Any] = field(default_factory=dict)  # None while a value is being computed

    def __post_init__(self) -> None:
        self._initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self._initializers |= {tensor.values.name: tensor for tensor in self.proto.sparse_initializer}
        self._inputs = {value.name for value in self.proto.input}
        self._producers = {name: node for node in self.proto.node for name in node.output if name}

    def constant(self, name: str) -> Any:
        """Return the array with a name, computed from the constants of the model.

        Raises:
            NotConstantError: If it depends on an input of the model or of a loop, or on random numbers.
        """
        if name in self._constants:
            if self._constants[name] is None:
                raise NotConstantError(f"its own result {name!r}, in a circle")
            return self._constants[name]
        if name in self._initializers:
            self._constants[name] = _to_array(self._initializers[name])
        elif name in self._producers:
            self._constants[name] = None
            try:
                self._constants |= self._run(self._producers[name])
            finally:
                if self._constants[name] is None:
                    del self._constants[name]
        elif self.outer is None:
            raise NotConstantError(f"the input {name!r} of the model")
        else:
            outer_name = self._unchanged_value(name) if name in self._inputs else name
            if outer_name is None:
                raise NotConstantError(f"{name!r}, which the {self.owner.op_type} around it changes")
            return self.outer.constant(outer_name)
        return self._constants[name]

    def _unchanged_value(self, name: str) -> str | None:
        """Return the outer value that an input of a loop's body has in every iteration; None if it changes.

        Converters also pass weights from one iteration to the next, although they don't change.
        """
        index = [value.name for value in self.proto.input].index(name)
        if self.owner.op_type == "Loop":
            output = index - 1 if index >= 2 else None  # the number of the iteration and the condition
        else:  # Scan
            scanned = next(a.i for a in self.owner.attribute if a.name == "num_scan_inputs")
            output = index if index < len(self.owner.input) - scanned else None
        if output is None:
            return None
        source = self.proto.output[output].name
        while (producer := self._producers.get(source)) is not None and producer.op_type == "Identity":
            source = producer.input[0]
        return str(self.owner.input[index]) if source == name else None

    def _run(self, node: Any) -> dict[str, Any]:
        """Run a node whose inputs are all constant, and return its outputs by name."""
        onnx = import_package("onnx", "from_onnx")
        helper, value_info = onnx.helper, onnx.ValueInfoProto
        reference = import_package("onnx.reference", "from_onnx")
        is_standard = node.domain in _ONNX
        if is_standard and node.op_type == "Constant" and node.attribute[0].name in ("value", "sparse_value"):
            return {node.output[0]: _to_array(helper.get_attribute_value(node.attribute[0]))}
        if is_standard and node.op_type in _RANDOM:
            raise NotConstantError(f"the random numbers of a {node.op_type}")
        feeds = {name: self.constant(name) for name in (*node.input, *_outer_names(node)) if name}
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] and feeds[node.input[2]]:
            raise NotConstantError("the random numbers of a Dropout")
        names = [name for name in node.output if name]
        values = [[value_info(name=name) for name in part] for part in (feeds, names)]
        graph = helper.make_graph([node], "node", *values)
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        try:
            results = reference.ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:  # the evaluator raises errors of any type
            raise NotConstantError(
                f"the operator {node.op_type}, which onnx's reference evaluator can't compute "
                f"({type(error).__name__}: {error})"
            ) from error
        return dict(zip(names, results, strict=True))


@dataclass(frozen=True, eq=False)
class FoundNode:
    """A recurrent node.

    Attributes:
        name: Its name, with the names of the nodes around it in front.
        proto: The ``onnx.NodeProto``.
        graph: The graph that it is in.
    """

    name: str
    proto: Any
    graph: Graph


def recurrent_nodes(model: Any) -> Iterator[FoundNode]:
    """Yield the recurrent nodes of an ``onnx.ModelProto`` and of all graphs in it, in order.

    Functions of the model are inlined first.
    """
    if model.functions:
        inliner = import_package("onnx.inliner", "from_onnx")
        model = inliner.inline_local_functions(model)
    yield from _nodes_in(Graph(model.graph, model), "")


def _nodes_in(graph: Graph, prefix: str) -> Iterator[FoundNode]:
    for index, node in enumerate(graph.proto.node):
        name = prefix + (node.name or f"{node.op_type}_{index}")
        if is_recurrent(node):
            yield FoundNode(name, node, graph)
        for attribute, inner in _graphs_of(node):
            yield from _nodes_in(Graph(inner, graph.model, graph, node), f"{name}.{attribute}.")


def is_recurrent(node: Any) -> bool:
    """Whether a node is an RNN, GRU or LSTM, or its quantized form in ONNX Runtime."""
    standard = node.op_type in OPERATORS and node.domain in _ONNX
    return standard or (node.op_type == QUANTIZED and node.domain == _MICROSOFT)


def describe_operators(model: Any) -> str:
    """Return the operators of a model and of all graphs in it as text, the most frequent ones first."""

    def operators(graph: Any) -> Iterator[str]:
        for node in graph.node:
            yield node.op_type if node.domain in _ONNX else f"{node.domain}.{node.op_type}"
            for _, inner in _graphs_of(node):
                yield from operators(inner)

    functions = [name for function in model.functions for name in operators(function)]
    counts = Counter([*operators(model.graph), *functions])
    names = [name for name, _ in counts.most_common()]
    return ", ".join([*names[:8], "…"] if len(names) > 8 else names) or "none"


def _graphs_of(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the graphs in the attributes of a node, each with the name of the attribute."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for index, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}_{index}", graph


def _outer_names(node: Any) -> list[str]:
    """Return the names of values that the graphs in a node read from the graphs around it."""
    names: dict[str, None] = {}
    for _, graph in _graphs_of(node):
        own = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
        own |= {tensor.values.name for tensor in graph.sparse_initializer}
        own |= {name for inner in graph.node for name in inner.output}
        used = [name for inner in graph.node for name in (*inner.input, *_outer_names(inner))]
        used += [value.name for value in graph.output]
        names |= dict.fromkeys(name for name in used if name and name not in own)
    return list(names)


def _to_array(tensor: Any) -> numpy.ndarray[Any, Any]:
    """Convert an ``onnx.TensorProto`` or ``onnx.SparseTensorProto`` to an array."""
    to_array = import_package("onnx", "from_onnx").numpy_helper.to_array
    if not hasattr(tensor, "indices"):
        return numpy.array(to_array(tensor))
    values, indices, shape = to_array(tensor.values), to_array(tensor.indices), tuple(tensor.dims)
    dense = numpy.zeros(shape, values.dtype)
    positions = indices if indices.ndim == 1 else numpy.ravel_multi_index(tuple(indices.T), shape)
    dense.reshape(-1)[positions] = values
    return dense
