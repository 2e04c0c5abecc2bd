"""Conversion of subclasses of torch.nn's classes, and the report about a conversion."""

from __future__ import annotations

import abc
import copy
import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unrolled as ur
from helpers.layer_pairs import assert_close, tensors


class ForgetBias(nn.LSTM):
    """Overrides only the initialization."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("bias_hh"):
                    parameter[self.hidden_size : 2 * self.hidden_size] = 1.0


class Scaled(nn.GRU):
    """Computes something around the layer, from an argument and a submodule of its own."""

    def __init__(self, size: int, scale: float) -> None:
        super().__init__(size, size, bidirectional=True)
        self.scale = scale
        self.head = nn.Linear(2 * size, 2)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
        output, hx = super().forward(self.scale * input, hx)
        return self.head(output), hx


class Deeper(Scaled):
    """A subclass of a subclass."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
        output, hx = super(Deeper, self).forward(input, hx)  # noqa: UP008
        return output.tanh(), hx


class WithLengths(abc.ABC, nn.RNNBase):
    """A mixin with a forward method, as in pytorch-forecasting."""

    @abc.abstractmethod
    def lengths(self) -> Any: ...

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        packed = pack_padded_sequence(input, self.lengths(), enforce_sorted=False)
        output, hx = super().forward(packed, hx=hx)  # type: ignore[misc]
        return pad_packed_sequence(output)[0], hx


class Mixed(WithLengths, nn.LSTM):
    """Inherits from a mixin and from torch.nn."""

    def lengths(self) -> Any:
        return [5, 2]


class Residual(nn.LSTMCell):
    """A cell that adds its input."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        h, c = super().forward(input, hx)
        return h + input, c


class Own(nn.LSTM):
    """Doesn't use the inherited forward method."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return input.cumsum(0), hx


class Checked(nn.GRU):
    """Overrides a method that torch.nn's forward calls."""

    def check_forward_args(self, input: Tensor, hidden: Tensor, batch_sizes: Tensor | None) -> None:
        assert input.abs().max() < 1


class Named(nn.LSTM):
    """Has a method whose name the layers of this library use."""

    def step(self) -> str:
        return "mine"


class Packed(nn.RNN):
    """Has its own way to be pickled."""

    def __getstate__(self) -> Any:
        return super().__getstate__()


class Sealed(nn.GRU):
    """Refuses subclasses."""

    def __init_subclass__(cls) -> None:
        raise TypeError("Sealed is final")


@pytest.fixture(autouse=True)
def _reference_engine() -> Iterator[None]:
    with ur.engine("reference"):
        yield


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (ForgetBias(3, 4, num_layers=2), torch.randn(5, 2, 3)),
        (Scaled(3, 0.5), torch.randn(5, 2, 3)),
        (Deeper(4, 2.0), torch.randn(5, 2, 4)),
        (Residual(4, 4), torch.randn(2, 4)),
        (Mixed(3, 4), torch.randn(5, 2, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_run_on_this_library(module: nn.Module, x: Tensor) -> None:
    model, calls = nn.Sequential(module), []
    names = [name for name, _ in model.named_parameters()]
    module.register_forward_hook(lambda *_: calls.append(1))
    expected = list(tensors(model(x)))
    ur.convert(model)
    converted = model[0]
    assert isinstance(converted, (ur.Recurrent, ur.LSTMCell))
    assert isinstance(converted, type(module))
    assert repr(converted) == repr(module)
    assert [name for name, _ in model.named_parameters()] == names
    copied = copy.deepcopy(converted)
    copies = copied, pickle.loads(pickle.dumps(copy.deepcopy(copied).apply(remove_hooks)))
    for layer in (converted, *copies):
        assert type(layer) is type(converted)
        assert_close(list(tensors(layer(x))), expected, 1e-6)
        layer.apply(lambda _: None).double().float()
    with torch.no_grad():
        assert_close(list(tensors(model(x))), expected, 1e-6)
    assert len(calls) == 4  # of the module, of its conversion and of the copy with hooks
    assert ur.convert(model)[0] is converted
    ur.revert(model)
    assert type(model[0]) is type(module)
    assert_close(list(tensors(model(x))), expected, 0)


def remove_hooks(module: nn.Module) -> None:
    module._forward_hooks.clear()


def test_an_overridden_initialization_is_kept() -> None:
    layer: Any = ur.convert(ForgetBias(3, 4))
    nn.init.zeros_(layer.bias_hh_l0)
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    expected = ForgetBias(3, 4)
    assert_close(list(layer.parameters()), list(expected.parameters()), 0)
    assert torch.equal(layer.bias_hh_l0[4:8], torch.ones(4))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Own(3, 4), r"Own.forward doesn't call super\(\).forward"),
        (Checked(3, 4), "Checked: it replaces check_forward_args, which torch.nn's forward method uses"),
        (Named(3, 4), "Named: its attribute 'step' has a meaning in unrolled.LSTM: rename it"),
        (Packed(3, 4), "Packed has its own __getstate__"),
        (Sealed(3, 4), "a subclass of it can't be created: Sealed is final"),
        (nn.RNNBase("GRU", 3, 4), "it is a recurrent module, but none of the classes of torch.nn"),
    ],
)
def test_subclasses_that_are_left(layer: nn.Module, reason: str) -> None:
    with pytest.warns(UserWarning, match=rf"the model \({type(layer).__name__}\) is not converted: {reason}"):
        assert ur.convert(layer) is layer


