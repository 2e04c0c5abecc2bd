"""Steps that can't be compiled: the error names operation and line, and the reference engine runs them."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import unrolled as ur

GLOBAL = torch.linspace(-1, 1, 8, requires_grad=True)
MATRIX = torch.eye(8, requires_grad=True)


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
    return torch.sort(torch.cat([h, x, h], -1), -1)[0][:, 8:16]


def batch_mean(self, x, h):
    return torch.tanh(h + x - x.mean(0))


def batch_norm(self, x, h):
    return F.batch_norm(h + x, None, None, training=True)


def batch_flip(self, x, h):
    return h + x.flip(0)


def batch_attention(self, x, h):
    return torch.softmax(h @ x.t(), -1) @ x


def dynamic_shape(self, x, h):
    return h + x[x > 0].sum()


def nonzero(self, x, h):
    return h + x * x.nonzero().shape[0]


def complex_product(self, x, h):
    return (torch.view_as_complex((h + x).view(-1, 4, 2)) * 1j).real.repeat(1, 2)


def batch_std(self, x, h):
    return torch.tanh(h / x.std(0))


def noise_for_all_rows(self, x, h):
    return h + x * torch.randn(8)


def random_weights(self, x, h):
    return h + x * torch.randn_like(x[:1])


def random_integers(self, x, h):
    return h + x * torch.randint(3, x.shape)


def own_generator(self, x, h):
    return h + x * torch.randn(x.shape, generator=torch.default_generator)


def alpha_dropout(self, x, h):
    return F.alpha_dropout(h + x, 0.5, True)


def half_precision(self, x, h):
    return h + x * torch.randn_like(x, dtype=torch.float16).float()


def size(self, x, h):
    return (h + x) / len(x)


def branch_on_size(self, x, h):
    return h + x if x.shape[0] > 50 else h - x


def python_noise(self, x, h):
    return h + x * random.random()


def outside(self, x, h):
    return torch.tanh(h + x * GLOBAL)


def outside_matrix(self, x, h):
    return torch.tanh(h + x @ MATRIX)


def stores_a_tensor(self, x, h):
    self.last = getattr(self, "last", 0) + x
    return torch.tanh(h + self.last)


def complex_dtype(self, x, h):
    return torch.fft.rfft(h + x).abs()[:, [0, 1, 2, 3, 3, 2, 1, 0]]


def bfloat16(self, x, h):
    return torch.tanh((h + x).bfloat16()).to(h.dtype)


def integers(self, x, h):
    return (h + x) * (((h * 1e6).long() * 1103515245 + 12345) % 2**31)


def differences_of_rows(self, x, h):
    return torch.tanh((h[:, None] - x[None]).abs().sum(1))


def weights_of_the_batch(self, x, h):
    return torch.tanh(h @ (x.t() @ h))


def negative_shift(self, x, h):
    return torch.tanh(h + x * ((3 * x).long() >> -1))


def divisor_may_be_zero(self, x, h):
    return torch.tanh(h + x + (3 * x).long() % (1 + (3 * h).long().abs()))


def number_out_of_range(self, x, h):
    return torch.tanh(h + x + (x > 0).to(torch.uint8).clamp(min=-1))


def loop_over_rows(self, x, h):
    return torch.tanh(torch.stack([row + h[0] for row in x]))


def list_of_values(self, x, h):
    return torch.tanh(h + x * len(x.tolist()[0]))


def single_rows(self, x, h):
    return torch.tanh(h + torch.cat(x.split(1)))


def new_parameter(self, x, h):
    return torch.tanh(h + x * torch.nn.Parameter(torch.ones(8)))


def sparse(self, x, h):
    return torch.tanh(h + x * torch.eye(8).to_sparse().to_dense()[0])


def sparse_values(self, x, h):
    return torch.tanh(h + x.to_sparse().to_dense())


class Lgamma(torch.autograd.Function):
    """A function whose backward isn't supported."""

    @staticmethod
    def forward(v):
        return v.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].lgamma()


def only_in_backward(self, x, h):
    return Lgamma.apply(h + x)


def in_a_helper(self, x, h):
    return helper(h + x)


