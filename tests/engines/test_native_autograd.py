"""Gradients of the native engine: accuracy, autograd's rules for saved and changed tensors, and memory."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from compare_engines import make_layer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, TOLERANCE, assert_close, pair, tensors
from helpers.sampling import sample
from unrolled.cli.bench import in_subprocess
from unrolled.cli.bench.rows import Row

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LAYERS, "mgu"])
def test_finite_differences(kind: str) -> None:
    torch.manual_seed(4)
    layer = make_layer(kind, 2, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    with ur.engine("native"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, *_: tuple(tensors(layer(x))), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "bidirectional"), list(itertools.product([1, 3], [False, True])))
def test_stacked_layers_train_like_torch(layers: int, bidirectional: bool) -> None:
    ours, theirs = pair("lstm", 6, 10, num_layers=layers, bidirectional=bidirectional)
    x, target = torch.randn(7, 4, 6), torch.randn(7, 4, 10 * (1 + bidirectional))
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            with ur.engine("native"):
                nn.functional.mse_loss(layer(x)[0], target).backward()
            optimizer.step()
    assert_close(list(ours.parameters()), list(theirs.parameters()), 1e-4)


def test_retain_graph() -> None:
    layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    with ur.engine("native"):
        loss = layer(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_outputs_may_be_changed_in_place() -> None:
    layer, theirs = pair("lstm", 3, 4)
    x = torch.randn(5, 2, 3)
    (theirs(x)[0] * 3 + 1).square().sum().backward()  # torch doesn't allow this in place on its own output
    with ur.engine("native"):
        output, _ = layer(x)
        output.mul_(3).add_(1)
        output.square().sum().backward()
    assert_close(
        [p.grad for p in layer.parameters()], [p.grad for p in theirs.parameters()], TOLERANCE[x.dtype]
    )


def test_parameters_may_not_be_changed_in_place() -> None:
    layer, x = ur.GRU(3, 4), torch.randn(5, 2, 3)
    with ur.engine("native"):
        loss = layer(x)[0].sum()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_do_not_share_memory() -> None:
    """Both biases have the same gradient, but separate tensors, so that one may be changed in place."""
    layer, x = ur.RNN(3, 4), torch.randn(5, 2, 3)
    with ur.engine("native"):
        grads = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    assert torch.equal(grads[2], grads[3])
    assert len({grad.data_ptr() for grad in grads}) == 4


@pytest.mark.parametrize("kind", sample(LAYERS))
def test_batched_gradients(kind: str) -> None:
    """``is_grads_batched=True`` and ``torch.vmap``, compared with torch.nn."""
    layer, theirs = pair(kind, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for module, arguments in ((theirs, {}), (layer, {}), (layer, {"checkpoint": 2})):
        output = module(x, **arguments)[0]
        leaves = [x, *module.parameters()]
        batch = torch.randn(6, *output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        results.append(torch.autograd.grad(output, leaves, batch, is_grads_batched=True, retain_graph=True))

        def vjp(grad: torch.Tensor, output: Any = output, leaves: Any = leaves) -> Any:
            return torch.autograd.grad(output, leaves, grad, retain_graph=True)

        if module is layer:
            results.append(torch.vmap(vjp)(batch))
    for result in results[1:]:
        assert_close(result, results[0], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [None, 10])
def test_a_loss_that_is_kept_does_not_keep_saved_tensors(checkpoint: int | None) -> None:
    layer, x = ur.LSTM(4, 16), torch.randn(50, 8, 4)
    loss = layer(x, checkpoint=checkpoint)[0].square().mean()
    loss.backward(retain_graph=True)
    before = _elements_in_memory()
    first = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    loss.backward()
    assert_close([parameter.grad for parameter in layer.parameters()], first, 0)
    # saved outputs and values, or the states between segments
    assert before - _elements_in_memory() > 4000
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def _elements_in_memory() -> int:
    """Return the number of elements of all tensors, counting shared memory once."""
    gc.collect()
    values = [value for value in gc.get_objects() if type(value) is torch.Tensor]
    return sum({value.data_ptr(): value.numel() for value in values}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("rnn", "gru")), "lstm"],
)
def test_peak_memory_of_training_is_at_most_that_of_torch(kind: str) -> None:
    row = Row(kind, 32, 1000, 256, "training")
    assert in_subprocess.peak_memory(row, "unrolled") <= in_subprocess.peak_memory(row, "torch")


class Overflowing(ur.Cell):
    """A cell with a second state that overflows, and that the first doesn't depend on."""

    state = ("h", "v")
    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor, v: Tensor) -> Any:
        z = x @ self.w.T
        return torch.tanh(z + h @ self.u.T), (v + 1) * z * 1e200


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"checkpoint": 2}, {"lengths": [6, 4]}], ids=str)
def test_an_unused_state_that_overflows(options: dict[str, Any]) -> None:
    layer = ur.Recurrent(Overflowing, 3, 4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for engine in ("native", "reference"):
        with ur.engine(engine):
            output, (_, v) = layer(x, **options)
            assert not v.isfinite().any()
            results.append(torch.autograd.grad(output.square().sum(), [x, *layer.parameters()]))
    assert_close(*results, 1e-12)
    with ur.engine("native"):
        output, (_, v) = layer(x, **options)
        assert torch.autograd.grad(output.sum() + v.sum(), layer.w_l0)[0].isnan().any()  # as in torch


class Detached(ur.Cell):
    """A cell with a state that overflows and one that no gradient flows through."""

    state = ("h", "v")
    w = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor, v: Tensor) -> Any:
        return (h + 1) * (x @ self.w.T) * 1e200, (v + x @ self.w.T).detach()


