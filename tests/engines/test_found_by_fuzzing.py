"""Faults that random cells (see ``tests/fuzz``) have found, each in its shortest form."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn import functional as F
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import (
    LAYERS,
    NEEDS_COMPILER,
    TOLERANCE,
    assert_close,
    pair,
    results_of_engines,
    tensors,
)
from helpers.sampling import sample
from helpers.step_batch import BatchCompiler
from unrolled.engines.compiler.capture import capture
from unrolled.engines.compiler.stored_graph import from_data, to_data

pytestmark = NEEDS_COMPILER


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"checkpoint": 2}], ids=["", "checkpoint"])
@pytest.mark.parametrize("kind", sample(LAYERS, ["gru"]))
def test_first_and_second_gradients_if_states_and_weights_depend_on_the_input(
    kind: str, options: dict[str, Any]
) -> None:
    """With ``create_graph=True``, the gradient of x must not include what reaches x through the others."""
    hidden = 4
    ours, theirs = (layer.double() for layer in pair(kind, 3, hidden))
    leaf = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def gradients(layer: nn.Module, **options: Any) -> list[Tensor]:
        x = leaf * 1
        params = {name: param * x.square().mean() for name, param in layer.named_parameters()}
        mean = x.mean((0, 2))[None, :, None]
        state = mean.expand(1, 2, layer.proj_size or hidden).contiguous()
        given = (state, mean.expand(1, 2, hidden).contiguous()) if "LSTM" in type(layer).__name__ else state
        output = functional_call(layer, params, (x, given), options)[0]
        first = torch.autograd.grad(output.square().sum(), [leaf, *layer.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [leaf, *layer.parameters()])
        return [*first, *second]

    with ur.engine("native"):
        actual = gradients(ours, **options)
    assert_close(actual, gradients(theirs), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("reset_state", sample([None, "initial"]))
def test_gradients_of_a_state_that_resets_read(reset_state: str | None) -> None:
    layer = ur.GRU(3, 4).double()
    x, state = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    resets = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]]).bool().t()
    leaves = [x.requires_grad_(), state.requires_grad_(), *layer.parameters()]

    def gradients(create_graph: bool) -> Any:
        output, final = layer(x, state, resets=resets, reset_state=reset_state)
        loss = (output.cos().sum() + final.sin().sum()).square()
        return torch.autograd.grad(loss, leaves, create_graph=create_graph)

    with ur.engine("reference"):
        expected = gradients(False)
    with ur.engine("native"):
        assert_close(gradients(False), expected, 1e-11)
        assert_close(gradients(True), expected, 1e-11)


class ProductWithColumns(ur.Cell):
    """The gradient of the weight is a product with the transposed input."""

    weight = ur.Param(1, "input", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        v = torch.bmm(x[None], self.weight)[0]
        return torch.cat([torch.tanh(v[:, :1] + h[:, :1]), h[:, 1:]], 1)


class ConstantGradient(ur.Cell):
    """The gradients of x and of the weight are zeros."""

    weight = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h) + torch.floor(linear(x, self.weight) + linear(h, self.weight))


class ScalarOfParameters(ur.Cell):
    """The backward reads a scalar."""

    scale = ur.Param("hidden")
    bias = ur.Param(1)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + h * torch.sigmoid(self.scale.mean()) * torch.tanh(self.bias[0]))


class SavedComparison(ur.Cell):
    """The backward reads comparisons of the input, and of products with one."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        v = linear((x > 0).to(x.dtype), self.weight)
        return torch.sin(v * (v > 0).sum(-1, keepdim=True)) + 0.5 * h


