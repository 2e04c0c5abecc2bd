"""Layers inside torch transforms: compile, export, trace, vmap, torch.func, forward mode, autocast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import unrolled as ur
from helpers import processes
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.sampling import sample
from unrolled.engines.torch_ops import operators

pytestmark = [
    NEEDS_COMPILER,
    # torch calls deprecated functions of torch.jit itself
    pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated"),
]

INPUT, HIDDEN = 3, 4


class Scaled(ur.Cell):
    """A cell with a tensor attribute, an option and a normalization, unlike the cells of torch.nn."""

    state = ("h", "m")
    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")
    leak: float = 0.5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = torch.linspace(0.5, 1.5, self.hidden)

    def step(self, x: Tensor, h: Tensor, m: Tensor) -> Any:
        sums = linear(x, self.weight_ih) + linear(h * self.scale.to(h.dtype), self.weight_hh)
        m = (1 - self.leak) * m + self.leak * layer_norm(sums, (self.hidden,))
        h = torch.tanh(m)
        return h, m


class Bessel(ur.Cell):
    """A cell that the compiler doesn't support."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.special.i0(h) * 0.5 + linear(x, self.weight)


LAYERS: dict[str, Callable[..., Any]] = {
    "rnn": lambda **kw: ur.RNN(INPUT, HIDDEN, **kw),
    "lstm": lambda **kw: ur.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True, **kw),
    "gru": lambda **kw: ur.GRU(INPUT, HIDDEN, **kw),
    "custom": lambda **kw: ur.Recurrent(Scaled, INPUT, HIDDEN, leak=0.25, **kw),
}
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)
SOME_LAYERS = pytest.mark.parametrize("name", sample(LAYERS, ["lstm", "custom"]))


