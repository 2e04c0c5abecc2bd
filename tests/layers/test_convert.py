"""Conversion of models to this library and back: numbers, parameters, modes and hooks stay the same."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import unrolled as ur
from helpers.layer_pairs import CELLS, LAYERS, NEEDS_COMPILER, assert_close, tensors


class Tagger(nn.Module):
    """A model with nested layers, a layer that is used twice, a list of cells, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"words": nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, dropout=0.5)}
        )
        self.shared = nn.Sequential(nn.Identity(), nn.GRU(10, 3, batch_first=True))
        self.again = self.shared[1]
        self.cells = nn.ModuleList(
            [nn.LSTMCell(3, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6, nonlinearity="relu")]
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder["words"](x)[0]
        x = self.again(self.shared[1](x)[0].repeat(1, 1, 4)[..., :10])[0]
        h, _ = self.cells[0](x[:, -1])
        return self.head(self.cells[2](self.cells[1](h)))


def class_names(model: nn.Module) -> list[str]:
    """Return library and class of every module, such as ``torch.LSTM``."""
    return [f"{type(m).__module__.split('.')[0]}.{type(m).__name__}" for m in model.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_converting_a_model_keeps_results_and_parameters(training: bool) -> None:
    model = Tagger().train(training)
    x = torch.randn(2, 4, 4)
    parameters, keys, names = dict(model.named_parameters()), list(model.state_dict()), class_names(model)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        output = model(x)
        return [output, *torch.autograd.grad(output.sum(), list(model.parameters()))]

    expected = run()
    assert ur.convert(model) is model
    converted = class_names(model)
    assert converted.count("unrolled.LSTM") == converted.count("unrolled.GRU") == 1
    assert not {"torch.LSTM", "torch.GRU", "torch.LSTMCell"} & set(converted)
    assert model.again is model.shared[1]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert {module.training for module in model.modules()} == {training}
    assert_close(run(), expected, 1e-5)
    assert class_names(ur.convert(model)) == converted  # a second conversion changes nothing
    assert ur.revert(model) is model
    assert class_names(model) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("table", [LAYERS, CELLS], ids=["layers", "cells"])
def test_every_class_by_itself(table: Any) -> None:
    for ours, theirs, options in table.values():
        for bias in (True, False):
            layer = theirs(4, 5, bias=bias, dtype=torch.float64, **options).eval()
            converted = ur.convert(layer)
            assert type(converted) is ours
            assert repr(converted) == repr(layer)
            x = torch.randn(3, 4, dtype=torch.float64)
            assert_close(converted(x), layer(x), 1e-12)
            reverted = ur.revert(converted)
            assert type(reverted) is theirs
            assert all(a.equal(b) for a, b in zip(tensors(reverted(x)), tensors(layer(x)), strict=True))
            assert all(a is b for a, b in zip(reverted.parameters(), layer.parameters(), strict=True))
    assert ur.convert(head := nn.Linear(2, 2)) is head


def test_hooks_attributes_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(nn.GRU(4, 5))
    model[0].weight_hh_l0.requires_grad_(False)
    model[0].note = "mine"
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    ur.convert(model)
    model(torch.randn(2, 4))
    assert (calls, model[0].note, model[0].weight_hh_l0.requires_grad) == ([1], "mine", False)
    handle.remove()
    model(torch.randn(2, 4))
    assert calls == [1]
    ur.revert(model)
    assert model[0].note == "mine"


def test_deprecated_weight_norm_still_works() -> None:
    model = nn.Sequential(nn.LSTM(4, 5))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0], "weight_hh_l0")
    expected = model(torch.ones(2, 4))[0]
    ur.convert(model)
    assert_close(model(torch.ones(2, 4))[0], expected, 1e-6)
    model[0].weight_hh_l0_g.data *= 2
    assert not torch.allclose(model(torch.ones(2, 4))[0], expected)


@NEEDS_COMPILER
def test_parametrizations_of_converted_layers() -> None:
    for register in (
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        functools.partial(prune.random_unstructured, amount=0.5),
    ):
        torch.manual_seed(3)
        theirs = nn.GRU(4, 5)
        ours = ur.convert(copy.deepcopy(theirs))
        for layer in (theirs, ours):
            torch.manual_seed(3)
            register(layer, "weight_hh_l0")
        x = torch.randn(3, 2, 4)
        with ur.engine("native"):
            assert_close(ours.eval()(x), theirs.eval()(x), 1e-5)


