"""The gradients of the parameters for the page, as sums over time steps and rows of the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.diagram.model import DiagramNode, DiagramTrace, Term
from unrolled.page.sampling import encode_values
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.step_graph import LayerProgram
from unrolled.tracing.weight_gradients import NoWeightGradientsError, StepGradients, step_gradients

MAX_VALUES = 100_000  # of a layer: half a megabyte
_TOLERANCE = 1e-4  # of a sum of products, relative to the largest gradient


def weight_gradient_data(
    part: LayerTrace, traced: DiagramTrace, program: LayerProgram, sources: Sequence[Any]
) -> dict[str, Any] | None:
    """Return the data from which the page shows the gradient of each parameter as a sum.

    For a weight in a weighted sum, each step of each row adds a product: the gradient of the weighted sum
    times the value that the weight is multiplied by. For any other parameter, what each step adds is stored.

    Args:
        part: The layer.
        traced: The diagram of its steps.
        program: Their program, with the values of the diagram.
        sources: The pieces of these values; see :func:`unrolled.page.diagram_data.value_sources`.

    Returns:
        None without gradients. ``{"reason"}``, a sentence, if the sums aren't on the page. Otherwise
        ``steps`` and ``rows`` of each sample; ``deltas``, the gradients of weighted sums by node and term,
        ``"n3.0"``; ``operands``, what the weights are multiplied with by source; and ``others``, what each
        sample adds to the gradient of other parameters, by name.
    """
    if not part.gradients:
        return None
    try:
        gradients = step_gradients(part, program)
        sums = _Sums(part, traced, sources, gradients)
        return sums.data()
    except NoWeightGradientsError as error:
        where = f"layer {part.layer} ({part.direction})"
        return {"reason": f"This page doesn't show the weight gradients of {where}, because {error}."}


@dataclass(frozen=True)
class _Sum:
    """A weighted sum: its gradient, and what its weights are multiplied with, for each sample."""

    term: Term
    delta: Tensor
    operand: Tensor


class _Sums:
    """The weighted sums of a layer, and their gradients."""

    def __init__(
        self, part: LayerTrace, traced: DiagramTrace, sources: Sequence[Any], gradients: StepGradients
    ) -> None:
        self._part, self._sources, self._gradients = part, sources, gradients
        self._values = {node.id: node.value for node in traced.diagram.nodes}
        self._sums = {
            f"{node.id}.{k}": found
            for node in traced.diagram.nodes
            for k, term in enumerate(node.terms)
            if (found := self._sum(node, term)) is not None
        }

    def _sum(self, node: DiagramNode, term: Term) -> _Sum | None:
        is_plain = term.weighted and term.parameter and term.rows is not None and term.source is not None
        if not is_plain or term.gain is not None or term.normalization is not None:
            return None
        delta = operand = None
        for index, sign in ((term.value, 1), (node.pre_activation, term.sign), (node.value, term.sign)):
            if index is not None and delta is None:
                delta = self._pieces(index, self._gradients.values, sign)
        if term.source == "x":
            operand = self._gradients.input
        elif term.source is not None and term.source.startswith("before:"):
            operand = self._gradients.states[term.source.removeprefix("before:")]
        elif term.source is not None:
            operand = self._pieces(self._values[term.source], self._gradients.computed)
        return None if delta is None or operand is None else _Sum(term, delta, operand)

    def _pieces(self, index: int, values: Mapping[str, Tensor], sign: int = 1) -> Tensor | None:
        """Return a value of the diagram, or its gradient, for each sample, if the step has it."""
        pieces = self._sources[index] or ()
        if not pieces or any(piece["name"] not in values for piece in pieces):
            return None
        return sign * torch.cat(
            [
                values[piece["name"]]
                if piece["elements"] is None
                else values[piece["name"]][:, piece["elements"]]
                for piece in pieces
            ],
            1,
        )

    def data(self) -> dict[str, Any]:
        found, part = self._gradients, self._part
        added = {name: torch.zeros_like(value) for name, value in found.parameters.items()}
        for one in self._sums.values():
            _add(added, one)
        others = {
            name: value for name, value in found.parameters.items() if not _are_close(added[name], value)
        }
        sums = {
            key: one for key, one in self._sums.items() if one.term.parameter not in others or one.term.bias
        }
        operands = {one.term.source: one.operand for one in sums.values()}
        tensors = [*(one.delta for one in sums.values()), *operands.values(), *others.values()]
        count = sum(map(torch.numel, tensors))
        if count > MAX_VALUES:
            raise NoWeightGradientsError(
                f"their sums over {len(found.steps):,} steps need {count:,} numbers, but at most "
                f"{MAX_VALUES:,} are stored"
            )

        def encoded(value: Tensor) -> dict[str, Any]:
            return encode_values(value.to(part.input.dtype))

        return {
            "reason": None,
            "steps": found.steps.tolist(),
            "rows": found.rows.tolist(),
            "deltas": {key: encoded(one.delta) for key, one in sums.items()},
            "operands": {source: encoded(value) for source, value in operands.items()},
            "others": {name: encoded(value) for name, value in others.items()},
        }


def _add(added: Mapping[str, Tensor], one: _Sum) -> None:
    """Add the products of a weighted sum to the gradients of its parameters, as ``weighted_rows.js`` does."""
    term, delta = one.term, one.delta
    assert term.rows is not None
    first, stop = term.rows
    count = one.operand.shape[1] if term.elements is None else len(term.elements)
    per_block = count // term.blocks
    first_column = 0 if term.columns is None else term.columns[0]
    columns = torch.arange(first_column, first_column + per_block)
    weights = added[term.parameter]
    for unit in range(min(stop - first, delta.shape[1])):
        block = math.floor(unit / ((stop - first) / term.blocks))
        positions = torch.arange(block * per_block, (block + 1) * per_block)
        elements = positions if term.elements is None else torch.tensor(term.elements)[positions]
        products = delta[:, unit, None] * one.operand[:, elements]
        if term.transposed:
            weights[:, columns, first + unit] += products
        else:
            weights[:, first + unit, columns] += products
        if term.bias:
            added[term.bias][:, (term.bias_rows or (0, 0))[0] + unit] += delta[:, unit]


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether sums of products are all of a gradient."""
    finite = expected.isfinite()
    scale = float(expected[finite].abs().max()) if finite.any() else 0.0
    return bool(((found - expected).abs()[finite] <= _TOLERANCE * scale + 1e-30).all())
