"""The computation graph of one step: which torch function computed each tensor, element by element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.call_recorder import INFIX, Call, CallRecorder
from unrolled.tracing.element_moves import MOVES


@dataclass(eq=False)
class Node:
    """A tensor or constant in the computation graph of a step.

    Attributes:
        kind: How the node was computed:

            * ``"value"``: not further explained.
            * ``"constant"``: a number or word in the code, given by ``name``.
            * ``"infix"``: an elementwise add, sub, mul or div (``name``) of two operands.
            * ``"negated"``: the negative of one operand.
            * ``"call"``: an elementwise function (``name``) of the operands.
            * ``"rows"``: a function (``name``) of whole operands, not elementwise.
            * ``"sum"``: weighted sums. The operands are input, weight and, optionally, bias.
            * ``"moved"``: each element is copied from an operand.
        tensor: The values; None for a constant.
        name: See ``kind``. For a value, its variable name in the step, or empty.
        operands: The nodes that it was computed from.
        element_maps: For each operand, the flat index of the operand element that each element of this tensor
            uses. None means the same index. For a moved tensor, it counts only where ``source_operands``
            names the operand.
        source_operands: For a moved tensor, the operand that each element comes from.
        weight_transposed: For weighted sums, whether the weight has shape ``(input, output)``, as in matmul,
            instead of ``(output, input)``, as in linear.
        call: For a function or weighted sums, the call as Python code, as ``"leaky_relu({}, 0.2)"``. Each
            ``{}`` stands for an operand that isn't a constant. Empty if it has other tensors as arguments.
        constant: The value of a constant.
        function: For ``"call"`` and ``"rows"``, the function of the operands that are not constants.
    """

    kind: str
    tensor: Tensor | None
    name: str = ""
    operands: list[Node] = field(default_factory=list)
    element_maps: list[Tensor | None] = field(default_factory=list)
    source_operands: Tensor | None = None
    weight_transposed: bool = False
    call: str = ""
    constant: Any = None
    function: Callable[..., Tensor] | None = None

    @property
    def numbers(self) -> Tensor:
        """The tensor of a node that isn't a constant."""
        assert self.tensor is not None
        return self.tensor

    def operand_index(self, operand: int, index: int) -> int:
        """Return the flat index of the operand element that the element at ``index`` uses."""
        element_map = self.element_maps[operand]
        return index if element_map is None else int(element_map[index])

    def read(self) -> Tensor:
        """Return the values, flattened. Moved elements are read from their sources."""
        flat = self.numbers.flatten()
        if self.source_operands is None:
            return flat
        flat = flat.clone()
        for k, (operand, element_map) in enumerate(zip(self.operands, self.element_maps, strict=True)):
            if element_map is not None:
                from_operand = self.source_operands == k
                flat[from_operand] = operand.read()[element_map[from_operand]].to(flat.dtype)
        return flat

    def source(self, index: int) -> tuple[Node, int]:
        """Follow an element through all functions that only move elements, to its node and index there."""
        if self.kind != "moved" or self.source_operands is None:
            return self, index
        operand = int(self.source_operands[index])
        return self.operands[operand].source(self.operand_index(operand, index))


@dataclass(frozen=True)
class StepGraph:
    """The computation graph of one step for one row.

    Attributes:
        nodes: The node of each quantity, by name.
        input: Input of the step, ``(1, input)``.
        state_before: Each state before the step, ``(1, size)``, by name.
    """

    nodes: dict[str, Node]
    input: Tensor
    state_before: dict[str, Tensor]


def computation_graph(
    recorder: CallRecorder, named: Mapping[str, Tensor], displayed: Mapping[str, Tensor]
) -> dict[str, Node]:
    """Build a node for each named tensor. Its operands are cut off at the other named tensors.

    Args:
        recorder: The recorded calls.
        named: Tensors by name, either inputs or computed while the recorder was active.
        displayed: Values to show instead, by name, where a named tensor is an operand.
    """
    calls = {key: call for key, call in recorder.calls().items() if call is not None}
    names = {id(tensor): name for name, tensor in named.items()}
    builder = _GraphBuilder(calls, names, displayed, recorder.move_cache)
    return {name: builder.computed_node(tensor) for name, tensor in named.items()}