class FlooredDivision(ur.Cell):
    """The divisor is made of parameters, and may be zero. Under vmap, ``remainder`` is such a division."""

    weight = ur.Param(1, "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        quotient = torch.div(h, self.weight**2, rounding_mode="floor")
        return torch.sin(x + torch.remainder(h, 1 + self.weight**2)) + 0.1 * torch.tanh(quotient)


CELLS = [ProductWithColumns, ConstantGradient, ScalarOfParameters, SavedComparison, FlooredDivision]


@pytest.mark.slow
@pytest.mark.parametrize("cell", sample(CELLS, [SavedComparison]))
@pytest.mark.parametrize("lengths", sample([None, [5, 3, 2]]))
def test_operators_save_values_of_every_shape(cell: type[ur.Cell], lengths: list[int] | None) -> None:
    """Transposed values and scalars: compare the operators with the reference engine."""
    torch.manual_seed(5)
    layer = ur.Recurrent(cell, 4, 4, dtype=torch.float64)
    params = {name: 0.5 * torch.randn_like(param) for name, param in layer.named_parameters()}
    x, state = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    options = {} if lengths is None else {"lengths": torch.tensor(lengths)}

    def run(x: Tensor, state: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(functional_call(layer, params, (x, state), options))

    weights = (torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64))

    def results(engine: str) -> list[Tensor]:
        with ur.engine(engine):
            values, pull = vjp(run, x, state, params)
            *gradients, of_params = pull(weights)
        return list(tensors([*values, *gradients, *of_params.values()]))

    assert_close(results("native"), results("reference"), 1e-11)

    def per_sample(x: Tensor, state: Tensor) -> Tensor:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return run(x[:, None], state[:, None], params)[0].square().sum()

        return torch.func.grad(loss)(params)

    if lengths is None:
        gradients = []
        for engine in ("native", "reference"):
            with ur.engine(engine):
                by_name = torch.func.vmap(per_sample, (1, 1))(x, state)
                gradients.append([by_name[name] for name in params])
        assert_close(*gradients, 1e-11)


class EqualGradients(ur.Cell):
    """The gradients of the parameters are views of one another, or of sums that repeat."""

    a = ur.Param("hidden")
    b = ur.Param(1, "hidden")
    c = ur.Param(2, "hidden")
    d = ur.Param(2, "hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.d.sum(0)) + h + self.a + self.b + self.c.sum(0))


@pytest.mark.parametrize("options", [{}, {"checkpoint": 2}], ids=["", "checkpoint"])
@pytest.mark.parametrize("route", sample(["backward", "grad"]))
def test_gradients_share_no_memory(options: dict[str, Any], route: str) -> None:
    layer = ur.Recurrent(EqualGradients, 3, 4, dtype=torch.float64)
    params, x = list(layer.parameters()), torch.randn(5, 2, 3, dtype=torch.float64)

    def gradients(times: int) -> list[Tensor]:
        if route == "grad":  # each one is changed in place
            results = torch.autograd.grad(layer(x, **options)[0].square().sum(), params)
            return [grad.mul_(times) for grad in results]
        layer.zero_grad()
        for _ in range(times):  # later gradients are added in place
            layer(x, **options)[0].square().sum().backward()
        nn.utils.clip_grad_norm_(params, 0.5)
        return [param.grad for param in params]  # type: ignore[misc]

    with ur.engine("reference"):
        expected = [grad.clone() for grad in gradients(3)]
    with ur.engine("native"):
        assert_close(gradients(3), expected, 1e-12)
        assert_close(gradients(3), expected, 1e-12)


class UsedAfterTheLastStep(ur.Cell):
    """The state t is a result, but no later step reads it."""

    state = ("h", "t")
    scale = ur.Param("hidden")
    weight = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(linear(x[:, :3], self.weight) + h), x[:, 3:] * self.scale


@pytest.mark.parametrize("route", sample(["grad", "checkpoint", "vjp"], ["grad", "vjp"]))
def test_infinity_in_steps_whose_state_is_not_used(route: str) -> None:
    layer = ur.Recurrent(UsedAfterTheLastStep, 6, 3, dtype=torch.float64)
    params = dict(layer.named_parameters())
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    x[1, 0, 4], x[2, 1, 5] = float("inf"), float("nan")
    options = {"checkpoint": 2} if route == "checkpoint" else {}

    def loss(params: dict[str, Tensor]) -> Tensor:
        output, states = functional_call(layer, params, (x,), options)
        return sum(value.sum() for value in (output, *states))

    def gradients() -> list[Tensor]:
        if route == "vjp":
            return [*torch.func.grad(loss)({name: param.detach() for name, param in params.items()}).values()]
        return [*torch.autograd.grad(loss(params), [*params.values()])]

    with ur.engine("reference"):
        expected = gradients()
    assert all(grad.isfinite().all() for grad in expected)
    with ur.engine("native"):
        assert_close(gradients(), expected, 1e-12)


class MadeOfWeights(ur.Cell):
    """What is made of parameters alone is computed once, before the loop."""

    weight = ur.Param("hidden", "hidden")
    bias = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        w, eye = self.weight, torch.eye(3, dtype=x.dtype)
        v = torch.addmv(self.bias, w, self.bias) * h + linear(x, w @ w)
        v = v + linear(h, torch.linalg.matrix_power(0.5 * w, 3)) + linear(x, torch.linalg.inv(w + 3 * eye))
        v = v + linear(h, torch.linalg.solve(eye + w - w.t(), eye - w + w.t()))
        v = v + h * torch.fft.irfft(torch.fft.rfft(self.bias), n=3)  # of an odd length
        return torch.tanh(v + torch.einsum("bi,oi,o->bo", x, w, self.bias))


class Rewritten(ur.Cell):
    """Operations that can be captured only after they are rewritten."""

    weight = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        v = linear(x, self.weight) + h
        # A replaced function, statistics, and an operation that works in place.
        u = F.layer_norm(torch.sigmoid(v).cumprod(-1), (3,), eps=0.1)
        u = F.pad(u[:, None], (1, 1), mode="circular")[:, 0, :3]
        keys = torch.stack([v, x], 1)
        u = u + F.scaled_dot_product_attention(v[:, None], keys, keys)[:, 0]
        u = u + torch.linalg.multi_dot([v, self.weight, self.weight])  # the order mustn't depend on the batch
        # The gradient of sgn is a tensor of zeros without memory, which a sum needs as a tensor with memory.
        u = u + v.sgn() * v + (v[:, :1].repeat(1, 3).sgn() + v) * 0.1
        return torch.tanh(u + torch.copysign(x, -0.0) - torch.copysign(v, 2))


@pytest.mark.parametrize("cell", sample([MadeOfWeights, Rewritten]))
@pytest.mark.parametrize("dtype", sample([torch.float32, torch.float64], [torch.float64]), ids=str)
def test_what_is_computed_before_the_loop_or_rewritten(cell: type[ur.Cell], dtype: torch.dtype) -> None:
    with BatchCompiler() as batch:
        layer: Any = ur.Recurrent(cell, 3, 3, dtype=dtype)
        batch.prepare(layer._first, dtype)
        batch.finish()
        _, expected, actual = results_of_engines(layer, torch.randn(4, 2, 3, dtype=dtype).requires_grad_())
    assert_close(actual, expected, 20 * TOLERANCE[dtype])
    data = json.loads(json.dumps(to_data(capture(layer._first, dtype))))
    assert to_data(from_data(data, layer._first)) == data


class Inverse(ur.Cell):
    weight = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + linear(h, torch.linalg.inv(self.weight)))


@pytest.mark.parametrize("engine", ["reference", "native"])
def test_the_inverse_of_a_singular_weight(engine: str) -> None:
    layer = ur.Recurrent(Inverse, 3, 3)
    for param in layer.parameters():
        nn.init.ones_(param)
    with ur.engine(engine), pytest.raises(torch.linalg.LinAlgError, match="matrix is singular"):
        layer(torch.randn(4, 2, 3))
