"""Compiled loops under sanitizers: no access outside of a buffer, no undefined behavior, no data race.

By default, samples run, and tests that the sanitizers report each kind of fault. ``pytest -m exhaustive``
runs all tests of the loops with sanitizers, which takes many minutes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.sanitizers import MEMORY, THREADS, Sanitizer, UnavailableError, archs, environment

ROOT = Path(__file__).parents[2]
LOOP_TESTS = (
    "engines/test_native",
    "engines/test_native_autograd",
    "engines/test_thread_pool",
    "engines/test_checkpointing",
    "engines/test_scans",
    "engines/test_operations",
    "engines/test_random_steps",
    "engines/test_draws",
    "engines/test_call_plans",
    "quantization/test_quantize",
    "inference/test_frozen",
    "inference/test_stream",
    "inference/test_stream_changes",
    "layers/test_call_options",
)
FILES = [str(ROOT / "tests" / f"{name}.py") for name in LOOP_TESTS]

# -s: with captured output, a report that ends the process would be lost.
PYTEST_OPTIONS = ("-q", "-s", "-p", "no:cacheprovider")

pytestmark = NEEDS_SYSTEM_COMPILER


OWN_THREADS = """
import sys, torch
from unrolled.engines.native import matmul
from unrolled.engines.native.tuning import constants
constants().update(STEP_WORK_FOR_TWO_THREADS=1, CALL_WORK_FOR_TWO_THREADS=1)
torch.set_num_threads(3)
matmul._thread_pool().thread_pool_use_openmp(None, None, None)
"""


def run(
    sanitizer: Sanitizer, cache: Path, arch: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python, and compile the loops with a sanitizer. Skip the test if there is none."""
    try:
        variables = environment(sanitizer, cache, arch)
    except UnavailableError as error:
        pytest.skip(str(error))
    line = [sys.executable, *arguments]
    return subprocess.run(line, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


FAULTS = """
import os, torch, unrolled as ur
from unrolled.engines import registry
from unrolled.engines.native.toolchain import build
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native.kernel import launch

torch.manual_seed(0)
cell, x = ur.cells.RNN(5, 19), torch.randn(4, 3, 5)
params = [torch.randn(shape) / 19**0.5 for shape in cell.shapes().values()]
initial = torch.randn(3, 19)
compiled = registry.compiled(cell, torch.float32)
with torch.no_grad():
    call, output, (final,) = compiled.inference_call(params, x, (initial,), Layout.of(x, None), False, 1)
    launch([call])
expected = torch.nn.RNN(5, 19)
expected.load_state_dict(dict(zip((f"{name}_l0" for name in cell.shapes()), params)))
print("clean", torch.allclose(output, expected(x, initial[None])[0], atol=1e-6), flush=True)

def crashes(fault):
    child = os.fork()  # the report ends it
    if child == 0:
        fault()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0

def run_with_short_buffer(tensor):  # one element too short
    short = torch.zeros(tensor.numel() - 1)
    indices = [k for k, pointer in enumerate(call.pointers) if pointer == tensor.data_ptr()]
    assert indices
    for index in indices:
        call.pointers[index] = short.data_ptr()
    launch([call])

buffers = {**dict(zip(cell.shapes(), params)), "x": x, "initial": initial, "output": output, "final": final}
for name, tensor in buffers.items():
    print("short", name, crashes(lambda: run_with_short_buffer(tensor)), flush=True)
library = build.load('extern "C" int next(int x) { return x + 1; }')
print("undefined", crashes(lambda: library.next(2**31 - 1)), flush=True)
"""


@pytest.mark.exhaustive
def test_a_buffer_that_is_one_element_short_is_reported(tmp_path: Path) -> None:
    """Each buffer of a loop in turn. With correct buffers, nothing is reported."""
    done = run(MEMORY, tmp_path, archs()[-1], "-c", FAULTS)
    assert done.returncode == 0, done.stderr
    first, *faults = done.stdout.splitlines()
    assert first == "clean True"
    assert [line.split()[-1] for line in faults] == ["True"] * 9, (done.stdout, done.stderr)
    assert done.stderr.count("ERROR: AddressSanitizer: heap-buffer-overflow") == 8
    assert done.stderr.count("WRITE of size") == 2
    assert "signed integer overflow: 2147483647 + 1" in done.stderr


RACE = """
import unrolled as ur
from unrolled.engines.native.toolchain import build
layer, x = ur.GRU(9, 40), torch.randn(12, 6, 9)
with torch.no_grad(), ur.engine("native"):
    layer(x)
    print("clean", flush=True)
    load = build.load
    build.load = lambda source: load(source.replace("Loop<Step, false", "Loop<Step, true"))
    for _ in range(100):  # until two threads race
        ur.RNN(9, 40)(torch.randn(12, 6, 9))
"""


@pytest.mark.slow
def test_missing_synchronization_is_reported(tmp_path: Path) -> None:
    """A correct loop, and one whose threads don't wait for one another after a step."""
    done = run(THREADS, tmp_path, "native", "-c", OWN_THREADS + RACE)
    assert done.stdout == "clean\n", done.stderr
    assert done.returncode == 66, done.stderr
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", archs())
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_no_access_outside_of_buffers(file: str, arch: str, tmp_path: Path) -> None:
    done = run(MEMORY, tmp_path, arch, "-m", "pytest", *PYTEST_OPTIONS, file, "-k", "not peak", timeout=7200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_no_data_race(file: str, tmp_path: Path) -> None:
    """Tests that start processes are left out, because these would use torch's threads."""
    code = f"{OWN_THREADS}import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    selection = "not own_threads and not peak"
    done = run(THREADS, tmp_path, "native", "-c", code, *PYTEST_OPTIONS, file, "-k", selection, timeout=7200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
