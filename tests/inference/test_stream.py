"""Streams: the bits of the whole sequence at once, for layers and models, and what can't be streamed."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, assert_close, pair, tensors
from helpers.user_cell import MGU
from unrolled.inference.stream import Stream


class Tagger(nn.Module):
    """Two layers with something between them, as models have them."""

    def __init__(self, recurrent: Any = ur) -> None:
        super().__init__()
        self.read = nn.Linear(5, 9)
        self.below = recurrent.LSTM(9, 7, num_layers=2, batch_first=True, dropout=0.5)
        self.above = recurrent.GRU(7, 4, batch_first=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.above(torch.tanh(self.below(self.read(x * scale))[0]))[0]


class Zeros(nn.Module):
    """A model that begins every call with zeros of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = ur.RNN(2, 3)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x, x.new_zeros(1, x.shape[1], 3))


class Twice(nn.Module):
    """A model that calls its layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = ur.RNN(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(self.rnn(x)[0])


class Never(Twice):
    """A model that doesn't call its layer."""

    def forward(self, x: Tensor) -> Any:
        return x


def assert_same(a: Any, b: Any) -> None:
    ours, theirs = list(tensors(a)), list(tensors(b))
    assert len(ours) == len(theirs)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def infer(module: nn.Module, *given: Any) -> Any:
    with torch.no_grad():
        return module(*given)


@NEEDS_COMPILER
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    layers=st.integers(1, 3),
    batch_first=st.booleans(),
    batched=st.booleans(),
    native=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_the_bits_of_the_whole_sequence(
    kind: str, cuts: list[int], batch: int, layers: int, batch_first: bool, batched: bool, native: bool
) -> None:
    layer, _ = pair(kind, 5, 17, num_layers=layers, batch_first=batch_first)
    axis = 1 if batch_first and batched else 0
    shape = [sum(cuts), batch] if axis == 0 else [batch, sum(cuts)]
    x = torch.randn(*(shape if batched else shape[:1]), 5)
    with ur.engine("auto" if native else "reference"):
        output, final = infer(layer, x)
        stream = Stream(layer)
        for _ in range(2):
            pieces = [stream(piece) for piece in x.split(cuts, axis)]
            if native:
                assert_same((torch.cat(pieces, axis), stream.state), (output, final))
            else:  # torch adds up products of other sizes in another order
                torch.testing.assert_close((torch.cat(pieces, axis), stream.state), (output, final))
            stream.reset()
            assert stream.state is None


@NEEDS_COMPILER
@pytest.mark.parametrize("cell", [ur.cells.PeepholeLSTM, ur.cells.LayerNormLSTM, MGU])
def test_a_cell_of_the_users_own_at_full_speed(cell: type[ur.Cell]) -> None:
    """What is computed of x alone, such as its normalised sums, is in the loop too: a call is one loop."""
    layer, x = ur.Recurrent(cell, 5, 19, num_layers=2), torch.randn(9, 3, 5)
    stream, (output, final) = Stream(layer), infer(layer, x)
    pieces = [stream(piece) for piece in x.split([1, 1, 4, 3])]
    assert stream._shuttle is not None
    assert stream._shuttle.at is not None
    assert_same((torch.cat(pieces), stream.state), (output, final))


@pytest.mark.parametrize("recurrent", [ur, nn])
def test_a_model(recurrent: Any) -> None:
    model, x = Tagger(recurrent).eval(), torch.randn(2, 12, 5)
    whole, stream = infer(model, x, 0.5), Stream(model)
    for _ in range(2):
        found = torch.cat([stream(piece, scale=0.5) for piece in x.split([1, 1, 4, 6], 1)], 1)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
        assert list(stream.state) == ["below", "above"]
        assert [part.shape for part in stream.state["below"]] == [(2, 2, 7), (2, 2, 7)]
        stream.reset()
        assert stream.state == {}
    assert not model.below._forward_hooks
    assert not model.below._forward_pre_hooks
    assert_same(infer(model, x, 0.5), whole)


def test_torch_layers_stream_as_ours() -> None:
    x = torch.randn(8, 3, 5)
    for theirs in (nn.RNN(5, 6), nn.GRU(5, 6), nn.LSTM(5, 6)):
        stream, (output, final) = Stream(theirs), infer(theirs, x)
        torch.testing.assert_close(torch.cat([stream(piece) for piece in x.split(3)]), output)
        torch.testing.assert_close(stream.state, final)


