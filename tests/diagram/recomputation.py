"""Recompute every number of a diagram in float64 from what the diagram says it is computed from."""

from __future__ import annotations

import contextlib
import math
import string

import torch
from torch import Tensor

from unrolled.diagram.model import DiagramNode, DiagramTrace, Term
from unrolled.tracing.layer_trace import LayerTrace


def call(text: str, *operands: Tensor) -> Tensor:
    """Run a call such as ``"leaky_relu({}, 0.2)"``."""
    names = string.ascii_lowercase[: len(operands)]
    name, _, arguments = text.partition("(")
    places = (torch.nn.functional, torch, torch.special, torch._C._nn, torch.Tensor)
    functions = [getattr(place, n, None) for n in (name, f"__{name}__") for place in places]
    values = dict(zip(names, operands, strict=True))
    scope: dict[str, object] = {"torch": torch, "inf": math.inf, "nan": math.nan, "device": torch.device}
    for function in filter(callable, functions):  # torch.celu has no argument inplace
        with contextlib.suppress(TypeError):
            scope["function"] = function
            result: Tensor = eval(f"function({arguments.format(*names)}", scope, values)
            return result
    raise ValueError(f"torch has no function for {text}")


def call_elements(text: str, *operands: Tensor) -> Tensor:
    """Run an elementwise call on each element, as a matrix of its own."""
    elements = [operand.reshape(-1, 1, 1) for operand in torch.broadcast_tensors(*operands)]
    return torch.vmap(lambda *values: call(text, *values))(*elements).flatten()


