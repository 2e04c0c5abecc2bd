"""Operations that a step can use, by family, for test_operations and test_random_steps.

Every function takes a value ``(batch, width)`` and is defined and bounded for any input. Where it also takes
``get``, a call ``get(*shape)`` returns a parameter of the cell.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import linear

import unrolled as ur

Get = Callable[..., Tensor]
Run = Callable[[Tensor, tuple[Tensor, ...], Get], tuple[Tensor, ...]]


def cell_of(run: Run, inputs: int, widths: tuple[int, ...]) -> type[ur.Cell]:
    """Return a cell class whose step is ``run(x, states, get)``.

    Args:
        run: Computes the new states. It calls ``get`` for its parameters, in the same order in each run.
        inputs: Width of the input.
        widths: Widths of the states.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record_shape(*shape: int) -> Tensor:
        shapes[f"p{len(shapes)}"] = shape
        return torch.zeros(shape)

    run(torch.ones(2, inputs), tuple(torch.ones(2, width) for width in widths), record_shape)

    def step(self: Any, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        params = iter([getattr(self, name) for name in shapes])
        return run(x, states, lambda *_: next(params))

    state_sizes = {f"s{k}": width for k, width in enumerate(widths)}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = [inspect.Parameter(name, kind) for name in ("self", "x", *state_sizes)]
    step.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    params = {name: ur.Param(*shape) for name, shape in shapes.items()}
    return type("Generated", (ur.Cell,), {"state": state_sizes, "step": step, **params})


def between(v: Tensor, low: float = -0.9, high: float = 0.9) -> Tensor:
    """Squash values into an interval, for functions that are defined only there."""
    return low + (high - low) * torch.sigmoid(v)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu-tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": lambda v: F.elu(v, 0.7),
    "celu": lambda v: F.celu(v, 1.3),
    "selu": F.selu,
    "leaky-relu": lambda v: F.leaky_relu(v, 0.2),
    "softplus": F.softplus,
    "softplus-sharp": lambda v: F.softplus(v, 2.0, 1.0),
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "hardtanh": lambda v: F.hardtanh(v, -0.7, 0.4),
    "hardswish": F.hardswish,
    "hardshrink": lambda v: F.hardshrink(v, 0.3),
    "softshrink": lambda v: F.softshrink(v, 0.3),
    "tanhshrink": F.tanhshrink,
    "threshold": lambda v: F.threshold(v, 0.1, -0.2),
    "method": lambda v: (v * 2).sigmoid_(),
    "module": torch.nn.GELU(),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda v: torch.exp(-v.abs()),
    "exp2": lambda v: torch.exp2(between(v)),
    "expm1": lambda v: torch.expm1(between(v)),
    "log": lambda v: torch.log(between(v, 0.2, 3)),
    "log2": lambda v: torch.log2(between(v, 0.2, 3)),
    "log10": lambda v: torch.log10(between(v, 0.2, 3)),
    "log1p": lambda v: torch.log1p(v * v),
    "sqrt": lambda v: torch.sqrt(1 + v * v),
    "rsqrt": lambda v: torch.rsqrt(1 + v * v),
    "reciprocal": lambda v: torch.reciprocal(1 + v * v),
    "square": lambda v: torch.square(torch.tanh(v)),
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": lambda v: torch.tan(between(v)),
    "asin": lambda v: torch.asin(between(v)),
    "acos": lambda v: torch.acos(between(v)),
    "atan": torch.atan,
    "sinh": lambda v: torch.sinh(between(v)),
    "cosh": lambda v: torch.cosh(between(v)),
    "asinh": torch.asinh,
    "acosh": lambda v: torch.acosh(1.5 + v * v),
    "atanh": lambda v: torch.atanh(between(v)),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "sinc": torch.sinc,
    "logit": lambda v: torch.logit(between(v, 0.1, 0.9)),
    "entr": lambda v: torch.special.entr(between(v, 0.1, 2)),
    "abs": torch.abs,
    "negative": lambda v: -v,
    "power-2": lambda v: between(v) ** 2,
    "power-3": lambda v: between(v) ** 3,
    "power-half": lambda v: (1 + v * v) ** 0.5,
    "power-minus-1": lambda v: (1 + v * v) ** -1,
    "power-1.7": lambda v: between(v, 0.1, 2) ** 1.7,
    "power-of-2": lambda v: 2.0 ** torch.sin(v),
    "clamp": lambda v: v.clamp(-0.5, 0.5),
    "clamp-min": lambda v: v.clamp(min=-0.2),
    "clamp-max": lambda v: torch.clamp_max(v, 0.2),
    "where": lambda v: torch.where(v > 0.1, v, 0.5 * v),
    "where-number": lambda v: torch.where(v > 0.1, v, 0.0),
    "where-logic": lambda v: torch.where((v > -0.5) & (v < 0.5) | ~(v < 1), v, -v),
    "masked-fill": lambda v: v.masked_fill(v < 0, 0.3),
    "mask-product": lambda v: v * (v > 0),
    "mask-sum": lambda v: v * ((v > -0.5) + (v > 0.5)),
    "mask-number": lambda v: v * (v > 0).to(v.dtype) * 0.7,
    "is-finite": lambda v: torch.where(torch.isfinite(v), v, torch.zeros_like(v)),
    "nan-to-num": torch.nan_to_num,
    "numbers": lambda v: (1 - 2 * v / 3 + 0.5) * math.pi,
}
DISCONTINUOUS: dict[
    str, Callable[[Tensor], Tensor]
] = {  # rounding errors of the input may change the result a lot
    "sign": lambda v: torch.sign(v) * v,
    "floor": lambda v: v + torch.floor(v),
    "ceil": lambda v: v + v.ceil(),
    "round": lambda v: v + v.round(),
    "round-decimals": lambda v: v + v.round(decimals=1),
    "trunc": lambda v: v - v.trunc(),
    "frac": torch.frac,
    "remainder": lambda v: v % 0.7,
    "fmod": lambda v: torch.fmod(v, 0.7),
    "division-down": lambda v: torch.div(v, 0.3, rounding_mode="floor") * 0.1,
    "division-to-0": lambda v: torch.div(v, 0.3, rounding_mode="trunc") * 0.1,
}
CUSTOM_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {  # gradients that aren't the derivative
    "detach": lambda v: v.detach() * v,
    "straight-through": lambda v: (torch.tanh(v) - v).detach() + v,
    "hardsigmoid": F.hardsigmoid,  # torch's backward uses 1/6 in float32
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: torch.add(a, b, alpha=0.3),
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * torch.tanh(b),
    "divide": lambda a, b: a / (1 + b * b),
    "power": lambda a, b: between(a, 0.1, 2) ** torch.sin(b),
    "maximum": torch.maximum,
    "minimum": lambda a, b: torch.min(a, b),
    "fmax": torch.fmax,
    "lerp": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "lerp-number": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, torch.tanh(a), b, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, 1 + b * b, value=0.5),
    "clamp-tensors": lambda a, b: torch.clamp(a, -torch.sigmoid(b), torch.cos(b).abs()),
    "where-compare": lambda a, b: torch.where(a > b, a, torch.sin(b)),
    "hypot": lambda a, b: torch.hypot(a, b + 2),
    "atan2": lambda a, b: torch.atan2(a, 1 + b * b),
    "logaddexp": torch.logaddexp,
    "copysign": lambda a, b: torch.copysign(a, 3 * b),
    "remainder": lambda a, b: torch.remainder(a, 1 + b * b) * 0.1,
    "softmax-of-2": lambda a, b: (torch.stack([a, b], 1).softmax(1) * torch.stack([b, a], 1)).sum(1),
    "interleave": lambda a, b: torch.stack([a, b], -1).flatten(1)[:, : a.shape[1]],
    "join": lambda a, b: torch.cat([b[:, b.shape[1] // 2 :], a], 1)[:, : a.shape[1]],
    "outer": lambda a, b: (a[:, :, None] * torch.tanh(b)[:, None, :4]).mean(2),
    "cosine": lambda a, b: a * F.cosine_similarity(a, b + 0.1, dim=1, eps=0.1)[:, None],
}


def heads(v: Tensor) -> int:
    """Return into how many heads a value is split."""
    return 2 if v.shape[1] % 2 == 0 else 1


def assign_slices(v: Tensor) -> Tensor:
    y = torch.zeros_like(v)
    y[:, 1:] = v[:, :-1]
    y[:, 0] = 0.5
    return y


def assign_strided_slices(v: Tensor) -> Tensor:
    y = v.new_empty(v.shape)
    y[:, ::2] = torch.sin(v[:, ::2])
    y[:, 1::2] = v[:, 1::2] * 2
    return y


def assign_heads(v: Tensor) -> Tensor:
    y = torch.zeros(v.shape[0], heads(v), v.shape[1] // heads(v), dtype=v.dtype)
    y[:, -1] = v.view(y.shape)[:, 0]
    y[..., -1] += 0.5
    return y.flatten(1)


def modify_in_place(v: Tensor) -> Tensor:
    y = v.clone()
    y.mul_(torch.sigmoid(v)).add_(v, alpha=0.3)
    y[:, :1].neg_()
    y[y < -2] = -2
    return y.clamp_(-3, 3)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda v: torch.cat(v.chunk(2, -1)[::-1], -1),
    "split": lambda v: torch.cat(v.split([v.shape[1] - 1, 1], -1)[::-1], -1) if v.shape[1] > 1 else v,
    "slices": lambda v: torch.cat([v[:, ::2], v[:, 1::2]], 1),
    "negative-slice": lambda v: torch.cat([v[:, -1:], v[:, :-1]], 1),
    "stack": lambda v: torch.stack([v, torch.sin(v)], 1).flatten(1),
    "unbind": lambda v: torch.stack(v.unflatten(1, (heads(v), -1)).unbind(1)[::-1], 1).flatten(1),
    "roll": lambda v: v.roll(3, -1),
    "flip": lambda v: v.flip(-1),
    "pad": lambda v: F.pad(v, (2, 1), value=0.3)[:, : v.shape[1]],
    "pad-around": lambda v: F.pad(v[:, None], (1, 0), mode="circular")[:, 0, :-1],
    "expand": lambda v: v[:, :1].expand(-1, v.shape[1]) * v,
    "repeat": lambda v: v[:, :2].repeat(1, 3),
    "repeat-interleave": lambda v: v[:, :3].repeat_interleave(2, 1),
    "transpose": lambda v: v.unflatten(1, (heads(v), -1)).transpose(1, 2).flatten(1),
    "permute": lambda v: v.unflatten(1, (heads(v), -1)).permute(0, 2, 1).reshape(v.shape),
    "index": lambda v: v[:, [0, v.shape[1] - 1, 0]],
    "index-select": lambda v: v.index_select(1, torch.arange(v.shape[1]).flip(0)),
    "gather": lambda v: v.gather(1, torch.arange(v.shape[1]).flip(0).expand_as(v)),
    "unfold": lambda v: F.pad(v, (1, 1)).unfold(1, 3, 1).mean(-1),
    "diagonal": lambda v: (v[:, :, None] * v[:, None, :]).diagonal(dim1=1, dim2=2) * 0.3,
    "triangle": lambda v: torch.tril(v[:, :4, None] * torch.tanh(v)[:, None, :4]).sum(2),
    "by-head": lambda v: (v.unflatten(1, (heads(v), -1)) * v.unflatten(1, (heads(v), -1))[:, :, :1]).flatten(
        1
    ),
    "put-in-place": assign_slices,
    "put-by-steps": assign_strided_slices,
    "put-in-heads": assign_heads,
    "changed-in-place": modify_in_place,
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda v: torch.tanh(v.sum(-1, keepdim=True)),
    "sum-of-heads": lambda v: v.unflatten(1, (heads(v), -1)).sum(1),
    "mean": lambda v: v - v.mean(-1, keepdim=True),
    "variance": lambda v: v / (1 + v.var(-1, keepdim=True, correction=0)),
    "std": lambda v: v / (1 + torch.cat([v, v + 1], 1).std(-1, keepdim=True)),
    "norm": lambda v: v / (1 + (v + 0.1).norm(dim=-1, keepdim=True)),
    "norm-1": lambda v: v / (1 + v.norm(p=1, dim=-1, keepdim=True)),
    "norm-largest": lambda v: v / (1 + torch.linalg.vector_norm(v, math.inf, -1, keepdim=True)),
    "normalize": lambda v: F.normalize(v + 0.1, dim=-1, eps=0.1),
    "amax": lambda v: v - v.amax(-1, keepdim=True),
    "amin": lambda v: v - v.amin(-1, keepdim=True),
    "max": lambda v: v - v.max(-1, keepdim=True)[0],
    "min": lambda v: v - v.min(-1).values[:, None],
    "argmax": lambda v: v * (v.argmax(-1, keepdim=True) == torch.arange(v.shape[1])),
    "max-of-heads": lambda v: v.unflatten(1, (heads(v), -1)).amax(1),
    "logsumexp": lambda v: v - v.logsumexp(-1, keepdim=True),
    "softmax": lambda v: v.softmax(-1),
    "softmax-of-heads": lambda v: v.unflatten(1, (heads(v), -1)).softmax(-1).flatten(1),
    "softmax-over-heads": lambda v: v.unflatten(1, (heads(v), -1)).softmax(1).flatten(1),
    "log-softmax": lambda v: v.log_softmax(-1),
    "layer-norm": lambda v: F.layer_norm(v, v.shape[1:], eps=0.1),
    "rms-norm": lambda v: F.rms_norm(v, v.shape[1:], eps=0.1),
    "group-norm": lambda v: F.group_norm(torch.cat([v, v + 1], 1), heads(v), eps=0.1),
    "cumsum": lambda v: v.cumsum(-1) * 0.3,
    "cumsum-back": lambda v: v.softmax(-1).flip(-1).cumsum(-1).flip(-1),
    "any": lambda v: v * ((v > 1).any(-1, keepdim=True) | (v > -1).all(-1, keepdim=True)),
    "count": lambda v: v * (v > 0).sum(-1, keepdim=True) / v.shape[1],
    "attention": lambda v: (lambda q: torch.softmax(q @ q.mT, -1) @ q)(
        v.unflatten(1, (heads(v), -1))
    ).flatten(1),
}
CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda v: v * torch.arange(v.shape[1]) / v.shape[1],
    "eye": lambda v: v @ torch.eye(v.shape[1], dtype=v.dtype),
    "triangle": lambda v: v @ torch.ones(v.shape[1], v.shape[1], dtype=v.dtype).tril() / v.shape[1],
    "tensor": lambda v: v * torch.tensor(0.5),
    "new-tensor": lambda v: v[:, :3] * v.new_tensor([1.0, -2.0, 0.5])[: v.shape[1]],
    "full-like": lambda v: torch.full_like(v, 0.2) * v + torch.ones_like(v),
    "zeros-of-batch": lambda v: v + torch.zeros(v.shape[0], 1, dtype=v.dtype),
    "mask": lambda v: torch.where(torch.arange(v.shape[1]) < 2, v, -v),
    "masked-fill": lambda v: v.masked_fill(torch.arange(v.shape[1]) % 2 == 0, 0.1),
    "linspace": lambda v: v * torch.linspace(-1, 1, v.shape[1], dtype=v.dtype),
}
PRODUCTS: dict[str, Callable[[Tensor, Get], Tensor]] = {
    "linear": lambda v, get: linear(v, get(5, v.shape[1]), get(5)),
    "square": lambda v, get: linear(v, get(v.shape[1], v.shape[1])),
    "matmul": lambda v, get: v @ get(v.shape[1], 6),
    "einsum": lambda v, get: torch.einsum("bi,oi->bo", v, get(4, v.shape[1])),
    "addmm": lambda v, get: torch.addmm(get(7), v, get(v.shape[1], 7), beta=0.5, alpha=0.7),
    "bilinear": lambda v, get: F.bilinear(v, torch.sin(v), get(3, v.shape[1], v.shape[1]), get(3)),
    "low-rank": lambda v, get: linear(linear(v, get(2, v.shape[1])), get(v.shape[1], 2)),
    "reset": lambda v, get: linear(torch.sigmoid(v) * v, get(v.shape[1], v.shape[1])),
    "chain": lambda v, get: linear(torch.tanh(linear(v, get(6, v.shape[1]))), get(v.shape[1], 6), get(1)),
    "heads-einsum": lambda v, get: torch.einsum(
        "bhi,hio->bho", v.unflatten(1, (heads(v), -1)), get(heads(v), v.shape[1] // heads(v), 3)
    ).flatten(1),
    "heads-bmm": lambda v, get: (
        torch.bmm(v.unflatten(1, (heads(v), -1)).transpose(0, 1), get(heads(v), v.shape[1] // heads(v), 3))
        .transpose(0, 1)
        .flatten(1)
    ),
    "heads-matmul": lambda v, get: (
        v.view(-1, heads(v), 1, v.shape[1] // heads(v)) @ get(heads(v), v.shape[1] // heads(v), 3)
    ).flatten(1),
    "heads-chunks": lambda v, get: torch.cat(
        [linear(part, get(3, part.shape[1])) for part in v.chunk(2, 1)], 1
    ),
    "row-of-matrix": lambda v, get: v * (v @ get(v.shape[1]))[:, None],
    "matrix-of-matrices": lambda v, get: linear(v, get(4, 3) @ get(3, v.shape[1])),
    "normed-matrix": lambda v, get: linear(v, F.normalize(get(5, v.shape[1]), dim=1)),
    "skew-matrix": lambda v, get: (lambda m: linear(v, m - m.t()))(get(v.shape[1], v.shape[1])),
    "transposed": lambda v, get: (get(4, v.shape[1]) @ v.t()).t(),
    "distances": lambda v, get: ((v[:, None] - get(3, v.shape[1])) ** 2).mean(-1),
    "scale": lambda v, get: v * get(v.shape[1]) + get(v.shape[1]),
    "decay": lambda v, get: v * torch.exp(-F.softplus(get(v.shape[1]))),
    "prelu": lambda v, get: F.prelu(v, get(v.shape[1])),
    "prelu-of-1": lambda v, get: F.prelu(v, get(1)),
    "layer-norm": lambda v, get: F.layer_norm(v, v.shape[1:], get(v.shape[1]), get(v.shape[1]), eps=0.1),
    "rms-norm": lambda v, get: F.rms_norm(v, v.shape[1:], get(v.shape[1]), eps=0.1),
    "group-norm": lambda v, get: F.group_norm(
        torch.cat([v, v + 1], 1), heads(v), get(2 * v.shape[1]), get(2 * v.shape[1]), eps=0.1
    ),
    "clamp": lambda v, get: torch.clamp(v, -get(v.shape[1]).abs(), get(1).abs() + 0.5),
    "put": lambda v, get: torch.cat([get(2).expand(v.shape[0], 2), v], 1),
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    f"{family}: {name}": function
    for family, table in {
        "activation": ACTIVATIONS,
        "function": FUNCTIONS,
        "move": MOVES,
        "reduction": REDUCTIONS,
        "constant": CONSTANTS,
    }.items()
    for name, function in table.items()
}


def fit(v: Tensor, width: int) -> Tensor:
    """Repeat or cut columns to a width."""
    repeats = -(-width // v.shape[1])
    return (v.repeat(1, repeats) if repeats > 1 else v)[:, :width]
