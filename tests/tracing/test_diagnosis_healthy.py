"""`Trace.health` gives no false alarm: on fresh layers of every cell, and on layers that learned a task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from unrolled.tracing.findings import HealthReport

FAST = ("LSTM", "GRU", "RNN", "MinGRU", "SLSTM", "LRU", "FastRNN")
RELU_CELLS = ("NAS", "LiGRU", "IndRNN")  # with few inputs, a unit of a relu can be 0 at all steps


def fresh(name: str, time: int, batch: int, seed: int, **options: Any) -> HealthReport:
    torch.manual_seed(seed)
    layer = ur.Recurrent(getattr(ur.cells, name), 8, 8, **options)
    trace = ur.trace(layer, torch.randn(time, batch, 8, dtype=options.get("dtype")))
    return trace.backward(lambda output: output.abs().square().mean()).health()


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ur.cells.__all__],
)
def test_fresh_layers(name: str) -> None:
    found = fresh(name, 12, 4, 0, dtype=torch.float64)
    if name in RELU_CELLS:
        assert {one.kind for one in found} <= {"dead"}
    else:
        assert not found.findings, str(found)
    assert len(found.checked) >= 6
    assert not found.not_checked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LayerNormGRU", "MinLSTM"])
def test_few_steps_and_low_precision(name: str, dtype: torch.dtype) -> None:
    """Neither chance nor rounding makes a unit dead, a parameter useless or an input ignored."""
    for seed, (time, batch) in enumerate([(1, 2), (2, 1), (2, 2), (3, 2), (20, 2)]):
        torch.manual_seed(seed)
        layer = ur.Recurrent(getattr(ur.cells, name), 8, 8, dtype=dtype)
        found = ur.trace(layer, torch.randn(time, batch, 8, dtype=dtype)).health()
        assert not found.findings, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ur.cells.__all__)
def test_fresh_layers_of_other_sizes(name: str) -> None:
    for seed, (time, batch, options) in enumerate(
        [(1, 3, {}), (3, 1, {}), (100, 2, {}), (12, 3, {"bidirectional": True, "num_layers": 2})]
    ):
        found = fresh(name, time, batch, seed, **options)
        for finding in found:  # a unit of a relu that is 0 at all steps is a true finding
            assert finding.kind == "dead"
            assert finding.values["value"] == 0


def sine(batch: int) -> tuple[Tensor, Tensor]:
    """Predict the next value of sines with different frequencies."""
    frequency, phase = torch.rand(batch) * 0.4 + 0.1, torch.rand(batch) * 6.28
    wave = torch.sin(torch.arange(41).unsqueeze(1) * frequency + phase).unsqueeze(-1)
    return wave[:-1], wave[1:]


def addition(batch: int) -> tuple[Tensor, Tensor]:
    """Add the two marked numbers of a sequence (Hochreiter & Schmidhuber, 1997), a loss at the last step."""
    x, rows = torch.rand(10, batch, 2), torch.arange(batch)
    x[..., 1] = 0
    x[torch.randint(0, 5, (batch,)), rows, 1] = 1
    x[torch.randint(5, 10, (batch,)), rows, 1] = 1
    return x, (x[..., 0] * x[..., 1]).sum(0, keepdim=True).unsqueeze(-1)


@pytest.mark.slow
@pytest.mark.parametrize("task", [sine, addition])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "MinGRU"])
def test_trained_layers(name: str, task: Any) -> None:
    torch.manual_seed(0)
    x, target = task(64)
    layer, head = ur.Recurrent(getattr(ur.cells, name), x.shape[-1], 24), nn.Linear(24, 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (head(output[-len(target) :]) - target).square().mean()

    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 5e-3)
    before = loss(layer(x)[0], target).item()
    for _ in range(500):
        batch_x, batch_target = task(32)
        optimizer.zero_grad()
        loss(layer(batch_x)[0], batch_target).backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    trace = ur.trace(layer, x)
    after = loss(trace.output, target).item()
    assert after < before / 4
    found = trace.backward(lambda output: loss(output, target)).health()
    assert not found.findings, str(found)
    assert not found.not_checked