def test_modules_that_are_not_converted() -> None:
    class CustomLSTM(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return nn.LSTM.forward(self, -input, hx)

    model = nn.ModuleDict(
        {"custom": CustomLSTM(2, 3), "normed": parametrizations.weight_norm(nn.GRU(2, 3), "weight_hh_l0")}
    )
    custom, normed = model["custom"], model["normed"]
    with pytest.warns(UserWarning, match="is not converted") as caught:
        ur.convert(model)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "module 'custom' (CustomLSTM) is not converted",
        "module 'normed' (ParametrizedGRU) is not converted",
    ]
    assert (model["custom"], model["normed"]) == (custom, normed)
    ours = nn.Sequential(ur.Recurrent(ur.cells.MGU, 2, 3), ur.LSTM(2, 3, zoneout=0.1))
    with pytest.warns(UserWarning, match="is not reverted: torch.nn has no") as caught:
        ur.revert(ours)
    assert len(caught) == 2
    assert str(caught[0].message).endswith("torch.nn has no MGU")
    assert str(caught[1].message).endswith("torch.nn has no option zoneout=0.1")
    for function in (ur.convert, ur.revert):
        with pytest.raises(TypeError, match="expected a module, got list"):
            function([nn.LSTM(2, 3)])


@pytest.mark.parametrize(
    ("cell", "torch_class", "options"),
    [
        (ur.cells.RNN, nn.RNN, {"nonlinearity": "relu"}),
        (ur.cells.LSTM, nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
        (ur.cells.GRU, nn.GRU, {"bias": False, "batch_first": True}),
    ],
)
def test_reverting_a_layer_that_is_built_from_its_cell(
    cell: Any, torch_class: Any, options: dict[str, Any]
) -> None:
    layer = ur.Recurrent(cell, 4, 5, dtype=torch.float64, **options).eval()
    layer.note = "mine"
    reverted = ur.revert(nn.Sequential(layer))[0]
    assert type(reverted) is torch_class
    assert (reverted.note, reverted.training) == ("mine", False)
    assert all(a is b for a, b in zip(reverted.parameters(), layer.parameters(), strict=True))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with ur.engine("reference"):
        assert_close(layer(x), reverted(x), 1e-12)


@pytest.mark.parametrize("make", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_modules_of_this_library_are_reverted_and_converted_again(make: str) -> None:
    """In the modules of torch.nn, nothing is left of those of this library."""
    ours = getattr(ur, make)(3, 4)
    ours.register_parameter("mine", None)
    reverted = ur.revert(ours)
    expected = {*vars(getattr(nn, make)(3, 4))["_parameters"], "mine"}
    assert set(vars(reverted)["_parameters"]) == expected
    again = ur.convert(reverted)
    assert type(again) is getattr(ur, make)
    assert repr(again) == repr(ours)
    assert all(a is b for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_attributes_that_users_added_to_a_layer() -> None:
    layer = nn.LSTM(3, 4)
    layer.head, layer.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(2))
    model = nn.Sequential(layer)
    parameters = dict(model.named_parameters())
    ur.convert(model)
    assert type(model[0]) is ur.LSTM
    assert model[0].head is layer.head
    assert {name: id(value) for name, value in model.named_parameters()} == {
        name: id(value) for name, value in parameters.items()
    }
    for name, value in (
        ("cell", 1),
        ("initial_state", nn.Parameter(torch.zeros(4))),
        ("step", nn.Identity()),
        ("forward", lambda x: x),
    ):
        model = nn.Sequential(nn.LSTM(3, 4))
        setattr(model[0], name, value)
        with pytest.warns(
            UserWarning,
            match=rf"module '0' \(LSTM\) is not converted: its (attribute '{name}'|{name} method)",
        ):
            ur.convert(model)
        assert type(model[0]) is nn.LSTM
    model = nn.Sequential(nn.GRU(3, 4))
    model[0].hidden_size = 5
    with pytest.warns(UserWarning, match=r"its weight_ih_l0 has the shape \(12, 3\), expected \(15, 3\)"):
        ur.convert(model)


def test_an_error_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.LSTM(2, 3), nn.GRU(3, 3))
    modules = list(model)

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ur.GRU, "__init__", fail)
    with pytest.raises(MemoryError):
        ur.convert(model)
    assert list(model) == modules


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # importing transformers gives warnings
def test_a_speech_codec_from_transformers() -> None:
    from transformers import EncodecConfig, EncodecModel

    codec = EncodecModel(EncodecConfig(num_filters=4, hidden_size=16, codebook_size=32)).double().eval()
    audio = torch.randn(1, 1, 3200, dtype=torch.float64)

    def run() -> list[Tensor]:
        codec.zero_grad()
        decoded = codec.decoder(codec.encoder(audio))
        decoded.square().mean().backward()
        return [
            decoded.detach(),
            *(value.grad.clone() for value in codec.parameters() if value.grad is not None),
        ]

    expected, keys = run(), list(codec.state_dict())
    ur.convert(codec)
    layers = [module for module in codec.modules() if isinstance(module, ur.LSTM)]
    assert len(layers) == 2
    assert not any(isinstance(module, nn.LSTM) for module in codec.modules())
    assert list(codec.state_dict()) == keys
    assert_close(run(), expected, 1e-9)
    ur.revert(codec)
    assert_close(run(), expected, 0)
