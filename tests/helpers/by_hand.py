"""Check a printed line of arithmetic by hand: recompute it in decimals from its printed digits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import torch
from torch import nn

NUMBER = r"(?<![\w.\[])\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w.])"
FUNCTIONS = (
    "tanh",
    "sigmoid",
    "relu",
    "exp",
    "abs",
    "cos",
    "sin",
    "sqrt",
    "softplus",
    "logsigmoid",
    "clamp_min",
)
FUNCTIONS += ("maximum", "minimum", "where", "ge", "gt", "lt", "eq", "pow")


def _function(name: str) -> Any:
    function = getattr(torch, name, None) or getattr(nn.functional, name)

    def call(*values: Any) -> Decimal | bool:
        numbers = (value if isinstance(value, bool) else float(value) for value in values)
        result = function(
            *(torch.tensor(n, dtype=None if isinstance(n, bool) else torch.float64) for n in numbers)
        ).item()
        return result if isinstance(result, bool) else Decimal(result)

    return call


def is_right(line: str, quantities: Mapping[str, Any] = {}) -> bool | None:
    """Whether the operands of ``line`` give its result, rounded to its printed digits.

    Args:
        line: The line, such as ``0.5·(−0.3) + 0.1 = −0.0500``.
        quantities: The values of quantities that a line refers to, as in ``h[3] = 0.1``.

    Returns:
        None if it has a function that is not known here, numbers that aren't finite, or the sign ≈.
    """
    text, sign, result = re.fullmatch(r"(.*) ([=≈]) (\S+)", line.replace("−", "-")).groups()
    if sign == "≈" or text == result or any(word in line for word in ("nan", "inf", "([", "i)")):
        return None
    text = re.sub(r"\(\d+ more terms: ([^)]+)\)", r"(\1)", text).replace("·", "*")
    if set(re.findall(r"[a-z_]\w*(?=\()", text)) - set(FUNCTIONS):
        return None
    text = re.sub(NUMBER, lambda match: f"D('{match[0]}')", text)
    scope = {"__builtins__": {}, "D": Decimal, **{name: _function(name) for name in FUNCTIONS}}
    scope |= {name: [Decimal(value) for value in values] for name, values in quantities.items()}
    value = Decimal(eval(text, scope))
    printed = Decimal(result)
    half_digit = Decimal(10) ** printed.as_tuple().exponent / 2
    return abs(value - printed) <= half_digit * (1 + Decimal("1e-7")) + abs(value) * Decimal("1e-14")
