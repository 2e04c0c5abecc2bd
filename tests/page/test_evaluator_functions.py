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
from unrolled.tracing.program_recorder import Constants, ProgramRecorder
from unrolled.tracing.provenance import CallRecorder
from unrolled.tracing.step_functions import UnsupportedError
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
F.one_hot(a3.argmax(-1), 5)
a3.count_nonzero(1)
a3.nansum(1)
torch.xlogy(m.float(), 1 + b.abs())
torch.logaddexp2(a, b)
torch.isposinf(a) | torch.isneginf(a)
torch.deg2rad(a)
torch.rad2deg(a)
torch.triu(a3, 1)
torch.diag_embed(a)
F.pad(a3.double(), (1, 2), mode='replicate')
(a > 0) ^ (b > 0)
a // 0.3
1.7 // (1 + a.abs())
2.5 % (1 + a.abs())
(a * 10).long() // 3
(a * 10).long() % 3
(a * 10).long() / 4
torch.nan_to_num(a, 0.5, 2.0, -2.0)
a.expand(2, *a.shape)
a3.unbind(1)[1]
torch.where(m, 1.0, 0.0)
F.dropout(a, 0.5, training=False)
torch.special.expit(a)
"""
TABLES = [
    *(templates.UNARY, templates.JUMPS, templates.BINARY, templates.CHOICES, templates.MASKS),
    *(templates.REDUCTIONS, templates.MOVES, templates.MATRICES, templates.LIKE),
]
FIELDS = {"a": "a", "b": "b", "c": "c", "r": "r", "m": "m", "k": "k", "q": "q", "n": "0.3", "w": "5", "i": "2",
          "flag": "True", "p_1w": "w1", "p_1": "s", "o": "5", "i_": "5", "p_oi": "w2", "p2_oi": "w3[0]",
          "p_io": "w2", "p_o": "q", "p_i": "q", "p_o2": "w2[:, :2]", "p_2i": "w2[:2]", "p_2oi": "w3[:2]",
          "p_o_": "q"}  # fmt: skip
UNSUPPORTED = ("complex", "self.", "circular", "one_hot({a}.argmax(-1))")


def operands(shape: tuple[int, ...], dtype: torch.dtype, special: bool) -> dict[str, Tensor]:
    """Return random operands by the names that the templates use. ``b`` and ``k`` are broadcast."""
    shapes = {
        "a": shape,
        "b": (*shape[:-2], 1, 5),
        "c": (5,),
        "d": shape,
        "r": (2, 5),
        "q": (5,),
        "s": (1,),
        "w1": (1, 5),
    }
    shapes |= {"w2": (5, 5), "w3": (4, 5, 5), "q3": (4,), "a3": (2, 3, 5), "x": (2, 5)}
    tensors = {name: torch.randn(size, dtype=dtype) for name, size in shapes.items()}
    if special:
        values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
        for name in ("a", "b", "c"):
            tensor = tensors[name].flatten()
            tensor[: len(values)] = values[torch.randperm(len(values))][: len(tensor)]
            tensors[name] = tensor.reshape(shapes[name])
    masks = {"m": tensors["a"] > 0.2, "k": tensors["b"] > -0.2}
    return tensors | masks


def program_of(text: str, tensors: dict[str, Tensor]) -> tuple[Any, Constants, Tensor]:
    """Return the program of an expression, its constants and its value."""
    constants, recorder = Constants(), CallRecorder()
    with recorder:
        result = eval(text, {"torch": torch, "F": F, "math": math, **tensors})
    run = StepRun(recorder, tensors["x"], {}, None, {}, {})
    recorded = ProgramRecorder(run, {n: t for n, t in tensors.items() if n != "x"}, constants, {})
    return recorded.program({"result": result}), constants, result


@needs_javascript
def test_every_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = [
        line.format_map({**FIELDS, "b": "d"} if "stack" in line else FIELDS)
        for table in TABLES
        for line in table.strip().splitlines()
        if line not in ("{n}", "{p_1}[0]")
    ]
    texts = [text for text in texts + OTHERS.strip().splitlines() if not any(u in text for u in UNSUPPORTED)]
    cases, expected = [], []
    for special in (False, True):
        for k, text in enumerate(texts):
            dtype = (torch.float32, torch.float64)[(k + special) % 2]
            tensors = operands(((2, 5), (2, 3, 5))[k % 3 == 0], dtype, special)
            try:
                program, constants, result = program_of(text, tensors)
            except (RuntimeError, ValueError, IndexError, UnsupportedError) as e:
                print(text, type(e), str(e)[:100])
                continue
            parameters = {name: encode_values(tensor) for name, tensor in tensors.items()}
            cases.append((program, [encode_values(c) for c in constants.tensors], parameters))
            expected.append((f"{text} with {tensors}", result))
    bad = []
    for (text, result), actual in zip(expected, run_javascript("runSteps", cases, tmp_path), strict=True):
        try:
            assert_equal_on_page(actual["result"], result, text)
        except AssertionError as e:
            bad.append((text.split(" with ")[0], result.flatten()[:16], actual["result"][:16], str(e)[-200:]))
    for b in bad:
        print(*b, sep="\n  ")
    assert not bad