def test_streams_of_one_module_are_apart() -> None:
    layer = ur.GRU(4, 6)
    xs = [torch.randn(20, 2, 4) for _ in range(4)]
    expected, found = [infer(layer, x)[0] for x in xs], [[] for _ in xs]

    def run(number: int) -> None:
        stream = Stream(layer)
        found[number] += [stream(piece) for piece in xs[number].split(1)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pieces, whole in zip(found, expected, strict=True):
        assert_same(torch.cat(pieces), whole)


def test_outputs_and_states_are_the_users() -> None:
    layer, x = ur.LSTM(4, 6), torch.randn(6, 2, 4)
    expected, stream = infer(layer, x)[0], Stream(layer)
    found = []
    for piece in x.split(2):
        output = stream(piece)
        found.append(output.clone())
        for part in (output, *stream.state):
            part.fill_(7.0)
    assert_same(torch.cat(found), expected)


def test_go_on_from_a_state() -> None:
    for layer in (ur.LSTM(4, 6, num_layers=2), Tagger().eval()):
        x = torch.randn(9, 3, layer.input_size if isinstance(layer, ur.LSTM) else 5)
        stream, other = Stream(layer), Stream(layer)
        stream(x)
        other.state = stream.state
        assert_same(other(x), stream(x))
        other.state = {} if isinstance(layer, Tagger) else None
        assert_same(other(x), Stream(layer)(x))


def test_some_rows_begin_anew() -> None:
    layer, x = ur.LSTM(4, 6), torch.randn(9, 3, 4)
    stream, fresh = Stream(layer), Stream(layer)
    stream(x)
    went_on = infer(layer, x, stream.state)[0]
    stream.reset(torch.tensor([False, True, False]))
    found, anew = stream(x), fresh(x)
    assert_same(found[:, 1], anew[:, 1])
    assert_same(found[:, ::2], went_on[:, ::2])
    model = Stream(Tagger().eval())
    model(torch.randn(2, 3, 5))
    model.reset([True, True])
    assert all(not part.any() for state in model.state.values() for part in tensors(state))


def test_a_changed_weight_is_taken() -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    stream = Stream(layer)
    stream(x)
    with torch.no_grad():
        layer.weight_ih_l0.mul_(2)
    stream.reset()
    assert_same(stream(x), infer(layer, x)[0])
    model = Tagger().eval()
    stream, x = Stream(model), torch.randn(2, 5, 5)
    stream(x)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    stream.reset()
    assert_same(stream(x), infer(model, x))


def norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "weight_ih_l0", nn.Parameter(torch.randn(6, 4))),
        lambda layer: layer.load_state_dict(
            {name: 2 * value for name, value in layer.state_dict().items()}, assign=True
        ),
        lambda layer: torch.utils.swap_tensors(layer.bias_hh_l0, nn.Parameter(torch.randn(6))),
        lambda layer: (norm(layer), layer.parametrizations.weight_hh_l0.original0.data.mul_(3)),
        lambda layer: layer.bias_ih_l0.share_memory_().data.add_(1),
    ],
)
def test_whatever_happens_to_a_weight(change: Callable[[Any], Any], wrapped: bool) -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    module = nn.Sequential(nn.Identity(), layer) if wrapped else layer
    stream = Stream(module)
    stream(x)
    change(layer)
    stream.reset()
    found = stream(x)
    assert_same(found[0] if wrapped else found, infer(layer, x)[0])


class Scaled(nn.Module):
    """A parametrization with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class Biased(ur.Cell):
    """A cell with a tensor of its own."""

    state = ("h",)
    weight = ur.Param("hidden", "input")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = torch.ones(self.hidden)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.own + h)


@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_that_are_no_parameters(wrapped: bool) -> None:
    x, scaled, layer = torch.randn(5, 2, 4), Scaled(), ur.RNN(4, 6)
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", scaled)
    biased = ur.Recurrent(Biased, 4, 6)
    for module, tensor in ((layer, scaled.scale), (biased, biased._cells["_l0"].own)):
        stream = Stream(nn.Sequential(module) if wrapped else module)
        stream(x)
        tensor.mul_(3)
        stream.reset()
        assert_same(next(tensors(stream(x))), infer(module, x)[0])


@pytest.mark.parametrize("wrapped", [False, True])
def test_hooks_of_the_user(wrapped: bool) -> None:
    seen: list[Any] = []

    class Recorder:
        def look(self, module: nn.Module, args: Any, result: Any) -> None:
            seen.append(stream.state)

    layer, x = ur.LSTM(4, 6), torch.randn(5, 2, 4)
    expected = infer(layer, 2 * x)[0]
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    layer.register_forward_hook(Recorder().look)
    stream = Stream(nn.Sequential(layer) if wrapped else layer)
    found = [next(tensors(stream(piece))) for piece in x.split([2, 3])]
    assert len(seen) == 2
    assert_same(torch.cat(found), expected)
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


class Changing(nn.Module):
    """A model that reads what it holds anew at every call, and writes to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.drop, self.scale = layer, nn.Identity(), 1.0
        self.seen: list[int] = []
        self.mean = 0.0

    def forward(self, x: Tensor) -> Tensor:
        output = self.drop(self.layer(x)[0]) * self.scale
        self.seen.append(len(x))
        self.mean = output.mean()
        return output


