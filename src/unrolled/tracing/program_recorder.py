"""Translation of the recorded calls of one step to a program: plain data that runs for other numbers, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.call_recorder import Call
from unrolled.tracing.element_moves import find_runs
from unrolled.tracing.step_functions import UnsupportedError, Value
from unrolled.tracing.step_recorder import StepRun
from unrolled.tracing.step_translations import translate

_DTYPES = frozenset(
    {torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)
_LIKE = frozenset(  # functions that read only the shape and dtype of their first argument
    {"zeros_like", "ones_like", "full_like", "empty_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
)


class Constants:
    """The constants of some programs, each stored once.

    Attributes:
        tensors: The constants.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._indices: dict[Any, int] = {}

    def index(self, tensor: Tensor) -> int:
        """Return the index of a tensor with these values. Adds it if there is none."""
        tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        key = (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        if key not in self._indices:
            self._indices[key] = len(self.tensors)
            self.tensors.append(tensor)
        return self._indices[key]


class ProgramRecorder:
    """Translates the recorded calls of a step to a program.

    Args:
        run: The recorded step.
        parameters: The parameters of its cell, by name.
        constants: The constants, to which those of this step are added.
        move_cache: Cache of the sources of moved elements, to share between steps.
    """

    def __init__(
        self, run: StepRun, parameters: Mapping[str, Tensor], constants: Constants, move_cache: dict[Any, Any]
    ) -> None:
        self._run = run
        self._constants = constants
        self._move_cache = move_cache
        self._calls = run.recorder.calls()
        self._nodes: list[dict[str, Any]] = []
        self._values: dict[int, Value] = {}  # by the id of the tensor
        self._leaves: dict[int, dict[str, Any]] = {id(run.input): {"leaf": "input"}}
        self._leaves |= {id(t): {"leaf": "state", "name": name} for name, t in run.state_before.items()}
        self._leaves |= {id(t): {"leaf": "parameter", "name": name} for name, t in parameters.items()}
        if run.draws is not None:
            self._leaves[id(run.draws)] = {"leaf": "draws"}
        self._varying = set(self._leaves)  # the ids of tensors that depend on a leaf
        for key, call in self._calls.items():
            if call is None or (
                call.name not in _LIKE and not all(map(self.is_constant, call.tensor_arguments()))
            ):
                self._varying.add(key)
        self._needed: list[Call] = []

    def program(self, quantities: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the program in the form that ``LayerProgram`` describes.

        Args:
            quantities: The tensors of the step whose values the program returns, by name.

        Raises:
            UnsupportedError: If the step can't be given as data.
        """
        for name, tensor in self._run.recorder.reads:
            if not self.is_constant(tensor):
                raise UnsupportedError(f"it reads numbers of a tensor in Python ({name})")
        self._needed = self._needed_calls([*quantities.values(), *self._run.new_state.values()])
        for call in self._needed:
            self._values[id(call.result)] = translate(self, call)
        refs = {name: self.value(tensor).ref for name, tensor in quantities.items()}
        states = {name: self.value(tensor).ref for name, tensor in self._run.new_state.items()}
        first_names = {ref: name for name, ref in reversed(refs.items())}
        held = [
            name for name, ref in refs.items() if first_names[ref] == name and "function" in self._nodes[ref]
        ]
        return {"nodes": self._nodes, "quantities": refs, "held": held, "states": states}

    def replay(self, leaves: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
        """Call the functions of the program again with other leaves.

        Args:
            leaves: The new tensor of each leaf, by the id of the leaf.

        Returns:
            A function that returns the new tensor of a tensor of the step.
        """
        replayed = dict(leaves)

        def replaced(value: Any) -> Any:
            if isinstance(value, Tensor):
                return replayed.get(id(value), value)
            if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
                return type(value)(map(replaced, value))
            return value

        for call in self._needed:
            result = call.function(*replaced(call.args), **{k: replaced(v) for k, v in call.kwargs.items()})
            replayed[id(call.result)] = result if call.output_index is None else result[call.output_index]
        return replaced

    def _needed_calls(self, results: Sequence[Tensor]) -> list[Call]:
        """Return the calls that the results depend on, in their order."""
        needed: set[int] = set()
        left = list(results)
        while left:
            tensor = left.pop()
            if id(tensor) in needed or id(tensor) in self._leaves or self.is_constant(tensor):
                continue
            call = self._calls[id(tensor)]
            if call is None:
                raise UnsupportedError("it changes a tensor in place")
            needed.add(id(tensor))
            left += call.tensor_arguments()
        return [call for key, call in self._calls.items() if key in needed and call is not None]

    # What a translation needs.

    def value(self, tensor: Tensor) -> Value:
        """Return the value of a tensor of the step."""
        if id(tensor) not in self._values:
            leaf = self._leaves.get(id(tensor)) or {
                "leaf": "constant",
                "index": self._constants.index(tensor),
            }
            self._values[id(tensor)] = self._append(leaf, tensor.shape, tensor.dtype)
        return self._values[id(tensor)]

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on no input, state, parameter or random number."""
        return id(tensor) not in self._varying

    def emit(self, function: str, args: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> Value:
        """Append an instruction. Values among the arguments become references."""
        return self._append({"function": function, "args": _encoded(args)}, shape, dtype)

    def runs(self, call: Call, first: int = 0) -> list[list[int]]:
        """Return the runs of elements that a call moves, as :func:`find_runs` does."""
        operands, maps = call.trace_moves(self._move_cache, first)
        key = id(operands)
        if key not in self._move_cache:
            self._move_cache[key] = (operands, find_runs(operands, maps))  # the tensor keeps its id in use
        runs: list[list[int]] = self._move_cache[key][1]
        return runs

    def moved(self, value: Value, move: Callable[[Tensor], Tensor]) -> Value:
        """Append a function that only moves elements."""
        indices = torch.arange(math.prod(value.shape)).reshape(value.shape)
        result = move(indices)
        runs = find_runs(torch.zeros_like(result).flatten(), [result.flatten()])
        return self.emit("move", [[value], runs, 0.0], result.shape, value.dtype)

    def _append(self, node: dict[str, Any], shape: Sequence[int], dtype: torch.dtype) -> Value:
        name = str(dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise UnsupportedError(f"it computes with {name} numbers")
        self._nodes.append({**node, "shape": list(shape), "dtype": name})
        return Value(len(self._nodes) - 1, tuple(shape), dtype)


def _encoded(value: Any) -> Any:
    """Return an argument as plain data."""
    if isinstance(value, Value):
        return {"ref": value.ref}
    if isinstance(value, (tuple, list)):
        return [_encoded(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UnsupportedError(f"it passes a {type(value).__name__} to a torch function")
