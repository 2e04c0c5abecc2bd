"""How the numbers of a step came to be: the torch functions that made them, element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

INFIX = {"add": " + ", "sub": " - ", "mul": "·", "div": " / "}
_SAME_AS = {"truediv": "div", "subtract": "sub", "multiply": "mul", "divide": "div", "mm": "matmul"}
_REVERSED = ("rsub", "rdiv", "rtruediv")
_MOVES = frozenset(  # functions that only move elements
    {"chunk", "split", "tensor_split", "unbind", "getitem", "narrow", "select", "index_select", "flip"}
    | {"cat", "concat", "concatenate", "hstack", "stack", "expand", "expand_as", "repeat", "roll", "clone"}
    | {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
    | {"transpose", "swapaxes", "permute", "movedim", "t", "T", "mT"}
)


@dataclass(eq=False)
class Node:
    """A tensor of a step, or a number in it, and what it is made of.

    Attributes:
        kind: ``"value"``: it stands for itself. ``"constant"``: a number or word of the code, ``name``.
            ``"infix"``: ``name`` (add, sub, mul or div) of two operands, element by element. ``"negated"``.
            ``"call"``: the function ``name`` of the operands, element by element. ``"rows"``: the function
            ``name`` of whole operands. ``"sum"``: weighted sums of the operands input, weight and perhaps
            bias. ``"moved"``: every element is one of an operand.
        tensor: the numbers; None for a constant.
        name: as above; of a value, the name that it has in the step, else empty.
        operands: what it is made of.
        places: for every operand, which of its elements meets each of ours, as flat indices; None: the one
            at the same place. Of a moved tensor only the operands and places of ``which`` count.
        which: of a moved tensor, the operand that each element is of.
        turned: of sums: whether the weight has the sums along its last axis.
    """

    kind: str
    tensor: Tensor | None
    name: str = ""
    operands: list[Node] = field(default_factory=list)
    places: list[Tensor | None] = field(default_factory=list)
    which: Tensor | None = None
    turned: bool = False

    @property
    def numbers(self) -> Tensor:
        """The tensor."""
        assert self.tensor is not None
        return self.tensor

    def place(self, operand: int, index: int) -> int:
        """Which element of an operand meets this one of ours."""
        places = self.places[operand]
        return index if places is None else int(places[index])

    def read(self) -> Tensor:
        """The numbers in a row: those of its sources, where it is moved."""
        flat = self.numbers.flatten()
        if self.which is None:
            return flat
        flat = flat.clone()
        for k, (operand, places) in enumerate(zip(self.operands, self.places, strict=True)):
            if places is not None:
                mine = self.which == k
                flat[mine] = operand.read()[places[mine]].to(flat.dtype)
        return flat

    def source(self, index: int) -> tuple[Node, int]:
        """Where an element came from, through all functions that only move elements."""
        if self.kind != "moved" or self.which is None:
            return self, index
        operand = int(self.which[index])
        return self.operands[operand].source(self.place(operand, index))


@dataclass(frozen=True)
class Derivations:
    """How the quantities of one step of one row are made.

    Attributes:
        made: each quantity by name.
        input: ``(1, input)``, what the step read.
        before: ``(1, size)`` for every state, by name, from which it began.
    """

    made: dict[str, Node]
    input: Tensor
    before: dict[str, Tensor]


@dataclass(frozen=True)
class _Made:
    """How a tensor came to be: a call and, where it returned several tensors, which one."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    which: int | None
    versions: tuple[tuple[Tensor, int], ...]

    def holds(self) -> bool:
        """Whether nothing of it was changed in place since."""
        return all(_version(tensor) == version for tensor, version in self.versions)


