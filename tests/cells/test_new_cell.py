"""A custom cell of fewer than 20 lines has all features of the built-in cells."""

from __future__ import annotations

import inspect
import json
import re

import numpy
import pytest
import torch

import unrolled as ur
from helpers import by_hand, processes, user_cell
from helpers.user_cell import MGU


def test_the_cell_is_short() -> None:
    assert len(inspect.getsource(MGU).splitlines()) < 20


def run_with_numpy(layer: ur.Recurrent, x: numpy.ndarray, suffix: str, reverse: bool) -> numpy.ndarray:
    """Run the paper's equations in float64, one row of the batch at a time."""
    w = {name: getattr(layer, name + suffix).detach().numpy() for name in MGU.params()}
    out = numpy.full((*x.shape[:2], layer.hidden_size), numpy.nan)
    for row in range(x.shape[1]):
        h = numpy.zeros(layer.hidden_size)
        for t in range(len(x))[:: -1 if reverse else 1]:
            f = 1 / (1 + numpy.exp(-(w["weight_f"] @ numpy.concatenate([h, x[t, row]]) + w["bias_f"])))
            new = numpy.tanh(w["weight_h"] @ numpy.concatenate([f * h, x[t, row]]) + w["bias_h"])
            h = out[t, row] = (1 - f) * h + f * new
    return out


@pytest.mark.slow
def test_layer_stack_and_both_directions() -> None:
    layer = ur.Recurrent(MGU, 4, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    expected = x.numpy()
    for k in range(2):
        directions = [run_with_numpy(layer, expected, f"_l{k}{'_reverse' * r}", bool(r)) for r in (0, 1)]
        expected = numpy.concatenate(directions, -1)
    output, final = layer(x)
    numpy.testing.assert_allclose(output.detach().numpy(), expected, rtol=0, atol=1e-14)
    numpy.testing.assert_allclose(final[2].detach().numpy(), expected[-1, :, :3], atol=1e-14)
    numpy.testing.assert_allclose(final[3].detach().numpy(), expected[0, :, 3:], atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x.requires_grad_(), fast_mode=True)


@pytest.mark.slow
def test_trace() -> None:
    layer = ur.Recurrent(MGU, 4, 3, bidirectional=True)
    x = torch.randn(6, 4)
    t = ur.trace(layer, x)
    assert t.names == ("f", "candidate", "h")
    assert torch.allclose(t["h"][:, 0], layer(x)[0][:, :3], atol=1e-6)
    assert torch.allclose((1 - t["f"][1:]) * t["h"][:-1] + t["f"][1:] * t["candidate"][1:], t["h"][1:])
    line = t.explain("h", 3, 2)
    assert by_hand.is_right(line)
    shown = [float(number.replace("−", "-")) for number in re.findall(r"−?[\d.]+", line)]
    expected = [
        1,
        t["f"][3, 0, 2],
        t["h"][2, 0, 2],
        t["f"][3, 0, 2],
        t["candidate"][3, 0, 2],
        t["h"][3, 0, 2],
    ]
    assert [abs(number) for number in shown] == pytest.approx(
        [abs(float(value)) for value in expected], abs=1e-4
    )
    with pytest.raises(ValueError, match="torch.nn has no layer that computes MGU"):
        t.check()


@pytest.mark.slow
def test_show() -> None:
    command = ["-m", "unrolled", "show", "--cell", f"{user_cell.__file__}:MGU"]
    text = processes.run(*command).stdout
    assert "Recurrent(MGU, 2, 3, batch_first=True)" in text
    assert "candidate = tanh(linear(torch.cat([f * h, x], -1), self.weight_h, self.bias_h))" in " ".join(
        text.split()
    )
    assert "not compared with torch.nn, which has no MGU layer" in text
    data = json.loads(processes.run(*command, "--json").stdout)
    assert [list(step["quantities"]) for step in data["steps"]] == [["f", "candidate", "h"]] * 4


@pytest.mark.slow
def test_show_reads_its_weights_from_a_file(tmp_path) -> None:
    layer = ur.Recurrent(MGU, 4, 3, num_layers=2, bidirectional=True)
    torch.save({"model": {f"net.mgu.{k}": v for k, v in layer.state_dict().items()}}, tmp_path / "w.pt")
    numpy.save(tmp_path / "x.npy", numpy.ones((5, 4)))
    command = ["-m", "unrolled", "show", "--cell", f"{user_cell.__file__}:MGU", tmp_path / "w.pt"]
    data = json.loads(processes.run(*command, "--input", tmp_path / "x.npy", "--json").stdout)
    assert data["layer"] == "Recurrent(MGU, 4, 3, num_layers=2, bidirectional=True)"
    expected = layer(torch.ones(5, 4))[0]
    assert torch.allclose(torch.tensor(data["output"]), expected, atol=1e-7)
