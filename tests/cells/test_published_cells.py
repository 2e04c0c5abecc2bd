"""Published cells compared with their papers' equations in NumPy, and with other libraries."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import test_every_cell
import torch
from test_every_cell import CASES, HIDDEN, INPUT, layer_of

import unrolled as ur
from conformance import papers
from conformance.other_cells import DEPARTS, PEERS
from helpers.layer_pairs import COMPILER_ERROR, assert_close

DOCS = Path(__file__).parents[2] / "docs" / "cells.md"
IN_TORCH = {"RNN", "LSTM", "GRU"}  # tests/layers/test_parity.py compares these with torch.nn


def test_papers_has_the_equations_of_every_cell() -> None:
    assert set(papers.STEPS) == set(ur.cells.__all__) - IN_TORCH


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name not in IN_TORCH])
@pytest.mark.parametrize(("input_size", "bias"), [(INPUT, True), (HIDDEN, True), (INPUT, False)])
def test_papers_equations(case: str, input_size: int, bias: bool) -> None:
    """Start from random states. sLSTM starts from zeros, as its initial stabilizer is arbitrary."""
    layer = layer_of(case, input_size, bias=bias)
    cell = layer._first
    all_shapes = type(cell)(input_size, HIDDEN, **cell.chosen_options()).shapes()
    batch = 2
    x = torch.randn(6, batch, input_size, dtype=torch.float64)
    initialize = torch.zeros if "n" in cell.state_sizes() else torch.rand
    states = [initialize(1, batch, size, dtype=torch.float64) for size in cell.state_sizes().values()]
    with torch.no_grad(), ur.engine("reference"):
        output, _ = layer(x, tuple(states) if len(states) > 1 else states[0])
    params = {name: numpy.zeros(shape) for name, shape in all_shapes.items()}  # omitted biases are zeros
    params |= {name: getattr(layer, f"{name}_l0").detach().numpy() for name in cell.shapes()}
    for row in range(batch):
        initial = [state[0, row].numpy() for state in states]
        expected = papers.run(type(cell).__name__, params, cell.chosen_options(), x[:, row].numpy(), initial)
        numpy.testing.assert_allclose(output[:, row], expected, rtol=0, atol=1e-12)


IN_FLOAT32 = ("LRU_pytorch", "recurrentgemma", "sru")
SLOW = ("sru",)  # compiles for a minute when it is imported


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.exhaustive if PEERS[case][0] in SLOW else ()) for case in PEERS],
)
@pytest.mark.filterwarnings("default")  # the other libraries give warnings
def test_another_library(case: str) -> None:
    name, _ = CASES[case]
    library, peer = PEERS[case]
    pytest.importorskip(library)
    square = name in (
        "IntersectionRNN",
        "RGLRU",
        "MinGRU",
        "MinLSTM",
    )  # there input and hidden sizes are equal
    layer = layer_of(case, HIDDEN if square else INPUT, bias="Min" not in name)
    cell = layer._first
    x = torch.randn(6, 2, cell.input, dtype=torch.float64)
    params = {key: getattr(layer, f"{key}_l0").detach() for key in cell.shapes()}
    with torch.no_grad(), ur.engine("reference"):
        ours, theirs = layer(x)[0], peer(cell, params, x)
    difference = float((ours - theirs).abs().max())
    if name in DEPARTS:
        assert difference > 1e-3, f"{library} no longer differs: {DEPARTS[name]}"
    else:
        assert difference < (1e-5 if library in IN_FLOAT32 else 1e-12)


@pytest.mark.slow
def test_adding_a_cell_as_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run all tests on the example in docs/cells.md: the file of the cell, its name and its equations."""
    code = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "ema.py").write_text(next(block for block in code if "class EMA" in block))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("ema")
    equations: dict[str, Any] = {}
    exec(next(block for block in code if "def ema" in block), equations)
    monkeypatch.setattr(ur.cells, "EMA", module.EMA, raising=False)
    monkeypatch.setitem(CASES, "EMA", ("EMA", {}))
    monkeypatch.setitem(papers.STEPS, "EMA", equations["ema"])
    test_papers_equations("EMA", INPUT, True)
    test_every_cell.test_trace_and_explain("EMA")
    test_every_cell.test_page("EMA", tmp_path)
    test_every_cell.test_onnx_export("EMA")
    stack = test_every_cell.Run("EMA", num_layers=2, bidirectional=True)
    with ur.engine("reference"):
        expected = stack(**test_every_cell.ALL_OPTIONS)
    with ur.engine("reference" if COMPILER_ERROR else "native"):
        assert_close(stack(**test_every_cell.ALL_OPTIONS), expected, 1e-10)


def initial_parameters(name: str, **options: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a new layer by name."""
    layer = ur.Recurrent(getattr(ur.cells, name), 24, 32, **options)
    return {key.removesuffix("_l0"): value.detach() for key, value in layer.named_parameters()}


def test_initial_parameters_are_those_of_the_papers() -> None:
    lru = initial_parameters("LRU", r_min=0.9, r_max=0.99, max_phase=0.3)
    size = torch.exp(-torch.exp(lru["nu"]))
    assert ((size > 0.9) & (size < 0.99)).all()
    assert (torch.exp(lru["theta"]) <= 0.3).all()
    torch.testing.assert_close(torch.exp(lru["gamma"]), (1 - size**2).sqrt())
    decay = torch.sigmoid(-initial_parameters("RGLRU")["decay"]) ** 8  # a ** c in the paper
    assert ((decay > 0.9 - 1e-4) & (decay < 0.999 + 1e-4)).all()
    slstm = initial_parameters("SLSTM", heads=2)
    forget = slstm["bias_ih"].chunk(4)[1].reshape(2, 16)
    assert torch.equal(forget[0], forget[1])
    assert forget[0, 0] == 5
    assert forget[0, -1] == -7
    assert not slstm["weight_hh"].any()
    chrono = initial_parameters("JANET", t_max=100)["bias_ih"].chunk(2)
    assert ((chrono[0] >= 0) & (chrono[0] <= torch.tensor(100.0).log())).all()
    assert not chrono[1].any()
    assert (initial_parameters("JANET")["bias_ih"].chunk(2)[0] == 1).all()
    assert (initial_parameters("STAR", t_max=100)["bias_ih"].chunk(2)[1] <= 0).all()
    highway = initial_parameters("RHN", depth=2)["bias_hh"].reshape(2, 2, 32)
    assert (highway[:, 1] == -2).all()
    assert not highway[:, 0].any()
    sru = initial_parameters("SRU", highway_bias=-1.5)
    assert (sru["bias_gates"].chunk(2)[1] == -1.5).all()
    assert float(sru["weight_ih"].var() * 24) == pytest.approx(1, rel=0.2)
    assert float(sru["weight_gates"].var() * 24) == pytest.approx(0.5, rel=0.2)
    fast = initial_parameters("FastGRNN")
    assert (float(fast["zeta"]), float(fast["nu"])) == (1, -4)
    orthogonal = initial_parameters("LiGRU")["weight_hh"].chunk(2)
    for part in orthogonal:
        torch.testing.assert_close(part @ part.T, torch.eye(32), rtol=0, atol=1e-5)
    oscillating = initial_parameters("CoRNN")
    assert max(float(value.abs().max()) for value in oscillating.values()) <= (24 + 2 * 32) ** -0.5
    hgrn = initial_parameters("HGRN")["theta"]
    torch.testing.assert_close(hgrn, 10000 ** (-2 * torch.arange(32.0) / 32))
