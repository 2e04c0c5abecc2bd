"""What a step may not do: told by operation and line, and run on the reference engine instead."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close

GLOBAL = torch.linspace(-1, 1, 8)


def branch(self, x, h):
    return h + x if h.sum() > 0 else h - x


def item(self, x, h):
    return h * x.mean().item()


def inplace(self, x, h):
    return h.add_(x)


def inplace_view(self, x, h):
    x[:, 1:] = 0
    return h + x


def sort(self, x, h):
    return torch.sort(h + x, -1)[0]


def batch_mean(self, x, h):
    return torch.tanh(h + x - x.mean(0))


def batch_norm(self, x, h):
    return F.batch_norm(h + x, None, None, training=True)


def batch_flip(self, x, h):
    return h + x.flip(0)


def batch_attention(self, x, h):
    return torch.softmax(h @ x.t(), -1) @ x


def noise(self, x, h):
    return h + x * torch.randn_like(x)


def dropout(self, x, h):
    return F.dropout(h + x, 0.5)


def size(self, x, h):
    return (h + x) / len(x)


def branch_on_size(self, x, h):
    return h + x if x.shape[0] > 50 else h - x


def python_noise(self, x, h):
    return h + x * random.random()


def outside(self, x, h):
    return torch.tanh(h + x * GLOBAL)


def remembered(self, x, h):
    self.last = getattr(self, "last", 0) + x
    return torch.tanh(h + self.last)


def complexes(self, x, h):
    return torch.fft.rfft(h + x).abs()[:, [0, 1, 2, 3, 3, 2, 1, 0]]


def half(self, x, h):
    return torch.tanh((h + x).bfloat16()).to(h.dtype)


def whole_numbers(self, x, h):
    return (h + x) * ((h > 0).sum(-1, keepdim=True) * 1000 // 7)


def backward_only(self, x, h):
    return torch.sigmoid(h + x).prod(-1, keepdim=True) + x


def handed_on(self, x, h):
    return helper(h + x)


def helper(v):
    return v.cummax(-1).values


CHANGING = (inplace, inplace_view)
REFUSED = [
    (branch, "torch.Tensor.__bool__", "values of a tensor"),
    (item, "torch.Tensor.item", "values of a tensor"),
    (inplace, "torch.Tensor.add_", "changes its input h in place"),
    (inplace_view, "torch.Tensor.__setitem__", "changes its input x in place"),
    (sort, "torch.sort", "aten.sort.stable|aten.sort.default is not in the compiler's vocabulary"),
    (batch_mean, "torch.Tensor.mean", "mixes rows of the batch"),
    (batch_norm, "torch.nn.functional.batch_norm", "batch_norm"),
    (batch_flip, "torch.Tensor.flip", "mixes rows of the batch"),
    (batch_attention, "torch.Tensor.matmul", "mixes rows of the batch"),
    (noise, "torch.randn_like", "draws random numbers"),
    (dropout, "torch.nn.functional.dropout", "draws random numbers"),
    (size, "torch.Tensor.div", "depends on the size of the batch"),
    (branch_on_size, "torch.Tensor", "depends on the size of the batch"),
    (python_noise, "torch.Tensor.mul", "differs from run to run"),
    (outside, "torch.Tensor.mul", "a tensor from outside"),
    (remembered, "torch.Tensor.add", "another run of the step has made"),
    (complexes, "torch.fft.rfft", "changes to torch.complex64"),
    (half, "torch.Tensor.bfloat16", "changes to torch.bfloat16"),
    (whole_numbers, "torch.Tensor.mul", "computes with whole numbers"),
    (backward_only, "the backward of torch.Tensor.prod", "aten.cumprod"),
    (handed_on, "torch.Tensor.cummax", "aten.cummax"),
]


@pytest.mark.parametrize(("step", "name", "why"), REFUSED, ids=lambda part: getattr(part, "__name__", ""))
def test_what_is_refused_is_named_with_its_line(step: Callable[..., Any], name: str, why: str) -> None:
    cell = type(f"Refused{step.__name__.title()}", (ur.Cell,), {"step": step})
    layer, x = ur.Recurrent(cell, 8, 8), torch.randn(3, 2, 8, requires_grad=True)
    line = step.__code__.co_firstlineno + 1
    pattern = f"({why}).*\\({re.escape(name)}[^,]*, {re.escape(__file__)}:{line}\\)$"
    with ur.engine("native"), pytest.raises(RuntimeError, match=pattern):
        layer(x.clone())
    if step in CHANGING:
        with ur.engine("auto"), pytest.raises(ValueError, match="in place"):
            layer(x.detach().clone())
        return

    def seeded() -> torch.Tensor:
        torch.manual_seed(1)
        random.seed(1)
        return layer(x.clone())[0]

    with ur.engine("auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seeded()
        output = seeded()
    [told] = caught  # once
    assert f"{cell.__name__} runs on the reference engine, step by step: " in str(told.message)
    assert re.search(pattern, str(told.message))
    assert output.requires_grad is (step is not item)
    with ur.engine("reference"):
        assert torch.equal(output, seeded())


class Dropping(ur.Cell):
    w = ur.Param("hidden", "input")

    def step(self, x, h):
        return torch.tanh(F.dropout(h + linear(x, self.w), 0.5, self.training))


@NEEDS_COMPILER
def test_dropout_in_a_step_is_the_reference_engines_in_training() -> None:
    layer, x = ur.Recurrent(Dropping, 3, 8), torch.randn(3, 2, 3)
    layer.eval()
    with ur.engine("reference"):
        expected = layer(x)[0]
    with ur.engine("native"):
        assert_close(layer(x)[0], expected, 1e-5)
        layer.train()
        with pytest.raises(
            RuntimeError, match=r"random numbers.*\(torch.nn.functional.dropout, .*test_refused.py"
        ):
            layer(x)
        layer.eval()
        assert_close(layer(x)[0], expected, 1e-5)
    layer.train()
    with ur.engine("auto"), pytest.warns(match="Dropping runs on the reference engine"):
        assert not torch.allclose(layer(x)[0], expected)
    with pytest.raises(TypeError, match="training is the mode of the layer: name the option otherwise"):
        type("Taken", (ur.Cell,), {"training": True})


def test_a_step_of_too_many_pieces_is_refused() -> None:
    class Turned(ur.Cell):
        def step(self, x, h):
            return torch.tanh(h.flip(-1) + x)

    layer, x = ur.Recurrent(Turned, 300, 300), torch.randn(2, 2, 300)
    with (
        ur.engine("native"),
        pytest.raises(RuntimeError, match="rearranges features into more than 256 pieces"),
    ):
        layer(x)