def outputs_and_gradients(layer: Any, run: Any, x: Tensor, state: Any = None) -> list[Tensor]:
    """Return the output, the final states and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    output, final = run(x, state)
    final = final if isinstance(final, tuple) else (final,)
    loss = (output**2).sum() + sum((part * 0.5).sum() for part in final)
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [output.detach(), *(part.detach() for part in final), *gradients]


# --- compile ---


@SOME_LAYERS
@pytest.mark.slow
def test_compiled_to_one_graph_for_all_lengths_and_batch_sizes(name: str) -> None:
    layer = LAYERS[name]()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for time, batch in ((5, 2), (9, 2), (6, 7)):  # all different from the features: torch merges equal sizes
        x = torch.randn(time, batch, INPUT)
        with ur.engine("native"):
            expected = outputs_and_gradients(layer, layer, x)
            actual = outputs_and_gradients(layer, compiled, x)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_model_by_inductor_with_and_without_gradients() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = ur.LSTM(INPUT, HIDDEN, 2, batch_first=True)
            self.head = nn.Linear(HIDDEN, 2)

        def forward(self, x: Tensor, state: Any = None) -> Any:
            output, state = self.lstm(x.relu(), state)
            return self.head(output), state

    model, x = Model(), torch.randn(2, 6, INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    state = (torch.randn(2, 2, HIDDEN), torch.randn(2, 2, HIDDEN))
    assert_close(
        outputs_and_gradients(model, compiled, x, state), outputs_and_gradients(model, model, x, state), 1e-5
    )
    with torch.no_grad():
        assert_close(compiled(x), model(x), 1e-5)


def test_compiled_layer_with_packed_sequences() -> None:
    layer = ur.GRU(INPUT, HIDDEN, bidirectional=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for lengths in ((5, 3, 1), (2, 4, 4)):
        packed = pack_sequence([torch.randn(n, INPUT) for n in lengths], enforce_sorted=False)
        expected, actual = layer(packed), compiled(packed)
        assert torch.equal(actual[0].data, expected[0].data)
        assert torch.equal(actual[1], expected[1])


@pytest.mark.slow
def test_compiled_layer_that_falls_back_to_the_reference_engine() -> None:
    layer, x = ur.Recurrent(Bessel, INPUT, HIDDEN), torch.randn(3, 2, INPUT)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="Bessel runs on the reference engine"):
        expected = outputs_and_gradients(layer, layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(outputs_and_gradients(layer, compiled, x), expected, 1e-5)
    torch._dynamo.reset()
    with ur.engine("native"), pytest.raises(Exception, match=r"can't run on the native engine.*aten\.i0"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)


def test_compiled_cells() -> None:
    cell, x = ur.LSTMCell(INPUT, HIDDEN), torch.randn(2, INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), cell(x), strict=True))


# --- export and trace ---


LOAD = """
import sys, torch, unrolled
x, expected = torch.load(sys.argv[2])
path = sys.argv[1]
loaded = torch.export.load(path).module() if path.endswith("pt2") else torch.jit.load(path)
assert torch.equal(loaded(x)[0], expected), "the result differs"
"""


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_exported_with_dynamic_sizes_and_loaded_in_a_new_process(tmp_path: Path, strict: bool) -> None:
    layer = ur.LSTM(INPUT, HIDDEN, 2, batch_first=True, bidirectional=True).eval()
    sizes = {"input": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=4096)}}
    exported = torch.export.export(
        layer,
        (torch.randn(2, 5, INPUT),),
        dynamic_shapes=sizes,
        strict=strict,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    x = torch.randn(7, 9, INPUT)
    with torch.no_grad():
        expected = layer(x)[0]
    assert torch.equal(exported.module()(x)[0], expected)
    torch.export.save(exported, tmp_path / "layer.pt2")
    assert_same_in_new_process(tmp_path / "layer.pt2", x, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # about checks of sizes, as in torch.nn
def test_traced_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    layer = ur.GRU(INPUT, HIDDEN, 2).eval()
    traced = torch.jit.trace(layer, (torch.randn(5, 2, INPUT),))
    x = torch.randn(8, 3, INPUT)
    with torch.no_grad():
        expected = layer(x)[0]
    assert torch.equal(traced(x)[0], expected)
    torch.jit.save(traced, tmp_path / "layer.ts")
    assert_same_in_new_process(tmp_path / "layer.ts", x, expected)


def assert_same_in_new_process(path: Path, x: Tensor, expected: Tensor) -> None:
    torch.save((x, expected.detach()), path.with_suffix(".case"))
    done = processes.run("-W", "ignore", "-c", LOAD, path, path.with_suffix(".case"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@EACH_LAYER
def test_operators_pass_torchs_opcheck(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(3, 2, INPUT)
    texts, tensors = [], []
    for k, (suffix, cell) in enumerate(list(layer._cells.items())[: 2 if layer.bidirectional else 1]):
        text, own_names, _, error = operators.serialize_direction(
            cell, (), True, torch.float32, x.device, False, k == 1
        )
        assert not error
        texts.append(text)
        tensors += [getattr(layer, name + suffix).detach().requires_grad_() for name in cell.shapes()]
        tensors += [getattr(cell, name) for name in own_names]
    arguments = (x.requires_grad_(), tensors, None, f"[{', '.join(texts)}]")
    for operator in (torch.ops.unrolled.recurrence, torch.ops.unrolled.recurrence_kept):
        torch.library.opcheck(operator.default, arguments)


def test_make_fx_and_fake_tensors() -> None:
    layer, x = ur.LSTM(INPUT, HIDDEN), torch.randn(4, 2, INPUT)
    graph = make_fx(lambda x: layer(x)[0])(x)
    assert torch.ops.unrolled.recurrence_kept.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(x), layer(x)[0])
    with torch._subclasses.FakeTensorMode():
        output, (h, c) = ur.LSTM(INPUT, HIDDEN)(torch.randn(4, 2, INPUT))
    assert (tuple(output.shape), tuple(h.shape), tuple(c.shape)) == (
        (4, 2, HIDDEN),
        (1, 2, HIDDEN),
        (1, 2, HIDDEN),
    )


# --- torch.func ---


def loss_function(layer: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output, final = functional_call(layer, parameters, (x,))
        final = final if isinstance(final, tuple) else (final,)
        return (output**2).sum() + sum(part.sum() for part in final)

    return loss


@pytest.fixture(params=sample(LAYERS, ["custom"]))
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    layer = LAYERS[request.param](dtype=torch.float64)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    return layer, loss_function(layer), parameters, torch.randn(4, 3, INPUT, dtype=torch.float64)


def assert_same_by_reference(actual: Any, compute: Callable[[], Any]) -> None:
    """Assert that the reference engine gives the same result, within the precision of float64."""
    with ur.engine("reference"):
        expected = compute()
    leaves = torch.utils._pytree.tree_leaves
    assert_close(leaves(actual), leaves(expected), 1e-10)


@pytest.mark.slow
def test_per_sample_gradients_are_native(case: Any) -> None:
    _, loss, parameters, x = case
    samples = x.unsqueeze(2)

    def compute() -> Any:
        return vmap(grad(loss), (None, 1))(parameters, samples)

    with ur.engine("native"):
        actual = compute()
        one_by_one = [grad(loss)(parameters, samples[:, k]) for k in range(3)]
    assert_same_by_reference(actual, compute)
    for name, value in actual.items():
        assert_close(value, torch.stack([gradients[name] for gradients in one_by_one]), 1e-12)


@pytest.mark.slow
def test_ensembles_are_native(case: Any) -> None:
    _, loss, parameters, x = case
    stacked = {name: torch.stack([value, 2 * value, -value]) for name, value in parameters.items()}

    def compute() -> Any:
        values = vmap(loss, (0, None))(stacked, x)
        return values, vmap(grad(loss), (0, 1))(stacked, x.unsqueeze(2))

    with ur.engine("native"):
        actual = compute()
    assert_same_by_reference(actual, compute)


@pytest.mark.slow
def test_nested_and_mixed_transforms(case: Any) -> None:
    _, loss, parameters, x = case
    nested_x = torch.randn(2, 3, 4, 1, INPUT, dtype=torch.float64)

    def penalty(parameters: Any, x: Tensor) -> Tensor:
        return sum((part**2).sum() for part in grad(loss)(parameters, x).values())

    def compute() -> Any:
        nested = vmap(vmap(grad(loss), (None, 0)), (None, 0))(parameters, nested_x)
        outer = grad(lambda p: (vmap(grad(loss, 1), (None, 1))(p, x.unsqueeze(2)) ** 2).sum())(parameters)
        penalties = vmap(grad(penalty), (None, 1))(parameters, x.unsqueeze(2))
        return nested, outer, penalties

    with ur.engine("native"):
        actual = compute()
    assert_same_by_reference(actual, compute)


@pytest.mark.slow
def test_forward_mode_and_hessians(case: Any) -> None:
    _, loss, parameters, x = case
    x = x[:2, :1]

    def loss_of_x(x: Tensor) -> Tensor:
        return loss(parameters, x)

    _, tangent = jvp(loss_of_x, (x,), (torch.ones_like(x),))
    jacobian, second = jacfwd(loss_of_x)(x), hessian(loss_of_x)(x)
    first = grad(loss_of_x)(x)
    assert_close(tangent, first.sum(), 1e-10)
    assert_close(jacobian, first, 1e-10)
    assert_close(second, torch.autograd.functional.hessian(loss_of_x, x), 1e-10)
    with forward_ad.dual_level():
        value = loss_of_x(forward_ad.make_dual(x, torch.ones_like(x)))
        assert_close(forward_ad.unpack_dual(value).tangent, first.sum(), 1e-10)


@pytest.mark.slow
def test_second_and_third_gradients(case: Any) -> None:
    layer, loss, parameters, x = case
    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]
    named_parameters = dict(layer.named_parameters())

    def compute() -> Any:
        first = torch.autograd.grad(loss(named_parameters, x), leaves, create_graph=True)
        penalty = sum((part**2).sum() for part in first)
        second = torch.autograd.grad(penalty, leaves, create_graph=True)
        return second, torch.autograd.grad(sum(part.sum() for part in second), x)

    assert_same_by_reference(compute(), compute)

    def third(x: Tensor) -> Tensor:
        return grad(lambda x: (grad(lambda x: loss(parameters, x))(x) ** 2).sum())(x)

    assert_same_by_reference(third(x.detach()), lambda: third(x.detach()))


# --- autocast, checkpointing ---


@EACH_LAYER
@pytest.mark.slow
def test_autocast(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(5, 2, INPUT)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)[0]
        loss = output.float().sum()
    assert output.dtype is torch.bfloat16
    assert_close(output.float(), expected[0], 0.03)
    loss.backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), ur.engine("reference"):
        assert layer(x)[0].dtype is torch.bfloat16


@pytest.mark.slow
@EACH_LAYER
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_by_torch(name: str, reentrant: bool) -> None:
    layer, x = LAYERS[name](), torch.randn(5, 2, INPUT, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)[0]
    assert sum(tensor.numel() for tensor in saved) >= output.numel()  # hooks see all saved tensors
    expected = torch.autograd.grad(output.sum(), [x, *layer.parameters()])
    output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)
    output.sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
