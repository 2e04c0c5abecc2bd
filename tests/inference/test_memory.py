"""Memory in a process that runs for weeks: inputs of ever-changing lengths."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.layer_pairs import NEEDS_COMPILER
from helpers.toolchain import run_python

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's figure of the memory"),
]

PROGRAM = """
from pathlib import Path
import torch
import unrolled as ur

def resident_memory():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
layer = ur.GRU(4, 64, num_layers=2)
x = torch.randn(1000, 16, 4)
{setup}

def run(lengths):
    with torch.no_grad():
        for length in lengths:
            call(x[:length])

run(range(1000, 990, -1))  # the longest first: what an output needs is no growth
before = resident_memory()
run(range(990, 930, -1))
print(resident_memory() - before)
"""

CALLS = {
    "frozen": "ur.frozen(layer).__enter__()\ncall = layer",
    "stream": "call = ur.Stream(layer)",
    "stream of a model": "call = ur.Stream(torch.nn.Sequential(layer))",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLS)
def test_the_memory_does_not_grow_with_each_new_length(kind: str) -> None:
    """Outputs of all lengths together would need 230 MB."""
    done = run_python(PROGRAM.format(setup=CALLS[kind]))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40, done.stdout  # MB