class Recording(TorchFunctionMode):
    """While active, notes for every new tensor the torch function that made it.

    Args:
        moves: where moved elements come from, kept from one recording to the next of the same code.
    """

    def __init__(self, moves: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self._moves = {} if moves is None else moves
        self._made: dict[int, _Made | None] = {}
        self._alive: list[Any] = []  # an id stays valid as long as its tensor lives

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__setitem__:
            self._made[id(args[0])] = None
        several = isinstance(result, (tuple, list))
        for which, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor):
                seen = tuple((part, _version(part)) for part in (tensor, *_parts((args, kwargs))))
                made = _Made(_name(func), func, args, kwargs or {}, which if several else None, seen)
                known = id(tensor) in self._made or any(tensor is argument for argument in args)
                self._made[id(tensor)] = None if known else made  # None: changed in place, no one call
                self._alive.append(tensor)
        return result

    def function_of(self, tensor: Tensor) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """The name of the function of one tensor that made this one, and the function; moves don't count."""
        made = self._made.get(id(tensor))
        while made and made.holds() and made.name in _MOVES and isinstance(next(iter(made.args), 0), Tensor):
            made = self._made.get(id(made.args[0]))
        if made is None or not made.holds() or made.which is not None:
            return None
        call = made
        if sum(isinstance(value, Tensor) for value in (*call.args, *call.kwargs.values())) != 1:
            return None

        def function(given: Tensor) -> Tensor:
            args = [given if isinstance(value, Tensor) else value for value in call.args]
            kwargs = {k: given if isinstance(value, Tensor) else value for k, value in call.kwargs.items()}
            result: Tensor = call.function(*args, **kwargs)
            return result

        return call.name, function

    def derivations(self, named: Mapping[str, Tensor], shown: Mapping[str, Tensor]) -> dict[str, Node]:
        """How each of these tensors was made, down to the others of them.

        Args:
            named: tensors that were there before or were made while this was active, by name.
            shown: what stands for some of them where others are made of them.
        """
        made = {key: how for key, how in self._made.items() if how and how.holds()}
        builder = _Builder(made, {id(tensor): name for name, tensor in named.items()}, shown, self._moves)
        return {name: builder.made_of(tensor) for name, tensor in named.items()}


class _Builder:
    """Makes the nodes, one for each tensor."""

    def __init__(
        self,
        made: Mapping[int, _Made],
        names: Mapping[int, str],
        shown: Mapping[str, Tensor],
        moves: dict[Any, Any],
    ) -> None:
        self._made = made
        self._names = names
        self._shown = shown
        self._moves = moves
        self._nodes: dict[int, Node] = {}

    def node(self, value: Any) -> Node:
        """What a value is where another one is made of it: itself, if it has a name."""
        if not isinstance(value, Tensor):
            text = f"{value:g}" if isinstance(value, float) else str(value)
            return Node("constant", None, text)
        if id(value) not in self._nodes:
            name = self._names.get(id(value), "")
            same = Node("value", self._shown.get(name, value), name)
            self._nodes[id(value)] = same if name else self.made_of(value)
        return self._nodes[id(value)]

    def made_of(self, tensor: Tensor) -> Node:
        """What a tensor is made of."""
        made = self._made.get(id(tensor))
        if made is None:
            return Node("value", tensor)
        if made.name in INFIX and len(made.args) == 2 and not made.kwargs:
            turned = made.function.__name__.strip("_") in _REVERSED
            return self._elementwise("infix", made.name, tensor, made.args[::-1] if turned else made.args)
        if made.name == "neg" and len(made.args) == 1:
            return self._elementwise("negated", "", tensor, made.args)
        if made.name in ("linear", "matmul") and _is_matrix(made):
            return self._sums(made, tensor)
        if made.name in _MOVES:
            return self._moved(made, tensor)
        arguments = [*made.args, *made.kwargs.values()]
        if made.which is None and _is_elementwise(made, tensor):
            return self._elementwise("call", made.name, tensor, arguments)
        whole = [self.node(value) for value in arguments if isinstance(value, Tensor) and value.dim() > 0]
        return Node("rows", tensor, made.name, whole, [None] * len(whole))

    def _elementwise(self, kind: str, name: str, tensor: Tensor, arguments: Any) -> Node:
        operands = [self.node(value) for value in arguments]
        return Node(kind, tensor, name, operands, [_broadcast(value, tensor) for value in arguments])

    def _sums(self, made: _Made, tensor: Tensor) -> Node:
        given = dict(zip(("input", "weight", "bias"), made.args, strict=False)) | made.kwargs
        parts = list(made.args) if made.name == "matmul" else [given["input"], given["weight"]]
        parts += [given["bias"]] if given.get("bias") is not None else []
        operands = [self.node(value) for value in parts]
        return Node("sum", tensor, "", operands, [None] * len(operands), turned=bool(made.name == "matmul"))

    def _moved(self, made: _Made, tensor: Tensor) -> Node:
        """Where every element came from."""
        sources = list(_parts(made.args[:1] if made.args else made.kwargs))
        key = None
        if not any(isinstance(value, Tensor) for value in (*made.args[1:], *made.kwargs.values())):
            shapes = tuple(source.shape for source in sources)
            key = (made.name, shapes, repr(made.args[1:]), repr(made.kwargs), made.which)
        found = self._moves.get(key) or self._places(made)
        if key is not None:
            self._moves[key] = found
        which, places = found
        return Node("moved", tensor, "", [self.node(source) for source in sources], [*places], which=which)

    @staticmethod
    def _places(made: _Made) -> tuple[Tensor, list[Tensor]]:
        """For every element the source that it came from, and for every source the places: move numbers."""
        sources: list[Tensor] = []

        def numbered(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(numbered(part) for part in value)
            start = sum(source.numel() for source in sources)
            sources.append(value)
            return torch.arange(start, start + value.numel(), device=value.device).reshape(value.shape)

        first = len(made.args) > 0  # what is moved stands first; the rest says how
        args = (numbered(made.args[0]), *made.args[1:]) if first else ()
        moves = ("input", "tensors", "tensor")
        kwargs = {k: numbered(v) if not first and k in moves else v for k, v in made.kwargs.items()}
        moved = made.function(*args, **kwargs)
        places = (moved if made.which is None else moved[made.which]).flatten()
        sizes = torch.tensor([source.numel() for source in sources], device=places.device)
        which = torch.arange(len(sources), device=places.device).repeat_interleave(sizes)[places]
        return which, [places - start for start in (sizes.cumsum(0) - sizes).tolist()]


def _is_elementwise(made: _Made, tensor: Tensor) -> bool:
    """Whether every element comes of the elements that stand at its place, by this function of them alone.

    Of numbers drawn for this: with those of the step, such as zeros, other functions would seem so too.
    """
    arguments = [*made.args, *made.kwargs.values()]

    def called(*values: Tensor) -> Tensor:
        left = iter(values)
        given = [next(left) if isinstance(value, Tensor) else value for value in arguments]
        count = len(made.args)
        result: Tensor = made.function(*given[:count], **dict(zip(made.kwargs, given[count:], strict=True)))
        return result

    try:
        drawn = [_drawn(value) for value in arguments if isinstance(value, Tensor)]
        rows = [value.broadcast_to(tensor.shape).reshape(-1, 1, 1).clone() for value in drawn]
        alone, whole = torch.vmap(called)(*rows), called(*drawn)
        return whole.shape == tensor.shape and torch.allclose(
            alone.flatten(), whole.flatten(), equal_nan=True
        )
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False


def _drawn(value: Tensor) -> Tensor:
    """Other numbers of the same kind, between 0.1 and 0.9; whole numbers as they are."""
    generator = torch.Generator(value.device).manual_seed(0)
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=generator, device=value.device) < 0.5
    if not (value.is_floating_point() or value.is_complex()):
        return value.clone()
    drawn = torch.rand(value.shape, generator=generator, device=value.device, dtype=torch.float64)
    return (0.1 + 0.8 * drawn).to(value.dtype)


