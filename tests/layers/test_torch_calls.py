"""Calls that torch's own functions answer on CUDA devices. Here, the CPU takes the place of such a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import unrolled as ur
from helpers.sampling import sample
from unrolled.layers import torch_calls
from unrolled.layers.planned_calls import PlannedCalls
from unrolled.layers.sequence import InputError

Calls = list[tuple[Any, ...]]

LAYERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rnn": (ur.RNN, nn.RNN, {}),
    "rnn-relu": (ur.RNN, nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "lstm": (ur.LSTM, nn.LSTM, {}),
    "lstm-proj": (ur.LSTM, nn.LSTM, {"proj_size": 3}),
    "gru": (ur.GRU, nn.GRU, {}),
}
SHAPES: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The arguments of each call of torch's functions, which run."""
    recorded: Calls = []

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            recorded.append(args)
            return function(*args)

        return run

    monkeypatch.setattr(torch_calls, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(PlannedCalls, "note", lambda *args: None)  # such a device has no plans
    for cls in (ur.LSTM, ur.GRU, ur.LSTMCell, ur.GRUCell):
        monkeypatch.setattr(cls, "torch_function", staticmethod(record(cls.torch_function)))
    for name in ("rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell"):
        monkeypatch.setattr(torch, name, record(getattr(torch, name)))
    return recorded


def pair(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    ours, theirs, more = LAYERS[kind]
    a, b = ours(5, 7, **more, **options, dtype=dtype), theirs(5, 7, **more, **options, dtype=dtype)
    a.load_state_dict(b.state_dict())
    return a, b


def flat(results: Any) -> list[Tensor]:
    """Return the tensors of a layer's results, with the steps of a packed sequence instead of it."""
    output, state = results
    states = state if isinstance(state, tuple) else (state,)
    return [output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output, *states]


def gradients(module: Any, x: Tensor, results: list[Tensor]) -> list[Tensor]:
    loss = sum((k + 1) * (result**2).sum() for k, result in enumerate(results))
    return list(torch.autograd.grad(loss, [x, *module.parameters()]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_the_same_bits_as_torch(kind: str, shape: dict[str, Any], calls: Calls) -> None:
    ours, theirs = pair(kind, **shape)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 4, 5, requires_grad=True)
    with torch.no_grad():
        state = theirs(x)[1]
    for given in (None, state):
        results, expected = flat(ours(x, given)), flat(theirs(x, given))
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        both = gradients(ours, x, results), gradients(theirs, x, expected)
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)  # autograd adds them in another order
    assert len(calls) == 2
    weights = calls[0][2]
    assert [w.data_ptr() for w in weights] == [p.data_ptr() for p in ours.parameters()]  # no copies


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_packed_and_single_sequences(kind: str, calls: Calls) -> None:
    ours, theirs = pair(kind, num_layers=2, bidirectional=True)
    x = pack_sequence([torch.randn(n, 5) for n in (2, 6, 3)], enforce_sorted=False)
    for given in (x, torch.randn(4, 5)):
        results, expected = flat(ours(given)), flat(theirs(given))
        assert all(map(torch.equal, results, expected))
        results, expected = flat(ours(given, ours(given)[1])), flat(theirs(given, theirs(given)[1]))
        assert all(map(torch.equal, results, expected))
    assert len(calls) == 6
    with pytest.raises(InputError, match="batch_sizes"):
        ours(nn.utils.rnn.PackedSequence(torch.randn(5, 5), torch.tensor([3, 3, 3])))
    with pytest.raises(InputError, match="input_size"):
        ours(torch.randn(3, 4, 6))


def test_dropout_and_modes(calls: Calls) -> None:
    ours, theirs = pair("gru", num_layers=3, dropout=0.5)
    x = torch.randn(6, 2, 5, requires_grad=True)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        results.append(flat(layer(x)))
    assert all(map(torch.equal, *results))
    with pytest.raises(RuntimeError, match="dropout between layers aren't possible"):
        torch.autograd.grad(results[0][0].sum(), x, create_graph=True)
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x)[0], theirs(x)[0])
    # cuDNN has a backward pass only after a forward pass in training mode; dropout is off.
    assert [call[5:7] for call in calls] == [(0.5, True), (0.0, True)]
    with torch.no_grad():
        ours(x)
    assert calls[-1][5:7] == (0.0, False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["rnn", pytest.param("lstm", marks=pytest.mark.slow)])
def test_second_gradients(kind: str, packed: bool, calls: Calls) -> None:
    layer, _ = pair(kind, torch.float64, num_layers=2, bidirectional=True)
    count = 2 if kind == "lstm" else 1
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(4, 2, 7, dtype=torch.float64, requires_grad=True) for _ in range(count)]

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        given = pack_sequence([x[:, 0], x[:2, 1]]) if packed else x
        return tuple(flat(layer(given, states if count == 2 else states[0])))

    assert torch.autograd.gradgradcheck(run, (x, *states), fast_mode=True)
    assert calls