@pytest.mark.parametrize("kind", [ur.GRU, nn.GRU])
def test_whatever_the_model_holds_now(kind: Any) -> None:
    model, x = Changing(kind(3, 4)), torch.randn(8, 2, 3)
    stream, whole = ur.Stream(model), model.layer(x)[0].detach()
    pieces = iter(zip(x.split(1), whole.split(1), strict=True))

    def follows(change: Callable[[Tensor], Tensor]) -> None:
        piece, expected = next(pieces)
        assert_close(stream(piece), change(expected), 1e-6)

    follows(lambda y: y)
    model.scale = 3.0
    follows(lambda y: 3 * y)
    model.drop = nn.Tanh()
    follows(lambda y: 3 * y.tanh())
    handle = model.drop.register_forward_hook(lambda module, args, output: -output)
    follows(lambda y: -3 * y.tanh())
    model.layer.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    follows(lambda y: -3 * (y + 1).tanh())
    handle.remove()
    assert model.seen == [1] * 5
    assert_close(model.mean, (-3 * (whole[4] + 1).tanh()).mean(), 1e-6)
    model.layer = copy.deepcopy(model.layer)
    follows(lambda y: 3 * (y + 1).tanh())
    assert "_compiled_call_impl" not in vars(model.layer)


def test_a_state_that_lost_its_layer() -> None:
    model, x = Changing(nn.ModuleDict({"one": ur.GRU(3, 4)})), torch.randn(2, 1, 3)
    model.forward = lambda x: model.layer["one"](x)[0]
    stream = ur.Stream(model)
    stream(x)
    model.layer = nn.ModuleDict({"two": ur.GRU(3, 4)})
    model.forward = lambda x: model.layer["two"](x)[0]
    with pytest.raises(
        RuntimeError, match=r"Changing no longer holds layer.one, of which the stream has a st"
    ):
        stream(x)
    stream.reset([True])  # of the layer that the stream still knows
    stream.reset()
    assert torch.equal(stream(x), model.layer["two"](x)[0])


def test_a_model_is_as_ever_for_other_threads() -> None:
    inside, go_on = threading.Event(), threading.Event()
    model, x = Changing(ur.GRU(3, 4)), torch.randn(6, 2, 3)
    whole = model.layer(x)[0].detach()
    stream = ur.Stream(model)
    stream(x[:3])

    class Waiting(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert go_on.wait(20)
            return y

    model.drop = Waiting()
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(stream(x[3:])))
    thread.start()
    assert inside.wait(20)
    assert_close(model(x), whole, 1e-6)  # from zeros, not from where the stream is
    assert_close(copy.deepcopy(model.layer)(x)[0], whole, 1e-6)
    go_on.set()
    thread.join()
    assert_close(found[0], whole[3:], 1e-6)
    assert "_compiled_call_impl" not in vars(model.layer)


