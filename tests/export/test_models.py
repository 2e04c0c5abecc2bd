"""Exported C of stacks, of both directions, and of models with other modules; and what can't be exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import unrolled as ur
from helpers.c_library import NEEDS_CC, Exported
from helpers.layer_pairs import NEEDS_COMPILER


class Tagger(nn.Module):
    """Linear modules, normalization, dropout and a sum around a stack with the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.rnn = nn.LSTM(12, 12, num_layers=2, batch_first=True)
        self.norm, self.drop = nn.LayerNorm(12), nn.Dropout(0.3)
        self.leave = nn.Sequential(nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 2))
        self.gain = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, state: Any = None) -> Any:
        z = torch.relu(self.enter(x))
        y, state = self.rnn(z)
        return self.leave(self.drop(self.norm(y) + 0.5 * z)) * self.gain, state


class Filter(nn.Module):
    """Causal convolutions: dilated, depthwise, in groups and with one tap; and batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 6, 3, dilation=2)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=2, groups=6)
        self.groups = nn.Sequential(nn.ConstantPad1d((1, 0), 0.0), nn.Conv1d(6, 6, 2, groups=2, bias=False))
        self.mix = nn.Conv1d(6, 4, 1)
        self.norm = nn.BatchNorm1d(6)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.rnn, self.leave = ur.GRU(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(F.pad(x, (4, 0)))))
        y = self.groups(F.silu(self.depthwise(y)[:, :, :-2]))
        y, _ = self.rnn(self.mix(y).permute(2, 0, 1))
        return torch.tanh(self.leave(y))


class Speller(nn.Module):
    """An embedding, and probabilities."""

    def __init__(self, bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.rnn = ur.LSTM(6, 9, num_layers=2, bidirectional=bidirectional, batch_first=True)
        self.leave = nn.Linear(9 * (1 + bidirectional), 11)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.leave(self.rnn(self.table(x))[0]) / 0.7, dim=-1)


class Residual(nn.Module):
    """Values that several modules read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ur.Recurrent(ur.cells.MinGRU, 4, 4), ur.LSTM(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)[0]
        both = torch.cat([x, torch.sigmoid(y)], -1)
        return self.b(both)[0] + x * 0.5 - y


def only(y: Tensor) -> Tensor:
    return y[:, 0]


def transposed(y: Tensor) -> Tensor:
    return y[0]


# For each model: how to build it, an input, the sequence that C gets, and the row of the output.
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "tagger": (Tagger, torch.randn(1, 17, 5), transposed, transposed),
    "filter": (Filter, torch.randn(1, 2, 25), lambda x: x[0].T, only),
    "speller": (lambda: Speller(False), torch.arange(17)[None] % 11, transposed, transposed),
    "both directions": (lambda: Speller(True), torch.arange(17)[None] % 11, transposed, transposed),
    "residual": (Residual, torch.randn(17, 1, 4), only, only),
    "torch's stack": (lambda: nn.GRU(3, 7, num_layers=3), torch.randn(17, 1, 3), only, only),
    "stack of both": (lambda: ur.GRU(3, 7, 2, bidirectional=True), torch.randn(17, 1, 3), only, only),
    "projection": (lambda: ur.LSTM(3, 7, proj_size=4, num_layers=2), torch.randn(17, 1, 3), only, only),
}
FAST = ("tagger",)


@NEEDS_CC
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@pytest.mark.parametrize("weights", ["array", pytest.param("file", marks=pytest.mark.slow)])
def test_models(name: str, weights: str, tmp_path: Path) -> None:
    create, x, sequence, row = MODELS[name]
    model = create()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported = Exported(model, tmp_path, weights=weights)
    assert model.training  # unchanged
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    result = model.eval()(x)
    expected = row(result[0] if isinstance(result, tuple) else result).detach()
    steps = sequence(x)
    for _ in range(2):
        assert_close(exported.run(steps), expected, atol=2e-6, rtol=0)
        exported.reset()
    if not exported.files.bidirectional:  # continues from the state
        parts = [exported.run(part.contiguous()) for part in steps.split(5)]
        assert_close(torch.cat(parts), expected, atol=2e-6, rtol=0)
    assert exported.selftest()[0] == 0


@pytest.mark.slow
@NEEDS_CC
@NEEDS_COMPILER
def test_a_stack_has_the_bits_of_the_layers(tmp_path: Path) -> None:
    layer, x = ur.GRU(3, 18, num_layers=2, bidirectional=True), torch.randn(9, 3)
    assert torch.equal(Exported(layer, tmp_path).run(x), layer(x)[0].detach())


@NEEDS_CC
@pytest.mark.slow
def test_indices_out_of_range_read_the_nearest_row(tmp_path: Path) -> None:
    exported = Exported(Speller(False), tmp_path)
    outside = exported.run(torch.tensor([-5, 11, 2**31 - 1]))
    exported.reset()
    assert torch.equal(outside, exported.run(torch.tensor([0, 10, 10])))


