"""Streams: outputs bit-identical to the whole sequence, states, resets and errors."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unrolled as ur
from helpers.forks import exit_code_of_child
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, pair, tensors
from helpers.streams import Tagger, assert_same, infer
from helpers.user_cell import MGU
from unrolled.inference.stream import Stream


class StateGivingModel(nn.Module):
    """A model that calls its layer with a state that isn't zero."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = ur.RNN(2, 3)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x, x.new_ones(1, x.shape[1], 3))


class TwoCallsModel(nn.Module):
    """A model that calls its layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = ur.RNN(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(self.rnn(x)[0])


class NoCallModel(TwoCallsModel):
    """A model that doesn't call its layer."""

    def forward(self, x: Tensor) -> Any:
        return x


@pytest.mark.slow
@NEEDS_COMPILER
@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    layers=st.integers(1, 3),
    batch_first=st.booleans(),
    batched=st.booleans(),
    native=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_bit_identical_to_the_whole_sequence(
    kind: str, lengths: list[int], batch: int, layers: int, batch_first: bool, batched: bool, native: bool
) -> None:
    layer, _ = pair(kind, 5, 17, num_layers=layers, batch_first=batch_first)
    axis = 1 if batch_first and batched else 0
    shape = [sum(lengths), batch] if axis == 0 else [batch, sum(lengths)]
    x = torch.randn(*(shape if batched else shape[:1]), 5)
    with ur.engine("auto" if native else "reference"):
        output, final = infer(layer, x)
        stream = Stream(layer)
        for _ in range(2):
            outputs = [stream(chunk) for chunk in x.split(lengths, axis)]
            if native:
                assert_same((torch.cat(outputs, axis), stream.state), (output, final))
            else:  # torch sums in another order for other sizes
                torch.testing.assert_close((torch.cat(outputs, axis), stream.state), (output, final))
            stream.reset()
            assert stream.state is None


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("cell", [ur.cells.PeepholeLSTM, ur.cells.LayerNormLSTM, MGU])
def test_custom_cells_use_the_double_buffer(cell: type[ur.Cell]) -> None:
    """Operations on x alone, such as a normalization, are part of the loop, so a call is one kernel."""
    layer, x = ur.Recurrent(cell, 5, 19, num_layers=2), torch.randn(9, 3, 5)
    stream, (output, final) = Stream(layer), infer(layer, x)
    outputs = [stream(chunk) for chunk in x.split([1, 1, 4, 3])]
    assert stream._double_buffer is not None
    assert stream._double_buffer.index is not None
    assert_same((torch.cat(outputs), stream.state), (output, final))


@pytest.mark.parametrize("recurrent", [ur, nn])
def test_a_model(recurrent: Any) -> None:
    model, x = Tagger(recurrent).eval(), torch.randn(2, 12, 5)
    whole, stream = infer(model, x, 0.5), Stream(model)
    for _ in range(2):
        output = torch.cat([stream(chunk, scale=0.5) for chunk in x.split([1, 1, 4, 6], 1)], 1)
        torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-6)
        assert list(stream.state) == ["below", "above"]
        assert [part.shape for part in stream.state["below"]] == [(2, 2, 7), (2, 2, 7)]
        stream.reset()
        assert stream.state == {}
    assert not model.below._forward_hooks
    assert not model.below._forward_pre_hooks
    assert_same(infer(model, x, 0.5), whole)


def test_layers_of_torch() -> None:
    x = torch.randn(8, 3, 5)
    for layer in (nn.RNN(5, 6), nn.GRU(5, 6), nn.LSTM(5, 6)):
        stream, (output, final) = Stream(layer), infer(layer, x)
        torch.testing.assert_close(torch.cat([stream(chunk) for chunk in x.split(3)]), output)
        torch.testing.assert_close(stream.state, final)


