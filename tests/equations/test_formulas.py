"""Formulas of single statements and of whole steps. What has no faithful formula is shown as code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formula_helpers import build_cell, to_text
from torch import Tensor

import unrolled as ur
from unrolled.equations.formulas import formulas
from unrolled.equations.source import step_source


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[str]]:
    """Generates a cell whose step has the given body, and returns its formulas as text."""

    def formulas_of(body: str, **options: Any) -> list[str]:
        return [to_text(equation.math) for equation in formulas(build_cell(tmp_path, body)(2, 3, **options))]

    return formulas_of


LINES = {  # the last line of a step before its return, and its formula, or the code if it has none
    "a = SCALE * third(h)": "a_{t}=SCALE·third(h_{t−1})",
    "a = silu(h)": "a = silu(h)",  # not torch's function
    "a = w_t * h": "a_{t}=w_t·h_{t−1}",  # not w at time t
    "a = V * h": "a = V * h",  # not self.V
    "a = square(h)": "a = square(h)",
    "a = self.both(x, h, c)": "a = self.both(x, h, c)",
    "a = self.U.mul(h)": "a_{t}=U⊙h_{t−1}",
    "a = torch.relu_(h + 1)": "a = torch.relu_(h + 1)",
    "a = F.relu(h + 1, inplace=True)": "a = F.relu(h + 1, inplace=True)",
    "torch.tanh_(x + 1)\na = torch.tanh(x)": "a_{t}=tanh(x_{t})",
    "a = torch.tanh(h, out=None)": "a = torch.tanh(h, out=None)",
    "a = h * -c - -c": "a_{t}=h_{t−1}⊙(−c_{t−1})−(−c_{t−1})",
    "a = h @ self.U * c": "a_{t}=(h_{t−1} U)⊙c_{t−1}",
    "a = c * (h @ self.U)": "a_{t}=c_{t−1}⊙(h_{t−1} U)",
    "a = torch.where(x == 0, h, x != 1)": "a_{t}=where((x_{t}=0),h_{t−1},x_{t}≠1)",
    "a = torch.cat((self.U, self.W), 1)": "a_{t}=cat((U,W),1)",
    "a, b, d = tanh(h)": "a, b, d = tanh(h)",
    "a, b = h.chunk(2)": "a, b = h.chunk(2)",  # rows of the batch
    "a, b = self.U.chunk(2, 1)": "a, b = self.U.chunk(2, 1)",  # columns of a matrix
    "a, b = self.U.chunk(2, dim=0)": "[a_{t},b_{t}]=U",
    "a, b = h.unbind(-1)": "[a_{t},b_{t}]=h_{t−1}",
    "a = unknown(h)": "a = unknown(h)",
    "a = h.unknown()": "a = h.unknown()",
    "a = (lambda s: s)(h)": "a = (lambda s: s)(h)",
    "a = torch.stack(*[(h, c)])": "a = torch.stack(*[(h, c)])",
    "a = torch.add(h, **{'other': c})": "a = torch.add(h, **{'other': c})",
    "a = torch.cat(tensors=(h, x), dim=-1)": "a_{t}=[h_{t−1};x_{t}]",
    "a = torch.cat((h, c))": "a_{t}=cat((h_{t−1},c_{t−1}))",
    "a = torch.cat()": "a_{t}=cat()",
    "a = torch.stack((h, c), 1)": "a_{t}=stack((h_{t−1},c_{t−1}),1)",
    "a = h.chunk(3, -1)": "a_{t}=chunk(h_{t−1},3,−1)",
    "a = self.V @ h": "a = self.V @ h",  # W x is linear(x, W)
    "a = self.V @ h.T": "a_{t}=V h_{t−1}^{⊤}",
    "a = linear(x, h)": "a = linear(x, h)",
    "a = F.gelu(h, approximate='tanh')": "a_{t}=GELU(h_{t−1},approximate='tanh')",
    "a = F.softmax(h, 0)": "a_{t}=softmax(h_{t−1},0)",
    "a = F.dropout(h, 0.1, self.training)": "a_{t}=dropout(h_{t−1},0.1,training)",
    "a = h.sum(-1, keepdim=True)": "a_{t}=sum(h_{t−1},−1,keepdim=True)",
    "a = (h > 0) * c": "a_{t}=(h_{t−1}>0)⊙c_{t−1}",
    "a = -(h >= 0)": "a_{t}=−(h_{t−1}≥0)",
    "a = h == c": "a_{t}=(h_{t−1}=c_{t−1})",
    "a = x * (x if x.sum() else 2 * x)": "a_{t}=x_{t}⊙(x if x.sum() else 2 * x)",
    "a = x + (x if x.sum() else 2 * x)": "a_{t}=x_{t}+(x if x.sum() else 2 * x)",
    "a = x ** (x % 2) - x[:, :1] ** 2": "a_{t}=x_{t}^{x % 2}−x[:, :1]^{2}",
    "a = ((x > 0) & (x < 1)) * h": "a_{t}=((x > 0) & (x < 1))⊙h_{t−1}",
    "a = h * (h if h.sum() else c)": "a = h * (h if h.sum() else c)",  # in code, h could be either value
    "a = (tanh if h.sum() else relu)(h)": "a = (tanh if h.sum() else relu)(h)",
    "a = 1e-5 * h + 0.10": "a_{t}=1e-5·h_{t−1}+0.10",
    "a = self.fine * h ** self.rate": "a_{t}=0.123456789·h_{t−1}^{−0.5}",
    "a = [s for s in h]": "a = [s for s in h]",
    "a = b = h": "a = b = h",
    "t = torch.nn\na = t.functional.tanh(h)": "a_{t}=tanh(h_{t−1})",
    "import math\na = h / math.sqrt(3)": "a = h / math.sqrt(3)",
    "a = torch.square(h).mul(c) @ self.U.T": "a_{t}=(square(h_{t−1})⊙c_{t−1}) U^{⊤}",
    "a = sum(h)": "a = sum(h)",  # Python's function
    "a = self.kind.upper()": "a = self.kind.upper()",
    "a = super().step(x, h, c)": "a = super().step(x, h, c)",
    "a = -1 ** h - (-1) ** h": "a_{t}=−1^{h_{t−1}}−(−1)^{h_{t−1}}",
    "a = h @ c.T @ h": "a_{t}=h_{t−1} c_{t−1}^{⊤} h_{t−1}",
    "a, *b = h, c": "a, *b = (h, c)",
    "(a, b), d = (h, c), x": "(a, b), d = ((h, c), x)",
    "a = (b := h) * 2": "a = (b := h) * 2",
    "a, b = h": "a, b = h",
    "a, a = h, c": "a, a = (h, c)",
    "self.k = 3\na = self.k * h": "a_{t}=k⊙h_{t−1}",  # the option has changed
    "_b = h_ = x": "_b = h_ = x",
    "_b = x * 2": "_b_{t}=x_{t}·2",
    "h_ = lambda_ = x\na = h_ * lambda_": "a_{t}=h__{t}⊙λ_{t}",
    "print(h)": "print(h)",
    "pass": None,
    "'words'": None,
    "a: torch.Tensor": None,
}


@pytest.mark.parametrize("code", LINES)
def test_single_statements(code: str, read: Callable[..., list[str]]) -> None:
    *formulas_before, h, c = read(f"{code}\nreturn x[:, :1] * h, c + c")
    assert (formulas_before[-1] if formulas_before else None) == LINES[code]
    assert (h, c) == ("h_{t}=x[:, :1]⊙h_{t−1}", "c_{t}=c_{t−1}+c_{t−1}")


STATEMENTS = {  # a whole step, and its formulas
    "for k in range(3):\n    h = tanh(x + h)\na = h * 2\nreturn h, c": [
        "for k in range(3):\n    h = tanh(x + h)", "a_{t}=h_{t}·2", "c_{t}=c_{t−1}"],
    "with torch.no_grad() as h:\n    pass\na = h\nreturn a, c": [
        "with torch.no_grad() as h:\n    pass", "a_{t}=h~_{t}", "h_{t}=a_{t}", "c_{t}=c_{t−1}"],
    "a = [h for h in c]\nreturn h + 1, c": ["a = [h for h in c]", "h_{t}=h_{t−1}+1", "c_{t}=c_{t−1}"],
    "def h():\n    c = 1\na = h\nreturn c, c": [
        "def h():\n    c = 1", "a_{t}=h~_{t}", "h_{t}=c_{t−1}", "c_{t}=c_{t−1}"],
    "z = tanh((h := h + x))\ndel c\nreturn h * z, c": [
        "z = tanh((h := (h + x)))", "del c", "h_{t}=h~_{t}⊙z_{t}"],
    "if x.sum() > 0:\n    return h, c\nh = h + 1\nreturn h, c": [
        "if x.sum() > 0:\n    return (h, c)", "h = h + 1", "return (h, c)"],
    "if self.training:\n    h = -h\nreturn h, c": ["if self.training:\n    h = -h", "c_{t}=c_{t−1}"],
    "if self.U is None or self.kind not in ('relu', 'tanh'):\n    h = -h\nreturn h, c + 1": [
        "h_{t}=h_{t−1}", "c_{t}=c_{t−1}+1"],
    "return self.both(x, h, c)": ["return self.both(x, h, c)"],
    "new = (h + 1, c)\nreturn new": ["new_{t}=(h_{t−1}+1,c_{t−1})", "return new"],
    "s = h\ns = s + 1\ns = s * 2\nreturn s, c": [
        "s^{(1)}_{t}=h_{t−1}", "s^{(2)}_{t}=s^{(1)}_{t}+1", "s_{t}=s^{(2)}_{t}·2",
        "h_{t}=s_{t}", "c_{t}=c_{t−1}"],
    "x = x * 2\nh, c = c, h\nreturn h ** x ** 2, c": [
        "x^{(1)}_{t}=x_{t}·2", "h~_{t}=c_{t−1}", "c_{t}=h_{t−1}", "h_{t}=h~_{t}^{(x^{(1)}_{t})^{2}}"],
    "s = x.view(-1, 2)\ns *= 2\nreturn h, x": ["s = x.view(-1, 2)", "s *= 2", "return (h, x)"],
    "f = tanh\nif x.sum():\n    f = relu\nreturn f(h), c": [
        "if x.sum():\n    f = relu", "return (f(h), c)"],
    "f = silu\nreturn f(h), c": ["f = silu", "return (f(h), c)"],
    "w = v = self.U\nreturn linear(h, w), c": ["w = v = self.U", "h_{t}=w_{t} h_{t−1}", "c_{t}=c_{t−1}"],
    "w = v = h * 1\nreturn linear(h, w), c": ["w = v = h * 1", "return (linear(h, w), c)"],
    "global h2\nh = h + 1\nreturn h, c": ["global h2", "h = h + 1", "return (h, c)"],
    "s = h.T\ns *= 2\nreturn h, c": ["s = h.T", "s *= 2", "return (h, c)"],  # this changes h, too
    "a, b = x, x\na += 1\nreturn b, c": ["a, b = (x, x)", "a += 1", "return (b, c)"],
    "a = b = x * 2\na[0] = 1\nreturn b, c": ["a = b = x * 2", "a[0] = 1", "return (b, c)"],
    "a = (b := x) * 2\nb += 1\nreturn a, x": ["a = (b := x) * 2", "b += 1", "return (a, x)"],
    "for s in h:\n    s *= 2\nreturn h, c + 1": ["for s in h:\n    s *= 2", "return (h, c + 1)"],
    "a = x * 2\na[0] = 1\nreturn a, c + 1": [
        "a~_{t}=x_{t}·2", "a[0] = 1", "h_{t}=a_{t}", "c_{t}=c_{t−1}+1"],
    "act = tanh if x.sum() else relu\nreturn act(h), c": [
        "act_{t}=tanh if x.sum() else relu", "return (act(h), c)"],
}  # fmt: skip


@pytest.mark.parametrize("code", STATEMENTS)
def test_whole_steps(code: str, read: Callable[..., list[str]]) -> None:
    assert read(code) == STATEMENTS[code]


def test_missing_bias_is_shown_as_none() -> None:
    texts = [to_text(one.math) for one in formulas(ur.cells.ResetBeforeGRU(2, 3, bias=False))]
    assert [texts[1], texts[4], texts[7]] == [
        "bias_{t}=None", "bias_{r,t}=None", "r_{t}=σ(input_{r,t}+weight_{r,t} h_{t−1})"]  # fmt: skip


def test_equation_names_are_the_assigned_quantities(tmp_path: Path) -> None:
    cell = build_cell(tmp_path, "a = F.relu(h + 1, inplace=True)\nself.k = 2\nb = a.add_(1)\nreturn b, c")
    assert [equation.names for equation in formulas(cell(2, 3))] == [("a",), (), ("a", "b"), ("h",), ("c",)]


def test_equation_lines_match_the_source(tmp_path: Path) -> None:
    cell = build_cell(tmp_path, '"""Words."""\n"More."\n...\na = h + 1\n"words"\nreturn a, (\n    c)')
    code = step_source(cell).splitlines()
    equations = formulas(cell(2, 3))
    assert [code[e.first_line : e.last_line + 1] for e in equations[:1]] == [["a = h + 1"]]
    assert [(e.first_line, e.last_line) for e in equations] == [(0, 0), (2, 3), (2, 3)]


def twice(step: Any) -> Any:
    @functools.wraps(step)
    def both(*arguments: Any) -> Any:
        return 2 * step(*arguments)

    return both


def plus(self: Any, x: Tensor, h: Tensor) -> Tensor:
    return x + h


class Lambda(ur.Cell):
    step = lambda self, x, h: x + h  # type: ignore[assignment]  # noqa: E731


class Decorated(ur.Cell):
    @twice
    def step(self, x: Tensor, h: Tensor) -> Any:
        return x + h


class Wrapped(ur.Cell):
    step = twice(plus)


class Elsewhere(ur.Cell):
    step = plus  # type: ignore[assignment]


class Renamed(ur.Cell):
    def step(me, word: Tensor, h: Tensor) -> Any:
        return word + me.hidden * h


def test_only_plain_functions_have_formulas() -> None:
    assert [formulas(cell(2, 2)) for cell in (Lambda, Decorated, Wrapped)] == [[], [], []]
    assert [to_text(one.math) for one in formulas(Elsewhere(2, 2))] == ["h_{t}=x_{t}+h_{t−1}"]
    assert [to_text(one.math) for one in formulas(Renamed(2, 2))] == ["h_{t}=word_{t}+2·h_{t−1}"]
