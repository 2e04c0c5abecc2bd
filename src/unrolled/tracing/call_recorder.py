"""Records the torch function calls of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unrolled.tracing.call_text import call_text, tensors_in
from unrolled.tracing.element_moves import MOVES, trace_moves

INFIX = {"add": " + ", "sub": " - ", "mul": "·", "div": " / "}
_ALIASES = {
    **{"truediv": "div", "subtract": "sub", "multiply": "mul", "divide": "div", "mm": "matmul"},
    **{"mod": "remainder", "floordiv": "floor_divide", "rsub": "sub", "log_sigmoid": "logsigmoid"},
    **{"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"},
    **{"special_expit": "sigmoid", "special_gammaln": "lgamma", "special_psi": "digamma"},
}
_MODULES = ("special", "linalg", "fft")  # torch.special.entr calls itself special_entr
_READS = frozenset(  # functions that return numbers of a tensor to Python
    {"bool", "float", "int", "index", "complex", "item", "tolist", "numpy", "array", "contains", "format"}
    | {"equal", "allclose", "is_nonzero"}
)
_OPERATORS = (*INFIX, "truediv", "matmul", "pow", "mod", "floordiv", "and", "or", "xor")
_REVERSED = ("rsub", "rdiv", "rtruediv", "rpow", "rmod", "rfloordiv")


@dataclass(frozen=True)
class Call:
    """The torch function call that returned a tensor.

    Attributes:
        result: The tensor.
        name: Canonical name of the function, such as ``add`` or ``special.entr``.
        function, args, kwargs: The call.
        output_index: Position of the tensor among the outputs; None if the function returned one tensor.
        versions: Version counters of the tensor and of all arguments after the call.
    """

    result: Tensor
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

    def operands(self) -> tuple[Any, ...]:
        """Return the positional arguments, in the order in which the function of this name takes them."""
        return self.args[::-1] if self.is_reversed else self.args

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

    @property
    def is_reversed(self) -> bool:
        """Whether the first argument is the right operand, as in ``Tensor.__rsub__``."""
        return self.function.__name__.strip("_") in _REVERSED

    def tensor_arguments(self) -> list[Tensor]:
        """Return every tensor among the arguments."""
        return list(tensors_in((self.args, self.kwargs)))

    def moved_tensors(self) -> list[Tensor]:
        """Return the tensors whose elements a function that only moves elements takes."""
        return list(tensors_in(self.args[:1] if self.args else self.kwargs))

    def trace_moves(self, cache: dict[Any, Any], first: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Find the source of each element, as :func:`trace_moves` does. Results are kept in ``cache``."""
        key = None
        if not any(isinstance(value, Tensor) for value in (*self.args[1:], *self.kwargs.values())):
            shapes = tuple(tensor.shape for tensor in self.moved_tensors())
            key = (self.name, shapes, repr(self.args[1:]), repr(self.kwargs), self.output_index, first)
        moves: tuple[Tensor, list[Tensor]] | None = cache.get(key)
        if moves is None:
            moves = trace_moves(self.function, self.args, self.kwargs, self.output_index, first)
        if key is not None:
            cache[key] = moves
        return moves

    def text(self, scalars: bool) -> str:
        """Return the call as Python code, as :func:`call_text` does. Empty if it returned several tensors."""
        if self.output_index is not None:
            return ""
        return call_text(self.name, self.operands(), self.kwargs, scalars)


class CallRecorder(TorchFunctionMode):
    """While active, record the torch function call that returned each new tensor.

    Args:
        move_cache: Cache of the sources of moved elements, to share between recordings of the same code.

    Attributes:
        reads: The functions that returned numbers of a tensor to Python, such as ``item``, and the tensor.
    """

    def __init__(self, move_cache: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self.move_cache = {} if move_cache is None else move_cache
        self._calls: dict[int, Call | None] = {}  # by the id of the tensor
        self.reads: list[tuple[str, Tensor]] = []
        self._alive: list[Any] = []  # keeps the tensors alive, so that no id is reused

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = list(tensors_in((args, kwargs)))
        before = [_version(argument) for argument in arguments]
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__setitem__:
            self._calls[id(args[0])] = None
        name = _name(func)
        if name in _READS and not isinstance(result, Tensor):  # unlike Tensor.float and Tensor.bool
            self.reads.append((name, args[0]))
        several = isinstance(result, (tuple, list))
        for output_index, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor):
                returned = [version for a, version in zip(arguments, before, strict=True) if a is tensor]
                if returned and returned[0] == _version(tensor) != -1:
                    continue  # a function that had nothing to do, such as x.to(x.dtype)
                versions = tuple((part, _version(part)) for part in (tensor, *arguments))
                position = output_index if several else None
                call = Call(tensor, name, func, args, kwargs or {}, position, versions)
                known = id(tensor) in self._calls or bool(returned)
                self._calls[id(tensor)] = None if known else call  # None: changed in place by several calls
                self._alive.append(tensor)
        return result

    def calls(self) -> dict[int, Call | None]:
        """Return the call that returned each tensor, by the id of the tensor, in the order of the calls.

        It is None for a tensor that was changed in place.
        """
        return {
            key: call if call is not None and call.is_unmodified() else None
            for key, call in self._calls.items()
        }

    def function_of(self, tensor: Tensor) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """Find the function of a single tensor that computed a tensor, ignoring moves of elements.

        Returns:
            The name and the function; None if the tensor was computed in another way.
        """
        call = self._calls.get(id(tensor))
        while (
            call
            and call.is_unmodified()
            and call.name in MOVES
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


def _version(tensor: Tensor) -> int:
    """Return torch's counter of in-place changes to a tensor or its base; -1 where torch doesn't count."""
    return -1 if tensor.is_inference() else tensor._version


def _name(function: Any) -> str:
    """Return a canonical name: ``add`` for torch.add, Tensor.add, Tensor.__add__ and Tensor.__radd__.

    It is the name in torch, torch.nn.functional or torch.Tensor.
    """
    name = str(function.__name__).strip("_")
    if name == "get":  # a property such as Tensor.T
        return str(function.__self__.__name__)
    if function.__name__.startswith("__r") and name[1:] in _OPERATORS:
        name = name[1:]
    module, _, rest = name.partition("_")
    if module in _MODULES and name not in _ALIASES:
        is_alias = module == "special" and hasattr(torch, rest)  # such as torch.special.softmax
        return rest if is_alias else f"{module}.{rest}"
    return _ALIASES.get(name, name)
