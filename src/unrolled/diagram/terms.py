"""The terms of a sum: weighted sums, biases, peepholes and anything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from unrolled.diagram.expressions import Expression, Product
from unrolled.diagram.indices import select
from unrolled.diagram.symbols import constant_text, divisor_text, factor_text, glyph, rows_text, symbol

_NORMALIZATIONS = ("layer_norm", "rms_norm")


@dataclass(frozen=True, eq=False)
class TermDraft:
    """A term before its source has a node.

    Attributes:
        source: What is read, or None for a constant.
        term: The expression of the term; None if it has no value of its own.
        sign: 1 or -1.
        product: The weights of a weighted term.
        columns: First and last column, exclusive, of the weights that belong to this term; None for all.
        value: The values of the term, if they aren't those of ``term``.
        gain: The factor, or None.
        divides: Whether it is divided by the factor instead.
        normalization: The expression of the normalization that is applied to the sum of the terms with it.
        inner_sign: 1, or -1 if the term is subtracted from the others before the normalization.
        rows: The elements of the normalized vector that are read.
        call: A comparison with a constant.
    """

    source: Expression | None
    term: Expression | None
    sign: int = 1
    product: Product | None = None
    columns: tuple[int, int] | None = None
    value: Tensor | None = None
    gain: Expression | None = None
    divides: bool = False
    normalization: Expression | None = None
    inner_sign: int = 1
    rows: range | None = None
    call: str = ""

    @property
    def learned(self) -> bool:
        """Whether the term depends on parameters."""
        factors = (self.gain, self.term if self.source is None else None)
        return self.product is not None or any(f is not None and f.learned for f in factors)

    def text(self, gate: str) -> str:
        """Return the formula, with ``{}`` for the source. ``gate`` names rows of parameters."""
        if self.source is None:
            return constant_text(self.term, gate) if self.term else ""
        text = "{}"
        if self.product is not None:
            gate = gate or (self.term.quantity if self.term else "")
            text = _weighted_text(self.product, gate, self.columns)
        if self.gain is not None:
            factor = divisor_text(self.gain, gate) if self.divides else factor_text(self.gain, gate)
            is_vector = self.gain.value.numel() > 1
            inner = f"({text})" if " + " in text or (is_vector and text != "{}") else text
            sign = "⊙" if is_vector else "·"
            text = f"{inner}/{factor}" if self.divides else f"{factor}{sign}{inner}"
        if self.call:
            name, _, level = self.call.removesuffix(")").partition("({}, ")
            text = f"{text} {glyph(name)} {level}"
        return text

    def normalization_text(self, gate: str) -> str:
        """Return the formula of the normalization, with ``{}`` for the sum that is normalized."""
        norm, rows = self.normalization, self.rows
        assert norm is not None
        assert rows is not None
        operands = ["{}", *(constant_text(argument, gate) for argument in norm.arguments[1:])]
        part = "" if len(rows) == norm.value.numel() else f"[{gate or f'{rows.start}:{rows.stop}'}]"
        return f"{glyph(norm.name)}({', '.join(operands)}){part}"


class Terms:
    """Splits expressions into terms.

    Args:
        outputs: The expressions of the new states. They count as read once more.
    """

    def __init__(self, outputs: Iterable[Expression]) -> None:
        self._uses: Counter[int] = Counter()
        self._takes: Counter[int] = Counter()  # uses by a take
        seen: set[int] = set()
        stack = list(outputs)
        self._uses.update(map(id, stack))
        while stack:
            expression = stack.pop()
            if id(expression) in seen:
                continue
            seen.add(id(expression))
            for argument in expression.arguments:
                self._uses[id(argument)] += 1
                self._takes[id(argument)] += expression.operation == "take"
                stack.append(argument)

    def read_once(self, expression: Expression) -> bool:
        """Return whether only one expression reads this one."""
        return self._uses[id(expression)] == 1

    def split(
        self, expression: Expression, sign: int = 1, is_open: bool = True, through_names: bool = True
    ) -> list[tuple[int, Expression]]:
        """Return the terms of a sum with their signs.

        A sum within the sum is split as well, unless anything else reads it.

        Args:
            expression: The sum, or a single term.
            sign: The sign of the expression.
            is_open: Whether to split the expression even if it is read more than once.
            through_names: Whether to split sums that are quantities of the step.
        """
        may_split = is_open or (self.read_once(expression) and (through_names or not expression.quantity))
        signs = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}.get(expression.operation)
        if signs is None or not may_split:
            return [(sign, expression)]
        return [
            term
            for inner_sign, argument in zip(signs, expression.arguments, strict=True)
            for term in self.split(argument, sign * inner_sign, False, through_names)
        ]

    def layer_terms(self, expression: Expression, elementwise: bool) -> list[TermDraft] | None:
        """Return the terms of a sum that a layer computes.

        Args:
            expression: The sum.
            elementwise: Whether elements may be multiplied by a parameter as well, as by a peephole.

        Returns:
            The terms. None if no term depends on a parameter, or no term depends on the input or a state.
        """
        drafts: list[TermDraft] = []
        learned = False
        for sign, term in self.split(expression, is_open=self.read_once(expression) or not elementwise):
            found = self._learned(term, elementwise)
            learned |= any(draft.learned for draft in found or ())
            drafts += [replace(draft, sign=sign) for draft in found or [TermDraft(term, term, sign)]]
        return drafts if learned and any(draft.source is not None for draft in drafts) else None

    def weighted_terms(self, expression: Expression) -> list[TermDraft] | None:
        """Return the terms of a weighted sum that nothing but a box of its own computes, or None."""
        if expression.operation in ("add", "sub"):
            drafts = self.layer_terms(expression, elementwise=False)
            is_weighted = drafts and all(draft.product or draft.source is None for draft in drafts)
            return drafts if is_weighted else None
        return self._learned(expression, False, is_read_once=True)

    def _learned(
        self, expression: Expression, elementwise: bool, is_read_once: bool = False
    ) -> list[TermDraft] | None:
        """Return a term that is linear in a source, or several terms that are normalized together."""
        if expression.static:
            return [TermDraft(None, expression)]
        is_norm = self._normalization(expression) is not None
        if not (is_read_once or is_norm or self.read_once(expression)):
            return None
        if is_norm:
            return self._normalized(expression)
        if expression.operation == "weighted":
            return _weighted(expression)
        if expression.operation in ("mul", "div"):
            left, right = expression.arguments
            factor, inner = (right, left) if right.static else (left, right)
            if not factor.static or (expression.operation == "div" and factor is left):
                return None
            drafts = self._learned(inner, False)
            divides = expression.operation == "div"
            if drafts is not None and len(drafts) == 1 and drafts[0].gain is drafts[0].normalization is None:
                return [replace(drafts[0], term=expression, gain=factor, divides=divides)]
            return [TermDraft(inner, expression, gain=factor, divides=divides)] if elementwise else None
        return None

    def _normalization(self, expression: Expression) -> Expression | None:
        """Return the normalization that an expression is a part of, if only such parts are read."""
        norm = expression.arguments[0] if expression.operation == "take" else expression
        if norm.name not in _NORMALIZATIONS or not all(argument.static for argument in norm.arguments[1:]):
            return None
        if expression.operation == "take":
            only_taken = self._uses[id(norm)] == self._takes[id(norm)]
            return norm if only_taken and isinstance(expression.index, range) else None
        return norm if self.read_once(norm) else None

    def _normalized(self, expression: Expression) -> list[TermDraft] | None:
        norm = self._normalization(expression)
        assert norm is not None
        given = norm.arguments[0]
        if not self.read_once(given):
            return None
        rows = expression.index if isinstance(expression.index, range) else range(expression.value.numel())
        drafts: list[TermDraft] = []
        for sign, term in self.split(given):
            found = self._learned(term, False)
            if not found or any(draft.gain or draft.normalization or draft.columns for draft in found):
                return None
            drafts += [replace(draft, inner_sign=sign) for draft in found]
        if not any(draft.product for draft in drafts):
            return None
        return [
            replace(draft, term=None if k else expression, normalization=norm, rows=rows)
            for k, draft in enumerate(drafts)
        ]


def _weighted(expression: Expression) -> list[TermDraft]:
    """Return the terms of weighted sums: one, or one for each part of a joined source."""
    product, source = expression.product, expression.arguments[0]
    assert product is not None
    if source.operation != "join" or product.blocks > 1:
        return [TermDraft(source, expression, product=product)]
    drafts = []
    column = 0
    for part in source.arguments:
        columns = (column, column + part.value.numel())
        of_part = replace(product, matrix=product.matrix[:, columns[0] : columns[1]])
        if column:
            of_part = replace(of_part, bias=None)
        value = of_part.matrix @ part.value.to(of_part.matrix.dtype)
        if of_part.bias is not None:
            value = value + select(of_part.bias.value, of_part.bias_rows)
        drafts.append(TermDraft(part, expression, product=of_part, columns=columns, value=value))
        column = columns[1]
    return drafts


def _weighted_text(product: Product, gate: str, columns: tuple[int, int] | None) -> str:
    if product.rows is None:
        text = factor_text(product.weight, gate)
    else:
        is_whole = product.rows == (0, product.parameter_rows)
        text = symbol(product.parameter) if is_whole else rows_text(product.parameter, gate, product.rows)
        text += "ᵀ" if product.transposed else ""
    text += f"[:, {columns[0]}:{columns[1]}]" if columns else ""
    return f"{text}·{{}}" + (f" + {bias_text(product, gate)}" if product.bias is not None else "")


def bias_parameter(product: Product) -> str:
    """Return the parameter that the bias is rows of, or an empty string."""
    bias = product.bias
    is_rows = bias is not None and bias.operation == "parameter" and not isinstance(bias.index, tuple)
    return bias.name if bias is not None and is_rows else ""


def bias_rows(product: Product) -> tuple[int, int] | None:
    """Return the rows of the bias parameter that are added; None for all, or if it is no parameter."""
    bias = product.bias
    if bias is None or isinstance(bias.index, tuple) or not bias_parameter(product):
        return None
    start = bias.index.start if bias.index is not None else 0
    rows = (start + product.bias_rows.start, start + product.bias_rows.stop)
    return None if bias.index is None and len(product.bias_rows) == bias.value.numel() else rows


def bias_text(product: Product, gate: str) -> str:
    """Return the text for the bias of weighted sums."""
    assert product.bias is not None
    rows = bias_rows(product)
    return rows_text(product.bias.name, gate, rows) if rows else constant_text(product.bias, gate)
