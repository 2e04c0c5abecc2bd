from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import unrolled as ur
from conformance import mutants
from helpers.layer_pairs import NEEDS_COMPILER

libraries = pytest.importorskip("conformance.other_libraries", reason="needs keras, flax and jax")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")  # in Keras
ENGINES = pytest.mark.parametrize(
    "engine",
    [pytest.param("native", marks=NEEDS_COMPILER), pytest.param("reference", marks=pytest.mark.exhaustive)],
)


@ENGINES
@pytest.mark.parametrize("name", libraries.KERAS)
def test_keras(name: str, engine: str) -> None:
    with ur.engine(engine):
        libraries.check_keras(name)


@ENGINES
@pytest.mark.parametrize("name", libraries.FLAX)
def test_flax(name: str, engine: str) -> None:
    with ur.engine(engine):
        libraries.check_flax(name)


# Where a library has one bias, it stands with the input, and there is no recurrent one to drop.
BIASED = {"keras": ("GRU",), "flax": ("GRU", "LSTM")}


@pytest.mark.parametrize(
    ("library", "what", "kind"),
    [
        (library, what, kind)
        for library, biased in BIASED.items()
        for what, kind in mutants.MUTANTS
        if what != "a bias dropped" or kind in biased
    ],
)
def test_a_wrong_cell_is_noticed(library: str, what: str, kind: str) -> None:
    def wrong(layer: Any) -> Any:
        made = ur.Recurrent(
            mutants.mutated(layer.cell, mutants.CHANGES[what][0]), layer.input_size, layer.hidden_size
        )
        made.load_state_dict(layer.state_dict())
        return made

    check = libraries.check_keras if library == "keras" else libraries.check_flax
    with ur.engine("reference"), pytest.raises(AssertionError, match="(?i)not equal to tolerance"):
        check(kind, wrong)


def test_what_is_no_layout_of_theirs() -> None:
    arrays = [numpy.zeros((3, 8)), numpy.zeros((4, 8))]
    with pytest.raises(ValueError, match="expected 1, 3 or 4 gates of one size"):
        ur.io.from_keras(arrays)
    with pytest.raises(ValueError, match="expected a kernel, a recurrent kernel and perhaps a bias"):
        ur.io.from_keras(arrays[:1])
    with pytest.raises(ValueError, match="SimpleCell, GRUCell or LSTMCell, got hi, ii"):
        ur.io.from_flax({"ii": {}, "hi": {}})
    for function, library in ((ur.io.to_keras, "Keras"), (ur.io.to_flax, "flax")):
        with pytest.raises(ValueError, match=f"{library} has no cell PeepholeLSTM"):
            function(ur.Recurrent(ur.cells.PeepholeLSTM, 3, 4))
        with pytest.raises(ValueError, match=f"{library} holds each layer and direction by itself"):
            function(ur.LSTM(3, 4, 2))
        with pytest.raises(ValueError, match=f"{library} has no projections"):
            function(ur.LSTM(3, 4, proj_size=2))
        with pytest.raises(TypeError, match="expected a recurrent layer of unrolled, got LSTM"):
            function(torch.nn.LSTM(3, 4))
        with pytest.raises(ValueError, match=r"takes float32 and float64, .* is of torch\.bfloat16"):
            function(ur.LSTM(3, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="flax's cells have biases"):
        ur.io.to_flax(ur.GRU(3, 4, bias=False))
    for bias, after in ((numpy.zeros(12), True), (numpy.zeros((2, 12)), False)):
        words = f"expected a bias of the shape .* with reset_after={after}, got"
        with pytest.raises(ValueError, match=words):
            ur.io.from_keras([numpy.zeros((3, 12)), numpy.zeros((4, 12)), bias], reset_after=after)
    flax = ur.io.to_flax(ur.LSTM(3, 4))
    for change, why in (
        (
            {"kernel": None},
            "kernel of if should be an array of float16, float32 or float64, got NoneType",
        ),
        ({"kernel": numpy.zeros((2, 4))}, r"the kernel of if should be \(3, 4\), got \(2, 4\)"),
        ({"bias": numpy.zeros(3)}, r"the bias of if should be \(4,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=why):
            ur.io.from_flax({**flax, "if": {**flax["if"], **change}})
    for given in (None, "weights.h5", [numpy.zeros((3, 4), int), numpy.zeros((1, 4), int)]):
        with pytest.raises(ValueError, match="expected the arrays|should be an array of float16"):
            ur.io.from_keras(given)
    with pytest.raises(ValueError, match="expected the parameters of a cell by name, got a list"):
        ur.io.from_flax([1])
    normed = torch.nn.utils.parametrizations.weight_norm(ur.GRU(3, 4, bias=False), "weight_hh_l0")
    assert torch.equal(ur.io.from_keras(ur.io.to_keras(normed)).weight_hh_l0, normed.weight_hh_l0)
    kept = ur.GRU(3, 4, bias=False, dtype=torch.float64)
    assert torch.equal(ur.io.from_keras(ur.io.to_keras(kept)).weight_hh_l0, kept.weight_hh_l0)
