"""Streams of modules that change between calls, have hooks, or are used by other threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import assert_close, tensors
from helpers.streams import Tagger, assert_same, infer
from unrolled.inference.stream import Stream


def test_a_changed_weight_takes_effect() -> None:
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


def add_weight_norm(layer: nn.Module) -> None:
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
        lambda layer: (add_weight_norm(layer), layer.parametrizations.weight_hh_l0.original0.data.mul_(3)),
        lambda layer: layer.bias_ih_l0.share_memory_().data.add_(1),
    ],
)
def test_any_change_of_a_weight_takes_effect(change: Callable[[Any], Any], wrapped: bool) -> None:
    layer, x = ur.RNN(4, 6), torch.randn(5, 2, 4)
    module = nn.Sequential(nn.Identity(), layer) if wrapped else layer
    stream = Stream(module)
    stream(x)
    change(layer)
    stream.reset()
    output = stream(x)
    assert_same(output[0] if wrapped else output, infer(layer, x)[0])


class ScaleParametrization(nn.Module):
    """A parametrization with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class Biased(ur.Cell):
    """A cell with a tensor attribute that is not a parameter."""

    state = ("h",)
    weight = ur.Param("hidden", "input")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = torch.ones(self.hidden)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.own + h)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_changed_buffer_or_tensor_attribute_takes_effect(wrapped: bool) -> None:
    x, scaled, layer = torch.randn(5, 2, 4), ScaleParametrization(), ur.RNN(4, 6)
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", scaled)
    biased = ur.Recurrent(Biased, 4, 6)
    for module, tensor in ((layer, scaled.scale), (biased, biased._cells["_l0"].own)):
        stream = Stream(nn.Sequential(module) if wrapped else module)
        stream(x)
        tensor.mul_(3)
        stream.reset()
        assert_same(next(tensors(stream(x))), infer(module, x)[0])


@pytest.mark.parametrize("wrapped", [False, True])
def test_hooks_of_the_layer_run(wrapped: bool) -> None:
    states: list[Any] = []

    class Recorder:
        def record(self, module: nn.Module, args: Any, result: Any) -> None:
            states.append(stream.state)

    layer, x = ur.LSTM(4, 6), torch.randn(5, 2, 4)
    expected = infer(layer, 2 * x)[0]
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    layer.register_forward_hook(Recorder().record)
    stream = Stream(nn.Sequential(layer) if wrapped else layer)
    outputs = [next(tensors(stream(chunk))) for chunk in x.split([2, 3])]
    assert len(states) == 2
    assert_same(torch.cat(outputs), expected)
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


class StatefulModel(nn.Module):
    """A model that reads and writes its own attributes in each call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head, self.scale = layer, nn.Identity(), 1.0
        self.chunk_lengths: list[int] = []
        self.mean = 0.0

    def forward(self, x: Tensor) -> Tensor:
        output = self.head(self.layer(x)[0]) * self.scale
        self.chunk_lengths.append(len(x))
        self.mean = output.mean()
        return output


@pytest.mark.parametrize("kind", [ur.GRU, nn.GRU])
def test_changes_of_the_model_take_effect(kind: Any) -> None:
    model, x = StatefulModel(kind(3, 4)), torch.randn(8, 2, 3)
    stream, whole = ur.Stream(model), model.layer(x)[0].detach()
    chunks = iter(zip(x.split(1), whole.split(1), strict=True))

    def check_next_output(change: Callable[[Tensor], Tensor]) -> None:
        chunk, expected = next(chunks)
        assert_close(stream(chunk), change(expected), 1e-6)

    check_next_output(lambda y: y)
    model.scale = 3.0
    check_next_output(lambda y: 3 * y)
    model.head = nn.Tanh()
    check_next_output(lambda y: 3 * y.tanh())
    handle = model.head.register_forward_hook(lambda module, args, output: -output)
    check_next_output(lambda y: -3 * y.tanh())
    model.layer.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    check_next_output(lambda y: -3 * (y + 1).tanh())
    handle.remove()
    assert model.chunk_lengths == [1] * 5
    assert_close(model.mean, (-3 * (whole[4] + 1).tanh()).mean(), 1e-6)
    model.layer = copy.deepcopy(model.layer)
    check_next_output(lambda y: 3 * (y + 1).tanh())
    assert "_compiled_call_impl" not in vars(model.layer)


def test_removing_a_layer_that_has_a_state_is_an_error() -> None:
    model, x = StatefulModel(nn.ModuleDict({"one": ur.GRU(3, 4)})), torch.randn(2, 1, 3)
    model.forward = lambda x: model.layer["one"](x)[0]
    stream = ur.Stream(model)
    stream(x)
    model.layer = nn.ModuleDict({"two": ur.GRU(3, 4)})
    model.forward = lambda x: model.layer["two"](x)[0]
    with pytest.raises(
        RuntimeError, match=r"StatefulModel no longer contains layer.one, but the stream holds a state"
    ):
        stream(x)
    stream.reset([True])  # the stream still knows the removed layer
    stream.reset()
    assert torch.equal(stream(x), model.layer["two"](x)[0])


def test_other_threads_can_use_the_model_during_a_call() -> None:
    started, resume = threading.Event(), threading.Event()
    model, x = StatefulModel(ur.GRU(3, 4)), torch.randn(6, 2, 3)
    whole = model.layer(x)[0].detach()
    stream = ur.Stream(model)
    stream(x[:3])

    class Waiting(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                started.set()
                assert resume.wait(20)
            return y

    model.head = Waiting()
    outputs: list[Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(stream(x[3:])))
    thread.start()
    assert started.wait(20)
    assert_close(model(x), whole, 1e-6)  # from zeros, not from the state of the stream
    assert_close(copy.deepcopy(model.layer)(x)[0], whole, 1e-6)
    resume.set()
    thread.join()
    assert_close(outputs[0], whole[3:], 1e-6)
    assert "_compiled_call_impl" not in vars(model.layer)


@pytest.mark.parametrize("wrapped", [False, True])
def test_under_autocast(wrapped: bool) -> None:
    layer, x = ur.LSTM(3, 4), torch.randn(4, 2, 3)
    stream = ur.Stream(StatefulModel(layer) if wrapped else layer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        state, expected = None, []
        for chunk in x.split(1):
            output, state = layer(chunk, state)
            expected.append(output)
        assert_close([stream(chunk) for chunk in x.split(1)], expected, 0)
