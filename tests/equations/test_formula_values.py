"""Formulas, translated back to Python, compute the same values as the step."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from formula_helpers import build_cell, to_text
from torch import Tensor
from torch.nn import functional as F

import unrolled as ur
from unrolled.cells.init import block_linear
from unrolled.equations.formulas import formulas
from unrolled.tracing.step_recorder import run_with_locals


class Value:
    """A tensor that knows whether it is batched: W x is the product with each row of a batched x."""

    def __init__(self, tensor: Any, is_batched: bool = False) -> None:
        self.tensor = tensor
        self.is_batched = is_batched

    @property
    def T(self) -> Value:
        return Value(self.tensor.T, self.is_batched)

    def __matmul__(self, other: Value) -> Value:
        is_linear = other.is_batched and not self.is_batched
        product = other.tensor @ self.tensor.T if is_linear else self.tensor @ other.tensor
        return Value(product, self.is_batched or other.is_batched)

    def __neg__(self) -> Value:
        return Value(self.tensor * -1, self.is_batched)


def unwrap(value: Any) -> Any:
    return value.tensor if isinstance(value, Value) else value


def on_values(function: Callable[..., Any]) -> Callable[..., Value]:
    def call(*arguments: Any, **named: Any) -> Value:
        values = [*arguments, *named.values()]
        is_batched = any(isinstance(one, Value) and one.is_batched for one in values)
        result = function(*map(unwrap, arguments), **{k: unwrap(v) for k, v in named.items()})
        return Value(result, is_batched)

    return call


def reflect(operation: Callable[..., Any]) -> Callable[..., Value]:
    return on_values(lambda a, b: operation(b, a))


for operation in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow):
    setattr(Value, f"__{operation.__name__}__", on_values(operation))
    setattr(Value, f"__r{operation.__name__}__", reflect(operation))
for operation in (operator.gt, operator.lt, operator.ge, operator.le, operator.eq):
    setattr(Value, f"__{operation.__name__}__", on_values(operation))

SIGNS = {"⊙": "*", "·": "*", "−": "-", "≥": ">=", "≤": "<=", "[": "cat(", "]": ")", ";": ",", "\u2061": ""}
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "zeta": "ζ", "theta": "θ", "nu": "ν"}
NAMES = {"σ": "sigmoid", "ReLU": "relu", "SiLU": "silu", "GELU": "gelu"}


def to_python(parts: list[ElementTree.Element]) -> str:
    """Translate MathML elements to Python. Only visible brackets group anything."""
    code = ""
    for index, part in enumerate(parts):
        following = (parts[index + 1].text or "") if index + 1 < len(parts) else ""
        children = list(part)
        match part.tag:
            case "mrow":
                code += to_python(children)
            case "mo" if part.text == "=" and parts[index - 1].tag != "mi":  # a comparison
                code += "=="
            case "mo":
                code += SIGNS.get(part.text or "", part.text or "")
            case "mn" | "mtext":
                code += part.text or ""
            case "mspace":
                code += " @ "
            case "mfrac":
                code += f"(({to_python([children[0]])}) / ({to_python([children[1]])}))"
            case "msup" if element_to_text(children[1]) == "⊤":
                code += f"{to_python([children[0]])}.T"
            case "msup" if children[0].tag == "mi" and children[0].text == "e":
                code += f"call('exp')({to_python([children[1]])})"
            case "msup":
                code += f"{to_python([children[0]])} ** ({to_python([children[1]])})"
            case "mi" if following == "\u2061":
                code += f"call({NAMES.get(part.text or '', part.text)!r})"
            case "mi" if following == "=":
                code += (part.text or "").replace(" ", "_")
            case _:
                code += f"values[{element_to_text(part)!r}]"
    return code


def element_to_text(part: ElementTree.Element) -> str:
    return to_text(ElementTree.tostring(part, encoding="unicode"))


def call(name: str) -> Callable[..., Value]:
    name = name.replace(" ", "_")
    if name == "softmax":
        return on_values(lambda value: value.exp() / value.exp().sum(-1, keepdim=True))
    if name == "layer_norm":
        return on_values(lambda value, **more: F.layer_norm(value, value.shape[-1:], **more))
    if name == "block_linear":
        return on_values(block_linear)
    if name == "sqrt":
        return on_values(lambda value: torch.as_tensor(value).sqrt())
    if name == "exp":
        return on_values(lambda value: torch.as_tensor(value, dtype=torch.float64).exp())
    return on_values(next(getattr(m, name) for m in (torch, F, Tensor) if hasattr(m, name)))


def compute(cell: ur.Cell, tensors: dict[str, Tensor], x: Tensor, *state: Tensor) -> dict[str, Value]:
    """Evaluate the formulas of a step, and return the values by the left-hand sides."""
    values = {name: Value(tensor) for name, tensor in tensors.items()} | {"x_{t}": Value(x, True)}
    values |= {f"{name}_{{t−1}}": Value(value, True) for name, value in zip(cell.state, state, strict=True)}
    join = on_values(lambda *parts: torch.cat(parts, -1))
    for equation in formulas(cell):
        math = ElementTree.fromstring(equation.math)
        assert "mtext" not in {part.tag for part in math}, to_text(equation.math)
        equals = [part.text for part in math].index("=")
        left, code = all_to_text(list(math)[:equals]), to_python(list(math)[equals + 1 :])
        value = eval(code, {"values": values, "call": call, "cat": join})
        if len(equation.names) == 1:
            values[left] = value
        else:
            names = left[1:-1].replace(",t}", "|t}").split(",")
            parts = value.tensor.chunk(len(names), -1 if value.is_batched else 0)
            values |= {
                n.replace("|", ","): Value(p, value.is_batched) for n, p in zip(names, parts, strict=True)
            }
    return values


def all_to_text(parts: list[ElementTree.Element]) -> str:
    return "".join(map(element_to_text, parts))


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
def test_formulas_give_the_values_of_the_step(name: str, kind: str, tmp_path: Path) -> None:
    cell = build_cell(tmp_path, STEPS[name])(2, 3, kind=kind)
    check_formulas(cell)


@pytest.mark.parametrize("name", ur.cells.__all__)
@pytest.mark.parametrize("bias", [True, False])
def test_formulas_of_every_cell_give_the_values_of_its_step(name: str, bias: bool) -> None:
    cell = getattr(ur.cells, name)
    has_loop = "for " in inspect.getsource(cell.step)  # a loop is shown as code
    if not has_loop and (name, bias) != ("ResetBeforeGRU", False):  # the parts of its bias are None
        check_formulas(cell(2, 3, bias=bias))


def check_formulas(cell: ur.Cell) -> None:
    """Compare the values of the formulas with those that the step computes."""
    double = {"dtype": torch.float64}
    tensors = {name: torch.randn(shape, **double) for name, shape in cell.shapes().items()}  # type: ignore[call-overload]
    x, state = torch.rand(4, 2, **double) + 0.1, [torch.rand(4, 3, **double) + 0.2 for _ in cell.state]  # type: ignore[call-overload]
    _, named = run_with_locals(cell.bind(tensors), x, *(value.clone() for value in state))
    symbols = {n.replace("weight_", "W_").replace("bias_", "b_").replace("_", "_{") + "}" * ("_" in n): t
               for n, t in tensors.items()}  # fmt: skip
    symbols = {GREEK.get(name, name): tensor for name, tensor in symbols.items()}
    values = compute(cell, symbols, x, *state)
    keys = {name: f"{name.replace('_', '_{')},t}}" if "_" in name else f"{name}_{{t}}" for name in named}
    compared = [name for name in named if keys[name] in values and name != "x"]
    assert set(cell.state) <= set(compared)
    for name in compared:
        torch.testing.assert_close(values[keys[name]].tensor, named[name], equal_nan=True)
