"""Captured steps as plain data, to be stored, and captured steps that are built from such data.

The data has numbers, strings, lists and dictionaries only, so reading it runs no code. Everything is checked:
operators are looked up by name among torch's own, and shapes are compared with those of the cell.
"""

from __future__ import annotations

import base64
import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines._torch_private import OpOverload
from unrolled.engines.compiler.capture import CapturedStep
from unrolled.engines.compiler.checks import tensor_attributes
from unrolled.engines.compiler.gradient_paths import GradientPaths
from unrolled.engines.compiler.ir import BATCH_SYMBOL
from unrolled.engines.compiler.lowering.dtypes import round_to_float32

_MAX_CONSTANT_BYTES = 2**20
_OPERATOR = re.compile(r"(aten|prims|unrolled)\.(\w+)\.(\w+)")
_GETITEM = "getitem"
# Operators without a tensor argument. Others of this kind may read or write files.
_FACTORIES = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "scalar_tensor", "zeros",
}  # fmt: skip
_KINDS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}
_ROLES = ("params", "states", "carries", "new_states", "grad_params", "grad_states")
_ROLES_OF_ONE = ("x", "grad_output", "grad_x")


class NotStorableError(Exception):
    """A captured step contains something that can't be stored."""


def to_data(captured: CapturedStep) -> dict[str, Any]:
    """Return a captured step as plain data.

    Raises:
        NotStorableError: If it contains something that can't be stored.
    """
    numbers = {node: number for number, node in enumerate(captured.graph.nodes)}
    created = [node for node in captured.constants if node.op == "get_attr"]
    if sum(captured.constants[node].nbytes for node in created) > _MAX_CONSTANT_BYTES:
        raise NotStorableError("the tensors that it creates are too large")

    def number(node: fx.Node | None) -> int | None:
        return None if node is None else numbers[node]

    paths = captured.paths
    return {
        "nodes": [_node_data(node, numbers) for node in numbers],
        **{role: [number(node) for node in getattr(captured, role)] for role in _ROLES},
        **{role: number(getattr(captured, role)) for role in _ROLES_OF_ONE},
        "tensor_attributes": {name: number(node) for name, node in captured.tensor_attributes.items()},
        "constants": {str(numbers[node]): _tensor_data(captured.constants[node]) for node in created},
        "constant_attributes": [*captured.constant_attributes],
        "mode_independent": captured.mode_independent,
        "paths": None if paths is None else [list(paths.reached), paths.inputs, paths.complete],
        "dtype": _name(captured.dtype),
    }


def from_data(data: dict[str, Any], cell: Cell) -> CapturedStep:
    """Build a captured step from the result of :func:`to_data`.

    Args:
        data: The data. It may be damaged.
        cell: The cell. The values of its tensor attributes are read.

    Raises:
        Exception: Of any kind, if the data is damaged or doesn't fit the cell.
    """
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    constants = {int(number): _tensor(stored) for number, stored in data["constants"].items()}
    shared: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}
    for number, stored in enumerate(data["nodes"]):
        node = _add_node(graph, stored, nodes, shared)
        if node.op == "get_attr":
            node.meta["val"] = constants[number]
        nodes.append(node)

    def node_at(number: int | None) -> fx.Node | None:
        return None if number is None else nodes[_index(number, nodes)]

    attributes = tensor_attributes(cell)
    used = {name: nodes[_index(number, nodes)] for name, number in data["tensor_attributes"].items()}
    paths = data["paths"]
    if paths is not None:
        reached, inputs, complete = paths
        reached = tuple(_checked(item, int) for item in reached)
        paths = GradientPaths(reached, _checked(inputs, int), _checked(complete, bool))
    roles: dict[str, Any] = {role: [node_at(number) for number in data[role]] for role in _ROLES}
    roles |= {role: node_at(data[role]) for role in _ROLES_OF_ONE}
    captured = CapturedStep(
        graph,
        **roles,
        tensor_attributes=used,
        constants={
            **{nodes[number]: value for number, value in constants.items()},
            **{node: attributes[name].detach().clone().contiguous() for name, node in used.items()},
        },
        mode_independent=_checked(data["mode_independent"], bool),
        paths=paths,
        dtype=_named(torch.dtype, data["dtype"]),
        constant_attributes={name: attributes[name].detach().clone() for name in data["constant_attributes"]},
    )
    _check(captured, cell)
    return captured


def _node_data(node: fx.Node, numbers: dict[fx.Node, int]) -> list[Any]:
    if node.op == "call_function":
        target = _GETITEM if node.target is operator.getitem else str(node.target)
        if target != _GETITEM and not _is_known(node.target):
            raise NotStorableError(f"it calls {target}")
    else:
        target = str(node.target)
    arguments = [_argument_data(value, numbers) for value in node.args]
    named = {name: _argument_data(value, numbers) for name, value in node.kwargs.items()}
    value = None if node.op in ("output", "get_attr") else _value_data(node.meta["val"])
    return [node.op, node.name, target, arguments, named, value]


def _add_node(
    graph: fx.Graph,
    stored: list[Any],
    nodes: list[fx.Node],
    shared: dict[tuple[torch.dtype, tuple[int, ...]], Tensor],
) -> fx.Node:
    """Add a node to a graph.

    Args:
        graph: The graph.
        stored: The result of :func:`_node_data`.
        nodes: The nodes before it.
        shared: Tensors without data, which nodes with the same shape and dtype share.
    """
    op, name, target, arguments, named, value = stored
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise ValueError(f"there is no operation {op!r}")
    function: Any = _checked(target, str)
    if op == "call_function":
        function = operator.getitem if target == _GETITEM else _operator(target)
    args = tuple(_argument(item, nodes) for item in arguments)
    kwargs = {_checked(key, str): _argument(item, nodes) for key, item in named.items()}
    node = graph.create_node(op, function, args, kwargs, _checked(name, str))
    if op not in ("output", "get_attr"):
        node.meta["val"] = _value(value, shared)
    return node


