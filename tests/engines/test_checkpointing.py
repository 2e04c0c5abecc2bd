"""Training with ``checkpoint``: the same gradients on both engines, with less memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, assert_close, pair, tensors
from unrolled.cli.bench import in_subprocess
from unrolled.cli.bench.rows import Row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_equal_those_of_torch(kind: str, engine: str) -> None:
    ours, theirs = pair(kind, 5, 7, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(23, 3, 5, dtype=torch.float64, requires_grad=True)
    state: Any = tuple(torch.randn_like(part).requires_grad_() for part in tensors(theirs(x)[1]))
    state = state if len(state) > 1 else state[0]
    weights = [torch.randn_like(part) for part in tensors(theirs(x))]

    def results(layer: nn.Module, state: Any, **options: int) -> list[torch.Tensor]:
        outputs = list(tensors(layer(x, state, **options)))
        loss = sum((part * weight).sum() for part, weight in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(loss, [x, *tensors(state), *layer.parameters()])]

    with ur.engine(engine):
        for initial in (None, state):
            expected = results(theirs, initial)
            for length in (1, 5, 22, 23, 50):
                assert_close(results(ours, initial, checkpoint=length), expected, 1e-12)


@pytest.mark.slow
@NEEDS_COMPILER
def test_finite_differences_and_second_gradients() -> None:
    layer = ur.GRU(2, 3, dtype=torch.float64)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    with ur.engine("native"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x: layer(x, checkpoint=2)[0], x, fast_mode=True)


def test_invalid_arguments() -> None:
    layer, x = ur.LSTM(2, 3), torch.randn(4, 1, 2)
    with pytest.raises(ValueError, match="checkpoint should be at least one time step, got 0"):
        layer(x, checkpoint=0)
    with pytest.raises(TypeError, match="checkpoint should be a number of time steps, got 2.5"):
        layer(x, checkpoint=2.5)
    with pytest.raises(ValueError, match="checkpoint doesn't support packed sequences"):
        layer(nn.utils.rnn.pack_sequence([x[:, 0]]), checkpoint=2)


@pytest.mark.slow
@NEEDS_COMPILER
def test_peak_memory_is_below_a_quarter_of_torchs() -> None:
    """For a long sequence and a layer of medium size."""
    row = Row("lstm", 32, 1000, 256, "training")
    assert in_subprocess.peak_memory(row, "checkpoint") < in_subprocess.peak_memory(row, "torch") / 4


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
def test_initial_states_with_any_memory_layout(engine: str) -> None:
    layer, x = ur.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64), torch.randn(7, 4, 3).double()
    one = torch.randn(4, 5).double()
    with ur.engine(engine):
        state = one.T.new_ones(4, 1, 1).expand(4, 4, 5), one.expand(4, 4, 5).mT.contiguous().mT
        expected = tensors(layer(x, tuple(part.contiguous() for part in state)))
        assert_close(layer(x, state, checkpoint=3), list(expected), 1e-12)
        learned = ur.Recurrent(ur.cells.GRU, 3, 5, initial_state="learned", dtype=torch.float64)
        torch.nn.init.normal_(learned.initial_h_l0)
        checkpointed, plain = (
            torch.autograd.grad(learned(x, checkpoint=k)[0].square().sum(), list(learned.parameters()))
            for k in (2, None)
        )
        assert_close(checkpointed, plain, 1e-12)


TRAIN_MILLION_STEPS = """
import resource, torch, unrolled as ur

def train(x, **options):
    layer.zero_grad()
    torch.autograd.backward(layer(x, **options)[1].square().mean())
    return [parameter.grad.clone() for parameter in layer.parameters()]

layer, x = ur.GRU(2, 16), torch.randn(1_000_000, 1, 2)
train(x[:3000], checkpoint=1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gradients = train(x, checkpoint=1000)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (x[:, 0, 0].numel() * 16 * 4))
torch.testing.assert_close(gradients, train(x), rtol=1e-4, atol=1e-6)
"""


@pytest.mark.exhaustive
@NEEDS_COMPILER
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit on other systems")
def test_a_million_time_steps_need_less_memory_than_twice_their_output() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN_MILLION_STEPS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2