class Recomputation:
    """The numbers of one step of a diagram.

    Args:
        trace: The diagram.
        part: The layer's trace that it was built from.
        batch: The row.
        tolerance: Largest difference, relative to the largest number of the tensor.
    """

    def __init__(self, trace: DiagramTrace, part: LayerTrace, batch: int, tolerance: float = 1e-9) -> None:
        self.trace, self.part, self.batch, self.tolerance = trace, part, batch, tolerance
        self.checked = 0

    def check(self) -> int:
        """Check the numbers of all steps and return how many there are."""
        diagram, part = self.trace.diagram, self.part
        for step, values in zip(self.trace.steps, self.trace.values, strict=True):
            self.values = [value.double() for value in values]
            self.step = step
            before = part.state_before(step, self.batch)
            self.sources = {"x": diagram.input_value}
            self.sources |= {f"before:{state.name}": state.value for state in diagram.states}
            self.sources |= {node.id: node.value for node in diagram.nodes}
            position = part.at(step)
            self.equal(part.input[position, self.batch], diagram.input_value, "x")
            for state in diagram.states:
                self.equal(before[state.name], state.value, f"{state.name} before the step")
                self.equal(part.values[state.name][position, self.batch], self.sources[state.end], state.name)
            done = {"x", *(f"before:{state.name}" for state in diagram.states)}
            for node in diagram.nodes:
                assert all(term.source is None or term.source in done for term in node.terms), node
                done.add(node.id)
                self.equal(self.node(node), node.value, node)
                if node.name in part.values and part.values[node.name][position, self.batch].numel() == len(
                    values[node.value]
                ):
                    self.equal(part.values[node.name][position, self.batch], node.value, node.name)
        return self.checked

    def equal(self, computed: Tensor, index: int, what: object) -> None:
        recorded = self.values[index]
        computed = computed.double().flatten().broadcast_to(recorded.shape)
        scale = recorded[recorded.isfinite()].abs().max().item() if recorded.isfinite().any() else 0.0
        bound = self.tolerance * (1 + scale)
        assert torch.allclose(computed, recorded, self.tolerance, bound, equal_nan=True), (
            f"{self.trace.diagram.cell}, step {self.step}: {what} is {computed.tolist()}, "
            f"but {recorded.tolist()} was recorded"
        )
        self.checked += recorded.numel()

    def term(self, term: Term) -> Tensor:
        """Compute a term, without its sign and normalization, and compare it with its value."""
        if term.source is None:
            assert term.value is not None
            return self.values[term.value]
        result = self.values[self.sources[term.source]]
        if term.elements is not None:
            result = result[list(term.elements)]
        if term.weighted:
            matrix = self.matrix(term)
            if term.blocks > 1:  # separately, so that a NaN stays in its block
                blocks = zip(matrix.chunk(term.blocks), result.chunk(term.blocks), strict=True)
                width = len(result) // term.blocks
                result = torch.cat([b[:, k * width :][:, :width] @ v for k, (b, v) in enumerate(blocks)])
            else:
                result = matrix @ result
            if term.bias or (term.weight is not None and self.trace.weights[term.weight].bias is not None):
                result = result + self.bias(term)
        if term.call:
            result = call(term.call, result)
        if term.gain is not None:
            gain = self.values[term.gain]
            result = result / gain if term.divides else result * gain
        if term.value is not None and term.normalization is None:
            self.equal(result, term.value, term)
        return result

    def matrix(self, term: Term) -> Tensor:
        assert term.weight is not None
        weights = self.trace.weights[term.weight].matrix.double()
        if not term.parameter:
            return weights
        assert term.rows is not None
        parameter = getattr(self.part.cell, term.parameter).double()
        if term.transposed:
            parameter = parameter.T
        rows = parameter.reshape(-1, parameter.shape[-1])[slice(*term.rows)]
        if term.columns:
            rows = rows[:, slice(*term.columns)]
        if term.blocks > 1:
            rows = torch.block_diag(*rows.chunk(term.blocks))
        assert rows.equal(weights) or rows.isnan().any(), f"{term} has other weights than it says"
        return rows

    def bias(self, term: Term) -> Tensor:
        assert term.weight is not None
        used = self.trace.weights[term.weight].bias
        assert used is not None
        if not term.bias:
            return used.double()
        bias: Tensor = getattr(self.part.cell, term.bias).double().flatten()
        bias = bias if term.bias_rows is None else bias[slice(*term.bias_rows)]
        assert bias.equal(used.double())
        return bias

    def terms(self, node: DiagramNode) -> list[Tensor]:
        """Compute the terms of a node with their signs. Those that are normalized together are one."""
        results: list[Tensor] = []
        groups: dict[int, Tensor] = {}
        for term in node.terms:
            result = term.sign * self.term(term)
            norm = term.normalization
            if norm is None:
                results.append(result)
            else:
                groups[norm.group] = groups.get(norm.group, torch.zeros(norm.size).double()) + result
        for group, total in groups.items():
            members = [t for t in node.terms if t.normalization and t.normalization.group == group]
            norm = members[0].normalization
            assert norm is not None
            normalized = call(norm.call, total[None], *[self.values[k] for k in norm.parameters])
            result = normalized.flatten()[slice(*norm.rows)]
            assert members[0].value is not None
            self.equal(result, members[0].value, members[0])
            results.append(result)
        return results

    def node(self, node: DiagramNode) -> Tensor:
        """Compute a node."""
        terms = self.terms(node)
        if node.operation == "product":
            return torch.stack(torch.broadcast_tensors(*terms)).prod(0)
        if node.operation == "quotient":
            return terms[0] / terms[1]
        if node.operation == "difference":
            return terms[0] - terms[1]
        if node.operation == "join":
            return torch.cat(terms)
        if node.operation == "draw":
            assert self.part.draws is not None
            drawn = self.part.draws.values[self.step, self.batch].double().flatten().tolist()
            assert set(self.values[node.value].tolist()) <= set(drawn)
            return self.values[node.value]
        if node.operation == "call":
            recorded = self.trace.values[self.trace.steps.index(self.step)]
            for k, term in enumerate(node.terms):  # conditions and indices
                if term.value is not None and not recorded[term.value].is_floating_point():
                    terms[k] = terms[k].to(recorded[term.value].dtype)
            if node.shapes:
                terms = [part.reshape(shape) for part, shape in zip(terms, node.shapes, strict=True)]
                return call(node.call, *terms)
            return call_elements(node.call, *terms)
        total = terms[0]
        for part in terms[1:]:
            total = total + part
        if node.operation == "sum":
            return total
        assert node.operation == "activation", node.operation
        if node.pre_activation is not None:
            self.equal(total, node.pre_activation, f"pre-activation of {node}")
        if node.shapes:
            return call(node.call, total.reshape(node.shapes[0]))
        return call_elements(node.call, total)