def _operator(name: str) -> Any:
    """Return an operator that changes nothing: one of torch's, or ``round_to_float32``.

    Raises:
        ValueError: If it is no such operator.
    """
    if name == str(round_to_float32):
        return round_to_float32
    match = _OPERATOR.fullmatch(name)
    if match is None:
        raise ValueError(f"there is no operator {name!r}")
    overload = getattr(getattr(getattr(torch.ops, match[1]), match[2]), match[3])
    schema = overload._schema
    takes_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
    if schema.is_mutable or not (takes_tensor or match[2] in _FACTORIES):
        raise ValueError(f"{name} isn't an operator of a captured step")
    return overload


def _is_known(target: object) -> bool:
    """Return whether :func:`_operator` returns this operator for its name."""
    try:
        return isinstance(target, OpOverload) and _operator(str(target)) is target
    except (AttributeError, ValueError):
        return False


def _argument_data(value: Any, numbers: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        items = [_argument_data(item, numbers) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) in _KINDS:
        return {_KINDS[type(value)]: _name(value)}
    raise NotStorableError(f"an operator takes an argument of the type {type(value).__name__}")


def _argument(data: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(data, list):
        return [_argument(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    [(kind, content)] = data.items()
    match kind:
        case "node":
            return nodes[_index(content, nodes)]
        case "tuple":
            return tuple(_argument(item, nodes) for item in content)
        case "device":
            return torch.device(content)
        case "dtype":
            return _named(torch.dtype, content)
        case "layout":
            return _named(torch.layout, content)
        case "memory_format":
            return _named(torch.memory_format, content)
    raise ValueError(f"there is no argument of the kind {kind!r}")


def _value_data(value: Any) -> Any:
    """Return the shape and dtype of a node's value, or those of its items, or None if there is no value."""
    if isinstance(value, Tensor):
        return {"dtype": _name(value.dtype), "shape": list(value.shape)}
    if isinstance(value, (list, tuple)):
        return [_value_data(item) for item in value]
    if value is None:
        return None
    raise NotStorableError(f"an operator returns a value of the type {type(value).__name__}")


def _value(data: Any, shared: dict[tuple[torch.dtype, tuple[int, ...]], Tensor]) -> Any:
    if isinstance(data, list):
        return [_value(item, shared) for item in data]
    if data is None:
        return None
    dtype, shape = _named(torch.dtype, data["dtype"]), tuple(_checked(size, int) for size in data["shape"])
    if (dtype, shape) not in shared:
        shared[dtype, shape] = torch.empty(shape, dtype=dtype, device="meta")
    return shared[dtype, shape]


def _tensor_data(tensor: Tensor) -> dict[str, Any]:
    content = tensor.detach().flatten().view(torch.uint8) if tensor.numel() else tensor
    text = base64.b64encode(content.numpy().tobytes()).decode()
    return {**_value_data(tensor), "content": text}


def _tensor(data: dict[str, Any]) -> Tensor:
    dtype, content = _named(torch.dtype, data["dtype"]), base64.b64decode(data["content"], validate=True)
    if not content:
        return torch.empty(data["shape"], dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(data["shape"])


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _named(kind: type, name: str) -> Any:
    """Return a dtype, a layout or a memory format by its name."""
    return _checked(getattr(torch, name), kind)


def _checked(value: Any, kind: type) -> Any:
    """Return a value of a type.

    Raises:
        TypeError: If it has another type.
    """
    if type(value) is not kind:
        raise TypeError(f"{value!r} should be of the type {kind.__name__}")
    return value


def _index(number: Any, nodes: list[fx.Node]) -> int:
    """Return the index of a node.

    Raises:
        IndexError: If there is no such node.
    """
    if not 0 <= _checked(number, int) < len(nodes):
        raise IndexError(f"there is no node {number}")
    return int(number)


def _check(captured: CapturedStep, cell: Cell) -> None:
    """Check that a captured step has the inputs and results of a cell.

    Raises:
        ValueError: If it doesn't.
    """
    extra = cell.features - cell.input
    params = [*cell.shapes().values(), *([(BATCH_SYMBOL, extra)] if extra else [])]
    states = [(BATCH_SYMBOL, size) for size in cell.state_sizes().values()]
    own = {name: tuple(value.shape) for name, value in tensor_attributes(cell).items()}
    attributes = captured.tensor_attributes
    for nodes, shapes in (
        (captured.params, params),
        (captured.states, states),
        (captured.carries, states),
        (captured.new_states, states),
        (captured.grad_params, list(cell.shapes().values())),
        (captured.grad_states, states),
        ([captured.x, captured.grad_x], [(BATCH_SYMBOL, cell.input)] * 2),
        ([captured.grad_output], states[:1]),
        ([*attributes.values()], [own[name] for name in attributes]),
    ):
        found = [None if node is None else tuple(node.meta["val"].shape) for node in nodes]
        expected = [
            None if node is None else shape for node, shape in zip(found, map(tuple, shapes), strict=True)
        ]
        if found != expected or (None in found and nodes is captured.params):
            raise ValueError(f"it has values of shapes {found} instead of {expected}")
