"""The parts that formulas are made of, as MathML, and where they need brackets."""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_GREEK = {unicodedata.name(letter).split()[-1].lower(): letter for letter in map(chr, range(0x3B1, 0x3CA))}
_GREEK["lambda"] = "λ"  # which Unicode spells otherwise

FACTORS = frozenset(("atom", "power", "fraction", "call"))
TERMS = FACTORS | {"product", "matrix", "linear"}
SUMS = TERMS | {"sum"}


@dataclass(frozen=True)
class Math:
    """An expression as MathML.

    Attributes:
        text: its elements.
        kind: what it is: "atom", "power", "fraction", "call", "product" (element by element), "matrix" (x W),
            "linear" (W x), "sum", "relation" or "code".
        signed: whether it begins with a minus.
    """

    text: str
    kind: str = "atom"
    signed: bool = False

    def held(self, kinds: frozenset[str], first: bool = False) -> str:
        """It as an operand: in brackets unless it is one of these kinds, and unsigned or the first."""
        whole = self.kind in kinds and (first or not self.signed)
        return self.text if whole else bracketed(self.text)


def symbol(name: str) -> str:
    """A name of the code as a symbol: ``U_h`` is U with the index h."""
    base, index = _parts(name)
    if index == "t":  # which would be read as the time
        return _letter(name)
    return f"<msub>{_level(_letter(base))}{upright(index)}</msub>" if index else _letter(base)


def indexed(name: str, step: str, tilde: bool = False, version: int = 0) -> Math:
    """A quantity of a time step, ``"t"`` or ``"t−1"``; a version is a number in brackets, 0: none."""
    base, index = _parts(name)
    letter = _letter(base)
    if tilde:
        letter = f"<mover accent='true'>{letter}<mo>~</mo></mover>"
    time = "<mi>t</mi>" if step == "t" else "<mi>t</mi><mo>−</mo><mn>1</mn>"
    below = row(f"{upright(index)}<mo>,</mo>{time}" if index else time)
    if version:
        above = row(f"<mo>(</mo><mn>{version}</mn><mo>)</mo>")
        return Math(f"<msubsup>{_level(letter)}{below}{above}</msubsup>", "power")
    return Math(f"<msub>{_level(letter)}{below}</msub>")


def number(text: str) -> Math:
    """A number, as it is written."""
    digits = f"<mn>{escape(text.removeprefix('-'))}</mn>"
    if text.startswith("-"):
        return Math(f"<mo>−</mo>{digits}", "product", True)
    return Math(digits, "atom" if text.replace(".", "").isdigit() else "product")


def code(text: str, kind: str = "code") -> Math:
    """What is no formula."""
    return Math(f"<mtext>{escape(text)}</mtext>", kind)


def upright(text: str) -> str:
    """A word."""
    return f"<mi mathvariant='normal'>{escape(text.replace('_', ' '))}</mi>"


def raised(base: Math, exponent: str) -> Math:
    """A power."""
    return Math(f"<msup>{row(base.held(frozenset(('atom',))))}{row(exponent)}</msup>", "power")


def beside(left: str, right: str) -> str:
    """A product of matrices."""
    return f"{left}<mspace width='0.2em'/>{right}"


def row(math: str) -> str:
    """Several elements as one."""
    return f"<mrow>{math}</mrow>"


def bracketed(math: str, opening: str = "(", closing: str = ")") -> str:
    """In brackets."""
    return row(f"<mo>{opening}</mo>{math}<mo>{closing}</mo>")


def listed(parts: Sequence[str], sign: str = ",") -> str:
    """One after another."""
    return f"<mo>{sign}</mo>".join(map(row, parts))


def _parts(name: str) -> tuple[str, str]:
    base, _, index = name.partition("_")
    if index == "" and keyword.iskeyword(base):  # such as lambda_
        return base, ""
    return (base, index) if base and index and not index.startswith("_") else (name, "")


def _level(letter: str) -> str:
    """A letter whose index stands as low as that of any other, whether or not it reaches below the line."""
    return f"<mpadded depth='0'>{letter}</mpadded>"


def _letter(base: str) -> str:
    shown = _GREEK.get(base, base)
    return (
        f"<mi>{escape(shown)}</mi>" if len(shown) == 1 else f"<mi mathvariant='normal'>{escape(shown)}</mi>"
    )