def without_rule(self, x, h):
    return h + torch.linalg.matrix_exp(x[:, :4].unflatten(1, (2, 2))).flatten(1).repeat(1, 2)


def helper(v):
    return v.lgamma()


IN_PLACE = (inplace, inplace_view)
UNSUPPORTED = [
    (branch, "torch.Tensor.__bool__", "values of a tensor, .* use torch.where"),
    (item, "torch.Tensor.item", "values of a tensor"),
    (inplace, "torch.Tensor.add_", "changes its input h in place"),
    (inplace_view, "torch.Tensor.__setitem__", "changes its input x in place"),
    (sort, "torch.sort", "up to 16 sorted values per row, got 24"),
    (dynamic_shape, "torch.Tensor.__getitem__", "the shape of a result depends .* use torch.where"),
    (nonzero, "torch.Tensor.nonzero", "the shape of a result depends .* use torch.where"),
    (complex_product, "torch.view_as_complex", "converts to torch.complex64 in the step; compute the real"),
    (batch_mean, "torch.Tensor.mean", "mixes rows of the batch, .* over the features"),
    (batch_std, "torch.Tensor.std", "mixes rows of the batch, .* over the features"),
    (batch_norm, "torch.nn.functional.batch_norm", "statistics over the batch, .* use layer_norm"),
    (batch_flip, "torch.Tensor.flip", "mixes rows of the batch"),
    (batch_attention, "torch.Tensor.matmul", "mixes rows of the batch"),
    (noise_for_all_rows, "torch.randn", "random numbers in a way .*, with numbers for each row of the batch"),
    (random_weights, "torch.randn_like", "random numbers in a way .*, with numbers for each row"),
    (random_integers, "torch.randint", "random numbers in a way .*aten.randint"),
    (own_generator, "torch.randn", "random numbers in a way .* without a generator"),
    (alpha_dropout, "torch.nn.functional.alpha_dropout", "random numbers in a way"),
    (half_precision, "torch.randn_like", "random numbers in a way .* in float32 or float64"),
    (size, "torch.Tensor.div", "depends on the batch size"),
    (branch_on_size, "torch.Tensor", "depends on the batch size"),
    (python_noise, "torch.Tensor.mul", "differs from run to run"),
    (outside, "torch.Tensor.mul", "outside .* requires a gradient; declare it as a Param"),
    (outside_matrix, "torch.Tensor.matmul", "outside .* requires a gradient; declare it as a Param"),
    (stores_a_tensor, "torch.Tensor.add", "another run of the step created"),
    (complex_dtype, "torch.fft.rfft", "converts to torch.complex64"),
    (bfloat16, "torch.Tensor.bfloat16", "converts to torch.bfloat16"),
    (integers, "torch.Tensor.mul", "integers that may exceed 2\\^53; limit its operands with clamp"),
    (differences_of_rows, "torch.Tensor.sub", "mixes rows of the batch"),
    (weights_of_the_batch, "torch.Tensor.matmul", "mixes rows of the batch"),
    (loop_over_rows, "torch.Tensor.unbind", "splits the batch into rows, .* compute all rows at once"),
    (list_of_values, "torch.Tensor.unbind", "splits the batch into rows, for example .* tolist\\(\\)"),
    (single_rows, "torch.Tensor.split", "splits the batch into rows"),
    (new_parameter, "torch.Tensor.mul", "creates a tensor that can't be captured, such as an nn.Parameter"),
    (sparse, "torch.Tensor.to_sparse", "a tensor with the layout torch.sparse_coo"),
    (sparse_values, "torch.Tensor.to_sparse", "a tensor with the layout torch.sparse_coo"),
    (negative_shift, "torch.Tensor.__rshift__", "shifts by a negative number of bits, -1"),
    (divisor_may_be_zero, "torch.Tensor.remainder", "integers needs a constant divisor other than 0"),
    (number_out_of_range, "torch.Tensor.clamp", "uses -1, which is outside the range of torch.uint8"),
    (only_in_backward, "the backward of", "aten.lgamma"),
    (in_a_helper, "torch.Tensor.lgamma", "aten.lgamma.*: native/operations.py has no expression"),
    (without_rule, "torch.linalg.matrix_exp", "aten.linalg_matrix_exp.*: compiler/lowering/ has no rule"),
]


