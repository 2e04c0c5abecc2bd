"""Building blocks of formulas as MathML, with rules for where brackets are needed."""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

GREEK = {unicodedata.name(letter).split()[-1].lower(): letter for letter in map(chr, range(0x3B1, 0x3CA))}
GREEK["lambda"] = "λ"  # Unicode spells it "lamda"

# Kinds of expressions that need no brackets as a factor of a product, a term of a sum, or a whole sum.
FACTORS = frozenset(("atom", "power", "fraction", "call"))
TERMS = FACTORS | {"product", "matrix", "linear"}
SUMS = TERMS | {"sum"}


@dataclass(frozen=True)
class Math:
    """An expression as MathML.

    Attributes:
        text: The MathML elements.
        kind: "atom", "power", "fraction", "call", "product" (elementwise), "matrix" (x W), "linear" (W x),
            "sum", "relation" or "code".
        leading_minus: Whether the expression starts with a minus sign.
    """

    text: str
    kind: str = "atom"
    leading_minus: bool = False

    def as_operand(self, kinds: frozenset[str], first: bool = False) -> str:
        """Return the MathML of the expression as an operand, in brackets if necessary.

        Args:
            kinds: The kinds of expressions that need no brackets.
            first: Whether this is the first operand. Any other needs brackets if it starts with a minus sign.
        """
        unbracketed = self.kind in kinds and (first or not self.leading_minus)
        return self.text if unbracketed else bracketed(self.text)


def symbol(name: str) -> str:
    """Return a name of the code as a symbol: ``U_h`` becomes U with subscript h."""
    base, index = _split_index(name)
    if index == "t":  # as a subscript, t would be read as the time step
        return _letter(name)
    return f"<msub>{_without_depth(_letter(base))}{upright(index)}</msub>" if index else _letter(base)


def indexed(name: str, time: str, tilde: bool = False, version: int = 0) -> Math:
    """Return a quantity at a time step.

    Args:
        name: The name of the quantity in the code.
        time: ``"t"`` or ``"t−1"``.
        tilde: Whether to draw a tilde over the letter.
        version: A number in brackets as superscript; 0 for none.
    """
    base, index = _split_index(name)
    letter = _letter(base)
    if tilde:
        letter = f"<mover accent='true'>{letter}<mo>~</mo></mover>"
    time_index = "<mi>t</mi>" if time == "t" else "<mi>t</mi><mo>−</mo><mn>1</mn>"
    subscript = mrow(f"{upright(index)}<mo>,</mo>{time_index}" if index else time_index)
    if version:
        superscript = mrow(f"<mo>(</mo><mn>{version}</mn><mo>)</mo>")
        return Math(f"<msubsup>{_without_depth(letter)}{subscript}{superscript}</msubsup>", "power")
    return Math(f"<msub>{_without_depth(letter)}{subscript}</msub>")


def number(text: str) -> Math:
    """Return a number, with the digits of ``text``."""
    digits = f"<mn>{escape(text.removeprefix('-'))}</mn>"
    if text.startswith("-"):
        return Math(f"<mo>−</mo>{digits}", "product", True)
    return Math(digits, "atom" if text.replace(".", "").isdigit() else "product")


def code(text: str, kind: str = "code") -> Math:
    """Return Python code as text within a formula."""
    return Math(f"<mtext>{escape(text)}</mtext>", kind)


def upright(text: str) -> str:
    """Return a word in upright letters."""
    return f"<mi mathvariant='normal'>{escape(text.replace('_', ' '))}</mi>"


def power(base: Math, exponent: str) -> Math:
    """Return a base with an exponent."""
    return Math(f"<msup>{mrow(base.as_operand(frozenset(('atom',))))}{mrow(exponent)}</msup>", "power")


def matrix_product(left: str, right: str) -> str:
    """Return two factors next to each other, without a sign between them."""
    return f"{left}<mspace width='0.2em'/>{right}"


def mrow(math: str) -> str:
    """Group several elements into one."""
    return f"<mrow>{math}</mrow>"


def bracketed(math: str, opening: str = "(", closing: str = ")") -> str:
    """Put elements in brackets."""
    return mrow(f"<mo>{opening}</mo>{math}<mo>{closing}</mo>")


def separated(parts: Sequence[str], separator: str = ",") -> str:
    """Join elements with a separator."""
    return f"<mo>{separator}</mo>".join(map(mrow, parts))


def _split_index(name: str) -> tuple[str, str]:
    """Split a name at its first underscore into the letter or word and its subscript."""
    base, _, index = name.partition("_")
    if index == "" and keyword.iskeyword(base):  # such as lambda_
        return base, ""
    return (base, index) if base and index and not index.startswith("_") else (name, "")


def _without_depth(letter: str) -> str:
    """Remove the depth of a letter, so that the subscripts of all letters are at the same height."""
    return f"<mpadded depth='0'>{letter}</mpadded>"


def _letter(base: str) -> str:
    text = GREEK.get(base, base)
    return f"<mi>{escape(text)}</mi>" if len(text) == 1 else f"<mi mathvariant='normal'>{escape(text)}</mi>"
