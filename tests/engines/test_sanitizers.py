"""The compiled loops under the compiler's sanitizers: nothing outside a buffer, nothing undefined, no race.

Samples run always, with proofs that faults of each kind are reported; all tests of the loops, which takes
many minutes, with ``pytest -m exhaustive``.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from helpers.layer_pairs import NEEDS_SYSTEMS_COMPILER
from unrolled.engines.native.toolchain import build

ROOT = Path(__file__).parents[2]
LOOPS = (
    "test_native",
    "test_frozen",
    "test_stream",
    "test_checkpoint",
    "test_asked",
    "test_scans",
    "test_vocabulary",
    "test_random_steps",
)
FILES = [str(path) for name in LOOPS if (path := ROOT / "tests" / f"{name}.py").exists()]

QUIETLY = ("-q", "-s", "-p", "no:cacheprovider")  # -s: a report that ends the process is not kept back

pytestmark = NEEDS_SYSTEMS_COMPILER


@dataclass(frozen=True)
class Sanitizer:
    """What is compiled in, the runtime that has to be loaded before Python, and what that is told."""

    flags: str
    runtime: str
    options: tuple[str, str]


MEMORY = Sanitizer(
    "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "libasan.so",
    ("ASAN_OPTIONS", "detect_leaks=0"),  # Python itself keeps memory to its end
)
# Of torch, which is not instrumented, nothing is to be reported: not what its threads do, and not what they
# do with our values, since OpenMP's waiting is not seen. So the team of our own does the work.
THREADS = Sanitizer(
    "-fsanitize=thread",
    "libtsan.so",
    ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66:die_after_fork=0"),
)
OWN_TEAM = """
import sys, torch
from unrolled.engines.native import kernel, matmul
kernel._WORTH = 0
torch.set_num_threads(3)
matmul._team().team_join(None, None, None)
"""


def of_the_compiler(library: str) -> str:
    """Where the compiler has a library; only its name where it has none."""
    line = ["c++", f"-print-file-name={library}"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def runtime(sanitizer: Sanitizer) -> str:
    """Where the runtime of a sanitizer is; without one the test is skipped."""
    version = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    if "clang" in version:
        pytest.skip("the sanitizers' runtimes are looked for as GCC has them, and c++ is clang")
    found = of_the_compiler(sanitizer.runtime)
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {sanitizer.runtime}")
    starts = subprocess.run(["true"], capture_output=True, text=True, env={"LD_PRELOAD": found})
    if starts.returncode != 0:  # such as a system whose addresses are laid out as TSan can't have them
        pytest.skip(f"no program runs with {sanitizer.runtime}: {starts.stderr.strip()[:200]}")
    return found


def run(
    sanitizer: Sanitizer, cache: Path, arch: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python with loops compiled with a sanitizer."""
    name, options = sanitizer.options
    environment = {
        **os.environ,
        "CXX": f"{shutil.which('c++')} {sanitizer.flags}",
        # with the C++ library, or AddressSanitizer takes the first error that torch throws for one of its own
        "LD_PRELOAD": f"{runtime(sanitizer)} {of_the_compiler('libstdc++.so.6')}",
        name: options,
        "UNROLLED_CACHE": str(cache),
        build.ARCH: arch,
    }
    environment.pop("UNROLLED_KERNELS", None)
    line = [sys.executable, *arguments]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def archs() -> list[str]:
    """This machine's own instruction set, and one whose last elements are not masked.

    AddressSanitizer doesn't look at masked loads and stores, which AVX-512 has.
    """
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_avx2_supported()
    return ["native", "x86-64-v3"] if x86 else ["native"]


FAULTS = """
import os, torch, unrolled as ur
from unrolled.engines.native import registry
from unrolled.engines.native.toolchain import build
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native.kernel import launch

torch.manual_seed(0)
cell, x = ur.cells.RNN(5, 19), torch.randn(4, 3, 5)
params = [torch.randn(shape) / 19**0.5 for shape in cell.shapes().values()]
initial = torch.randn(3, 19)
compiled = registry.compiled(cell, torch.float32)
with torch.no_grad():
    job, output, (final,) = compiled.infer(params, x, (initial,), Layout.of(x, None), False, 1)
    launch([job])
expected = torch.nn.RNN(5, 19)
expected.load_state_dict(dict(zip((f"{name}_l0" for name in cell.shapes()), params)))
print("clean", torch.allclose(output, expected(x, initial[None])[0], atol=1e-6), flush=True)

def dies(fault):
    child = os.fork()  # which ends with the report
    if child == 0:
        fault()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0

def too_short(tensor):  # by one element
    short = torch.zeros(tensor.numel() - 1)
    places = [k for k, pointer in enumerate(job.pointers) if pointer == tensor.data_ptr()]
    assert places
    for place in places:
        job.pointers[place] = short.data_ptr()
    launch([job])

buffers = {**dict(zip(cell.shapes(), params)), "x": x, "initial": initial, "output": output, "final": final}
for name, tensor in buffers.items():
    print("short", name, dies(lambda: too_short(tensor)), flush=True)
library = build.load('extern "C" int next(int x) { return x + 1; }')
print("undefined", dies(lambda: library.next(2**31 - 1)), flush=True)
"""


@pytest.mark.exhaustive
def test_a_buffer_that_is_one_element_short_is_reported(tmp_path: Path) -> None:
    """Every buffer of a loop in turn; and with the right ones nothing is reported."""
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
layer, x = ur.GRU(9, 40), torch.randn(12, 6, 9)
with torch.no_grad(), ur.engine("native"):
    layer(x)
    print("clean", flush=True)
    load = loop.build.load
    loop.build.load = lambda source: load(source.replace("APART = false", "APART = true"))
    for _ in range(100):  # in the end two of the threads meet
        ur.RNN(9, 40)(torch.randn(12, 6, 9))
"""


def test_a_missing_meeting_of_threads_is_reported(tmp_path: Path) -> None:
    """One loop as it is, and one whose threads don't wait for one another after a step."""
    done = run(THREADS, tmp_path, "native", "-c", OWN_TEAM + RACE)
    assert done.stdout == "clean\n", done.stderr
    assert done.returncode == 66, done.stderr
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", archs())
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_no_loop_leaves_its_buffers(file: str, arch: str, tmp_path: Path) -> None:
    done = run(MEMORY, tmp_path, arch, "-m", "pytest", *QUIETLY, file, "-k", "not peak", timeout=7200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_no_two_threads_race(file: str, tmp_path: Path) -> None:
    """Without the tests that start processes, which would have torch's threads work."""
    code = f"{OWN_TEAM}import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    choice = "not team_of_its_own and not peak"
    done = run(THREADS, tmp_path, "native", "-c", code, *QUIETLY, file, "-k", choice, timeout=7200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
