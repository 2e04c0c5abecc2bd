"""Runs the program of a step for many steps at once, with the rounding of the page's evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.program_functions import REDUCTIONS, VECTOR_FUNCTIONS, elementwise_function


@dataclass(frozen=True)
class ProgramRun:
    """The values of a program for several steps.

    Attributes:
        computed: Each quantity as the program computes it, ``(time, size)``, by name.
        values: The values that the program continued with.
    """

    computed: dict[str, Tensor]
    values: dict[str, Tensor]


class ProgramRunner:
    """Runs one program.

    Every value is computed in double precision and rounded to its dtype, as ``page/evaluator.js`` does. In
    single precision, the results of both are the same, except for about one in 100 million, where the last
    bit of a double decides how it is rounded.

    Args:
        program: The program; see :class:`unrolled.tracing.step_graph.LayerProgram`.
        parameters: The parameters, by name.
        constants: The constants of the program.
        free: The parameters that :meth:`run_perturbed` gets for each step, instead of those above.
    """

    def __init__(
        self,
        program: Mapping[str, Any],
        parameters: Mapping[str, Tensor],
        constants: list[Tensor],
        free: Collection[str] = (),
    ) -> None:
        self._program = program
        self._nodes: list[dict[str, Any]] = program["nodes"]
        self._indices = {
            k: self._move_index(node) for k, node in enumerate(self._nodes) if node.get("function") == "move"
        }
        self._fixed: dict[int, Tensor] = {}
        for k, node in enumerate(self._nodes):
            if node.get("leaf") == "parameter" and node["name"] not in free:
                self._fixed[k] = parameters[node["name"]].detach().cpu().double().reshape(node["shape"])
            elif node.get("leaf") == "constant":
                self._fixed[k] = constants[node["index"]].detach().cpu().double().reshape(node["shape"])
        for k, node in enumerate(self._nodes):  # what follows from parameters alone is the same at every step
            if "function" in node and all(ref in self._fixed for ref in _references(node["args"])):
                self._fixed[k] = self._result(k, node, {}, self._fixed)

    @property
    def step_size(self) -> int:
        """The number of values of a step, without parameters and constants."""
        shapes: list[list[int]] = [
            node["shape"] for k, node in enumerate(self._nodes) if k not in self._fixed
        ]
        return 1 + sum(map(math.prod, shapes))

    def _move_index(self, node: Mapping[str, Any]) -> Tensor:
        """Return where each element of a move is among those of all operands and the number after them."""
        sources, runs, _ = node["args"]
        starts = [0]
        for source in sources:
            starts.append(starts[-1] + math.prod(self._nodes[source["ref"]]["shape"]))
        pieces = [
            torch.full((count,), starts[-1])
            if operand < 0
            else starts[operand] + first + stride * torch.arange(count)
            for operand, first, count, stride in runs
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)

    def run(
        self,
        x: Tensor,
        states: Mapping[str, Tensor],
        recorded: Mapping[str, Tensor],
        choose: Callable[[str, Tensor, Tensor], Tensor],
        draws: Tensor | None = None,
    ) -> ProgramRun:
        """Run the program for several steps at once.

        Args:
            x: The input of each step, ``(time, input)``.
            states: Each state before the steps, ``(time, size)``, by name.
            recorded: The recorded values of some quantities, ``(time, size)``, by name.
            choose: Returns the values of such a quantity to continue with, given its name, the computed and
                the recorded values.
            draws: The random numbers of each step, ``(time, width)``.
        """
        leaves = {"x": x, **{f"state {name}": value for name, value in states.items()}}
        if draws is not None:
            leaves["draws"] = draws
        inputs = {name: value.detach().cpu().double() for name, value in leaves.items()}
        given = {name: value.detach().cpu().double() for name, value in recorded.items()}
        with torch.no_grad():
            computed, values = torch.func.vmap(partial(self._step, choose))(inputs, given)
        return ProgramRun(computed, values)

    def run_perturbed(
        self,
        x: Tensor,
        states: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        perturbations: Mapping[str, Tensor],
        draws: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the program for several steps at once, with autograd support.

        Args:
            x: The input of each step, ``(time, input)``.
            states: Each state before the steps, ``(time, size)``, by name.
            parameters: Each free parameter at each step, ``(time, *shape)``, by name.
            perturbations: Tensors to add to some quantities, ``(time, size)``, by name. If two names refer to
                the same node, only the first one is used.
            draws: The random numbers of each step, ``(time, width)``.

        Returns:
            Each quantity, ``(time, size)``, by name.
        """
        leaves = {"x": x, **{f"state {name}": value for name, value in states.items()}}
        leaves |= {f"parameter {name}": value for name, value in parameters.items()}
        if draws is not None:
            leaves["draws"] = draws

        def add(_: str, computed: Tensor, perturbation: Tensor) -> Tensor:
            return computed + perturbation

        values: dict[str, Tensor] = torch.func.vmap(partial(self._step, add))(leaves, perturbations)[1]
        return values

    def _step(
        self,
        choose: Callable[[str, Tensor, Tensor], Tensor],
        leaves: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        replaced: dict[int, str] = {}
        for name, ref in self._program["quantities"].items():
            if name in given:
                replaced.setdefault(ref, name)
        values: dict[int, Tensor] = {}
        computed: dict[int, Tensor] = {}
        for k, node in enumerate(self._nodes):
            value = self._fixed[k] if k in self._fixed else self._result(k, node, leaves, values)
            computed[k] = value
            if k in replaced and "function" in node:
                value = choose(replaced[k], value, given[replaced[k]].reshape(node["shape"]))
            values[k] = value
        names = self._program["quantities"].items()
        return (
            {name: computed[ref].flatten() for name, ref in names},
            {name: values[ref].flatten() for name, ref in names},
        )

    def _result(
        self, k: int, node: Mapping[str, Any], leaves: Mapping[str, Tensor], values: Mapping[int, Tensor]
    ) -> Tensor:
        return _rounded(self._exact(k, node, leaves, values), node["dtype"]).reshape(node["shape"])

    def _exact(
        self, k: int, node: Mapping[str, Any], leaves: Mapping[str, Tensor], values: Mapping[int, Tensor]
    ) -> Tensor:
        if "leaf" in node:
            kind = node["leaf"]
            return leaves[{"input": "x", "draws": "draws"}.get(kind) or f"{kind} {node['name']}"]
        function, args = node["function"], [_decoded(arg, values) for arg in node["args"]]
        if function == "move":
            fill = torch.as_tensor(args[2], dtype=torch.float64).reshape(1)
            return torch.cat([*(source.flatten() for source in args[0]), fill])[self._indices[k]]
        if function == "einsum":
            return _einsum(*args)
        if function == "gather":
            return _gather(*args)
        if function in REDUCTIONS or function in VECTOR_FUNCTIONS:
            vectors = args[0].reshape(args[1])
            return (REDUCTIONS.get(function) or VECTOR_FUNCTIONS[function])(vectors, *args[2:])
        return elementwise_function(function, args)


def _rounded(value: Tensor, dtype: str) -> Tensor:
    """Round a value to a dtype and return it in double precision."""
    if dtype == "float32":
        return value.to(torch.float32).double()
    if dtype == "bool":
        return (value != 0).double()
    value = value.double()
    return value if dtype == "float64" else value.trunc()


def _references(value: Any) -> Iterator[int]:
    """Return the nodes that arguments refer to."""
    if isinstance(value, list):
        for part in value:
            yield from _references(part)
    elif isinstance(value, dict) and "ref" in value:
        yield value["ref"]


def _decoded(value: Any, values: Mapping[int, Tensor]) -> Any:
    """Return an argument with the tensors and numbers that it refers to."""
    if isinstance(value, list):
        return [_decoded(part, values) for part in value]
    if isinstance(value, dict):
        return values[value["ref"]] if "ref" in value else float(value["number"])
    return value


def _einsum(operands: list[Tensor], labels: list[list[int]], out: list[int], bias: Tensor | None) -> Tensor:
    """Sum products over the labels that the result doesn't have."""
    if _is_linear(operands, labels, out):  # torch.einsum would copy the weights for every step
        result = operands[0] @ operands[1].T
        return result if bias is None else result + bias.flatten()
    letters = {label: k for k, label in enumerate(dict.fromkeys(chain.from_iterable(labels)))}
    pairs: list[Any] = []
    for operand, names in zip(operands, labels, strict=True):
        pairs += [operand, [letters[name] for name in names]]
    result = torch.einsum(*pairs, [letters[name] for name in out])
    return (
        result if bias is None else (result.reshape(-1, bias.numel()) + bias.flatten()).reshape(result.shape)
    )


def _is_linear(operands: list[Tensor], labels: list[list[int]], out: list[int]) -> bool:
    """Whether a sum of products is that of torch.nn.functional.linear."""
    if len(operands) != 2 or operands[1].dim() != 2 or operands[0].dim() < 2:
        return False
    (*batch, inner), (column, summed) = labels
    is_sum = inner == summed and out == [*batch, column] and column not in labels[0] and inner not in batch
    return is_sum and operands[0].shape[-1] == operands[1].shape[1]


def _gather(values: Tensor, sizes: list[int], index: Tensor, count: int) -> Tensor:
    """Take elements along the middle of three axes."""
    before, length, after = sizes
    return values.reshape(before, length, after).gather(1, index.long().reshape(before, count, after))
