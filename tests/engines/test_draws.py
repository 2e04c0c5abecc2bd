"""Random numbers in a step: the same for every engine, with the distributions and gradients of torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.sampling import sample
from unrolled.engines import draws as drawing
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.layers.single_step import SingleStep

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated:DeprecationWarning")

DTYPES = (torch.float32, torch.float64)


class NoisyCell(ur.Cell):
    """A rate network with noise, dropout and a random gate."""

    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")
    log_sigma = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        kept = F.dropout(h, 0.3, self.training)
        noise = torch.randn_like(h)
        gate = torch.rand(len(x), 1, dtype=x.dtype) < 0.8
        new = torch.tanh(linear(x, self.w) + linear(kept, self.u) + torch.exp(self.log_sigma) * noise)
        h = torch.where(gate, new, h)
        return h


class TwoStates(ur.Cell):
    """Two states, and draws of several shapes."""

    state = ("h", "c")
    w = ur.Param("2*hidden", "input")

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, b = linear(x + 0.1 * torch.randn_like(x), self.w).chunk(2, -1)
        heads = (h.view(len(h), 2, -1) * torch.rand(h.shape[0], 2, 1, dtype=h.dtype)).flatten(1)
        c = torch.sigmoid(a) * c + F.gumbel_softmax(b + heads, tau=0.5)
        return torch.tanh(c + b), c


def run(engine: str, layer: nn.Module, x: Any, *args: Any, seed: int = 1, **options: Any) -> list[Tensor]:
    """Return the output, the final states, and the gradients of x and of the parameters."""
    layer.zero_grad()
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_() if isinstance(x, Tensor) else x
    with ur.engine(engine):
        output, state = layer(leaf, *args, **options)[:2]
    data = output if isinstance(output, Tensor) else output.data
    states = state if isinstance(state, tuple) else (state,)
    (data.sin().sum() + sum(part.square().sum() for part in states)).backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    return [
        data.detach(),
        *(part.detach() for part in states),
        *([leaf.grad] if leaf is not x else []),
        *grads,
    ]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def layer_of(
    cell: type[ur.Cell] = NoisyCell, dtype: torch.dtype = torch.float32, **options: Any
) -> ur.Recurrent:
    torch.manual_seed(0)
    return ur.Recurrent(cell, 3, 6, dtype=dtype, **options)


@NEEDS_COMPILER
@pytest.mark.parametrize("cell", sample([TwoStates, NoisyCell]))
@pytest.mark.parametrize("dtype", sample(DTYPES))
@pytest.mark.parametrize("stacked", sample([True, False]))
def test_engines_agree(cell: type[ur.Cell], dtype: torch.dtype, stacked: bool) -> None:
    """Output, states and gradients of both engines, and float32 against float64."""
    layer = layer_of(cell, dtype, **({"num_layers": 2, "bidirectional": True} if stacked else {}))
    x = torch.randn(7, 4, 3, dtype=dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-12
    expected, native = run("reference", layer, x), run("native", layer, x)
    assert_close(native, expected, tolerance)
    assert_equal(run("native", layer, x), native)
    assert not torch.allclose(run("native", layer, x, seed=2)[0], native[0])
    torch.manual_seed(1)
    first, second = layer(x)[0], layer(x)[0]
    assert torch.equal(first, native[0])
    assert not torch.allclose(first, second)  # each call has its own numbers
    wide = layer_of(cell, torch.float64, **({"num_layers": 2, "bidirectional": True} if stacked else {}))
    wide.load_state_dict(layer.state_dict())
    assert_close(run("reference", wide, x.double()), [part.double() for part in expected], 1e-3)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [True, False])
def test_call_options(bidirectional: bool) -> None:
    layer = layer_of(dtype=torch.float64, num_layers=2, bidirectional=bidirectional)
    x, resets = torch.randn(7, 4, 3).double(), torch.rand(7, 4) < 0.3
    for options in (
        {"lengths": [3, 7, 0, 5]},
        {"resets": resets},
        {"lengths": [3, 7, 1, 5], "resets": resets},
    ):
        assert_close(run("native", layer, x, **options), run("reference", layer, x, **options), 1e-12)
    plain = run("native", layer, x)
    for engine in ("native", "reference"):
        assert_close(run(engine, layer, x, checkpoint=3), plain, 1e-12)
        torch.manual_seed(1)
        with ur.engine(engine):
            _, final, states = layer(x, all_states=True)
        assert_close(final.detach(), plain[1], 1e-12)
        assert_close(states["h"][-2 if bidirectional else -1, -1].detach(), plain[0][-1, :, :6], 1e-12)
    assert torch.equal(run("native", layer, x, checkpoint=3)[0], plain[0])


@NEEDS_COMPILER
@pytest.mark.parametrize("engine", ["native", "reference"])
def test_draws_depend_on_row_and_step_of_the_user(engine: str) -> None:
    """A row of a batch with lengths has the same numbers as in the whole batch, wherever it is sorted to."""
    layer, x = layer_of(dtype=torch.float64), torch.randn(7, 4, 3).double()
    whole = run(engine, layer, x)[0]
    lengths = [3, 7, 2, 5]
    padded = run(engine, layer, x, lengths=lengths)[0]
    packed = pack_sequence([x[:n, k] for k, n in enumerate(lengths)], enforce_sorted=False)
    torch.manual_seed(1)
    with ur.engine(engine):
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(layer(packed)[0])
    for row, length in enumerate(lengths):
        assert_close(padded[:length, row], whole[:length, row], 1e-12)
        assert_close(unpacked[:length, row].detach(), whole[:length, row], 1e-12)
    batch_first = layer_of(dtype=torch.float64, batch_first=True)
    assert_close(run(engine, batch_first, x.transpose(0, 1))[0].transpose(0, 1), whole, 1e-12)
    assert_close(run(engine, layer, x[:, 0])[0], whole[:, 0], 1e-12)


@NEEDS_COMPILER
def test_thread_count_and_batch_do_not_matter() -> None:
    layer, x = layer_of(num_layers=2), torch.randn(9, 40, 3)
    results = []
    for threads in (1, 2, 3):
        before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
        results.append(run("native", layer, x))
        torch.set_num_threads(before)
    assert_equal(results[0][:2], results[1][:2])
    assert_equal(results[0][:2], results[2][:2])
    assert torch.equal(run("native", layer, x[:, :7])[0], results[0][0][:, :7])
    assert torch.equal(run("native", layer, x[:4])[0], results[0][0][:4])


@pytest.mark.slow
def test_directions_and_layers_have_their_own_numbers() -> None:
    class Noise(ur.Cell):
        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.randn_like(h) + 0 * (x.sum(-1, keepdim=True) + h)

    layer = ur.Recurrent(Noise, 3, 6, num_layers=3, bidirectional=True)
    _, _, states = layer(torch.randn(50, 20, 3), all_states=True)
    rows = states["h"].flatten(1)
    assert torch.corrcoef(rows).triu(1).abs().max() < 5 / rows.shape[1] ** 0.5
    assert_close(rows.std(1), torch.ones(6), 0.05)


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


def test_one_draw_of_torchs_generator_for_each_call() -> None:
    layer, x = layer_of(num_layers=3, bidirectional=True), torch.randn(4, 2, 3)
    torch.manual_seed(5)
    layer(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    drawing.draw_seed()
    assert torch.equal(torch.get_rng_state(), state)


@NEEDS_COMPILER
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(dtype=torch.float64), torch.randn(5, 4, 3).double()
    expected = run("reference", layer, x)

    def fail(*args: Any) -> None:
        raise NoCompilerError("no compiler")

    monkeypatch.setattr(drawing.compiled_philox, "fill", fail)
    assert_equal(run("reference", layer, x), expected)


@NEEDS_COMPILER
@pytest.mark.slow
def test_regularization_and_draws() -> None:
    options = {"recurrent_dropout": 0.4, "zoneout": 0.2, "variational_dropout": 0.1}
    layer, x = layer_of(dtype=torch.float64, num_layers=2, **options), torch.randn(7, 4, 3).double()
    assert_close(run("native", layer, x), run("reference", layer, x), 1e-12)
    lengths = {"lengths": [3, 7, 1, 5]}
    assert_close(run("native", layer, x, **lengths), run("reference", layer, x, **lengths), 1e-12)


def test_other_dtypes_use_torchs_generator() -> None:
    layer, x = layer_of(dtype=torch.bfloat16), torch.randn(5, 4, 3).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        first = layer(x)[0]
        torch.manual_seed(1)
        assert torch.equal(first, layer(x)[0])
    assert first.isfinite().all()


def test_a_single_step_module() -> None:
    module = SingleStep(NoisyCell, 3, 6, dtype=torch.float64)
    x, h = torch.randn(4, 3).double(), torch.randn(4, 6).double()
    results = []
    for engine in ("auto", "reference"):
        torch.manual_seed(2)
        with ur.engine(engine):
            results.append(module(x, h))
    assert_close(results[0], results[1], 1e-12)
    assert not torch.allclose(module(x, h), results[0])


# --- streams, traces and torch's transforms ---


class Model(nn.Module):
    """Two layers of cells that draw random numbers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.below = layer_of(num_layers=2, dtype=dtype)
        self.above = ur.Recurrent(TwoStates, 6, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x)[0])[0]


