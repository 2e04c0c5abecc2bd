"""The report of a quantized module: errors of each layer and state over time, and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import use_threads


class Tagger(nn.Module):
    """A layer, and a cell that its caller runs step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = ur.LSTM(6, 10, batch_first=True)
        self.cell = ur.GRUCell(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for step in self.rnn(x)[0].transpose(0, 1):
            h = self.cell(step, h)
        assert h is not None
        return h


@pytest.mark.slow
def test_errors_of_layers_are_their_own() -> None:
    """The numbers are those of the definition, and each layer gets the input of the float model."""
    model, batches = Tagger().eval(), [torch.randn(3, 7, 6), torch.randn(2, 4, 6)]
    quantized = ur.quantize(model)
    report = quantized.report(batches)
    assert list(report.layers) == ["rnn", "cell"]
    assert list(report.layers["rnn"]) == ["h", "c"]
    assert list(report.layers["cell"]) == ["h"]
    errors, values = [], []
    for x in batches:
        states = [one.rnn(x, all_states=True)[2]["c"][0].transpose(0, 1) for one in (quantized, model)]
        errors.append((states[0] - states[1]).double().detach())
        values.append(states[1].double().detach())
    found = report.layers["rnn"]["c"]
    squares = sum(error.square().sum() for error in errors)
    count = sum(error.numel() for error in errors)
    assert found.rms == pytest.approx(float((squares / count).sqrt()))
    assert found.largest == pytest.approx(max(float(error.abs().max()) for error in errors))
    assert found.relative == pytest.approx(float((squares / sum(v.square().sum() for v in values)).sqrt()))
    assert len(found.over_time) == 7
    last = errors[0][6].square().mean().sqrt()
    assert float(found.over_time[6]) == pytest.approx(float(last))
    both = torch.stack([error[2].square().mean() for error in errors]).mean().sqrt()
    assert float(found.over_time[2]) == pytest.approx(float(both))
    assert len(report.layers["cell"]["h"].over_time) == 7
    difference = torch.cat([quantized(x) - model(x) for x in batches]).double().detach()
    assert report.output.rms == pytest.approx(float(difference.square().mean().sqrt()))


@pytest.mark.slow
def test_layers_that_suffer_are_named_and_can_be_kept() -> None:
    model, x = Tagger().eval(), torch.randn(4, 9, 6)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(model.rnn, name)[20] = 0  # so that its first output is 0
        model.cell.weight_ih[:, 0] = 300  # all other weights become 0
        model.rnn.weight_hh_l0.mul_(0.1)
    quantized = ur.quantize(model)
    report = quantized.report([x])
    assert report.inaccurate == ["cell"]
    assert "relative error above 5%: 'cell'. To keep in float32: keep=['cell']" in str(report)
    assert quantized.report([x], limit=1e9).inaccurate == []
    better = ur.quantize(model, keep=report.inaccurate).report([x])
    assert list(better.layers) == ["rnn"]
    assert better.inaccurate == []


@pytest.mark.slow
def test_score() -> None:
    model, x = Tagger().eval(), torch.randn(4, 9, 6)
    quantized = ur.quantize(model)
    report = quantized.report([x], score=lambda module: float(module(x).detach().square().mean()))
    assert report.score is not None
    assert report.score[0] == pytest.approx(float(model(x).detach().square().mean()))
    assert report.score[1] == pytest.approx(float(quantized(x).detach().square().mean()))
    assert "score: " in str(report)
    assert "in float32" in str(report)


@pytest.mark.slow
def test_stacked_layers_of_torch_and_packed_inputs() -> None:
    model = nn.LSTM(5, 6, num_layers=2, bidirectional=True).eval()
    quantized, x = ur.quantize(model), torch.randn(8, 3, 5)
    with use_threads(1):
        states = quantized.report([x]).layers[""]
        assert list(states) == [f"{s}_l{k}{r}" for k in (0, 1) for r in ("", "_reverse") for s in ("h", "c")]
        assert all(0 < error.relative < 0.03 for error in states.values())
        packed = nn.utils.rnn.pack_padded_sequence(x, [8, 5, 2])
        [(name, error)] = quantized.report([packed]).layers[""].items()
    assert name == "h"
    assert 0 < error.relative < 0.03


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        (torch.randn(3, 7, 6), TypeError, r"got Tensor: pass \[x\]"),
    ],
)
def test_refused(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ur.quantize(Tagger().eval()).report(batches)
