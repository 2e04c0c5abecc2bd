"""What the page says about numbers and findings, without a browser if there is Node.js."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from page_helpers import small_trace
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from helpers.evaluator import needs_javascript, run_javascript
from unrolled.page.contents import page_data

CELLS = ur.cells


class Undescribed(ur.Cell):
    """A cell that doesn't say what its quantities are."""

    state = ("h", "c")
    weight = ur.Param("3*hidden", "input")
    turn = ur.Param("3*hidden", "hidden")

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        x = 2 * x
        f, o, drive = (linear(x, self.weight) + linear(h, self.turn)).chunk(3, -1)
        f, o = torch.sigmoid(f), torch.sigmoid(o)
        candidate = torch.tanh(drive)
        c = f * c + (1 - f) * candidate
        h = o * c
        return h, c


def data_of(trace: ur.Trace, limit: int = 3_000_000) -> dict[str, Any]:
    return page_data(trace, None, None, "numbers", None, limit)


def said(cases: list[list[Any]], folder: Path) -> list[dict[str, Any]]:
    return run_javascript("sentences", cases, folder)


@needs_javascript
def test_sentences_about_gates_are_true_for_any_number(tmp_path: Path) -> None:
    data = data_of(small_trace(CELLS.LSTM))
    number = {"q": "f", "t": 2, "u": 1}
    expected = {
        "5": (
            "The forget gate of unit 1 multiplies the old cell state c_1[1] by 5.",
            "Forget gate f[1] is 5 in all 4 steps, so it multiplies c by 5.",
        ),
        "-2": (
            "The forget gate of unit 1 multiplies the old cell state c_1[1] by −2.",
            "Forget gate f[1] is −2 in all 4 steps, so it multiplies c by −2.",
        ),
        "0": (
            "The forget gate of unit 1 is shut. The old cell state c_1[1] is erased.",
            "Forget gate f[1] is 0 in all 4 steps, so unit 1 forgets c at every step.",
        ),
        "1": (
            "The forget gate of unit 1 is open. It keeps all of the old cell state c_1[1].",
            "Forget gate f[1] is 1 in all 4 steps, so unit 1 keeps all of c at every step.",
        ),
        "0.01": (
            "The forget gate of unit 1 keeps 1 % of the old cell state c_1[1].",
            "Forget gate f[1] stays shut: at most 0.0100 in all 4 steps, so unit 1 forgets nearly all of c "
            "at every step.",
        ),
        "0.9995": (
            "The forget gate of unit 1 keeps 99.95 % of the old cell state c_1[1].",
            "Forget gate f[1] stays open: at least 0.9995 in all 4 steps, so unit 1 keeps nearly all of c at "
            "every step.",
        ),
        "0.96": ("The forget gate of unit 1 keeps 96 % of the old cell state c_1[1].", ""),
    }
    results = said([[data, 0, f"f[1]={value}", [number]] for value in expected], tmp_path)
    for (sentence, effect), result in zip(expected.values(), results, strict=True):
        assert result["numbers"] == [sentence]
        assert result["effect"] == effect


@pytest.mark.slow
@needs_javascript
def test_only_what_scales_a_number_is_called_a_gate(tmp_path: Path) -> None:
    cells: list[Any] = [CELLS.SCRN, CELLS.NAS, CELLS.GRU, Undescribed]
    traces = [small_trace(cell) for cell in cells]
    scrn, nas, gru, undescribed = said([[data_of(trace), 0, "", []] for trace in traces], tmp_path)
    for result in (scrn, nas):
        assert not [text for text in result["tour"] if text.startswith("Gates")]
        assert not [text for text in result["experiments"] if "Shut" in text]
        assert not [
            text
            for text in result["every"]
            if re.search(r"\b(open|shut)\b|(hidden state|fourth).* lets", text)
        ]
    assert "Gates: The update gate z is a number between 0 (shut) and 1 (open)." in gru["tour"][2]
    # The reset gate scales what the candidate reads, not the state that is kept.
    assert any(
        re.match(r"The reset gate of unit 1 lets \d+ % of hidden_n,2\[1\] through\.", text)
        for text in gru["every"]
    )
    assert "Shut f[1]" in undescribed["experiments"]
    assert any(re.match(r"f\[1\] keeps \d+ % of the old c_1\[1\]\.", text) for text in undescribed["every"])


