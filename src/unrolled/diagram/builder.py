"""The nodes of a diagram, from the expressions of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from unrolled.diagram.definitions import find_definitions, parameters_of
from unrolled.diagram.expressions import Expression
from unrolled.diagram.indices import select
from unrolled.diagram.model import Diagram, DiagramNode, DiagramState, Normalization, Term, Weights
from unrolled.diagram.step_reader import StepReader
from unrolled.diagram.symbols import (
    call_formula,
    call_glyph,
    constant_text,
    divisor_text,
    factor_text,
    glyph,
    is_comparison,
    is_number,
    number,
)
from unrolled.diagram.terms import TermDraft, Terms, bias_parameter, bias_rows
from unrolled.tracing.row_names import RowNames

_ACTIVATIONS = {"sigmoid", "tanh", "relu", "silu", "softplus", "logsigmoid", "exp", "gelu"}
_ACTIVATIONS |= {"softmax", "cos", "sin", "elu", "leaky_relu", "hardtanh", "hardsigmoid", "softsign", "mish"}
_RANGES = {"sigmoid": "gate", "softmax": "gate", "hardsigmoid": "gate", "tanh": "tanh", "softsign": "tanh"}
_RANGES |= {"cos": "tanh", "sin": "tanh"}


class DiagramBuilder:
    """Makes the nodes for the expressions of the new states.

    Args:
        cell: Class name of the cell.
        outputs: The expression of each new state.
        reader: The reader that made them.
        names: The gates that the rows of the parameters compute.
    """

    def __init__(
        self, cell: str, outputs: Mapping[str, Expression], reader: StepReader, names: RowNames
    ) -> None:
        self.values: list[Tensor] = []
        self.weights: list[Weights] = []
        self._terms = Terms(outputs.values())
        self._names = names
        self._nodes: list[DiagramNode] = []
        self._ids: dict[int, str] = {}
        self._value_indices: dict[int, int] = {}
        self._sources = {id(reader.input): "x"}
        self._sources |= {id(state): f"before:{name}" for name, state in reader.before.items()}
        ends: dict[str, str] = {}
        for name in (*list(outputs)[1:], *list(outputs)[:1]):  # the output last, since it reads the others
            ends[name] = self._state_node(name, outputs[name])
        states = tuple(
            DiagramState(name, ends[name], self._value(reader.before[name].value)) for name in outputs
        )
        self.diagram = Diagram(
            cell,
            states,
            tuple(self._nodes),
            self._value(reader.input.value),
            definitions=find_definitions(outputs.values()),
        )

    def _state_node(self, name: str, expression: Expression) -> str:
        """Return the id of the node for a new state, which isn't the input or an old state itself."""
        if expression.operation in ("input", "state", "take") or expression.static:
            return self._add(expression, "function", "=", [self._draft(expression)], name=name)
        return self._node(expression)

    @staticmethod
    def _draft(expression: Expression, sign: int = 1) -> TermDraft:
        return TermDraft(None if expression.static else expression, expression, sign)

    def _value(self, tensor: Tensor) -> int:
        """Return the index of a tensor among the values."""
        if id(tensor) not in self._value_indices:
            self._value_indices[id(tensor)] = len(self.values)
            self.values.append(tensor)
        return self._value_indices[id(tensor)]

    def _add(
        self,
        expression: Expression,
        kind: str,
        text: str,
        drafts: Sequence[TermDraft],
        operation: str = "sum",
        name: str = "",
        value_range: str = "",
        formula: str = "",
        pre_activation: Expression | None = None,
        shapes: tuple[tuple[int, ...], ...] = (),
        call: str = "",
    ) -> str:
        """Add a node, after the nodes that it reads, and return its id."""
        sources = [self._source(draft.source) for draft in drafts]
        name = expression.quantity or name
        groups: dict[int, int] = {}
        named = [draft.term.quantity if draft.term and draft.product else "" for draft in drafts]
        owner = next(filter(None, named), "")
        gates = [  # of the rows of parameters
            name or own or owner or self._gate_of_rows(draft)
            for draft, own in zip(drafts, named, strict=True)
        ]
        terms = tuple(
            self._term(draft, source, gate, groups)
            for draft, source, gate in zip(drafts, sources, gates, strict=True)
        )
        node = DiagramNode(
            f"n{len(self._nodes)}",
            kind,
            text,
            name,
            terms,
            value_range,
            self._value(expression.value),
            None if pre_activation is None else self._value(pre_activation.value),
            formula,
            operation,
            call,
            shapes,
        )
        self._nodes.append(node)
        self._ids[id(expression)] = node.id
        return node.id

    def _gate_of_rows(self, draft: TermDraft) -> str:
        """Return the gate that the rows of a weighted term compute, or an empty string."""
        product = draft.product
        if product is None or product.rows is None:
            return ""
        rows = draft.rows or range(*product.rows)
        blocks = self._names.blocks.get(product.parameter, ())
        return next((block.gate for block in blocks if block.rows == rows), "")

    def _source(self, expression: Expression | None) -> tuple[str | None, tuple[int, ...] | None]:
        """Return the id of the node to read an expression from, and which elements of it; None for all."""
        if expression is None:
            return None, None
        if expression.operation != "take" or self._terms.weighted_terms(expression):
            return self._node(expression), None
        return self._node(expression.arguments[0]), tuple(expression.index or ())

    def _term(
        self,
        draft: TermDraft,
        source: tuple[str | None, tuple[int, ...] | None],
        gate: str,
        groups: dict[int, int],
    ) -> Term:
        value = draft.value if draft.value is not None else None if draft.term is None else draft.term.value
        text, sign = draft.text(gate), draft.sign
        is_constant = source[0] is None and draft.term is not None and number(draft.term) != 0
        if is_constant and value is not None and text.startswith("−"):
            text, sign, value = text[1:], -sign, -value
        term = Term(
            source[0],
            text,
            draft.product is not None,
            sign,
            None if value is None else self._value(value),
            draft.normalization is not None,
            source[1],
            gain=None if draft.gain is None else self._value(draft.gain.value),
            divides=draft.divides,
            call=draft.call,
            constants=parameters_of(_constants(draft)),
        )
        product, norm = draft.product, draft.normalization
        if product is not None:
            bias = None if product.bias is None else select(product.bias.value, product.bias_rows)
            self.weights.append(Weights(product.matrix, bias))
            term = replace(
                term,
                weight=len(self.weights) - 1,
                parameter=product.parameter,
                rows=product.rows,
                columns=draft.columns,
                transposed=product.transposed,
                blocks=product.blocks,
                bias=bias_parameter(product),
                bias_rows=bias_rows(product),
                gate="" if product.rows == (0, product.parameter_rows) else gate,
            )
        if norm is not None and draft.rows is not None:
            parameters = tuple(self._value(argument.value) for argument in norm.arguments[1:])
            rows = (draft.rows.start, draft.rows.stop)
            group = groups.setdefault(id(norm), len(groups))
            text, size = draft.normalization_text(gate), norm.value.numel()
            normalization = Normalization(group, draft.inner_sign, text, norm.call, parameters, rows, size)
            term = replace(term, normalization=normalization)
        return term

    def _node(self, expression: Expression) -> str:
        """Return the id of the node for an expression, or the name of the input or state."""
        if id(expression) in self._sources:
            return self._sources[id(expression)]
        if id(expression) not in self._ids:
            self._ids[id(expression)] = self._create(expression)
        return self._ids[id(expression)]

    def _create(self, expression: Expression) -> str:
        operation = expression.operation
        if operation == "draw":
            return self._add(expression, "function", "random", [], "draw", formula="random")
        if operation == "join":
            drafts = [self._draft(part) for part in expression.arguments]
            formula = f"[{', '.join('{}' if draft.source else draft.text('') for draft in drafts)}]"
            return self._add(expression, "function", "join", drafts, "join", formula=formula)
        drafts = self._terms.weighted_terms(expression) or []
        if drafts:
            return self._add(expression, "layer", "W", drafts)
        if operation in ("add", "sub", "neg"):
            return self._sum(expression)
        if operation == "mul":
            return self._product(expression)
        if operation == "div":
            return self._quotient(expression)
        return self._function(expression)

    def _sum(self, expression: Expression) -> str:
        terms = self._terms.split(expression, through_names=False)
        signals = [(sign, term) for sign, term in terms if not term.static]
        constants = [(sign, term) for sign, term in terms if term.static]
        if len(signals) > 1:
            drafts = [self._draft(term, sign) for sign, term in (*signals, *constants)]
            return self._add(expression, "operation", "+", drafts)
        sign, signal = signals[0]
        if sign > 0 and all(is_number(term, 0) for _, term in constants):
            return self._same(expression, signal)
        label = ""
        for constant_sign, term in constants:
            label += ("−" if constant_sign < 0 else "+" if label else "") + constant_text(term)
        if sign < 0 and len(constants) == 1 and constants[0][0] > 0:
            is_complement = label == "1"
            return self._add(
                expression,
                "operation" if len(label) < 2 else "function",
                f"{label}−",
                [TermDraft(None, constants[0][1]), self._draft(signal)],
                "difference",
                value_range="gate" if is_complement and self._is_gate(signal) else "",
                formula=f"{label} − {{}}",
            )
        text = label if label.startswith("−") else f"+{label}"
        drafts = [self._draft(signal, sign), *(TermDraft(None, term, s) for s, term in constants)]
        return self._add(
            expression, "operation" if len(text) < 3 else "function", "−" if not constants else text, drafts
        )

    def _product(self, expression: Expression) -> str:
        left, right = expression.arguments
        if not (left.static or right.static):
            gates = self._is_gate(left) and self._is_gate(right)
            drafts = [self._draft(left), self._draft(right)]
            gate = "gate" if gates else ""
            return self._add(
                expression, "operation", "×", drafts, "product", value_range=gate, formula="{}·{}"
            )
        factor, signal = (left, right) if left.static else (right, left)
        if is_number(factor, 1):
            return self._same(expression, signal)
        text = factor_text(factor)
        return self._add(
            expression,
            "gain",
            f"×{text}".replace(" ", ""),
            [self._draft(signal), TermDraft(None, factor)],
            "product",
            value_range="gate" if 0 < number(factor) <= 1 and self._is_gate(signal) else "",
            formula=f"{text}·{{}}",
        )

    def _quotient(self, expression: Expression) -> str:
        left, right = expression.arguments
        drafts = [self._draft(left), self._draft(right)]
        if left.static:
            text = factor_text(left)
            return self._add(
                expression, "function", f"{text}/·", drafts, "quotient", formula=f"{text} / {{}}"
            )
        if right.static:
            text = divisor_text(right)
            return self._add(expression, "gain", f"÷{text}", drafts, "quotient", formula=f"{{}} / {text}")
        return self._add(expression, "operation", "÷", drafts, "quotient", formula="{} / {}")

    def _function(self, expression: Expression) -> str:
        function, arguments = expression.name, expression.arguments
        shapes, call = expression.shapes, expression.call
        if function in _ACTIVATIONS and len(arguments) == 1:
            return self._activation(expression, arguments[0])
        text = call_glyph(function, call)
        drafts = [self._argument(argument) for argument in arguments]
        operands = ["{}" if draft.source else constant_text(draft.term) for draft in drafts if draft.term]
        return self._add(
            expression,
            "operation" if function == "lerp" else "function",
            text,
            drafts,
            "call",
            shapes=shapes,
            call=call,
            value_range=_RANGES.get(function, ""),
            formula=call_formula(function, call, operands, elementwise=not shapes),
        )

    def _argument(self, expression: Expression) -> TermDraft:
        """Return the term for an operand of a function. A comparison with a constant is part of the term."""
        if is_comparison(expression) and not expression.static and self._terms.read_once(expression):
            return TermDraft(expression.arguments[0], expression, call=expression.call)
        return self._draft(expression)

    def _activation(self, expression: Expression, argument: Expression) -> str:
        function = expression.name
        text = glyph(function)
        drafts = self._terms.layer_terms(argument, elementwise=True)
        shapes, call, formula = expression.shapes, expression.call, f"{text}({{}})"
        kind = "layer"
        if drafts is None:
            kind = "function"
            terms = self._terms.split(argument, is_open=self._terms.read_once(argument))
            signals = [term for _, term in terms if not term.static]
            if len(signals) == 1 and len(terms) > 1 and terms[0] == (1, signals[0]):
                shift = "".join(f"{'+' if s > 0 else '−'}{constant_text(t)}" for s, t in terms[1:])
                text, formula = f"{text}(·{shift})", f"{text}({{}}{shift})"
                drafts = [self._draft(term, sign) for sign, term in terms]
            else:
                drafts = [self._draft(argument)]
        return self._add(
            expression,
            kind,
            text,
            drafts,
            "activation",
            value_range=_RANGES.get(function, ""),
            formula=formula,
            pre_activation=argument,
            shapes=shapes,
            call=call,
        )

    def _same(self, expression: Expression, signal: Expression) -> str:
        """Return the node of an expression that has the same values. It gets the name of the expression."""
        if signal.operation == "take" or id(signal) in self._sources:
            return self._add(expression, "function", "=", [self._draft(signal)])
        if not signal.quantity:
            signal.quantity = expression.quantity
        return self._node(signal)

    def _is_gate(self, expression: Expression) -> bool:
        """Return whether all values are from 0 to 1, whatever the input."""
        arguments = expression.arguments
        match expression.operation:
            case "mul":
                return all(self._is_gate(a) or 0 < number(a) <= 1 for a in arguments)
            case "add":
                left, right = arguments
                return (is_number(left, 0) and self._is_gate(right)) or (
                    is_number(right, 0) and self._is_gate(left)
                )
            case "sub":
                return is_number(arguments[0], 1) and self._is_gate(arguments[1])
            case "take":
                return self._is_gate(arguments[0])
        return _RANGES.get(expression.name) == "gate"


def _constants(draft: TermDraft) -> list[Expression]:
    """Return the constants in the formula of a term, without the rows of a parameter in its weighted sum."""
    product, norm = draft.product, draft.normalization
    constants = [draft.gain, draft.term if draft.source is None else None]
    if product is not None:
        constants += [
            None if product.parameter else product.weight,
            None if bias_parameter(product) else product.bias,
        ]
    if norm is not None:
        constants += norm.arguments[1:]
    return [one for one in constants if one is not None]
