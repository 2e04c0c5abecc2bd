"""Inside torch's transforms: compile, export, trace, vmap, torch.func, forward mode, autocast."""

from __future__ import annotations

import sys
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
from unrolled.engines.torch_ops import cell_text, operators

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.filterwarnings(
        r"ignore:.torch\.jit\..* is deprecated:DeprecationWarning"
    ),  # torch calls it itself
]

INPUT, HIDDEN = 3, 4


class Scaled(ur.Cell):
    """With a tensor of its own, an option, and a norm: which torch.nn has not."""

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


class Sorting(ur.Cell):
    """A step that the compiler can't take."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sort(h, -1)[0] * 0.5 + linear(x, self.weight)


KINDS: dict[str, Callable[..., Any]] = {
    "rnn": lambda **kw: ur.RNN(INPUT, HIDDEN, **kw),
    "lstm": lambda **kw: ur.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True, **kw),
    "gru": lambda **kw: ur.GRU(INPUT, HIDDEN, **kw),
    "own": lambda **kw: ur.Recurrent(Scaled, INPUT, HIDDEN, leak=0.25, **kw),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def results(layer: Any, run: Any, x: Tensor, state: Any = None) -> list[Tensor]:
    """Outputs, final states and the gradients of all there is."""
    x = x.clone().requires_grad_()
    output, final = run(x, state)
    final = final if isinstance(final, tuple) else (final,)
    loss = (output**2).sum() + sum((part * 0.5).sum() for part in final)
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [output.detach(), *(part.detach() for part in final), *found]


# --- compile ---


@EVERY
def test_compiled_without_a_break_and_once_for_all_lengths(kind: str) -> None:
    layer = KINDS[kind]()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for time, batch in ((5, 2), (9, 2), (6, 7)):  # not the features: torch takes equal sizes for one
        x = torch.randn(time, batch, INPUT)
        with ur.engine("native"):
            expected, found = results(layer, layer, x), results(layer, compiled, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_by_inductor_in_a_model_with_states_and_without_gradients() -> None:
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
    assert_close(results(model, compiled, x, state), results(model, model, x, state), 1e-5)
    with torch.no_grad():
        assert_close(compiled(x), model(x), 1e-5)


def test_compiled_with_packed_sequences() -> None:
    layer = ur.GRU(INPUT, HIDDEN, bidirectional=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for lengths in ((5, 3, 1), (2, 4, 4)):
        packed = pack_sequence([torch.randn(n, INPUT) for n in lengths], enforce_sorted=False)
        expected, found = layer(packed), compiled(packed)
        assert torch.equal(found[0].data, expected[0].data)
        assert torch.equal(found[1], expected[1])


def test_compiled_steps_that_the_native_engine_leaves_to_the_reference() -> None:
    layer, x = ur.Recurrent(Sorting, INPUT, HIDDEN), torch.randn(3, 2, INPUT)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="Sorting runs on the reference engine"):
        expected = results(layer, layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(results(layer, compiled, x), expected, 1e-5)
    torch._dynamo.reset()
    with ur.engine("native"), pytest.raises(Exception, match=r"can't run on the native engine.*aten\.sort"):
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
assert torch.equal(loaded(x)[0], expected), "another result"
"""


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
    load_elsewhere(tmp_path / "layer.pt2", x, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of what is checked of sizes, as in torch.nn
def test_traced_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    layer = ur.GRU(INPUT, HIDDEN, 2).eval()
    traced = torch.jit.trace(layer, (torch.randn(5, 2, INPUT),))
    x = torch.randn(8, 3, INPUT)
    with torch.no_grad():
        expected = layer(x)[0]
    assert torch.equal(traced(x)[0], expected)
    torch.jit.save(traced, tmp_path / "layer.ts")
    load_elsewhere(tmp_path / "layer.ts", x, expected)


def load_elsewhere(path: Path, x: Tensor, expected: Tensor) -> None:
    torch.save((x, expected.detach()), path.with_suffix(".case"))
    done = processes.run("-W", "ignore", "-c", LOAD, path, path.with_suffix(".case"))
    assert done.returncode == 0, done.stderr


def test_a_cell_stands_in_a_graph_as_text() -> None:
    cell = Scaled(INPUT, HIDDEN, leak=0.125)
    text = cell_text.text_of(cell, False)
    assert '"leak": 0.125' in text
    cell_text._cells.pop(text)
    read = cell_text.cell_of(text)
    assert (read.identity(), read.training) == (cell.identity(), False)

    class Local(Scaled):
        pass

    text = cell_text.text_of(Local(INPUT, HIDDEN), True)
    assert isinstance(cell_text.cell_of(text), Local)
    cell_text._cells.pop(text)
    with pytest.raises(ValueError, match="Local.*in the process that made the graph only"):
        cell_text.cell_of(text)
    for name, why in (
        ("antigravity:Cell", "the cell Cell of the module antigravity: import antigravity first"),
        ("unrolled:engine", "the cell engine of the module unrolled, which has no such cell"),
    ):
        with pytest.raises(ValueError, match=why):
            cell_text.cell_of(cell_text.text_of(cell, False).replace("test_transforms:Scaled", name))
    assert "antigravity" not in sys.modules


@EVERY
def test_what_torch_checks_of_an_operator(kind: str) -> None:
    layer, x = KINDS[kind](), torch.randn(3, 2, INPUT)
    texts, given = [], []
    for k, (suffix, cell) in enumerate(list(layer._cells.items())[: 2 if layer.bidirectional else 1]):
        text, own, _, why = operators.described(cell, (), True, torch.float32, False, k == 1)
        assert not why
        texts.append(text)
        given += [getattr(layer, name + suffix).detach().requires_grad_() for name in cell.shapes()]
        given += [getattr(cell, name) for name in own]
    arguments = (x.requires_grad_(), given, None, f"[{', '.join(texts)}]")
    for operator in (torch.ops.unrolled.recurrence, torch.ops.unrolled.recurrence_kept):
        torch.library.opcheck(operator.default, arguments)


def test_traced_by_make_fx_and_run_without_data() -> None:
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


def loss_of(layer: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output, final = functional_call(layer, parameters, (x,))
        final = final if isinstance(final, tuple) else (final,)
        return (output**2).sum() + sum(part.sum() for part in final)

    return loss


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    layer = KINDS[request.param](dtype=torch.float64)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    return layer, loss_of(layer), parameters, torch.randn(4, 3, INPUT, dtype=torch.float64)


def same(found: Any, compute: Callable[[], Any]) -> None:
    """As the reference engine has it, to float64's precision."""
    with ur.engine("reference"):
        expected = compute()
    leaves = torch.utils._pytree.tree_leaves
    assert_close(leaves(found), leaves(expected), 1e-10)


def test_gradients_of_samples_are_native(case: Any) -> None:
    _, loss, parameters, x = case
    samples = x.unsqueeze(2)

    def compute() -> Any:
        return vmap(grad(loss), (None, 1))(parameters, samples)

    with ur.engine("native"):
        found = compute()
        each = [grad(loss)(parameters, samples[:, k]) for k in range(3)]
    same(found, compute)
    for name, value in found.items():
        assert_close(value, torch.stack([one[name] for one in each]), 1e-12)


def test_ensembles_are_native(case: Any) -> None:
    _, loss, parameters, x = case
    stacked = {name: torch.stack([value, 2 * value, -value]) for name, value in parameters.items()}

    def compute() -> Any:
        values = vmap(loss, (0, None))(stacked, x)
        return values, vmap(grad(loss), (0, 1))(stacked, x.unsqueeze(2))

    with ur.engine("native"):
        found = compute()
    same(found, compute)


def test_nested_and_mixed_transforms(case: Any) -> None:
    _, loss, parameters, x = case
    many = torch.randn(2, 3, 4, 1, INPUT, dtype=torch.float64)

    def penalty(parameters: Any, x: Tensor) -> Tensor:
        return sum((part**2).sum() for part in grad(loss)(parameters, x).values())

    def compute() -> Any:
        twice = vmap(vmap(grad(loss), (None, 0)), (None, 0))(parameters, many)
        outer = grad(lambda p: (vmap(grad(loss, 1), (None, 1))(p, x.unsqueeze(2)) ** 2).sum())(parameters)
        penalties = vmap(grad(penalty), (None, 1))(parameters, x.unsqueeze(2))
        return twice, outer, penalties

    with ur.engine("native"):
        found = compute()
    same(found, compute)


def test_forward_mode_and_hessians(case: Any) -> None:
    _, loss, parameters, x = case
    x = x[:2, :1]

    def of_x(x: Tensor) -> Tensor:
        return loss(parameters, x)

    found = jvp(of_x, (x,), (torch.ones_like(x),)), jacfwd(of_x)(x), hessian(of_x)(x)
    first = grad(of_x)(x)
    assert_close(found[0][1], first.sum(), 1e-10)
    assert_close(found[1], first, 1e-10)
    assert_close(found[2], torch.autograd.functional.hessian(of_x, x), 1e-10)
    with forward_ad.dual_level():
        value = of_x(forward_ad.make_dual(x, torch.ones_like(x)))
        assert_close(forward_ad.unpack_dual(value).tangent, first.sum(), 1e-10)


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

    same(compute(), compute)

    def third(x: Tensor) -> Tensor:
        return grad(lambda x: (grad(lambda x: loss(parameters, x))(x) ** 2).sum())(x)

    same(third(x.detach()), lambda: third(x.detach()))


# --- autocast, checkpointing ---


@EVERY
def test_autocast(kind: str) -> None:
    layer, x = KINDS[kind](), torch.randn(5, 2, INPUT)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        loss = found[0].float().sum()
    assert found[0].dtype is torch.bfloat16
    assert_close(found[0].float(), expected[0], 0.03)
    loss.backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), ur.engine("reference"):
        assert layer(x)[0].dtype is torch.bfloat16


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_less(kind: str, reentrant: bool) -> None:
    layer, x = KINDS[kind](), torch.randn(5, 2, INPUT, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)[0]
    assert sum(tensor.numel() for tensor in saved) >= output.numel()  # what is kept, can be kept elsewhere
    expected = torch.autograd.grad(output.sum(), [x, *layer.parameters()])
    output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)
    output.sum().backward()
    found = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
