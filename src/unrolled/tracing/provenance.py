"""The computation graph of one step: which torch function computed each tensor, element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

INFIX = {"add": " + ", "sub": " - ", "mul": "·", "div": " / "}
_ALIASES = {"truediv": "div", "subtract": "sub", "multiply": "mul", "divide": "div", "mm": "matmul"}
_REVERSED = ("rsub", "rdiv", "rtruediv")
_MOVES = frozenset(  # functions that only move elements
    {"chunk", "split", "tensor_split", "unbind", "getitem", "narrow", "select", "index_select", "flip"}
    | {"cat", "concat", "concatenate", "hstack", "stack", "expand", "expand_as", "repeat", "roll", "clone"}
    | {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
    | {"transpose", "swapaxes", "permute", "movedim", "t", "T", "mT"}
)


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
        function: For ``"call"`` and ``"rows"``, the function of the operands that are not constants.
    """

    kind: str
    tensor: Tensor | None
    name: str = ""
    operands: list[Node] = field(default_factory=list)
    element_maps: list[Tensor | None] = field(default_factory=list)
    source_operands: Tensor | None = None
    weight_transposed: bool = False
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


@dataclass(frozen=True)
class _Call:
    """The torch function call that returned a tensor.

    Attributes:
        name: Canonical name of the function.
        function, args, kwargs: The call.
        output_index: Position of the tensor among the outputs; None if the function returned one tensor.
        versions: Version counters of the tensor and of all arguments after the call.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output_index: int | None
    versions: tuple[tuple[Tensor, int], ...]

    @property
    def arguments(self) -> list[Any]:
        """The positional arguments, followed by the keyword arguments."""
        return [*self.args, *self.kwargs.values()]

    def run(self, *tensors: Tensor) -> Tensor:
        """Call the function with other tensors instead of its tensor arguments, in order."""
        remaining = iter(tensors)
        replaced = [next(remaining) if isinstance(value, Tensor) else value for value in self.arguments]
        kwargs = dict(zip(self.kwargs, replaced[len(self.args) :], strict=True))
        result = self.function(*replaced[: len(self.args)], **kwargs)
        tensor: Tensor = result if self.output_index is None else result[self.output_index]
        return tensor

    def run_on_rows(self, *tensors: Tensor) -> Tensor:
        """Call the function with other tensors instead of those of its tensor arguments that have axes."""
        remaining = iter(tensors)
        own = (value for value in self.arguments if isinstance(value, Tensor))
        return self.run(*(next(remaining) if value.dim() else value for value in own))

    def is_unmodified(self) -> bool:
        """Whether neither the tensor nor any argument was changed in place since the call."""
        return all(_version(tensor) == version for tensor, version in self.versions)


class CallRecorder(TorchFunctionMode):
    """While active, record the torch function call that returned each new tensor.

    Args:
        move_cache: Cache of the sources of moved elements, to share between recordings of the same code.
    """

    def __init__(self, move_cache: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self._move_cache = {} if move_cache is None else move_cache
        self._calls: dict[int, _Call | None] = {}  # by the id of the tensor
        self._alive: list[Any] = []  # keeps the tensors alive, so that no id is reused

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__setitem__:
            self._calls[id(args[0])] = None
        several = isinstance(result, (tuple, list))
        for output_index, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor):
                versions = tuple((part, _version(part)) for part in (tensor, *_tensors_in((args, kwargs))))
                call = _Call(
                    _name(func), func, args, kwargs or {}, output_index if several else None, versions
                )
                known = id(tensor) in self._calls or any(tensor is argument for argument in args)
                self._calls[id(tensor)] = None if known else call  # None: changed in place by several calls
                self._alive.append(tensor)
        return result

    def function_of(self, tensor: Tensor) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """Find the function of a single tensor that computed a tensor, ignoring moves of elements.

        Returns:
            The name and the function; None if the tensor was computed in another way.
        """
        call = self._calls.get(id(tensor))
        while (
            call
            and call.is_unmodified()
            and call.name in _MOVES
            and isinstance(next(iter(call.args), 0), Tensor)
        ):
            call = self._calls.get(id(call.args[0]))
        if call is None or not call.is_unmodified() or call.output_index is not None:
            return None
        final_call = call
        if sum(isinstance(value, Tensor) for value in (*call.args, *call.kwargs.values())) != 1:
            return None

        def function(x: Tensor) -> Tensor:
            args = [x if isinstance(value, Tensor) else value for value in final_call.args]
            kwargs = {k: x if isinstance(value, Tensor) else value for k, value in final_call.kwargs.items()}
            result: Tensor = final_call.function(*args, **kwargs)
            return result

        return final_call.name, function

    def graph(self, named: Mapping[str, Tensor], displayed: Mapping[str, Tensor]) -> dict[str, Node]:
        """Build a node for each named tensor. Its operands are cut off at the other named tensors.

        Args:
            named: Tensors by name, either inputs or computed while this was active.
            displayed: Values to show instead, by name, where a named tensor is an operand.
        """
        calls = {key: call for key, call in self._calls.items() if call and call.is_unmodified()}
        names = {id(tensor): name for name, tensor in named.items()}
        builder = _GraphBuilder(calls, names, displayed, self._move_cache)
        return {name: builder.computed_node(tensor) for name, tensor in named.items()}


class _GraphBuilder:
    """Builds the nodes, one for each tensor."""

    def __init__(
        self,
        calls: Mapping[int, _Call],
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
            return Node("constant", None, text)
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
            is_reversed = call.function.__name__.strip("_") in _REVERSED
            return self._elementwise(
                "infix", call.name, tensor, call.args[::-1] if is_reversed else call.args
            )
        if call.name == "neg" and len(call.args) == 1:
            return self._elementwise("negated", "", tensor, call.args)
        if call.name in ("linear", "matmul") and _is_matrix_product(call):
            return self._weighted_sums(call, tensor)
        if call.name in _MOVES:
            return self._moved(call, tensor)
        if call.output_index is None and _is_elementwise(call, tensor):
            node = self._elementwise("call", call.name, tensor, call.arguments)
            node.function = call.run
            return node
        whole = [
            self.operand_node(value) for value in call.arguments if isinstance(value, Tensor) and value.dim()
        ]
        return Node("rows", tensor, call.name, whole, [None] * len(whole), function=call.run_on_rows)

    def _elementwise(self, kind: str, name: str, tensor: Tensor, arguments: Any) -> Node:
        operands = [self.operand_node(value) for value in arguments]
        return Node(kind, tensor, name, operands, [_broadcast_map(value, tensor) for value in arguments])

    def _weighted_sums(self, call: _Call, tensor: Tensor) -> Node:
        arguments = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
        is_matmul = call.name == "matmul"
        parts = list(call.args) if is_matmul else [arguments["input"], arguments["weight"]]
        parts += [arguments["bias"]] if arguments.get("bias") is not None else []
        operands = [self.operand_node(value) for value in parts]
        return Node("sum", tensor, "", operands, [None] * len(operands), weight_transposed=is_matmul)

    def _moved(self, call: _Call, tensor: Tensor) -> Node:
        sources = list(_tensors_in(call.args[:1] if call.args else call.kwargs))
        key = None
        if not any(isinstance(value, Tensor) for value in (*call.args[1:], *call.kwargs.values())):
            shapes = tuple(source.shape for source in sources)
            key = (call.name, shapes, repr(call.args[1:]), repr(call.kwargs), call.output_index)
        moves = self._move_cache.get(key) or self._trace_moves(call)
        if key is not None:
            self._move_cache[key] = moves
        source_operands, element_maps = moves
        operands = [self.operand_node(source) for source in sources]
        return Node("moved", tensor, "", operands, [*element_maps], source_operands=source_operands)

    @staticmethod
    def _trace_moves(call: _Call) -> tuple[Tensor, list[Tensor]]:
        """Find the source of each element by running the function on tensors of running numbers.

        Returns:
            The operand that each element comes from, and its flat index counted in each operand.
        """
        sources: list[Tensor] = []

        def numbered(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(numbered(part) for part in value)
            start = sum(source.numel() for source in sources)
            sources.append(value)
            return torch.arange(start, start + value.numel(), device=value.device).reshape(value.shape)

        positional = len(call.args) > 0  # the tensors come first, then the arguments that say how to move
        args = (numbered(call.args[0]), *call.args[1:]) if positional else ()
        tensor_arguments = ("input", "tensors", "tensor")
        kwargs = {
            k: numbered(v) if not positional and k in tensor_arguments else v for k, v in call.kwargs.items()
        }
        result = call.function(*args, **kwargs)
        positions = (result if call.output_index is None else result[call.output_index]).flatten()
        sizes = torch.tensor([source.numel() for source in sources], device=positions.device)
        operands = torch.arange(len(sources), device=positions.device).repeat_interleave(sizes)
        return operands[positions], [positions - start for start in (sizes.cumsum(0) - sizes).tolist()]


def _is_elementwise(call: _Call, tensor: Tensor) -> bool:
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


def _version(tensor: Tensor) -> int:
    """Return torch's counter of in-place changes to a tensor or its base; -1 where torch doesn't count."""
    return -1 if tensor.is_inference() else tensor._version


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor among the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def _name(function: Any) -> str:
    """Return a canonical name: ``add`` for torch.add, Tensor.add, Tensor.__add__ and Tensor.__radd__."""
    name = str(function.__name__).strip("_")
    if name == "get":  # a property such as Tensor.T
        return str(function.__self__.__name__)
    if function.__name__.startswith("__r") and name[1:] in (*INFIX, "truediv", "matmul"):
        name = name[1:]
    name = {"rsub": "sub"}.get(name, name)
    return _ALIASES.get(name, name)


def _is_matrix_product(call: _Call) -> bool:
    """Whether the operands are matrices, so that each element is one weighted sum."""
    if call.name == "linear":
        arguments = dict(zip(("input", "weight"), call.args, strict=False)) | call.kwargs
        return bool(arguments["weight"].dim() == 2)
    return len(call.args) == 2 and all(isinstance(a, Tensor) and a.dim() == 2 for a in call.args)