@pytest.mark.slow
def test_an_overflow_beside_a_state_without_gradient() -> None:
    layer = ur.Recurrent(Detached, 3, 4, dtype=torch.float64)
    x, params = torch.randn(6, 2, 3, dtype=torch.float64), dict(layer.named_parameters())

    def final_v(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, (x,))[1][1]

    with ur.engine("native"):
        assert not final_v(params, x).requires_grad
        value, pull = torch.func.vjp(final_v, params, x)
        for gradient in tree_leaves(pull(torch.ones_like(value))):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_unused_state_that_overflows_in_transforms() -> None:
    """The operators get gradients of zero for it."""
    layer = ur.Recurrent(Overflowing, 3, 4, bidirectional=True, dtype=torch.float64)
    x, params = torch.randn(6, 2, 3, dtype=torch.float64), dict(layer.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        output, _ = torch.func.functional_call(layer, params, (x,))
        return output.square().sum()

    def row_loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return loss(params, row.unsqueeze(1))

    def constant_loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (0 * loss(params, x)).detach()

    for gradients, dims in (
        (torch.func.grad(loss, (0, 1)), ()),
        (torch.func.grad(constant_loss, (0, 1)), ()),
        (torch.func.grad(row_loss), (None, 1)),
    ):
        results = []
        for engine in ("native", "reference"):
            with ur.engine(engine):
                run = torch.func.vmap(gradients, dims) if dims else gradients
                results.append(tree_leaves(run(params, x)))
        assert_close(*results, 1e-12)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_gradient_of_nan_at_the_first_step_reaches_the_recurrent_weights(kind: str) -> None:
    """As in torch, although the initial state is zero."""
    layer, theirs = pair(kind, 3, 4, bidirectional=True)
    for steps in (1, 3):
        x, gradients = torch.randn(steps, 2, 3), []
        for module in (layer, theirs):
            with ur.engine("native"):
                output, _ = module(x)
            weights = torch.ones_like(output)
            weights[0, 0, 1] = torch.nan
            gradients.append(torch.autograd.grad((output * weights).sum(), list(module.parameters())))
        for ours, expected in zip(*gradients, strict=True):
            assert torch.equal(ours.isnan(), expected.isnan())
            assert_close(ours.nan_to_num(0.0), expected.nan_to_num(0.0), TOLERANCE[x.dtype])


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        lambda: torch.autograd.set_detect_anomaly(True),
    ],
    ids=["saved tensor hooks", "detect_anomaly"],
)
def test_the_first_call_of_a_cell_may_be_in_any_mode_of_autograd(context: Any) -> None:
    """Its step is captured there."""

    class New(ur.Cell):
        state = ("h",)
        w = ur.Param("hidden", "input")
        u = ur.Param("hidden", "hidden")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(x @ self.w.T + h @ self.u.T)

    layer, x, gradients = ur.Recurrent(New, 3, 4), torch.randn(5, 2, 3), []
    for engine in ("native", "reference"):
        with ur.engine(engine), context(), context():
            gradients.append(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())))
    assert_close(*gradients, TOLERANCE[x.dtype])


@pytest.mark.slow
def test_a_layer_can_be_trained_after_a_first_call_in_inference_mode() -> None:
    class New(ur.Cell):
        state = ("h",)
        w = ur.Param("hidden", "input")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(x @ self.w.T + h)

    layer, x = ur.Recurrent(New, 3, 4), torch.randn(5, 2, 3)
    with torch.inference_mode(), ur.engine("native"):
        expected = layer(x)[0].clone()
    with ur.engine("native"):
        output = layer(x)[0]
        [actual] = torch.autograd.grad(output.sum(), list(layer.parameters()))
    assert_close(output, expected, TOLERANCE[x.dtype])
    with ur.engine("reference"):
        [gradient] = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    assert_close(actual, gradient, TOLERANCE[x.dtype])


class Encoder(ur.Cell):
    """Reads its input through two layers, without the state."""

    state = ("h",)
    first, bias = ur.Param(24, "input"), ur.Param(24)
    second, recurrent = ur.Param("hidden", 24), ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        encoded = torch.tanh(nn.functional.linear(x, self.first, self.bias))
        return torch.tanh(encoded @ self.second.T + h @ self.recurrent.T)


class NormalizedWeights(ur.Cell):
    """Computes its weights from parameters."""

    state = ("h",)
    weight, recurrent = ur.Param("hidden", "input"), ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.softmax(-1).T + h @ self.recurrent.softmax(-1).T)


@pytest.mark.parametrize(
    ("cell", "values_per_row", "values"),
    [
        # The states, and the tanh of the encoder and its derivative.
        (Encoder, 3 + 24 + 24, 0),
        # The states, and both matrices.
        (NormalizedWeights, 3, 3 * 5 + 3 * 3),
    ],
)
@pytest.mark.parametrize("dtype", sample([torch.float32, torch.float64]))
def test_only_what_the_backward_reads_is_stored(
    cell: type[ur.Cell], values_per_row: int, values: int, dtype: torch.dtype
) -> None:
    layer, x = ur.Recurrent(cell, 5, 3, dtype=dtype), torch.randn(7, 4, 5, dtype=dtype, requires_grad=True)
    owned = {tensor.data_ptr() for tensor in (x, *layer.parameters())}
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with ur.engine("native"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x)
    size = sum(nbytes for address, nbytes in stored.items() if address not in owned)
    assert size <= (7 * 4 * values_per_row + values) * dtype.itemsize
    actual = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    with ur.engine("reference"):
        expected = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
    assert_close(actual, expected, TOLERANCE[dtype])
