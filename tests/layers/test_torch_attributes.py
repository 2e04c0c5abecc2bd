"""What other code expects of a layer: its class, torch.nn's attributes, graphs of torch.fx, FLOPs, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import unrolled as ur
from helpers.layer_pairs import CELLS, LAYERS, NEEDS_COMPILER, assert_close, pair, tensors

SHAPE = {"num_layers": 2, "bidirectional": True}
ENGINES = ["reference", pytest.param("native", marks=NEEDS_COMPILER)]


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_have_the_attributes_of_torchs(kind: str) -> None:
    ours, theirs = pair(kind, 3, 5, **SHAPE, dtype=torch.float64)
    assert isinstance(ours, nn.RNNBase)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert all(
        a is getattr(ours, name) for a, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True)
    )
    for a, b in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(c, d) for c, d in zip(a, b, strict=True))
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    _, state = theirs(x)
    ours.check_forward_args(x, state, None)
    wrong = tuple(part[:, :1] for part in state) if isinstance(state, tuple) else state[:, :1]
    for layer in (ours, theirs):
        with pytest.raises(RuntimeError, match="Expected hidden"):
            layer.check_forward_args(x, wrong, None)
    order = torch.tensor([1, 0])
    assert_close(ours.permute_hidden(state, order), theirs.permute_hidden(state, order), 0)
    torch_forward: Any = ours.torch_class.forward  # reads all of these
    assert_close(torch_forward(ours, x, state), theirs(x, state), 0)
    packed = pack_sequence([x[:3, 0], x[:2, 1]])
    assert_close(torch_forward(ours, packed), theirs(packed), 0)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_instances_of_torchs_classes(kind: str) -> None:
    ours, theirs = pair(kind, 3, 5, table=CELLS)
    assert isinstance(ours, type(theirs))
    assert [type(theirs) in other.__mro__ for other in (ur.RNNCell, ur.LSTMCell, ur.GRUCell)].count(True) == 1
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not isinstance(ur.Recurrent(ur.cells.MGU, 3, 5), (nn.RNNBase, nn.RNNCellBase))


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_never_stored_twice(kind: str) -> None:
    layer, _ = pair(kind, 3, 5, **SHAPE)
    x = torch.randn(4, 2, 3)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert not any("flat" in name for name in vars(layer))
    for other in copies:
        with ur.engine("reference"):
            assert_close(other(x), layer(x), 0)
    layer.double()
    assert {weight.dtype for weight in layer._flat_weights} == {torch.float64}
    layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    assert layer._flat_weights[1] is layer.weight_hh_l0
    layer._flat_weights = copies[0]._flat_weights
    assert layer.weight_ih_l0 is copies[0].weight_ih_l0


def test_replicas_of_data_parallel_use_their_own_weights() -> None:
    layer, x = ur.LSTM(3, 5), torch.randn(4, 2, 3)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():  # as torch.nn.DataParallel does
        setattr(replica, name, parameter * 2)
    other = nn.LSTM(3, 5)
    other.load_state_dict({name: 2 * parameter for name, parameter in layer.state_dict().items()})
    with ur.engine("reference"):
        assert_close(replica(x), other(x), 1e-6)
        assert_close([part for part in replica._flat_weights if part is not None], other._flat_weights, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rnn-tanh", "lstm-proj", "gru"])
def test_a_model_with_layers_compiles_without_a_graph_break(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(5 if kind != "lstm-proj" else 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0])

    ours, theirs = pair(kind, 3, 5)
    model, x = Model(ours), torch.randn(4, 2, 3)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=False):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), model.head(theirs(x)[0]), 1e-5)
        compiled(x).sum().backward()
    expected = torch.autograd.grad(model.head(theirs(x)[0]).sum(), list(theirs.parameters()))
    assert_close([parameter.grad for parameter in ours.parameters()], expected, 1e-5)


@pytest.mark.parametrize("kind", [*LAYERS, "cell"])
def test_layers_are_leaves_in_graphs_of_fx(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ur.GRUCell(3, 5) if kind == "cell" else pair(kind, 3, 5)[0]

        def forward(self, x: Tensor, state: Any) -> Any:
            if kind == "cell":
                return self.layer(x[0], state).tanh()
            output, state = self.layer(x, state)
            return output.tanh(), self.layer(x, hx=state)[0]

    model, x = Model(), torch.randn(4, 2, 3)
    traced = fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["layer"] * (1 if kind == "cell" else 2)
    with ur.engine("reference"):
        state = torch.randn(2, 5) if kind == "cell" else model.layer(x)[1]
        assert_close(traced(x, state), model(x, state), 0)


def test_options_of_calls_in_graphs_of_fx() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ur.LSTM(3, 5)

        def forward(self, x: Tensor, resets: Tensor) -> Any:
            return self.layer(x, lengths=[4, 2], resets=resets, all_states=True)[2]["c"]

    model, x, resets = Model(), torch.randn(4, 2, 3), torch.rand(4, 2) > 0.5
    with ur.engine("reference"):
        assert_close(fx.symbolic_trace(model)(x, resets), model(x, resets), 0)
    with pytest.raises(TypeError, match=r"torch.fx can't trace into LSTM, .* trace a module that has it"):
        fx.symbolic_trace(model.layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_flops_are_those_of_torch(kind: str) -> None:
    ours, theirs = pair(kind, 6, 5, **SHAPE, dtype=torch.float64)  # torch has no fused operator for float64
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)

    def count(layer: nn.Module) -> tuple[Any, int, int]:
        with FlopCounterMode(display=False) as forward:
            result = layer(x)
        with FlopCounterMode(display=False) as both:
            layer(x)[0].sum().backward()
        return result, forward.get_total_flops(), both.get_total_flops()

    (actual, *flops), (expected, *torch_flops) = count(ours), count(theirs)
    assert flops == torch_flops
    assert flops[0] > 0
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [lambda: ur.GRU(3, 4), lambda: ur.LSTM(3, 4)], ids=["GRU", "LSTM"])
def test_final_states_can_be_detached_in_place(make: Callable[[], Any], engine: str) -> None:
    layer, chunks = make(), torch.randn(3, 5, 2, 3)

    def train(in_place: bool) -> list[Tensor]:
        layer.zero_grad()
        state = None
        for x in chunks:
            output, state = layer(x, state)
            output.sum().backward()
            parts = list(tensors(state))
            detached = [part.detach_() if in_place else part.detach() for part in parts]
            assert not any(part.requires_grad for part in detached)
            state = tuple(detached) if len(detached) > 1 else detached[0]
        return [parameter.grad.clone() for parameter in layer.parameters()]

    with ur.engine(engine):
        assert_close(train(True), train(False), 0)
        with torch.no_grad():
            for part in tensors(layer(chunks[0])[1]):
                part.detach_()
        output, state, _ = layer(chunks[0], all_states=True)
        for part in tensors(state):
            part.detach_().zero_()  # changes neither the output nor its gradients
        assert_close(torch.autograd.grad(output.sum(), layer.weight_hh_l0), torch.autograd.grad(
            layer(chunks[0])[0].sum(), layer.weight_hh_l0), 1e-6)  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_a_second_backward_pass_raises_torchs_error(engine: str, checkpoint: int | None) -> None:
    layer, x = ur.GRU(3, 4), torch.randn(5, 2, 3)
    with ur.engine(engine):
        loss = layer(x, checkpoint=checkpoint)[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
