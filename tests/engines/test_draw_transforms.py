"""Layers that draw random numbers under torch.compile, torch.jit.trace, torch.export and torch.func."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.noisy_layers import NoisyCell, NoisyModel, seeded

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated:DeprecationWarning")


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend: str) -> None:
    model, x = NoisyModel(), torch.randn(5, 3, 3)

    def loss_and_gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        output = seeded(function, leaf)
        output.sin().sum().backward()
        return [output.detach(), leaf.grad, *[parameter.grad.clone() for parameter in model.parameters()]]

    expected = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_close(loss_and_gradients(compiled), expected, 1e-5)
    assert not torch.allclose(compiled(x), compiled(x))

    def recomputing(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    assert_close(loss_and_gradients(recomputing), expected, 1e-5)
    assert_close(loss_and_gradients(torch.compile(recomputing, backend=backend)), expected, 1e-5)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_traced_layers_draw_at_each_call() -> None:
    layer, x = ur.Recurrent(NoisyCell, 3, 4), torch.randn(6, 2, 3)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    for seed in range(4):
        torch.manual_seed(seed)
        actual = traced(x)[0]
        torch.manual_seed(seed)
        assert_close(actual, layer(x)[0], 1e-6)


@pytest.mark.slow
def test_export() -> None:
    model, x = NoisyModel(), torch.randn(5, 3, 3)
    dims = {"x": {0: torch.export.Dim("time"), 1: torch.export.Dim("batch")}}
    program = torch.export.export(model, (x,), dynamic_shapes=dims).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x,), check_trace=False)
    for other in (x, torch.randn(8, 2, 3)):
        expected = seeded(model, other)
        assert torch.equal(seeded(program, other), expected)
        assert torch.equal(seeded(traced, other), expected)


@NEEDS_COMPILER
@pytest.mark.slow
def test_transforms() -> None:
    model, x = NoisyModel(torch.float64), torch.randn(2, 5, 3, 3).double()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(model)(x)
    same = seeded(torch.func.vmap(model, randomness="same"), x)
    for k in range(2):
        assert_close(same[k], seeded(model, x[k]), 1e-12)
    different = seeded(torch.func.vmap(model, randomness="different"), x[:1].expand(2, 5, 3, 3))
    assert not torch.allclose(different[0], different[1])
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sin().sum()

    grads = seeded(torch.func.grad(loss), parameters, x[0])
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")
    sample_grads = seeded(per_sample, parameters, x)
    seeded(loss, parameters, x[0]).backward()
    for name, parameter in parameters.items():
        assert_close(grads[name], parameter.grad, 1e-12)
        assert_close(sample_grads[name][0], parameter.grad, 1e-12)

    def run_model(x: Tensor) -> Tensor:
        return seeded(model, x)

    tangent = torch.randn_like(x[0])
    _, forward = torch.func.jvp(run_model, (x[0],), (tangent,))
    _, vjp = torch.func.vjp(run_model, x[0])
    assert_close((forward * forward).sum(), (vjp(forward)[0] * tangent).sum(), 1e-10)
    leaf = x[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(run_model(leaf).sin().sum(), leaf, create_graph=True)
    grad.square().sum().backward()
    double = leaf.grad.clone()
    leaf.grad = None
    with ur.engine("reference"):
        (grad,) = torch.autograd.grad(run_model(leaf).sin().sum(), leaf, create_graph=True)
    grad.square().sum().backward()
    assert_close(double, leaf.grad, 1e-10)
