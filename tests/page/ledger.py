"""Check lines of arithmetic by hand: with decimals, from the digits that are printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, getcontext
from functools import reduce
from typing import Any

import torch
from torch.nn import functional

getcontext().prec = 60

# Returns the lines of the arithmetic.
READ_LINES = """() => {
  const spans = [...document.querySelector('.arithmetic .sum').children]
    .flatMap((one) => (one.matches('.line') ? [...one.children] : [one]));
  const lines = [];
  for (let k = 0; k < spans.length;) {
    const name = spans[k].className;
    if (name.startsWith('rule') || name === 'gap') {
      lines.push({ kind: name });
      k += 1;
    } else {
      const texts = spans.slice(k, k + 7).map((one) => one.textContent);
      const [operator, label, first, times, second, equals, result] = texts;
      const kind = spans[k + 6].className;
      lines.push({ kind, operator, label, factors: [first, second], times, equals, result });
      k += 7;
    }
  }
  return lines;
}"""
# Chooses every number of a step, and returns [number, note, lines] of those with arithmetic.
READ_ARITHMETIC = f"""(selector) => [...document.querySelectorAll(selector)].map((cell) => {{
  if (cell.hidden) return null;
  cell.click();
  if (!document.querySelector('.arithmetic .sum')) return null;
  const lines = ({READ_LINES})();
  const note = document.querySelector('.arithmetic .note');
  return [cell.refer(), note?.textContent ?? '', lines];
}}).filter((one) => one !== null)"""
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "σ": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "ReLU": torch.relu,
    "exp": torch.exp,
    "softplus": functional.softplus,
    "SiLU": functional.silu,
    "silu": functional.silu,
    "sin": torch.sin,
    "cos": torch.cos,
    "√": torch.sqrt,
    "log": torch.log,
    "ln": torch.log,
}


def decimal(text: str) -> Decimal:
    """Return the number that was printed."""
    return Decimal(text.replace("−", "-").replace("∞", "Infinity"))


def agree(computed: Decimal, text: str) -> bool:
    """Whether a number, rounded to the digits of a printed one, is that one. Halves may go either way."""
    printed = decimal(text)
    if not (computed.is_finite() and printed.is_finite()):
        return str(computed) == str(printed)
    last_digit = Decimal(1).scaleb(int(printed.as_tuple().exponent))
    return abs(computed - printed) <= last_digit / 2


def apply(name: str, operand: str) -> Decimal | None:
    """Return the result of a function, or None if this isn't a function that a reader can look up."""
    if name not in FUNCTIONS:
        return None
    return Decimal(FUNCTIONS[name](torch.tensor(float(decimal(operand)), dtype=torch.float64)).item())


def check_lines(lines: list[dict[str, Any]], what: object) -> tuple[int, int]:
    """Check lines from top to bottom, as someone with paper would.

    A line is a product, a number, the total of the lines above it, or a function of that total.

    Args:
        lines: The lines.
        what: What they explain, for the message.

    Returns:
        How many lines there are, and how many of them apply a function that was checked.
    """
    addends: list[Decimal] = []  # since the last total
    totals: list[Decimal] = []  # of the parts
    previous = ""  # the total that was printed last
    functions = 0
    for line in lines:
        if line["kind"] == "gap":  # a total is of the lines since the last gap
            totals, addends = totals + addends, []
        if line["kind"].startswith(("rule", "gap")):
            continue
        message = f"{what}: {line}\nin {lines}"
        sign = -1 if line["operator"] == "−" else 1
        result, label = line["result"], line["label"]
        factors = [text for text in re.split(f" {line['times']} ", line["factors"][0]) if text]
        factors += [line["factors"][1]] if line["factors"][1] else []
        softmax = re.fullmatch(r"softmax\((.*)\)\[(\d+)\]", label)
        is_function = re.fullmatch(r"(\D+)\((.*)\)", label)
        if factors:
            numbers = [decimal(text) for text in factors]
            divides = line["times"] == "÷"
            value = numbers[0] / numbers[1] if divides else reduce(Decimal.__mul__, numbers)
            assert agree(value, result), message
            addends.append(sign * decimal(result))
        elif softmax and "…" not in label:
            numbers = torch.tensor([float(decimal(text)) for text in softmax[1].split(", ")]).double()
            assert agree(Decimal(numbers.softmax(-1)[int(softmax[2])].item()), result), message
            functions += 1
        elif "sub" in line["kind"] and is_function and (addends or totals):  # tanh(c), of the total above
            value = apply(is_function[1], previous)
            assert value is None or agree(value, result), message
            functions += value is not None
        elif "sub" in line["kind"] and is_function and not addends:
            addends = []
        elif "sub" in line["kind"]:
            if addends:
                assert agree(sum(addends, Decimal(0)), result) or label.startswith("sum"), message
            if label.startswith("sum"):
                assert agree(sum(totals + addends, Decimal(0)), result), message
                totals, sign = [], 1
            totals.append(sign * decimal(result))
            addends = []
        elif "total" in line["kind"] and is_function and re.fullmatch(r"−?[\d.]+(e[+-]\d+)?", is_function[2]):
            if totals or addends:
                assert agree(sum(totals + addends, Decimal(0)), is_function[2]), message
            value = apply(is_function[1], is_function[2])
            assert value is None or agree(value, result), message
            functions += value is not None
        elif "total" in line["kind"]:
            assert agree(sum(totals + addends, Decimal(0)), result), message
        else:
            addends.append(sign * decimal(result))
        previous = result
    return len(lines), functions


def assert_arithmetic_is_right(tab: Any, cells: str = ".tables .n") -> tuple[int, int, int]:
    """Check the arithmetic of all numbers of the chosen step.

    Returns:
        The number of lines, of the functions among them that were checked, and of the numbers whose lines
        don't claim to be right.
    """
    lines, functions, others = 0, 0, 0
    for number, note, ledger in tab.evaluate(READ_ARITHMETIC, cells):
        if note.startswith("Each line is right"):
            count, applied = check_lines(ledger, number)
            lines, functions = lines + count, functions + applied
        else:
            others += 1
    return lines, functions, others
