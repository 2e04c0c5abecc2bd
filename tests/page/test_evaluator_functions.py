"""Each function of the page's evaluator, compared with torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fuzz import templates
from helpers.evaluator import assert_equal_on_page, needs_javascript, run_javascript
from unrolled.page.sampling import encode_values
from unrolled.tracing.call_recorder import CallRecorder
from unrolled.tracing.program_recorder import Constants, ProgramRecorder
from unrolled.tracing.step_functions import ELEMENTWISE, UnsupportedError
from unrolled.tracing.step_recorder import StepRun

# More calls, in the form of the templates.
OTHERS = """
F.celu(a, 0.4)
torch.lerp(a, b, 1.7)
torch.clamp(a, 0.5, -0.5)
F.glu(torch.cat([a, b.expand_as(a)], -1))
F.prelu(r, q)
F.prelu(a, s)
F.softplus(40 * a)
F.group_norm(r, 1, q, q)
F.bilinear(r, r, w3, q3)
F.linear(r, w2, q)
F.linear(r, w2, s)
F.linear(a3, q)
torch.baddbmm(a3[..., :3], a3, a3.mT, beta=0.5, alpha=2)
torch.bmm(a3, a3.mT)
torch.matmul(a3, w2)
torch.matmul(a3, q)
torch.mv(w2, q)
torch.dot(q, q)
torch.inner(r, w2)
torch.outer(q, q)
torch.tensordot(r, w2, dims=([1], [1]))
torch.einsum('...i,oi->...o', a3, w2)
torch.einsum('ij,ij', r, r)
torch.einsum('ii->i', w2)
torch.addmv(q, w2, q)
r @ w2.T
w2.__rmatmul__(r)
a3.sum((0, 2))
a3.mean(1)
a3.prod()
a3.amax((0, 2), keepdim=True)
a3.std(dim=(0, 2))
a3.var(1, False)
a3.norm(3, 1)
a3.norm()
a3.argmax()
a3.max(1).indices
a3.min(1)[1]
a3.min()
torch.max(a, b)
a3.any()
a3.median(1).indices
a3.sort(1, descending=True)[0]
a3.sort().values
a3.argsort(-1)
a3.topk(2, 1)[0]
a3.topk(2).indices
a3.topk(2, largest=False).values
a3.cumprod(1)
a3.logcumsumexp(1)
a3.log_softmax(1)
torch.gather(a3, 2, a3.argsort(-1)[..., :2])
torch.take_along_dim(a3, a3.argmax(1, keepdim=True), 1)
F.one_hot(a3.argmax(-1), WIDTH)
a3.count_nonzero(1)
torch.xlogy(m.float(), 1 + b.abs())
torch.triu(a3, 1)
torch.diag_embed(a)
F.pad(a3.double(), (1, 2), mode='replicate')
(a > 0) ^ (b > 0)
a // 0.3
1.7 // (1 + a.abs())
2.5 % (1 + a.abs())
(torch.nan_to_num(a, 1, 2, 3) * 10).long() // 3
(torch.nan_to_num(a, 1, 2, 3) * 10).long() % 3
(torch.nan_to_num(a, 1, 2, 3) * 10).long() / 4
torch.nan_to_num(a, 0.5, 2.0, -2.0)
a.expand(2, *a.shape)
a3.unbind(1)[1]
torch.where(m, 1.0, 0.0)
F.dropout(a, 0.5, training=False)
torch.special.expit(a)
a.where(m, b)
torch.where(m, b, a)
a.sum(-1, True)
a.mean(-1, True)
a.argmax(-1, True)
a.norm(2, -1)
torch.norm(a, p=1)
torch.rsub(a, b, alpha=0.3)
a.clip(-1, 1)
F.dropout(a, 0.0)
a.data.detach()
a.index_select(-1, torch.tensor([0, 2]))
a.repeat_interleave(2)
a3.split([1, 1], 0)[1].squeeze()
torch.hstack([r, r[:, :2]])
torch.vstack([r, r[:1]])
a3.swapaxes(0, -1)
torch.flip(a3, (0, -1))
r.diagonal()
r.T.reshape(-1)[1:]
a3.permute(2, 0, 1).contiguous()
a3[:, [0, 2], None, 1:]
a3[0, ..., -1]
torch.tile(r, (2, 2))
torch.rot90(r)
r.broadcast_to(3, *r.shape)
torch.column_stack([r, r])
r.unfold(1, 2, 2)
a.type(torch.float64)
a3.tensor_split(2, -1)[0]
"""
TABLES = [
    *(templates.UNARY, templates.JUMPS, templates.BINARY, templates.CHOICES, templates.MASKS),
    *(templates.REDUCTIONS, templates.MOVES, templates.MATRICES, templates.LIKE),
]
FIELDS = {  # what the templates' fields stand for
    **{name: name for name in "abcrmkq"},
    **{"n": "0.3", "i": "2", "flag": "True", "p_1w": "w1", "p_1": "s", "p_o": "q", "p_i": "q"},
    **{
        "p_oi": "w2",
        "p_io": "w2",
        "p2_oi": "w3[0]",
        "p_2oi": "w3[:2]",
        "p_o2": "w2[:, :2]",
        "p_2i": "w2[:2]",
    },
}
NOT_USED = ("complex", "self.")
REFUSED = [
    "torch.exp(torch.complex(a, b)).real",
    "torch.polygamma(1, a)",
    "a.half()",
    "a[a > 0]",
    "a.clone().mul_(2)",
    "a * a.sum().item()",
    "F.dropout(a, 0.5)",
    "F.one_hot(a.argmax(-1))",
    "torch.add(a, b, out=torch.zeros_like(a))",
    "a[..., a.argmax(-1)]",
    "torch.bernoulli(a.sigmoid())",
    "torch.linalg.norm(a, 'nuc')",
    "(a * 10).long() & 3",
]


def expressions(width: int) -> list[str]:
    """Return an expression for each template, for operands whose last axis has some width."""
    fields = {**FIELDS, "w": str(width), "o": str(width), "i_": str(width)}
    lines = [line for table in TABLES for line in table.strip().splitlines()]
    lines = [line for line in lines if line not in ("{n}", "{p_1}[0]")]
    texts = [line.format_map({**fields, "b": "d"} if "stack" in line else fields) for line in lines]
    texts += [line.replace("WIDTH", str(width)) for line in OTHERS.strip().splitlines()]
    return [text for text in texts if not any(part in text for part in NOT_USED)]


def operands(shape: tuple[int, ...], dtype: torch.dtype, special: bool) -> dict[str, Tensor]:
    """Return random operands by the names that the expressions use. ``b`` and ``k`` are broadcast."""
    w = shape[-1]
    shapes = {"a": shape, "b": (*shape[:-2], 1, w), "c": (w,), "d": shape, "r": (2, w), "q": (w,), "s": (1,)}
    shapes |= {"w1": (1, w), "w2": (w, w), "w3": (4, w, w), "q3": (4,), "a3": (2, 3, w), "x": (2, w)}
    tensors = {name: torch.randn(size, dtype=dtype) for name, size in shapes.items()}
    if special:
        values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
        for name in "abc":
            flat = tensors[name].flatten()
            count = min(len(flat), len(values))
            flat[:count] = values[torch.randperm(len(values))][:count]
            tensors[name] = flat.reshape(shapes[name])
    return {**tensors, "m": tensors["a"] > 0.2, "k": tensors["b"] > -0.2}


def program_of(text: str, tensors: dict[str, Tensor]) -> tuple[Any, Constants, Tensor]:
    """Return the program of an expression, its constants and its value."""
    constants, recorder = Constants(), CallRecorder()
    with recorder:
        result = eval(text, {"torch": torch, "F": F, "math": math, **tensors})
    run = StepRun(recorder, torch.zeros(1), {}, None, {}, {})
    program = ProgramRecorder(run, tensors, constants, {}).program({"result": result})
    return program, constants, result


@needs_javascript
@pytest.mark.parametrize("special", [False, True], ids=["normal", "special"])
def test_every_function(special: bool, tmp_path: Path) -> None:
    """The special operands contain zeros of both signs, infinities and NaN."""
    torch.manual_seed(special)
    width = 4 + int(torch.randint(4, ()))
    cases, expected = [], []
    for k, text in enumerate(expressions(width)):
        shape = (*torch.randint(1, 4, (k % 2,)).tolist(), 2, width)
        tensors = operands(shape, (torch.float32, torch.float64)[(k + k // 2 + special) % 2], special)
        program, constants, result = program_of(text, tensors)
        names = [node["name"] for node in program["nodes"] if node.get("leaf") == "parameter"]
        parameters = {name: encode_values(tensors[name]) for name in names}
        cases.append((program, [encode_values(constant) for constant in constants.tensors], parameters))
        expected.append((text, {name: tensors[name] for name in names}, result))
    results = run_javascript("runSteps", cases, tmp_path)
    for (text, used, result), actual in zip(expected, results, strict=True):
        assert_equal_on_page(actual["result"], result, lambda text=text, used=used: f"{text} with {used}")


@needs_javascript
def test_the_evaluator_has_the_functions_of_the_programs(tmp_path: Path) -> None:
    tensors = operands((3, 2, 5), torch.float64, False)
    programs = [program_of(text, tensors)[0] for text in expressions(5)]
    used = {node["function"] for program in programs for node in program["nodes"] if "function" in node}
    assert used == set(run_javascript("functionNames", None, tmp_path))
    assert used > ELEMENTWISE.keys()


@pytest.mark.parametrize("text", REFUSED)
def test_other_functions_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="^it "):
        program_of(text, operands((2, 5), torch.float64, False))