def seeded(function: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(1)
    return function(*args)


@NEEDS_COMPILER
@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("sizes", [[4, 1, 4], [1] * 9, [9]])
@pytest.mark.slow
def test_a_stream_continues_the_numbers(engine: str, sizes: list[int]) -> None:
    model, x = Model(), torch.randn(9, 4, 3)
    with ur.engine(engine), torch.no_grad():
        for module in (model, model.below):
            whole = seeded(module, x)
            whole = whole if isinstance(whole, Tensor) else whole[0]
            stream = ur.Stream(module)
            for _ in range(2):
                parts = seeded(lambda stream=stream: [stream(chunk) for chunk in x.split(sizes)])
                assert torch.equal(torch.cat(parts), whole)
                stream.reset()


@NEEDS_COMPILER
@pytest.mark.slow
def test_records_of_a_stream() -> None:
    model, x = Model(torch.float64), torch.randn(9, 4, 3).double()
    whole = seeded(model, x).detach()
    for rows in (None, [1, 3]):
        stream = ur.Stream(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with ur.record(model, calls=9, rows=rows) as rec:
                parts = seeded(lambda stream=stream: [stream(chunk) for chunk in x.split([1, 4, 4])])
        assert torch.equal(torch.cat(parts), whole)
        recorded = torch.cat([trace["h"] for trace in rec.calls("above")])
        assert_close(recorded, whole if rows is None else whole[:, rows], 1e-12)


@NEEDS_COMPILER
def test_traces_and_explanations() -> None:
    layer, x = layer_of(num_layers=2, bidirectional=True, dtype=torch.float64), torch.randn(5, 3, 3).double()
    output = seeded(layer, x)[0].detach()
    trace = seeded(ur.trace, layer, x)
    assert_close(trace.output, output, 1e-12)
    for part in trace.layers:
        arguments = {"layer": part.layer, "direction": part.direction, "batch": 1}
        value = part["noise"][2, 1, 4].item()
        noise = f"{value:.4f}".replace("-", "−")
        explained = trace.explain("new", 2, 4, **arguments)
        assert explained.startswith("tanh(")
        factors = [float(text.replace("−", "-")) for text in re.findall(r"·\(?(−?[\d.]+)", explained)]
        assert any(factor == pytest.approx(value, abs=1e-4) for factor in factors)
        assert trace.explain("noise", 2, 4, **arguments) == f"{noise} = {noise}"
    trace.backward(lambda output: output.sin().sum() + 0 * output.sum())
    leaf = x.clone().requires_grad_()
    seeded(layer, leaf)[0].sin().sum().backward()
    assert trace.gradient("noise").abs().sum() > 0
    weights = layer.log_sigma_l1
    expected = (trace.gradient("noise", layer=1) * trace.layer(1)["noise"]).sum((0, 1))
    assert_close(expected, weights.grad, 1e-10)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend: str) -> None:
    model, x = Model(), torch.randn(5, 3, 3)

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


@NEEDS_COMPILER
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


def test_export() -> None:
    model, x = Model(), torch.randn(5, 3, 3)
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
    model, x = Model(torch.float64), torch.randn(2, 5, 3, 3).double()
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


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_step_that_starts_and_stops_drawing() -> None:
    class Switched(ur.Cell):
        sigma = 0.0

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            h = torch.tanh(x + h)
            return h + self.sigma * torch.randn_like(h) if self.sigma else h

    layer, x = ur.Recurrent(Switched, 3, 3), torch.randn(4, 2, 3)
    with ur.engine("native"):
        quiet = layer(x)[0]
        Switched.sigma = 0.5
        noisy = seeded(layer, x)[0]
        with ur.engine("reference"):
            assert_close(noisy, seeded(layer, x)[0], 1e-5)
        assert not torch.allclose(noisy, quiet)
        Switched.sigma = 0.0
        assert torch.equal(layer(x)[0], quiet)
