"""Formulas say what the code says: read back and computed, case by case, and as code where there is none."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from test_mathml import plain
from torch import Tensor
from torch.nn import functional as F

import unrolled as ur
from unrolled.cells.init import block_linear
from unrolled.equations.formulas import formulas
from unrolled.equations.source import equations
from unrolled.tracing.step_recorder import run_with_names

made = itertools.count()
HEAD = """
import torch
import torch as th
import torch.nn.functional as fn
from torch.nn import functional as F
from torch import relu, sigmoid, tanh
from torch.nn.functional import linear, softplus
import unrolled as ur

SCALE = w_t = V = 2.5

def third(value):
    return value / 3

def silu(value):
    return value

def square(value):
    return value

class Made(ur.Cell):
    state = ("h", "c")
    W = ur.Param("hidden", "input")
    U = ur.Param("hidden", "hidden")
    V = ur.Param("hidden", "hidden")
    b = ur.Param("hidden")
    kind: str = "tanh"
    k: int = 1
    rate: float = -0.5
    fine: float = 0.123456789

    def both(self, x, h, c):
        return h, c

    def step(self, x, h, c):
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a module with a cell whose step this is, and reads its formulas."""

    def cell(body: str, **options: Any) -> list[str]:
        return [plain(one.math) for one in formulas(built(tmp_path, body)(2, 3, **options))]

    return cell


def built(folder: Path, body: str) -> Any:
    """A cell with this step."""
    path = folder / f"made_{next(made)}.py"
    path.write_text(HEAD + textwrap.indent(textwrap.dedent(body).strip(), " " * 8) + "\n")
    space: dict[str, Any] = {"__name__": "builtins"}
    exec(compile(path.read_text(), str(path), "exec"), space)
    return space["Made"]


class Value:
    """A tensor, and whether it has a row for each row of the input: W x is a product with each row."""

    def __init__(self, number: Any, rows: bool = False) -> None:
        self.number = number
        self.rows = rows

    @property
    def T(self) -> Value:
        return Value(self.number.T, self.rows)

    def __matmul__(self, other: Value) -> Value:
        turned = other.rows and not self.rows
        product = other.number @ self.number.T if turned else self.number @ other.number
        return Value(product, self.rows or other.rows)

    def __neg__(self) -> Value:
        return Value(self.number * -1, self.rows)


def number(value: Any) -> Any:
    return value.number if isinstance(value, Value) else value


def on_numbers(function: Callable[..., Any]) -> Callable[..., Value]:
    def call(*arguments: Any, **named: Any) -> Value:
        values = [*arguments, *named.values()]
        rows = any(isinstance(one, Value) and one.rows for one in values)
        return Value(function(*map(number, arguments), **{k: number(v) for k, v in named.items()}), rows)

    return call


def reflected(act: Callable[..., Any]) -> Callable[..., Value]:
    return on_numbers(lambda a, b: act(b, a))


for act in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow):
    setattr(Value, f"__{act.__name__}__", on_numbers(act))
    setattr(Value, f"__r{act.__name__}__", reflected(act))
for act in (operator.gt, operator.lt, operator.ge, operator.le, operator.eq):
    setattr(Value, f"__{act.__name__}__", on_numbers(act))

SIGNS = {"⊙": "*", "·": "*", "−": "-", "≥": ">=", "≤": "<=", "[": "cat(", "]": ")", ";": ",", "\u2061": ""}
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "zeta": "ζ", "theta": "θ", "nu": "ν"}
NAMES = {"σ": "sigmoid", "ReLU": "relu", "SiLU": "silu", "GELU": "gelu"}


def python(parts: list[ElementTree.Element]) -> str:
    """Elements of MathML as Python: only the brackets that are drawn hold anything together."""
    found = ""
    for place, part in enumerate(parts):
        after = (parts[place + 1].text or "") if place + 1 < len(parts) else ""
        inner = list(part)
        match part.tag:
            case "mrow":
                found += python(inner)
            case "mo" if part.text == "=" and parts[place - 1].tag != "mi":  # of a relation, not an argument
                found += "=="
            case "mo":
                found += SIGNS.get(part.text or "", part.text or "")
            case "mn" | "mtext":
                found += part.text or ""
            case "mspace":
                found += " @ "
            case "mfrac":
                found += f"(({python([inner[0]])}) / ({python([inner[1]])}))"
            case "msup" if plain_of(inner[1]) == "⊤":
                found += f"{python([inner[0]])}.T"
            case "msup" if inner[0].tag == "mi" and inner[0].text == "e":
                found += f"call('exp')({python([inner[1]])})"
            case "msup":
                found += f"{python([inner[0]])} ** ({python([inner[1]])})"
            case "mi" if after == "\u2061":
                found += f"call({NAMES.get(part.text or '', part.text)!r})"
            case "mi" if after == "=":
                found += (part.text or "").replace(" ", "_")
            case _:
                found += f"of[{plain_of(part)!r}]"
    return found


def plain_of(part: ElementTree.Element) -> str:
    return plain(ElementTree.tostring(part, encoding="unicode"))


def call(name: str) -> Callable[..., Value]:
    name = name.replace(" ", "_")
    if name == "softmax":
        return on_numbers(lambda value: value.exp() / value.exp().sum(-1, keepdim=True))
    if name == "layer_norm":
        return on_numbers(lambda value, **more: F.layer_norm(value, value.shape[-1:], **more))
    if name == "block_linear":
        return on_numbers(block_linear)
    if name == "sqrt":
        return on_numbers(lambda value: torch.as_tensor(value).sqrt())
    if name == "exp":
        return on_numbers(lambda value: torch.as_tensor(value, dtype=torch.float64).exp())
    return on_numbers(next(getattr(m, name) for m in (torch, F, Tensor) if hasattr(m, name)))


def computed(cell: ur.Cell, tensors: dict[str, Tensor], x: Tensor, *state: Tensor) -> dict[str, Value]:
    """What the formulas of a step give, by what stands before the equals sign."""
    of = {name: Value(tensor) for name, tensor in tensors.items()} | {"x_{t}": Value(x, True)}
    of |= {f"{name}_{{t−1}}": Value(value, True) for name, value in zip(cell.state, state, strict=True)}
    join = on_numbers(lambda *parts: torch.cat(parts, -1))
    for one in formulas(cell):
        math = ElementTree.fromstring(one.math)
        assert "mtext" not in {part.tag for part in math}, plain(one.math)
        cut = [part.text for part in math].index("=")
        left, text = plain_of_all(list(math)[:cut]), python(list(math)[cut + 1 :])
        value = eval(text, {"of": of, "call": call, "cat": join})
        if len(one.names) == 1:
            of[left] = value
        else:
            names = left[1:-1].replace(",t}", "|t}").split(",")
            parts = value.number.chunk(len(names), -1 if value.rows else 0)
            of |= {n.replace("|", ","): Value(p, value.rows) for n, p in zip(names, parts, strict=True)}
    return of


def plain_of_all(parts: list[ElementTree.Element]) -> str:
    return "".join(map(plain_of, parts))


STEPS = {
    "powers": """
        a = x @ self.W.T
        p = (a / 2) ** 2 + (a ** 2) ** 0.5 + torch.exp(a) ** 2 + torch.matmul(h, self.U) ** 2
        q = self.rate ** 2 * a - self.rate + (-a) ** 2 - a ** 2 + 2 ** -a + 2 ** (a ** 2)
        return p + q * (h / 3) ** 3, (tanh(c) ** 2) ** 3
    """,
    "products": """
        a = h @ (self.U * self.b)
        d = h @ self.U * self.b + torch.matmul(h, self.U * self.b) + (h * self.b) @ self.U
        e = linear(h @ self.U, self.V) @ self.U + linear(linear(h, self.U, self.b), self.V)
        f = -(a * d) + a * -d - -e + 2 * (h @ self.U) - (h @ self.U) * 2 - h @ -self.U
        g = linear(x, self.U @ self.W) + h @ self.U @ self.V + h @ (self.U - self.U.T)
        return a + d + e + f + g, a @ self.U.T / 2 * c
    """,
    "sums": """
        a, b = linear(x, self.W, self.b), h
        p = a - (b - c) + a / b * c - a / (b * c) - (a + b) - (-a)
        q = -(a + b) + (a - (b + c)) * (a - b) - -(a - b) / 2
        r = (a - b) / (a + b) / c + a / (b / c) + (a - (h - 1)).clone() * 2
        return p + q - (r + a), 1 - (1 - r)
    """,
    "arguments": """
        z = linear(input=x, weight=self.W)
        a = torch.add(h, z, alpha=2) - torch.lerp(h, z, weight=c) + h.mul(-z) + h.mul(2) + h.sub(z).neg()
        d = torch.pow(h, 2) + torch.maximum(h, -z) + h.clamp(min=0) + torch.where(z > 0, z, 0.)
        e = F.leaky_relu(h, 0.2) + F.softplus(h, beta=3) + torch.addcmul(h, z, a, value=2)
        f = linear(x, weight=self.W, bias=self.b) * torch.special.expit(a) + fn.linear(x, self.W) + th.tanh(h)
        g = (a > 0) * h - (1 > d) * c + torch.div(h, z - 3) + h.matmul(self.U).T.T + torch.softmax(h, -1)
        return F.layer_norm(a + d + e, (3,)) + f, torch.cat((z[:, :1], d[:, 1:]), dim=-1) if False else g
    """,
    "joined": """
        both = torch.cat((h, x), dim=-1)
        u, v = torch.cat([both, both * 2 - 1], 1).chunk(2, -1)
        h = tanh(linear(v, torch.eye(5)[:3]) if self.k > 1 else h + x.sum(-1, keepdim=True))
        return h, c
    """,
    "versions": """
        x = x * 2
        x = tanh(x) + 1
        s = linear(x, self.W)
        s = s * 2
        s *= h + 1
        s -= h - s
        s **= 2
        s @= self.U
        s /= 2 + h
        h, c = c + s, h - s
        h = h * c
        return c, h * 2
    """,
    "swapped": """
        c = c + linear(x, self.W)
        h = tanh(c) * h
        return c, h
    """,
    "aliases": """
        activation = tanh if self.kind == "tanh" else relu
        f = linear
        F = sigmoid(f(x, self.W, self.b))
        h = activation(f(h, self.U) * h) * h
        h = F.mul(h) + (tanh if self.k == 1 else relu)(c)
        if self.kind == "relu":
            return h, c
        elif self.k == 1:
            return tanh(h), c
        return h, h
    """,
    "digits": """
        h = h * self.fine + 0.123456789 - 1e-5 * c + 1234567 * h ** 1e-1 * self.k
        return h, c
    """,
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_formulas_read_back_give_what_the_step_gives(name: str, kind: str, tmp_path: Path) -> None:
    cell = built(tmp_path, STEPS[name])(2, 3, kind=kind)
    check(cell)


@pytest.mark.parametrize("name", ur.cells.__all__)
@pytest.mark.parametrize("bias", [True, False])
def test_the_formulas_of_every_cell_give_what_its_step_gives(name: str, bias: bool) -> None:
    cell = getattr(ur.cells, name)
    looping = "for " in inspect.getsource(cell.step)  # which is shown as code
    if not looping and (name, bias) != ("ResetBeforeGRU", False):  # its parts of a bias are None there
        check(cell(2, 3, bias=bias))


def check(cell: ur.Cell) -> None:
    double = {"dtype": torch.float64}
    tensors = {name: torch.randn(shape, **double) for name, shape in cell.shapes().items()}  # type: ignore[call-overload]
    x, state = torch.rand(4, 2, **double) + 0.1, [torch.rand(4, 3, **double) + 0.2 for _ in cell.state]  # type: ignore[call-overload]
    _, named = run_with_names(cell.bind(tensors), x, *(value.clone() for value in state))
    symbols = {n.replace("weight_", "W_").replace("bias_", "b_").replace("_", "_{") + "}" * ("_" in n): t
               for n, t in tensors.items()}  # fmt: skip
    symbols = {GREEK.get(name, name): tensor for name, tensor in symbols.items()}
    found = computed(cell, symbols, x, *state)
    keys = {one: f"{one.replace('_', '_{')},t}}" if "_" in one else f"{one}_{{t}}" for one in named}
    compared = [one for one in named if keys[one] in found and one != "x"]
    assert set(cell.state) <= set(compared)
    for one in compared:
        torch.testing.assert_close(found[keys[one]].number, named[one], equal_nan=True)


LINES = {  # the last line of a step before its return, and what is shown for it
    "a = SCALE * third(h)": "a_{t}=SCALE·third(h_{t−1})",
    "a = silu(h)": "a = silu(h)",  # not torch's
    "a = w_t * h": "a_{t}=w_t·h_{t−1}",  # which is not w at the time t
    "a = V * h": "a = V * h",  # which is not self.V
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
    "a = h * (h if h.sum() else c)": "a = h * (h if h.sum() else c)",  # h in code may be either h
    "a = (tanh if h.sum() else relu)(h)": "a = (tanh if h.sum() else relu)(h)",
    "a = 1e-5 * h + 0.10": "a_{t}=1e-5·h_{t−1}+0.10",
    "a = self.fine * h ** self.rate": "a_{t}=0.123456789·h_{t−1}^{−0.5}",
    "a = [s for s in h]": "a = [s for s in h]",
    "a = b = h": "a = b = h",
    "t = torch.nn\na = t.functional.tanh(h)": "a_{t}=tanh(h_{t−1})",
    "import math\na = h / math.sqrt(3)": "a = h / math.sqrt(3)",
    "a = torch.square(h).mul(c) @ self.U.T": "a_{t}=(square(h_{t−1})⊙c_{t−1}) U^{⊤}",
    "a = sum(h)": "a = sum(h)",  # Python's own
    "a = self.kind.upper()": "a = self.kind.upper()",
    "a = super().step(x, h, c)": "a = super().step(x, h, c)",
    "a = -1 ** h - (-1) ** h": "a_{t}=−1^{h_{t−1}}−(−1)^{h_{t−1}}",
    "a = h @ c.T @ h": "a_{t}=h_{t−1} c_{t−1}^{⊤} h_{t−1}",
    "a, *b = h, c": "a, *b = (h, c)",
    "(a, b), d = (h, c), x": "(a, b), d = ((h, c), x)",
    "a = (b := h) * 2": "a = (b := h) * 2",
    "a, b = h": "a, b = h",
    "a, a = h, c": "a, a = (h, c)",
    "self.k = 3\na = self.k * h": "a_{t}=k⊙h_{t−1}",  # the option is no longer as it was given
    "_b = h_ = x": "_b = h_ = x",
    "_b = x * 2": "_b_{t}=x_{t}·2",
    "h_ = lambda_ = x\na = h_ * lambda_": "a_{t}=h__{t}⊙λ_{t}",
    "print(h)": "print(h)",
    "pass": None,
    "'words'": None,
    "a: torch.Tensor": None,
}


@pytest.mark.parametrize("code", LINES)
def test_a_line_is_a_formula_that_says_all_of_it_or_code(code: str, read: Callable[..., list[str]]) -> None:
    *found, h, c = read(f"{code}\nreturn x[:, :1] * h, c + c")
    assert (found[-1] if found else None) == LINES[code]
    assert (h, c) == ("h_{t}=x[:, :1]⊙h_{t−1}", "c_{t}=c_{t−1}+c_{t−1}")


STATEMENTS = {  # a whole step, and all that is shown
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
    "s = h.T\ns *= 2\nreturn h, c": ["s = h.T", "s *= 2", "return (h, c)"],  # which changes h too
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
def test_statements_that_are_no_equations_are_code_and_what_they_give_is_given(
    code: str, read: Callable[..., list[str]]
) -> None:
    assert read(code) == STATEMENTS[code]


def test_a_cell_without_a_bias_shows_none() -> None:
    shown = [plain(one.math) for one in formulas(ur.cells.ResetBeforeGRU(2, 3, bias=False))]
    assert [shown[1], shown[4], shown[7]] == [
        "bias_{t}=None", "bias_{r,t}=None", "r_{t}=σ(input_{r,t}+weight_{r,t} h_{t−1})"]  # fmt: skip


def test_what_a_line_gives_are_quantities(tmp_path: Path) -> None:
    made = built(tmp_path, "a = F.relu(h + 1, inplace=True)\nself.k = 2\nb = a.add_(1)\nreturn b, c")
    assert [one.names for one in formulas(made(2, 3))] == [("a",), (), ("a", "b"), ("h",), ("c",)]


def test_the_lines_are_those_of_the_code(tmp_path: Path) -> None:
    made = built(tmp_path, '"""Words."""\n"More."\n...\na = h + 1\n"words"\nreturn a, (\n    c)')
    code = equations(made).splitlines()
    found = formulas(made(2, 3))
    assert [code[one.line : one.last + 1] for one in found[:1]] == [["a = h + 1"]]
    assert [(one.line, one.last) for one in found] == [(0, 0), (2, 3), (2, 3)]


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


def test_only_one_plain_function_has_formulas() -> None:
    assert [formulas(cell(2, 2)) for cell in (Lambda, Decorated, Wrapped)] == [[], [], []]
    assert [plain(one.math) for one in formulas(Elsewhere(2, 2))] == ["h_{t}=x_{t}+h_{t−1}"]
    assert [plain(one.math) for one in formulas(Renamed(2, 2))] == ["h_{t}=word_{t}+2·h_{t−1}"]