class _GraphBuilder:
    """Builds the nodes, one for each tensor."""

    def __init__(
        self,
        calls: Mapping[int, Call],
        names: Mapping[int, str],
        displayed: Mapping[str, Tensor],
        move_cache: dict[Any, Any],
    ) -> None:
        self._calls = calls
        self._names = names
        self._displayed = displayed
        self._move_cache = move_cache
        self._nodes: dict[int, Node] = {}

    def operand_node(self, value: Any) -> Node:
        """Return the node of an operand: a value if it has a name, else how it was computed."""
        if not isinstance(value, Tensor):
            short = f"{value:g}" if isinstance(value, float) else str(value)
            text = short if not isinstance(value, float) or float(short) == value else repr(value)
            return Node("constant", None, text, constant=value)
        if id(value) not in self._nodes:
            name = self._names.get(id(value), "")
            named_value = Node("value", self._displayed.get(name, value), name)
            self._nodes[id(value)] = named_value if name else self.computed_node(value)
        return self._nodes[id(value)]

    def computed_node(self, tensor: Tensor) -> Node:
        """Return a node that shows how a tensor was computed."""
        call = self._calls.get(id(tensor))
        if call is None:
            return Node("value", tensor)
        if call.name in INFIX and len(call.args) == 2 and not call.kwargs:
            return self._elementwise("infix", call.name, tensor, call.operands())
        if call.name == "neg" and len(call.args) == 1:
            return self._elementwise("negated", "", tensor, call.args)
        if call.name in ("linear", "matmul") and _is_matrix_product(call):
            return self._weighted_sums(call, tensor)
        if call.name in MOVES:
            return self._moved(call, tensor)
        if call.output_index is None and _is_elementwise(call, tensor):
            arguments = [*call.operands(), *call.kwargs.values()]
            node = self._elementwise("call", call.name, tensor, arguments, call.text(scalars=True))
            node.function = call.run
            return node
        whole = [
            self.operand_node(value) for value in call.arguments if isinstance(value, Tensor) and value.dim()
        ]
        maps: list[Tensor | None] = [None] * len(whole)
        text = call.text(scalars=False)
        return Node("rows", tensor, call.name, whole, maps, call=text, function=call.run_on_rows)

    def _elementwise(self, kind: str, name: str, tensor: Tensor, arguments: Any, text: str = "") -> Node:
        operands = [self.operand_node(value) for value in arguments]
        element_maps = [_broadcast_map(value, tensor) for value in arguments]
        return Node(kind, tensor, name, operands, element_maps, call=text)

    def _weighted_sums(self, call: Call, tensor: Tensor) -> Node:
        arguments = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
        is_matmul = call.name == "matmul"
        parts = list(call.args) if is_matmul else [arguments["input"], arguments["weight"]]
        parts += [arguments["bias"]] if arguments.get("bias") is not None else []
        operands = [self.operand_node(value) for value in parts]
        node = Node("sum", tensor, "", operands, [None] * len(operands), None, is_matmul)
        node.call = call.text(scalars=False)
        return node

    def _moved(self, call: Call, tensor: Tensor) -> Node:
        source_operands, element_maps = call.trace_moves(self._move_cache)
        operands = [self.operand_node(source) for source in call.moved_tensors()]
        return Node("moved", tensor, "", operands, [*element_maps], source_operands=source_operands)


def _is_elementwise(call: Call, tensor: Tensor) -> bool:
    """Check whether each element of the result depends only on the operand elements at the same index.

    The function runs on random values, once on whole tensors and once on single elements. With the values of
    the step, such as zeros, other functions could look elementwise, too.
    """
    try:
        samples = [_random_like(value) for value in call.arguments if isinstance(value, Tensor)]
        elements = [value.broadcast_to(tensor.shape).reshape(-1, 1, 1).clone() for value in samples]
        separate, whole = torch.vmap(call.run)(*elements), call.run(*samples)
        return whole.shape == tensor.shape and torch.allclose(
            separate.flatten(), whole.flatten(), equal_nan=True
        )
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False


def _random_like(value: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype with random values from 0.1 to 0.9; integers are copied."""
    generator = torch.Generator(value.device).manual_seed(0)
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=generator, device=value.device) < 0.5
    if not (value.is_floating_point() or value.is_complex()):
        return value.clone()
    uniform = torch.rand(value.shape, generator=generator, device=value.device, dtype=torch.float64)
    return (0.1 + 0.8 * uniform).to(value.dtype)


def _broadcast_map(value: Any, tensor: Tensor) -> Tensor | None:
    """Return the flat index in ``value`` for each element of ``tensor``; None if the shapes are equal."""
    if not isinstance(value, Tensor) or value.shape == tensor.shape:
        return None
    return torch.arange(value.numel()).reshape(value.shape).broadcast_to(tensor.shape).flatten()


def _is_matrix_product(call: Call) -> bool:
    """Whether the operands are matrices, so that each element is one weighted sum."""
    if call.name == "linear":
        arguments = dict(zip(("input", "weight"), call.args, strict=False)) | call.kwargs
        return bool(arguments["weight"].dim() == 2)
    return len(call.args) == 2 and all(isinstance(a, Tensor) and a.dim() == 2 for a in call.args)