def test_streams_of_one_module_are_independent() -> None:
    layer = ur.GRU(4, 6)
    xs = [torch.randn(20, 2, 4) for _ in range(4)]
    expected, outputs = [infer(layer, x)[0] for x in xs], [[] for _ in xs]

    def run(index: int) -> None:
        stream = Stream(layer)
        outputs[index] += [stream(chunk) for chunk in xs[index].split(1)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for chunks, whole in zip(outputs, expected, strict=True):
        assert_same(torch.cat(chunks), whole)


def test_outputs_and_states_can_be_changed_in_place() -> None:
    layer, x = ur.LSTM(4, 6), torch.randn(6, 2, 4)
    expected, stream = infer(layer, x)[0], Stream(layer)
    outputs = []
    for chunk in x.split(2):
        output = stream(chunk)
        outputs.append(output.clone())
        for part in (output, *stream.state):
            part.fill_(7.0)
    assert_same(torch.cat(outputs), expected)


def test_setting_the_state_continues_a_sequence() -> None:
    for layer in (ur.LSTM(4, 6, num_layers=2), Tagger().eval()):
        x = torch.randn(9, 3, layer.input_size if isinstance(layer, ur.LSTM) else 5)
        stream, other = Stream(layer), Stream(layer)
        stream(x)
        other.state = stream.state
        assert_same(other(x), stream(x))
        other.state = {} if isinstance(layer, Tagger) else None
        assert_same(other(x), Stream(layer)(x))


def test_reset_of_some_rows() -> None:
    layer, x = ur.LSTM(4, 6), torch.randn(9, 3, 4)
    stream, new_stream = Stream(layer), Stream(layer)
    stream(x)
    continued = infer(layer, x, stream.state)[0]
    stream.reset(torch.tensor([False, True, False]))
    output, from_zeros = stream(x), new_stream(x)
    assert_same(output[:, 1], from_zeros[:, 1])
    assert_same(output[:, ::2], continued[:, ::2])
    model = Stream(Tagger().eval())
    model(torch.randn(2, 3, 5))
    model.reset([True, True])
    assert all(not part.any() for state in model.state.values() for part in tensors(state))


def test_changing_a_state_in_place_does_not_affect_the_stream() -> None:
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


def test_a_forked_child_can_use_a_stream_that_another_thread_locked() -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    stream = Stream(layer)
    stream(x)
    assert exit_code_of_child(stream._lock, lambda: stream(x)) == 0


def test_streams_cannot_be_copied() -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    stream = Stream(layer)
    for copy_function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Stream can't be copied or pickled: create a new Stream"):
            copy_function(stream)
    model = nn.Sequential(layer)
    with torch.no_grad(), ur.frozen(model):
        output = model(x)[0]
        assert_same(Stream(model)(x)[0], output)


def test_inputs_with_the_negative_bit() -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    expected = infer(layer, -x)[0]
    negated = torch._neg_view(x)
    for output in (infer(layer, negated)[0], Stream(layer)(negated)):
        torch.testing.assert_close(output, expected)


def test_no_gradients_are_recorded() -> None:
    x = torch.randn(5, 2, 4, requires_grad=True)
    for module in (ur.RNN(4, 6), nn.Sequential(nn.Linear(4, 4), ur.RNN(4, 6))):
        output = Stream(module)(x)
        assert not any(part.requires_grad for part in tensors(output))


def test_inside_and_outside_of_inference_mode() -> None:
    layer, x = ur.GRU(4, 6), torch.randn(8, 2, 4)
    with torch.inference_mode():
        stream = Stream(layer)
        first = stream(x[:3])
    assert_same(torch.cat([first, stream(x[3:])]), infer(layer, x)[0])
    stream.reset()
    assert_same(stream(x), infer(layer, x)[0])


def test_changing_the_dtype_needs_a_reset() -> None:
    layer = ur.GRU(4, 6)
    stream, x = Stream(layer), torch.randn(3, 2, 4)
    stream(x)
    layer.double()
    stream.reset()
    assert_same(stream(x.double()), infer(layer, x.double())[0])
    with pytest.raises(ValueError, match="dtype"):
        stream(x)
    layer.float()
    message = "states have dtype torch.float64, but the weights have torch.float32: call reset"
    with pytest.raises(ValueError, match=message):
        stream(x)


@pytest.mark.parametrize("module", [ur.RNN(2, 3), nn.Sequential(ur.RNN(2, 3))])
def test_changing_the_batch_size_needs_a_reset(module: nn.Module) -> None:
    stream = Stream(module)
    stream(torch.randn(4, 3, 2))
    before = stream.state if isinstance(module, ur.RNN) else stream.state["0"]
    with pytest.raises(ValueError, match="states have 3 rows, but this chunk has 2 rows: call reset"):
        stream(torch.randn(4, 2, 2))
    with pytest.raises(ValueError, match="states have 3 rows, but this chunk has no batch axis: call reset"):
        stream(torch.randn(4, 2))
    message = (
        r"reset of RNN.*: expected 3 booleans, one per row, got a tensor of torch.bool with shape \(1,\)"
    )
    with pytest.raises(ValueError, match=message):
        stream.reset([True])
    assert_same(stream.state if isinstance(module, ur.RNN) else stream.state["0"], before)
    stream.reset()
    stream(torch.randn(4, 2, 2))


def test_invalid_modules_calls_and_states() -> None:
    with pytest.raises(TypeError, match="Stream expects a torch.nn.Module, got int"):
        Stream(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear contains none"):
        Stream(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="can't run LSTM '1': it is bidirectional"):
        Stream(nn.Sequential(nn.Linear(2, 2), ur.LSTM(2, 3, bidirectional=True)))
    x = torch.randn(4, 2, 2)
    with pytest.raises(RuntimeError, match="RNN 'rnn' is given a state by its caller.*unrolled.frozen"):
        Stream(StateGivingModel())(x)
    with pytest.raises(RuntimeError, match="RNN 'rnn' is called twice for one chunk"):
        Stream(TwoCallsModel())(torch.randn(4, 2, 3))
    with pytest.raises(RuntimeError, match="NoCallModel called none of its recurrent layers"):
        Stream(NoCallModel())(x)
    with pytest.raises(RuntimeError, match="RNN is given a state by its caller"):
        Stream(ur.RNN(2, 3))(x, torch.zeros(1, 2, 3))
    stream = Stream(nn.Sequential(ur.RNN(2, 3)))
    with pytest.raises(ValueError, match=r"dictionary by layer name \(0\), got Tensor"):
        stream.state = torch.zeros(1)
    with pytest.raises(ValueError, match=r"dictionary by layer name \(0\), got 1"):
        stream.state = {"1": torch.zeros(1)}
    stream.state = {"0": torch.zeros(1, 2, 4)}
    with pytest.raises(ValueError, match="Expected hidden size"):
        stream(x)
    with pytest.raises(ValueError, match="a state is a tensor or a tuple of tensors, got int"):
        stream.state = {"0": 3}
    layer_stream = Stream(ur.RNN(2, 3))
    layer_stream.state = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="Expected hidden size"):
        layer_stream(x)
    with pytest.raises(TypeError, match="to be a Tensor or a PackedSequence, got list"):
        Stream(ur.RNN(2, 3))([1.0])