@pytest.mark.parametrize("name", ["flatten_parameters", "extra_repr", "note", "reset_parameters", "hook"])
def test_attributes_that_change_no_number_are_kept(name: str) -> None:
    layer = nn.LSTM(3, 4)
    setattr(layer, name, str)
    x = torch.randn(5, 2, 3)
    expected = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = ur.convert(layer)
        assert getattr(converted, name) is str
        assert_close(converted(x), expected, 1e-6)
        assert getattr(ur.revert(converted), name) is str


def test_attributes_that_change_what_forward_computes() -> None:
    layer: Any = nn.GRU(3, 4)
    layer.permute_hidden = lambda hx, permutation: -hx
    with pytest.warns(UserWarning, match="it replaces permute_hidden, which torch.nn's forward method uses"):
        assert ur.convert(layer) is layer
    compiled = nn.GRU(3, 4)
    compiled.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"it is compiled: convert it before Module.compile\(\)"):
        assert ur.convert(compiled) is compiled


@pytest.mark.filterwarnings(
    r"ignore:.*torch\.jit\.", "ignore:.*torch.ao.quantization", "ignore:.*quantize_per"
)
def test_the_report(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(2, 2)), {nn.LSTM})[0]
    model = nn.ModuleDict(
        {
            "first": nn.LSTM(3, 4),
            "cells": nn.ModuleList([nn.GRUCell(3, 4), Residual(4, 4)]),
            "own": Own(3, 4),
            "scripted": torch.jit.script(nn.Sequential(nn.GRUCell(3, 4), nn.Linear(4, 4))),
            "traced": torch.jit.trace(nn.RNNCell(3, 4), torch.randn(2, 3)),
            "quantized": quantized,
            "ours": ur.LSTM(3, 4),
        }
    )
    caplog.set_level(logging.INFO, "unrolled.convert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ur.convert(model, report=True) is model
    printed, scripted = capsys.readouterr().out, "it is scripted or traced: convert it before torch.jit"
    assert printed == (
        "3 converted, 4 not converted\n"
        "  module 'first' (LSTM): converted\n"
        "  module 'cells.0' (GRUCell): converted\n"
        "  module 'cells.1' (Residual): converted\n"
        "  module 'own' (Own): not converted: Own.forward doesn't call super().forward\n"
        f"  module 'scripted.0' (GRUCell): not converted: {scripted}\n"
        f"  module 'traced' (RNNCell): not converted: {scripted}\n"
        "  module 'quantized' (LSTM): not converted: it is quantized: convert it before quantization\n"
    )
    assert [record.getMessage() + "\n" for record in caplog.records] == [printed]
    ur.revert(model, report=True)
    assert capsys.readouterr().out.startswith("4 reverted, 0 not reverted\n")
    assert type(model["cells"][1]) is Residual


def test_layers_that_keep_their_types() -> None:
    model = nn.ModuleList([nn.RNN(3, 4, nonlinearity="relu"), nn.LSTM(3, 4), nn.GRU(3, 4), nn.LSTMCell(3, 4)])
    originals = list(model)
    ur.convert(model, keep_types=True)
    for layer, original in zip(model, originals, strict=True):
        assert isinstance(layer, type(original))
        assert isinstance(layer, getattr(ur, type(original).__name__))
        x = torch.randn(2, 3) if isinstance(original, nn.LSTMCell) else torch.randn(5, 2, 3)
        assert_close(layer(x), original(x), 1e-6)
        assert_close(pickle.loads(pickle.dumps(layer))(x), original(x), 1e-6)
        assert type(ur.revert(layer)) is type(original)


@pytest.mark.slow
def test_torch_compile_of_layers_that_keep_their_types() -> None:
    layer, x = ur.convert(nn.GRU(3, 4), keep_types=True), torch.randn(5, 2, 3)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=False), pytest.raises(Exception, match="allow_rnn"):
        torch.compile(nn.Sequential(layer), fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend="eager")
        assert_close(compiled(x), layer(x), 1e-6)