@pytest.mark.slow
@needs_javascript
def test_sentences_say_what_a_value_without_a_name_is(tmp_path: Path) -> None:
    cells: list[Any] = [CELLS.LayerNormLSTM, CELLS.SLSTM, CELLS.RGLRU]
    layer_norm, slstm, rglru = said([[data_of(small_trace(cell)), 0, "", []] for cell in cells], tmp_path)
    expected = (
        (layer_norm, "c_2, normalized to mean 0 and variance 1 over all units, then multiplied by gain_c and "
         "shifted by b_c."),
        (slstm, "What is left of the old cell state."),
        (slstm, "What is new. It is added to what is left of the old cell state."),
        (slstm, "What is left of the old normalizer."),
        (rglru, "What is left of the old hidden state."),
    )  # fmt: skip
    for result, text in expected:
        assert text in result["every"]


LEAKS = (
    r"\bthe unit \d", r"\bn\d+\b", r"^[^ ]{1,20}\.$", r"\b(\w+)[,:]? \1\b", r"\bThe [a-z] of unit",
    r"output of unit \d, and the output",
)  # fmt: skip


@pytest.mark.slow
@needs_javascript
@pytest.mark.parametrize(
    "cells",
    [
        (CELLS.QRNN, CELLS.HGRN, CELLS.MinGRU, Undescribed),
        pytest.param((CELLS.SLSTM, CELLS.RHN, CELLS.NAS, CELLS.IntersectionRNN), marks=pytest.mark.slow),
    ],
)
def test_sentences_have_no_internal_names(cells: tuple[Any, ...], tmp_path: Path) -> None:
    for result in said([[data_of(small_trace(cell)), 0, "", []] for cell in cells], tmp_path):
        texts = [text for key in ("every", "tour", "experiments", "names") for text in result[key]]
        assert not [text for text in texts for leak in LEAKS if re.search(leak, text)]


@needs_javascript
def test_the_tour_of_a_backward_layer_names_the_step_that_runs_before(tmp_path: Path) -> None:
    layer = torch.nn.RNN(2, 3, bidirectional=True)
    data = data_of(ur.trace(layer, torch.randn(5, 2)))
    forward, backward = said([[data, 0, "", []], [data, 1, "", []]], tmp_path)
    assert "of the state from the step before, with" in forward["tour"][2]
    assert "of the state from step 3, which runs before it, with" in backward["tour"][2]


# --- findings


def exploding(steps: int, rows: int) -> ur.Trace:
    torch.manual_seed(0)
    layer = torch.nn.RNN(4, 8, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_hh_l0.copy_(2.5 * torch.eye(8))
    return ur.trace(layer, torch.randn(steps, rows, 4))


def test_a_finding_opens_the_number_that_it_names() -> None:
    trace = exploding(40, 3)
    finding = next(one for one in data_of(trace)["health"]["findings"] if "exponentially" in one["message"])
    step, row, unit = finding["number"]["t"], finding["row"], finding["number"]["u"]
    assert step == 39
    assert f"h[{unit}] = " in finding["message"]
    assert f" in row {row}." in finding["message"]
    assert trace["h"][step, row, unit] == trace["h"][-1].max()


@needs_javascript
def test_an_overflow_opens_in_a_row_of_the_page(tmp_path: Path) -> None:
    trace = exploding(200, 3)
    data = data_of(trace)  # has room for one row
    assert not data["rows"]
    error, growth = data["health"]["findings"][:2]
    assert not trace[error["number"]["q"]][
        error["number"]["t"], error["row"], error["number"]["u"]
    ].isfinite()
    for finding in (error, growth):
        assert finding["missing"] is None
        assert finding["row"] == data["row"]
    (shown,) = said([[data, 0, "", []]], tmp_path)
    step, unit = error["number"]["t"], error["number"]["u"]
    assert shown["findings"][:2] == [
        {"q": "h.1", "t": step, "u": unit},
        growth["number"],
    ]  # W_hh h is hidden_sum
    x = torch.randn(200, 3, 4)
    x[5, 2] = math.nan
    assert data_of(ur.trace(torch.nn.RNN(4, 8), x))["row"] == 2  # the row with the error, since one fits


@needs_javascript
def test_a_bad_weight_and_a_bad_initial_state_are_opened(tmp_path: Path) -> None:
    layer = torch.nn.LSTM(4, 8)
    with torch.no_grad():
        layer.weight_hh_l0[11, 7] = math.nan
    state = torch.zeros(1, 3, 8)
    state[0, 2, 4] = math.nan
    cases = [ur.trace(layer, torch.randn(6, 2, 4)), ur.trace(torch.nn.GRU(4, 8), torch.randn(6, 3, 4), state)]
    weight, initial = said([[data_of(trace), 0, "", []] for trace in cases], tmp_path)
    assert weight["findings"] == [{"q": "weight_hh", "u": 11, "j": 7}]
    assert initial["findings"] == [{"q": "h", "t": -1, "u": 4}]
    assert "Checked: all numbers" not in weight["checked"]
    assert "dead units" in weight["checked"].split("Not checked: ")[1]
