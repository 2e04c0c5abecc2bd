"""Kernels in Triton itself, without a GPU: in its interpreter, and compiled for devices that aren't there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.sampling import sample
from unrolled.engines.gpu.choice import STRATEGIES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PROGRAMS = Path(__file__).parents[1] / "helpers" / "triton_programs.py"
CELLS = ["LSTM", "GRU", "RNN", "LayerNormGRU", "LayerNormLSTM", "SLSTM", "HGRN", "MinGRU", "LRU", "CoRNN"]
CELLS += ["MGU", "SRU", "NAS"]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may use, by compute capability


def run(*request: Any, interpret: bool = False) -> Any:
    """Return the result of a program in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-W", "ignore", str(PROGRAMS), json.dumps(request)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("strategy", sample(STRATEGIES, ["registers"]))
@pytest.mark.parametrize("names", sample([CELLS[:1], CELLS[1:]]), ids=len)
def test_the_interpreter_of_triton(names: list[str], strategy: str) -> None:
    """It runs one program after another, so no programs share the columns of a row."""
    differences = run("interpret", names, strategy, interpret=True)
    assert differences or (names, strategy) == (CELLS[:1], "scan")
    for name, difference in differences.items():
        assert difference < 1e-12, name


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_kernels_compile_for_devices(dtype: str, capability: int) -> None:
    """The first choice of each loop needs no more shared memory than there is."""
    cells = [("LSTM", 64), ("LayerNormGRU", 32), ("LSTM", 256), ("MinGRU", 300)]
    for (name, hidden), kernels in zip(cells, run("compile", cells, dtype, capability), strict=True):
        for kernel in kernels:
            assert kernel["shared"] <= SHARED_MEMORY[capability], (name, hidden)
            assert (kernel["products"] > 0) is (name != "MinGRU"), (name, hidden)
