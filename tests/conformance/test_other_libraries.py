from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import unrolled as ur
from conformance import mutants
from helpers.layer_pairs import NEEDS_COMPILER

libraries = pytest.importorskip("conformance.other_libraries", reason="needs keras, flax and jax")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy"
)  # given by Keras
ENGINES = pytest.mark.parametrize(
    "engine",
    [pytest.param("native", marks=NEEDS_COMPILER), pytest.param("reference", marks=pytest.mark.exhaustive)],
)


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("name", libraries.KERAS)
def test_keras(name: str, engine: str) -> None:
    with ur.engine(engine):
        libraries.check_keras(name)


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("name", libraries.FLAX)
def test_flax(name: str, engine: str) -> None:
    with ur.engine(engine):
        libraries.check_flax(name)


# The cells that have a recurrent bias to drop: a single bias belongs to the input.
BIASED = {"keras": ("GRU",), "flax": ("GRU", "LSTM")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "change", "kind"),
    [
        (library, what, kind)
        for library, biased in BIASED.items()
        for what, kind in mutants.MUTANTS
        if what != "a bias dropped" or kind in biased
    ],
)
def test_mutants_are_detected(library: str, change: str, kind: str) -> None:
    def mutate(layer: Any) -> Any:
        mutant = ur.Recurrent(
            mutants.mutate(layer.cell, mutants.CHANGES[change][0]), layer.input_size, layer.hidden_size
        )
        mutant.load_state_dict(layer.state_dict())
        return mutant

    check = libraries.check_keras if library == "keras" else libraries.check_flax
    with ur.engine("reference"), pytest.raises(AssertionError, match="(?i)not equal to tolerance"):
        check(kind, mutate)


def test_invalid_weights() -> None:
    arrays = [numpy.zeros((3, 8)), numpy.zeros((4, 8))]
    with pytest.raises(ValueError, match="expected 1, 3 or 4 gates of the same size"):
        ur.io.from_keras(arrays)
    with pytest.raises(ValueError, match="expected a kernel, a recurrent kernel and an optional bias"):
        ur.io.from_keras(arrays[:1])
    with pytest.raises(ValueError, match="SimpleCell, GRUCell or LSTMCell, got hi, ii"):
        ur.io.from_flax({"ii": {}, "hi": {}})
    for function, library in ((ur.io.to_keras, "Keras"), (ur.io.to_flax, "flax")):
        with pytest.raises(ValueError, match=f"{library} has no PeepholeLSTM cell"):
            function(ur.Recurrent(ur.cells.PeepholeLSTM, 3, 4))
        with pytest.raises(ValueError, match=f"{library} stores each layer and direction separately"):
            function(ur.LSTM(3, 4, 2))
        with pytest.raises(ValueError, match=f"{library} has no projections"):
            function(ur.LSTM(3, 4, proj_size=2))
        with pytest.raises(TypeError, match="expected a recurrent layer of unrolled, got LSTM"):
            function(torch.nn.LSTM(3, 4))
        with pytest.raises(ValueError, match=r"supports float32 and float64, .* is torch\.bfloat16"):
            function(ur.LSTM(3, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="flax cells have biases"):
        ur.io.to_flax(ur.GRU(3, 4, bias=False))
    for bias, after in ((numpy.zeros(12), True), (numpy.zeros((2, 12)), False)):
        message = f"expected a bias of shape .* with reset_after={after}, got"
        with pytest.raises(ValueError, match=message):
            ur.io.from_keras([numpy.zeros((3, 12)), numpy.zeros((4, 12)), bias], reset_after=after)
    flax = ur.io.to_flax(ur.LSTM(3, 4))
    for change, message in (
        (
            {"kernel": None},
            "kernel of if: expected an array of float16, float32 or float64, got NoneType",
        ),
        ({"kernel": numpy.zeros((2, 4))}, r"kernel of if: expected the shape \(3, 4\), got \(2, 4\)"),
        ({"bias": numpy.zeros(3)}, r"bias of if: expected the shape \(4,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ur.io.from_flax({**flax, "if": {**flax["if"], **change}})
    for invalid in (None, "weights.h5", [numpy.zeros((3, 4), int), numpy.zeros((1, 4), int)]):
        with pytest.raises(ValueError, match="expected the arrays|expected an array of float16"):
            ur.io.from_keras(invalid)
    with pytest.raises(ValueError, match="expected the parameters of a cell by name, got a list"):
        ur.io.from_flax([1])
    normed = torch.nn.utils.parametrizations.weight_norm(ur.GRU(3, 4, bias=False), "weight_hh_l0")
    assert torch.equal(ur.io.from_keras(ur.io.to_keras(normed)).weight_hh_l0, normed.weight_hh_l0)
    double = ur.GRU(3, 4, bias=False, dtype=torch.float64)
    assert torch.equal(ur.io.from_keras(ur.io.to_keras(double)).weight_hh_l0, double.weight_hh_l0)