@pytest.mark.parametrize(
    ("step", "name", "reason"), UNSUPPORTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_error_names_operation_and_line(step: Callable[..., Any], name: str, reason: str) -> None:
    cell = type(f"Unsupported{step.__name__.title()}", (ur.Cell,), {"step": step})
    layer, x = ur.Recurrent(cell, 8, 8), torch.randn(3, 2, 8, requires_grad=True)
    line = step.__code__.co_firstlineno + 1
    pattern = f"({reason}).*\\({re.escape(name)}[^,]*, {re.escape(__file__)}:{line}\\)$"
    with ur.engine("native"), pytest.raises(RuntimeError, match=pattern) as raised:
        layer(x.clone())
    assert str(raised.value).count(__file__) == 1
    if step in IN_PLACE:
        with ur.engine("auto"), pytest.raises(ValueError, match="in place"):
            layer(x.detach().clone())
        return

    def run_with_seed() -> torch.Tensor:
        torch.manual_seed(1)
        random.seed(1)
        return layer(x.clone())[0]

    with ur.engine("auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_with_seed()
        output = run_with_seed()
    [warning] = caught  # only one for two calls
    message = str(warning.message)
    assert message.startswith(
        f"{cell.__name__} runs on the reference engine, which is slower, because it can't be compiled: "
    )
    assert re.search(pattern, message)
    assert output.requires_grad is (step is not item)
    with ur.engine("reference"):
        assert torch.equal(output, run_with_seed())


UNKNOWN = {
    "is_grad_enabled": lambda self, x, h: torch.tanh(h + x) * (1.0 if torch.is_grad_enabled() else 0.5),
    "requires_grad": lambda self, x, h: torch.tanh(h + x) * (1.0 if x.requires_grad else 0.5),
    "is_inference": lambda self, x, h: torch.tanh(h + x) * (1.0 if h.is_inference() else 0.5),
    "eval": lambda self, x, h: torch.tanh(h + x) * eval("1.0 if torch.is_grad_enabled() else 0.5"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_known_only_while_the_step_runs(name: str) -> None:
    layer = ur.Recurrent(type("UnknownCell", (ur.Cell,), {"step": UNKNOWN[name]}), 8, 8)
    x = torch.randn(3, 2, 8, requires_grad=True)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            without = layer(x.detach())[0]
        with torch.inference_mode():
            return [layer(x)[0].clone(), without, layer(x.detach())[0].clone()]

    with ur.engine("native"), pytest.raises(RuntimeError, match=f"it reads {name}, which a compiled loop"):
        run()
    with ur.engine("auto"), pytest.warns(match=f"runs on the reference engine, .* it reads {name}"):
        actual = [layer(x)[0], *run()]
    with ur.engine("reference"):
        assert all(map(torch.equal, actual, [layer(x)[0], *run()]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64], ids=str)
def test_state_of_another_dtype_keeps_it(dtype: torch.dtype) -> None:
    cell = type("CastCell", (ur.Cell,), {"step": lambda self, x, h: (2 * x + h).to(dtype)})
    layer, x = ur.Recurrent(cell, 8, 8), torch.randn(3, 2, 8)
    message = f"its step returns h as {dtype} instead of torch.float32; write .to\\(x.dtype\\) .*{__file__}:"
    with ur.engine("auto"), pytest.warns(match=message):
        output, state = layer(x)
    with ur.engine("reference"):
        expected, expected_state = layer(x)
    assert torch.equal(output, expected)
    assert torch.equal(state, expected_state)
    assert output.dtype is state.dtype is dtype


def test_training_is_no_option() -> None:
    with pytest.raises(TypeError, match="training is the mode of the layer: give the option another name"):
        type("Taken", (ur.Cell,), {"training": True})


@pytest.mark.slow
def test_too_many_pieces() -> None:
    class Flip(ur.Cell):
        def step(self, x, h):
            return torch.tanh(h.flip(-1) + x)

    layer, x = ur.Recurrent(Flip, 300, 300), torch.randn(2, 2, 300)
    with (
        ur.engine("native"),
        pytest.raises(RuntimeError, match="rearranges features into more than 256 pieces"),
    ):
        layer(x)