def test_other_uses_of_gradients(calls: Calls) -> None:
    ours, theirs = pair("gru")
    x = torch.randn(3, 4, 5, requires_grad=True)
    loss, expected_loss = ours(x)[0].square().sum(), theirs(x)[0].square().sum()
    expected = torch.autograd.grad(expected_loss, [x, *theirs.parameters()])
    inputs = [x, *ours.parameters()]
    for retain_graph in (True, False):
        assert all(map(torch.equal, torch.autograd.grad(loss, inputs, retain_graph=retain_graph), expected))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        output = ours(x)[0]
    assert packed
    other = checkpoint(lambda x: ours(x)[0], x, use_reentrant=False)
    assert torch.equal(*[torch.autograd.grad(out.sum(), x)[0] for out in (output, other)])
    output, plain = ours(x)[0], theirs(x)[0]
    grads = torch.randn(3, *output.shape)
    both = [torch.autograd.grad(out, x, grads, is_grads_batched=True)[0] for out in (output, plain)]
    torch.testing.assert_close(*both)
    output, state = ours(x)
    state.detach_()
    output.mul_(2)  # without batch_first, it is a tensor of its own


def test_autocast(calls: Calls) -> None:
    ours, theirs = pair("lstm", num_layers=2)
    x = torch.randn(3, 4, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = flat(ours(x)), flat(theirs(x))
    assert results[0].dtype is expected[0].dtype
    assert all(map(torch.equal, results, expected))
    both = gradients(ours, x, results), gradients(theirs, x, expected)
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


CELLS: list[tuple[Any, Any, dict[str, Any]]] = [
    (ur.RNNCell, nn.RNNCell, {}),
    (ur.RNNCell, nn.RNNCell, {"nonlinearity": "relu", "bias": False}),
    (ur.LSTMCell, nn.LSTMCell, {"bias": False}),
    (ur.LSTMCell, nn.LSTMCell, {}),
    (ur.GRUCell, nn.GRUCell, {}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), CELLS, ids=str)
def test_cells(ours: Any, theirs: Any, options: dict[str, Any], calls: Calls) -> None:
    a, b = ours(5, 7, **options), theirs(5, 7, **options)
    a.load_state_dict(b.state_dict())
    for shape in ((3,), ()):
        x = torch.randn(*shape, 5, requires_grad=True)
        first = b(torch.randn(*shape, 5))
        for given in (None, first):
            results, expected = a(x, given), b(x, given)
            for p, q in zip(flat((x, results)), flat((x, expected)), strict=True):
                assert torch.equal(p, q)
    [slope] = torch.autograd.grad(flat((x, a(x)))[1].sum(), x, create_graph=True)
    [expected_slope] = torch.autograd.grad(flat((x, b(x)))[1].sum(), x, create_graph=True)
    assert torch.equal(slope, expected_slope)
    assert torch.autograd.grad(slope.sum(), x)[0].abs().sum() > 0 or options
    assert len(calls) == 5


def custom(x: Tensor) -> Tensor:
    return ur.Recurrent(ur.cells.MGU, 5, 7)(x)[0]


RUN_AS_USUAL: dict[str, Callable[[Any, Tensor], Any]] = {
    "resets": lambda layer, x: layer(x, resets=torch.rand(3, 4) < 0.5),
    "lengths": lambda layer, x: layer(x, lengths=torch.tensor([3, 1, 2, 3])),
    "mask": lambda layer, x: layer(x, mask=torch.ones(3, 4, dtype=torch.bool)),
    "all_states": lambda layer, x: layer(x, all_states=True),
    "checkpoint": lambda layer, x: layer(x, checkpoint=2),
    "zoneout": lambda layer, x: ur.LSTM(5, 7, zoneout=0.5)(x),
    "learned": lambda layer, x: ur.LSTM(5, 7, initial_state="learned")(x),
    "custom": lambda layer, x: custom(x),
    "func": lambda layer, x: torch.func.grad(lambda x: layer(x)[0].sum())(x),
    "vmap": lambda layer, x: torch.vmap(lambda x: layer(x)[0], 1)(x),
    "trace": lambda layer, x: ur.trace(layer, x),
}


@pytest.mark.parametrize(
    "name", sample(RUN_AS_USUAL, RUN_AS_USUAL.keys() - {"resets", "zoneout", "checkpoint"})
)
def test_calls_that_torch_cannot_answer(name: str, calls: Calls) -> None:
    layer, x = ur.LSTM(5, 7), torch.randn(3, 4, 5)
    RUN_AS_USUAL[name](layer, x)
    assert not calls
    for engine in ("native", "reference"):
        with ur.engine(engine):
            assert layer(x)[0].shape == (3, 4, 7)
    assert not calls


def test_weights_are_put_into_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever torch.nn does so, on any device: by its own function, which does nothing on a CPU."""
    flattened: list[Any] = []
    original = nn.RNNBase.flatten_parameters

    def flatten(self: Any) -> None:
        flattened.append(self)
        original(self)

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten)
    counts = []
    for cls in (ur.LSTM, nn.LSTM):
        flattened.clear()
        layer = cls(5, 7, num_layers=2)
        layer.double()
        layer.to("cpu", torch.float32)
        layer.flatten_parameters()
        assert all(each is layer for each in flattened)
        counts.append(len(flattened))
    assert counts[0] == counts[1] == 4
    lazy = ur.LSTM(None, 7)
    flattened.clear()
    lazy(torch.randn(3, 4, 5))
    assert flattened == [lazy]


def test_quantized_modules_compute_their_own_products(calls: Calls) -> None:
    """torch's functions would compute them in float32."""
    for module, x in ((ur.LSTM(5, 7), torch.randn(3, 2, 5)), (ur.GRUCell(5, 7), torch.randn(2, 5))):
        quantized = ur.quantize(module.eval())
        expected = quantized(x)[0]
        quantized._frozen = quantized._packed = None  # on a GPU, weights aren't packed
        torch.testing.assert_close(quantized(x)[0], expected)
    assert not calls