def _broadcast(value: Any, tensor: Tensor) -> Tensor | None:
    """The flat indices of the elements of ``value`` that meet those of ``tensor``; None: the same ones."""
    if not isinstance(value, Tensor) or value.shape == tensor.shape:
        return None
    return torch.arange(value.numel()).reshape(value.shape).broadcast_to(tensor.shape).flatten()


def _version(tensor: Tensor) -> int:
    """How often a tensor, or what it is a view of, was changed in place, where torch counts it."""
    return -1 if tensor.is_inference() else tensor._version


def _parts(value: Any) -> Iterator[Tensor]:
    """Every tensor among the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)


def _name(function: Any) -> str:
    """``add`` for torch.add, Tensor.add, Tensor.__add__ and Tensor.__radd__ alike."""
    name = str(function.__name__).strip("_")
    if name == "get":  # a property such as Tensor.T
        return str(function.__self__.__name__)
    if function.__name__.startswith("__r") and name[1:] in (*INFIX, "truediv", "matmul"):
        name = name[1:]
    name = {"rsub": "sub"}.get(name, name)
    return _SAME_AS.get(name, name)


def _is_matrix(made: _Made) -> bool:
    """Whether a product is one with a matrix, so that each number is one weighted sum."""
    if made.name == "linear":
        given = dict(zip(("input", "weight"), made.args, strict=False)) | made.kwargs
        return bool(given["weight"].dim() == 2)
    return len(made.args) == 2 and all(isinstance(a, Tensor) and a.dim() == 2 for a in made.args)
