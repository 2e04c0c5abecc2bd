"""Operations that draw random numbers in a step: the distributions, gradients and errors of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.noisy_layers import layer_of, run
from helpers.sampling import sample

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated:DeprecationWarning")

# A step without parameters whose state is what it draws, and the mean and standard deviation.
SAMPLERS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], float, float]] = {
    "randn_like": (lambda self, x, h: torch.randn_like(h), 0, 1),
    "rand_like": (lambda self, x, h: torch.rand_like(input=h), 0.5, 12**-0.5),
    "randn": (lambda self, x, h: torch.randn(h.shape, dtype=h.dtype, device=h.device), 0, 1),
    "randn sizes": (lambda self, x, h: torch.randn(len(x), 8, dtype=h.dtype), 0, 1),
    "rand size=": (lambda self, x, h: torch.rand(size=h.shape, dtype=h.dtype), 0.5, 12**-0.5),
    "batch last": (lambda self, x, h: torch.randn(8, len(x), dtype=h.dtype).t(), 0, 1),
    "heads": (lambda self, x, h: torch.randn_like(h.view(-1, 4)).view(h.shape), 0, 1),
    "changed": (lambda self, x, h: torch.randn_like(h).mul_(3).add_(1), 1, 3),
    "normal": (lambda self, x, h: torch.normal(2 + 0 * h, 0.5), 2, 0.5),
    "normal std": (lambda self, x, h: torch.normal(2.0, 3 + 0 * h), 2, 3),
    "normal both": (lambda self, x, h: torch.normal(0 * h[:, :1] - 1, std=3 + 0 * h), -1, 3),
    "normal size": (lambda self, x, h: torch.normal(2.0, 3.0, h.shape, dtype=h.dtype), 2, 3),
    "normal_": (lambda self, x, h: torch.empty_like(h).normal_(std=2.0), 0, 2),
    "uniform_": (lambda self, x, h: torch.empty_like(h).uniform_(-1, 3), 1, 4 * 12**-0.5),
    "uniform_ to": (lambda self, x, h: h.new_empty(h.shape).uniform_(to=2), 1, 2 * 12**-0.5),
    "exponential_": (lambda self, x, h: torch.empty_like(h).exponential_(2.0), 0.5, 0.5),
    "bernoulli": (lambda self, x, h: torch.bernoulli(0 * h + 0.3), 0.3, 0.21**0.5),
    "bernoulli p": (lambda self, x, h: h.bernoulli(0.3), 0.3, 0.21**0.5),
    "bernoulli_": (lambda self, x, h: torch.empty_like(h).bernoulli_(0.3), 0.3, 0.21**0.5),
    "bernoulli_ p": (lambda self, x, h: torch.empty_like(h).bernoulli_(0 * h + 0.3), 0.3, 0.21**0.5),
    "boolean": (lambda self, x, h: (torch.rand_like(h) < 0.3).to(h.dtype), 0.3, 0.21**0.5),
    "dropout": (lambda self, x, h: F.dropout(torch.ones_like(h), 0.25), 1, (1 / 3) ** 0.5),
    "dropout in place": (
        lambda self, x, h: torch.dropout_(torch.ones_like(h), 0.25, True),
        1,
        (1 / 3) ** 0.5,
    ),
    "torch.dropout": (lambda self, x, h: torch.dropout(h * 0 + 1, p=0.25, train=True), 1, (1 / 3) ** 0.5),
    "Dropout": (lambda self, x, h: nn.Dropout(0.25)(torch.ones_like(h)), 1, (1 / 3) ** 0.5),
    "gumbel_softmax": (lambda self, x, h: F.gumbel_softmax(0 * h, hard=True), 1 / 8, (7 / 64) ** 0.5),
    "gumbel heads": (
        lambda self, x, h: F.gumbel_softmax(0 * h.view(-1, 2, 4), dim=1, hard=True).flatten(1),
        1 / 2,
        1 / 2,
    ),
    "gumbel": (lambda self, x, h: -torch.empty_like(h).exponential_().log(), 0.5772, torch.pi / 6**0.5),
    "distribution": (lambda self, x, h: torch.distributions.Normal(h * 0 + 2, 3.0).rsample(), 2, 3),
}
NOT_COMPILED = {"distribution"}  # it reads values to check its arguments
FAST = {"heads", "bernoulli"}


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SAMPLERS]
)
def test_operations(name: str) -> None:
    """Every operation has the moments of torch's, and the same numbers on both engines."""
    function, mean, std = SAMPLERS[name]
    cell = type(f"Sampler{name.title().replace(' ', '')}", (ur.Cell,), {"step": function})
    layer, x = ur.Recurrent(cell, 8, 8, dtype=torch.float64), torch.zeros(30, 40, 8).double()
    torch.manual_seed(3)
    with torch.no_grad(), ur.engine("reference"):
        output = layer(x)[0]
    error = std / output.numel() ** 0.5
    assert output.mean().item() == pytest.approx(mean, abs=6 * error)
    assert output.std().item() == pytest.approx(std, rel=0.05)
    if name in NOT_COMPILED:
        return
    torch.manual_seed(3)
    with torch.no_grad(), ur.engine("native"):
        assert_close(layer(x)[0], output, 1e-12)


GRADIENTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "bernoulli": lambda self, x, h: torch.tanh(h + torch.bernoulli(torch.sigmoid(x + self.p))),
    "straight-through": lambda self, x, h: (
        (p := torch.sigmoid(x + h + self.p)) + (torch.bernoulli(p) - p).detach()
    ),
    "normal": lambda self, x, h: torch.tanh(h + torch.normal(x, torch.exp(self.p).expand_as(x))),
    "reparameterized": lambda self, x, h: torch.tanh(h + x + torch.exp(self.p) * torch.randn_like(x)),
    "dropout": lambda self, x, h: torch.tanh(F.dropout(h + self.p, 0.4) + x),
    "gumbel hard": lambda self, x, h: F.gumbel_softmax(h + x + self.p, hard=True) * h,
}


@NEEDS_COMPILER
@pytest.mark.parametrize("name", sample(GRADIENTS, ["reparameterized"]))
@pytest.mark.slow
def test_gradients(name: str) -> None:
    """Gradients of both engines, and those that torch itself computes for the same function."""
    cell = type(
        f"Graded{name.title().replace(' ', '').replace('-', '')}",
        (ur.Cell,),
        {"p": ur.Param("hidden"), "step": GRADIENTS[name]},
    )
    torch.manual_seed(0)
    layer, x = ur.Recurrent(cell, 4, 4, dtype=torch.float64), torch.randn(5, 3, 4).double()
    native = run("native", layer, x)
    assert_close(native, run("reference", layer, x), 1e-12)
    if name in ("bernoulli", "normal"):
        assert native[2].eq(0).all()  # zeros, as in torch
        assert native[3].eq(0).all()
        return
    if "gumbel" in name or name == "straight-through":
        return

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        with ur.engine("reference"):
            return layer(x)[0].sin().sum()

    assert torch.autograd.gradcheck(loss, x.requires_grad_())


def test_probabilities_outside_of_0_and_1() -> None:
    class Invalid(ur.Cell):
        p: float = 0.5

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.bernoulli(x) + 0 * h

    layer = ur.Recurrent(Invalid, 2, 2)
    output = layer(torch.tensor([[[0.0, 1.0], [-0.1, 1.1], [float("nan"), 1.0]]]))[0]
    assert output[0, 0].tolist() == [0, 1]
    assert output.isnan().tolist() == [[[False, False], [True, True], [True, False]]]

    class InvalidDropout(ur.Cell):
        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return F.dropout(h + x, 1.5)

    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        ur.Recurrent(InvalidDropout, 2, 2)(torch.zeros(1, 1, 2))


@NEEDS_COMPILER
@pytest.mark.slow
def test_dropout_in_training_and_eval() -> None:
    class Dropout(ur.Cell):
        w = ur.Param("hidden", "input")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(F.dropout(h + linear(x, self.w), 0.5, self.training))

    layer, x = layer_of(Dropout), torch.randn(3, 2, 3)
    layer.eval()
    state = torch.get_rng_state()
    evaluated = layer(x)[0]
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    with ur.engine("native"):
        layer.train()
        trained = layer(x)[0]
        assert not torch.allclose(trained, evaluated)
        assert (trained == 0).any()
        layer.eval()
        assert torch.equal(layer(x)[0], evaluated)