@pytest.mark.parametrize("wrapped", [False, True])
def test_under_autocast(wrapped: bool) -> None:
    layer, x = ur.LSTM(3, 4), torch.randn(4, 2, 3)
    stream = ur.Stream(Changing(layer) if wrapped else layer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        state, expected = None, []
        for piece in x.split(1):
            output, state = layer(piece, state)
            expected.append(output)
        assert_close([stream(piece) for piece in x.split(1)], expected, 0)


def test_a_state_is_the_streams_own() -> None:
    layer, x = ur.LSTM(4, 6), torch.randn(5, 2, 4)
    whole = infer(layer, x)[0]
    stream = Stream(nn.Sequential(layer))
    _, state = stream(x[:2])
    for part in state:
        part.zero_()
    assert_same(stream(x[2:])[0], whole[2:])
    stream = Stream(layer)
    stream(x[:2])
    state = stream.state
    stream.state = state
    for part in state:
        part.zero_()
    assert_same(stream(x[2:]), whole[2:])


def test_a_forked_child_takes_no_lock_that_another_thread_held() -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    stream = Stream(layer)
    stream(x)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with stream._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        stream(x)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    thread.join()


def test_copies() -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    stream = Stream(layer)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Stream can't be copied or pickled: make one of the module"):
            copied(stream)
    model = nn.Sequential(layer)
    with torch.no_grad(), ur.frozen(model):
        output = model(x)[0]
        assert_same(Stream(model)(x)[0], output)


def test_numbers_yet_to_be_negated() -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    expected = infer(layer, -x)[0]
    negated = torch._neg_view(x)
    for found in (infer(layer, negated)[0], Stream(layer)(negated)):
        torch.testing.assert_close(found, expected)


def test_no_gradients_are_recorded() -> None:
    x = torch.randn(5, 2, 4, requires_grad=True)
    for module in (ur.RNN(4, 6), nn.Sequential(nn.Linear(4, 4), ur.RNN(4, 6))):
        output = Stream(module)(x)
        assert not any(part.requires_grad for part in tensors(output))


def test_in_inference_mode_and_out_of_it() -> None:
    layer, x = ur.GRU(4, 6), torch.randn(8, 2, 4)
    with torch.inference_mode():
        stream = Stream(layer)
        first = stream(x[:3])
    assert_same(torch.cat([first, stream(x[3:])]), infer(layer, x)[0])
    stream.reset()
    assert_same(stream(x), infer(layer, x)[0])


def test_float64_after_float32() -> None:
    layer = ur.GRU(4, 6)
    stream, x = Stream(layer), torch.randn(3, 2, 4)
    stream(x)
    layer.double()
    stream.reset()
    assert_same(stream(x.double()), infer(layer, x.double())[0])
    with pytest.raises(ValueError, match="dtype"):
        stream(x)
    layer.float()
    with pytest.raises(
        ValueError, match=r"goes on with states of torch.float64, and this piece has weights of"
    ):
        stream(x)


@pytest.mark.parametrize("module", [ur.RNN(2, 3), nn.Sequential(ur.RNN(2, 3))])
def test_another_number_of_rows(module: nn.Module) -> None:
    stream = Stream(module)
    stream(torch.randn(4, 3, 2))
    before = stream.state if isinstance(module, ur.RNN) else stream.state["0"]
    with pytest.raises(ValueError, match="goes on with 3 rows, and this piece has 2 rows: reset"):
        stream(torch.randn(4, 2, 2))
    with pytest.raises(ValueError, match="goes on with 3 rows, and this piece has one sequence without"):
        stream(torch.randn(4, 2))
    with pytest.raises(
        ValueError, match="reset of RNN.*: expected 3 booleans, one a row, got torch.bool of the"
    ):
        stream.reset([True])
    assert_same(stream.state if isinstance(module, ur.RNN) else stream.state["0"], before)
    stream.reset()
    stream(torch.randn(4, 2, 2))


def test_what_is_no_stream() -> None:
    with pytest.raises(TypeError, match="Stream takes a module, got int"):
        Stream(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear holds none"):
        Stream(nn.Linear(2, 3))
    for single in (ur.LSTMCell(2, 3), nn.GRUCell(2, 3)):
        with pytest.raises(ValueError, match="Cell is a single step"):
            Stream(single)
    with pytest.raises(ValueError, match="can't run LSTM '1': it is bidirectional"):
        Stream(nn.Sequential(nn.Linear(2, 2), ur.LSTM(2, 3, bidirectional=True)))
    x = torch.randn(4, 2, 2)
    with pytest.raises(RuntimeError, match="RNN 'rnn' is given a state by its caller"):
        Stream(Zeros())(x)
    with pytest.raises(RuntimeError, match="RNN 'rnn' is called twice for one piece"):
        Stream(Twice())(torch.randn(4, 2, 3))
    with pytest.raises(RuntimeError, match="Never called none of its recurrent layers"):
        Stream(Never())(x)
    with pytest.raises(RuntimeError, match="RNN is given a state by its caller"):
        Stream(ur.RNN(2, 3))(x, torch.zeros(1, 2, 3))
    stream = Stream(nn.Sequential(ur.RNN(2, 3)))
    with pytest.raises(ValueError, match=r"dictionary by layers \(0\), got Tensor"):
        stream.state = torch.zeros(1)
    with pytest.raises(ValueError, match=r"dictionary by layers \(0\), got 1"):
        stream.state = {"1": torch.zeros(1)}
    stream.state = {"0": torch.zeros(1, 2, 4)}
    with pytest.raises(ValueError, match="Expected hidden size"):
        stream(x)
    with pytest.raises(ValueError, match="a state is a tensor or a tuple of tensors, got int"):
        stream.state = {"0": 3}
    alone = Stream(ur.RNN(2, 3))
    alone.state = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="Expected hidden size"):
        alone(x)
    with pytest.raises(TypeError, match="to be a Tensor or a PackedSequence, got list"):
        Stream(ur.RNN(2, 3))([1.0])
