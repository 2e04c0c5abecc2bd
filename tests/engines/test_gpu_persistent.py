"""GPU kernels whose programs share the columns of a row, and wait for each other."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers.gpu_engine import RUNTIME, gpu_engine, results
from helpers.sampling import sample
from helpers.user_cell import MGU
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.gpu.backend import BACKEND, GpuBackend
from unrolled.engines.gpu.choice import PERSISTENT, STREAMED

CELLS: list[Any] = [getattr(ur.cells, name) for name in ur.cells.__all__]
CELLS = [cell for cell in CELLS if isinstance(cell, type) and issubclass(cell, ur.Cell)]
DEVICE = torch.device("cuda", 0)


def compare(layer: Any, x: Tensor, lengths: Any = None, **options: Any) -> list[Tensor]:
    """Compare kernels with the reference engine, and return their results."""
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.6, 0.6)
    with ur.engine("reference"):
        expected = results(layer, x, lengths)
    with gpu_engine(PERSISTENT) as runtime, ur.engine("native"):
        vars(runtime).update(options)
        actual = results(layer, x, lengths)
    assert all("meet(arrived + tl.program_id(0), goal)" in source for source in runtime.sources)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    return actual


# The other strategies are tested with every cell in make test-rest.
SLOW = "RNN", "LSTM", "GRU", "LayerNormLSTM", "SLSTM", "HGRN", "MinGRU", "RGLRU", "LRU", "FastGRNN", "CFN"


@pytest.mark.parametrize(
    "cell",
    [
        MGU,
        *(pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS if cell.__name__ in SLOW),
        *(pytest.param(cell, marks=pytest.mark.exhaustive) for cell in CELLS if cell.__name__ not in SLOW),
    ],
    ids=lambda cell: cell.__name__,
)
def test_every_cell(cell: Any) -> None:
    """Each tile of rows has three programs. With 40 units, they have different numbers of blocks."""
    layer, x = ur.Recurrent(cell, 3, 40).double(), torch.randn(3, 18, 3, dtype=torch.float64)
    compare(layer, x, programs=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LSTM", "LayerNormGRU", "HGRN"])
def test_packed_sequences_in_both_directions(name: str) -> None:
    layer = ur.Recurrent(getattr(ur.cells, name), 4, 20, bidirectional=True).double()
    lengths = [5] * 17 + [4, 2, 2, 1]
    compare(layer, torch.randn(5, 21, 4, dtype=torch.float64), lengths, programs=4)


@pytest.mark.parametrize("cell", sample([MGU, ur.cells.LayerNormLSTM, ur.cells.SLSTM], [MGU]), ids=str)
def test_one_process_for_each_program(cell: Any) -> None:
    """Two tiles of rows with three programs each, which run at the same time and share memory only."""
    layer, x = ur.Recurrent(cell, 2, 40).double(), torch.randn(4, 20, 2, dtype=torch.float64)
    compare(layer, x, programs=6, processes=True)


@pytest.mark.slow
def test_without_waiting_the_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above would find a barrier that is missing."""
    load, old = type(RUNTIME).load, "meet(arrived + tl.program_id(0), goal)"
    monkeypatch.setattr(type(RUNTIME), "load", lambda self, source: load(self, source.replace(old, "pass")))

    class Hasty(MGU):
        """A cell whose kernels no other test has loaded."""

    layer, x = ur.Recurrent(Hasty, 2, 60), torch.randn(30, 2, 2)
    with torch.no_grad():
        with ur.engine("reference"):
            expected = layer(x)[0]
        with gpu_engine(PERSISTENT) as runtime, ur.engine("native"):
            runtime.programs, runtime.processes = 4, True
            output = layer(x)[0]
    assert not torch.allclose(output, expected, atol=1e-3)


@functools.cache
def inference_loop(hidden: int) -> Any:
    return GpuBackend(RUNTIME).compile(ur.cells.CIFG(4, hidden), torch.float32, DEVICE).inference


@pytest.mark.parametrize(
    ("hidden", "batch", "strategy", "rows", "shape"),
    [
        (256, 1, PERSISTENT, 16, (1, 16)),
        (1024, 1, PERSISTENT, 16, (1, 64)),
        (1024, 32, PERSISTENT, 16, (2, 64)),
        (1024, 64, PERSISTENT, 16, (4, 33)),
        (1024, 256, PERSISTENT, 64, (4, 33)),
        (1024, 64 * 66, PERSISTENT, 64, (66, 2)),
        (1024, 64 * 67, STREAMED, 16, (268,)),
    ],
)
def test_the_grid(hidden: int, batch: int, strategy: str, rows: int, shape: tuple[int, ...]) -> None:
    """On a device with 132 multiprocessors, such as an H200, all programs run at the same time."""
    RUNTIME.reset()
    RUNTIME.programs = 132
    loop = inference_loop(hidden)
    grid = loop.choose(Layout(100, batch), DEVICE)
    assert loop.specs[grid.chosen].choice.strategy == strategy
    assert (grid.rows, grid.shape) == (rows, shape)
    assert len(shape) == 1 or shape[0] * shape[1] <= 132
    RUNTIME.reset()


def test_more_steps_than_a_counter_holds() -> None:
    """A 32-bit number counts the programs that have arrived."""
    RUNTIME.reset()
    loop = inference_loop(256)
    for steps, strategy in ((2**31 // 3 // loop.specs[0].meetings - 1, PERSISTENT), (2**31 // 3, STREAMED)):
        assert loop.specs[loop.choose(Layout(steps, 1), DEVICE).chosen].choice.strategy == strategy


class TooSmall(MGU):
    """A cell whose kernels no other test has loaded."""


@pytest.mark.slow
def test_a_device_on_which_programs_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = ur.Recurrent(TooSmall, 3, 100), torch.randn(5, 2, 3)
    with torch.no_grad():
        with ur.engine("reference"):
            expected = layer(x)[0]
        with gpu_engine() as runtime, ur.engine("native"):
            runtime.refused = "meet("
            for _ in range(2):
                torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)
            assert all("meet(" not in source for source in runtime.sources)
    errors = types.ModuleType("triton.runtime.errors")
    monkeypatch.setattr(errors, "OutOfResources", type("OutOfResources", (Exception,), {}), raising=False)
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", errors)
    for message in ("Triton Error [CUDA]: too many blocks in cooperative launch", "another error"):
        assert BACKEND.runtime.is_too_large(RuntimeError(message)) is (message[0] == "T")
