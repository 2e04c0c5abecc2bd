"""Texts in a diagram: names as symbols, numbers with few digits, and how wide they are."""

from __future__ import annotations

import math

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η",
    "theta": "θ", "lambda": "λ", "mu": "μ", "nu": "ν", "phi": "φ", "psi": "ψ", "rho": "ρ", "sigma": "σ",
    "tau": "τ", "omega": "ω",
}  # fmt: skip
_NARROW, _WIDE, _SIGNS = set("fijlrtI.,:;'|!()[]/ ·"), set("mwMW%@…"), set("−+×÷=<>≥≤±∞√≠")
_FUNCTION_NAMES = {"log", "exp", "sin", "cos", "tan", "tanh", "sqrt", "min", "max", "sum", "mean", "norm"}
_FUNCTION_NAMES |= {"softmax"}
_LONG_SYMBOL = 2  # a longer base is set as a word, not as a symbol
MOST_CHARACTERS = 20  # of a glyph


def symbol(name: str) -> tuple[str, str]:
    """Split a name into its base and its index: ``"hidden_n"`` gives ``("hidden", "n")``.

    The name of a function has no index: ``log_f`` isn't the logarithm to the base f.
    """
    base, _, index = name.partition("_")
    if not base or base in _FUNCTION_NAMES:
        base, index = name, ""
    return GREEK.get(base, base), index.replace("_", " ")


def is_word(base: str) -> bool:
    """Whether a base is set upright, as a word."""
    return len(base) > _LONG_SYMBOL


def digits(value: float) -> str:
    """Format a number with two decimals, or fewer if it is large."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 999.5:
        mantissa, _, exponent = f"{size:.0e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{size:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"
    is_zero = not any(character in "123456789" for character in text)
    return text if value >= 0 or is_zero else "−" + text


def shortened(text: str) -> str:
    """Shorten a long glyph: its formula says the rest."""
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def width(text: str, size: float, bold: bool = False) -> float:
    """Return an upper bound of the width of a text in a sans-serif font of a size."""
    total = 0.0
    for character in text:
        if character in _NARROW:
            total += 0.42
        elif character in _WIDE:
            total += 1.0
        elif character in _SIGNS:
            total += 0.84
        elif character.isupper():
            total += 0.76
        else:
            total += 0.66
    return total * size * (1.1 if bold else 1.0)


def name_width(name: str, size: float) -> float:
    """Return an upper bound of the width of a name that is set as a symbol with an index."""
    base, index = symbol(name)
    word = is_word(base)
    return width(base, size * (0.82 if word else 1.0), bold=word) + width(index, size * 0.66)