class Given(nn.Module):
    """A model whose forward is given."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.given = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.given(self, x)


def lstm(**options: Any) -> nn.LSTM:
    return nn.LSTM(4, 4, **options)


def handed_over(model: Any, x: Tensor) -> Tensor:
    y, state = model.a(x)
    return model.b(y, state)[0]


def case(message: str, forward: Callable[..., Any], **modules: nn.Module) -> Any:
    return pytest.param(Given(forward, **modules), message, id=message[:40])


REFUSED = [
    case(r"getitem \(test_models.py, line \d+\) takes a part", lambda m, x: m.a(x)[0][-1], a=lstm()),
    case(
        "MultiheadAttention 'b' .* isn't among the modules|is given",
        lambda m, x: m.b(*[m.a(x)[0]] * 3)[0],
        a=lstm(),
        b=nn.MultiheadAttention(4, 2),
    ),
    case("Flatten 'b' .* is not among the modules", lambda m, x: m.b(m.a(x)[0]), a=lstm(), b=nn.Flatten()),
    case(
        r"Conv1d 'b' .* isn't causal \(padding=\(1,\)\).* pad its input with 2 zeros",
        lambda m, x: m.a(m.b(x).transpose(1, 2))[0],
        a=lstm(batch_first=True),
        b=nn.Conv1d(4, 4, 3, padding=1),
    ),
    case(
        "Conv1d 'b' .* has a stride",
        lambda m, x: m.a(m.b(x).transpose(1, 2))[0],
        a=lstm(batch_first=True),
        b=nn.Conv1d(4, 4, 3, stride=2),
    ),
    case("mean .* is not among the methods", lambda m, x: m.a(x)[0].mean(0, keepdim=True), a=lstm()),
    case("cumsum .* is not among the functions", lambda m, x: torch.cumsum(m.a(x)[0], 0), a=lstm()),
    case("LSTM 'b' .* is called with a state", handed_over, a=lstm(), b=lstm()),
    case("add .* is given the final state of a", lambda m, x: m.a(x)[1][0] + x, a=lstm()),
    case("Linear 'b' .* is given the pair", lambda m, x: m.b(m.a(x)), a=lstm(), b=nn.Linear(4, 2)),
    case(
        "LSTM 'b' .* takes an axis as batch that was time",
        lambda m, x: m.b(m.a(x)[0])[0],
        a=lstm(),
        b=lstm(batch_first=True),
    ),
    case("softmax .* takes an axis as features", lambda m, x: torch.softmax(m.a(x)[0], 0), a=lstm()),
    case(
        "LSTM 'b' .* expects 4 features, got 8",
        lambda m, x: m.b(torch.cat([x, m.a(x)[0]], -1))[0],
        a=lstm(),
        b=lstm(),
    ),
    case("torch.fx can't trace Given", lambda m, x: m.a(x)[0] if x.sum() > 0 else x, a=lstm()),
    case("doesn't return a value for each time step", lambda m, x: m.a(x)[1], a=lstm()),
    case("BatchNorm1d 'b' .* normalizes over the batch", lambda m, x: m.a(m.b(x).mT)[0],
         a=lstm(batch_first=True), b=nn.BatchNorm1d(4, track_running_stats=False)),
]  # fmt: skip


@pytest.mark.parametrize(("model", "message"), REFUSED)
def test_what_cannot_be_exported_is_named(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ur.export.c(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Bessel(ur.Cell):
    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.special.bessel_j0(h) + x @ self.weight.T


def with_nan() -> nn.Module:
    layer = ur.LSTM(2, 3)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = float("nan")
    return layer


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: nn.Linear(2, 3), "Linear contains no recurrent layer"),
        (lambda: ur.LSTM(2, 3).double(), "weight_ih_l0 has dtype torch.float64.*call module.float"),
        (lambda: ur.LSTM(2, 3).bfloat16(), "has dtype torch.bfloat16"),
        (lambda: nn.Sequential(nn.Linear(2, 3, dtype=torch.complex64)), "has dtype torch.complex64"),
        (lambda: ur.LSTM(2, 3, device="meta"), r"weight_ih_l0 is on meta: call module.cpu\(\)"),
        (lambda: ur.LSTMCell(2, 3), "LSTMCell '0' is not among the modules"),
        (
            lambda: nn.Sequential(nn.Tanh(), nn.Tanh()),
            "none of the modules of Sequential has a fixed number of input features",
        ),
        (lambda: ur.LSTM(None, 3), "the size of weight_ih_l0 isn't known yet"),
        (with_nan, "weight_hh_l0 contains NaN"),
    ],
)
def test_modules_that_cannot_be_exported(create: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ur.export.c(create(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*runs on the reference engine")
def test_a_cell_that_cannot_be_compiled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Bessel can't be exported: .*bessel_j0"):
        ur.export.c(ur.Recurrent(Bessel, 2, 3), tmp_path / "out")
    with pytest.raises(TypeError, match=r"expects a torch.nn.Module, got int"):
        ur.export.c(3, tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
