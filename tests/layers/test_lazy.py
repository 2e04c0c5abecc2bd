"""Layers that take their input size from the first input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.layer_pairs import CELLS, LAYERS, assert_close

SHAPE = {"num_layers": 2, "bidirectional": True}


@pytest.fixture(autouse=True)
def _reference_engine() -> Any:
    with ur.engine("reference"):
        yield


@pytest.mark.parametrize("features", [1, 3, 7])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_first_call_creates_the_parameters(kind: str, features: int) -> None:
    ours, _, options = LAYERS[kind]
    lazy = ours(None, 5, **options, **SHAPE)
    assert all(isinstance(parameter, UninitializedParameter) for parameter in lazy.parameters())
    optimizer_parameters = list(lazy.parameters())
    x = torch.randn(4, 2, features)
    torch.manual_seed(5)
    output = lazy(x)
    torch.manual_seed(5)
    layer = ours(features, 5, **options, **SHAPE)
    assert_close(output, layer(x), 0)
    assert repr(lazy) == repr(layer)
    assert lazy.input_size == features
    assert all(a is b for a, b in zip(optimizer_parameters, lazy.parameters(), strict=True))
    assert not lazy._forward_pre_hooks
    with pytest.raises(ValueError, match="must be equal to input_size"):
        lazy(torch.randn(4, 2, features + 1))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_take_their_input_size_from_the_first_call(kind: str) -> None:
    ours, theirs, options = CELLS[kind]
    lazy, x = ours(None, 5, **options), torch.randn(2, 3)
    lazy(input=x)
    layer = theirs(3, 5, **options)
    layer.load_state_dict(lazy.state_dict())
    assert_close(lazy(x), layer(x), 1e-6)


@pytest.mark.parametrize("cell", [ur.cells.MGU, ur.cells.RHN, ur.cells.LayerNormLSTM, ur.cells.SRU])
def test_other_cells_and_inputs(cell: Any) -> None:
    features = 5 if cell is ur.cells.SRU else 3  # SRU needs as many inputs as units
    sequences = [torch.randn(4, features), torch.randn(2, features)]
    layer = ur.Recurrent(cell, None, 5, initial_state="learned", dtype=torch.float64).float()
    packed = layer(pack_sequence(sequences))[0]
    assert layer.input_size == features
    assert packed.data.shape == (6, 5)
    assert_close(layer.step(sequences[0][:1])[0], layer(sequences[0][None, :1].transpose(0, 1))[0][0], 1e-6)


def test_copies_and_files_of_lazy_layers() -> None:
    lazy = ur.LSTM(None, 4, num_layers=2)
    assert repr(lazy) == "LSTM(0, 4, num_layers=2)"
    trained = ur.LSTM(3, 4, num_layers=2)
    for layer in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy)), lazy):
        assert list(layer.state_dict()) == list(trained.state_dict())
        assert layer.input_size == 0
        nn.Sequential(layer).load_state_dict(nn.Sequential(trained).state_dict())
        assert layer.input_size == 3
        x = torch.randn(5, 2, 3)
        assert_close(layer(x), trained(x), 0)


def test_errors_of_lazy_layers() -> None:
    lazy = ur.GRU(None, 4)
    with pytest.raises(RuntimeError, match="weight_ih_l0"):
        lazy.load_state_dict({**ur.GRU(3, 4).state_dict(), "weight_ih_l0": torch.zeros(5, 5)})
    with pytest.raises(TypeError, match="Expected input to be a Tensor"):
        lazy([1.0])
    with pytest.warns(UserWarning, match="its input_size isn't known before its first call"):
        ur.revert(lazy)
    with pytest.raises(TypeError, match="input_size should be of type int, got: str"):
        ur.GRU("3", 4)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="call it once before you compile"):
        torch.compile(lazy, fullgraph=True, backend="eager")(torch.randn(5, 2, 3))
