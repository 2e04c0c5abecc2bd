"""Small libraries and programs for tests of the toolchain."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import processes
from unrolled.engines.native.toolchain import build, cpu

X86_ONLY = pytest.mark.skipif("x86" not in cpu.system(), reason="names x86 instruction sets")

SOURCE = 'extern "C" int answer() { return 42; }\n'
OTHER_SOURCE = 'extern "C" int answer() { return 43; }\n'
# Variables of a process that finds no compiler, not even that of the ziglang package.
NO_COMPILER = {"PATH": "", "PYTHONPATH": str(Path(__file__).with_name("without_ziglang"))}
PRINT_ANSWER = """
import sys
from unrolled.engines.native.toolchain import build, cache
from unrolled.engines.native.toolchain.compiler import NoCompilerError
try:
    print(build.load({source!r}).answer())
except NoCompilerError as error:
    print("refused:", error)
"""
PRINT_LANES = "from unrolled.engines.native.toolchain import build\nprint(build.load(build.PROBE).lanes())"
COMPARE_ENGINES = """
import torch, unrolled as ur
torch.manual_seed(1)
for layer in (LAYERS,):
    x, results = torch.randn(6, 3, layer.input_size), []
    for engine in ("ENGINE", "reference"):
        with ur.engine(engine):
            output, _ = layer(x)
            loss = output.square().sum()
            results.append([output.detach(), *torch.autograd.grad(loss, layer.parameters())])
    print(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results)) < 1e-5)
"""


def compare_engines(engine: str, layers: str = "ur.LSTM(5, 19)") -> str:
    """Return a program that compares an engine with the reference engine. It prints True for each layer."""
    return COMPARE_ENGINES.replace("ENGINE", engine).replace("LAYERS", layers)


def call_library(source: str = SOURCE, arch: str = "native") -> int:
    """Find a library in the cache or compile it, and call its function."""

    def call(library: Path, _: object) -> int:
        # A copy, because the dynamic linker doesn't load the same path twice.
        with tempfile.TemporaryDirectory() as folder:
            return int(ctypes.CDLL(shutil.copy(library, folder)).answer())

    return build.find_or_compile(source, arch, call)


def library_path(source: str = SOURCE, arch: str = "native") -> Path:
    """Find a library in the cache or compile it, and return its path."""
    return build.find_or_compile(source, arch, lambda library, _: library)


def run_python(
    code: str, *, prefix: tuple[str, ...] = (), timeout: float = 900, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run code in a new process.

    Args:
        code: The program.
        prefix: A command and its arguments that run Python, if any.
        timeout: Seconds until the process is killed.
        variables: Environment variables to set, or to remove if None.
    """
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    code = textwrap.dedent(code)
    if not prefix:
        return processes.run("-c", code, env=environment, timeout=timeout)
    command = [*prefix, sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def mount_namespace(command: str, **ids: int) -> tuple[str, ...]:
    """Return a prefix of a command line that runs in a mount namespace, or skip the test.

    Args:
        command: A shell command to run first.
        ids: User and group ids in the namespace. Root by default.
    """
    users = [f"--map-{name}={number}" for name, number in ids.items()] or ["-r"]
    prefix = ("unshare", "-m", "-U", *users, "sh", "-c", f'{command} && exec "$@"', "sh")
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except OSError:
        pytest.skip("unshare is not installed")
    if done.returncode != 0:
        pytest.skip(f"mount namespaces are not available: {done.stderr}")
    return prefix


def fake_compiler(folder: Path, version: str, compiling: str, name: str = "c++") -> Path:
    """Create a compiler that runs one shell command to print its version, and another to compile."""
    script = folder / name
    script.write_text(f'#!/bin/sh\ncase "$*" in\n*--version) {version};;\n*) {compiling or ":"};;\nesac\n')
    script.chmod(0o755)
    return script


def counting_compiler(folder: Path, before: str = "", version: str = "") -> tuple[str, Callable[[], int]]:
    """Create a C++ compiler that counts how often it compiles, and then runs the real one.

    Args:
        folder: A folder for the script.
        before: A shell command to run before compiling.
        version: A shell command to run before printing the version.

    Returns:
        The value for CXX, and a function that returns the count.
    """
    calls, script = folder / "calls", folder / "my c++"
    script.write_text(
        f"""#!/bin/sh
case "$*" in
*-shared*) echo >> "{calls}"; {before or ":"};;
*--version) {version or ":"};;
esac
exec {shutil.which("c++")} "$@"
"""
    )
    script.chmod(0o755)
    return f"'{script}'", lambda: len(calls.read_text().splitlines()) if calls.exists() else 0
