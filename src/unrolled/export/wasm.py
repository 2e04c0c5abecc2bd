"""Export a module to WebAssembly: the exported C, compiled with zig or clang."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from unrolled.engines.native.toolchain import cache
from unrolled.export.c_source import CSource
from unrolled.export.errors import ExportError
from unrolled.export.layout import Layout
from unrolled.export.modules import read_module
from unrolled.export.templates import fill, template

_NO_COMPILER = (
    "no compiler for WebAssembly was found. Install zig (pip install ziglang), or clang with wasm-ld"
)
_TIMEOUT = 600  # seconds; a few where zig has its files
_CHUNK = 128  # steps in a call: a block of Web Audio
_SEQUENCE = 1024  # steps of a sequence that also runs from its end
_FLAGS = ("-std=c11", "-ffp-contract=off", "-nostdlib", "-Wl,--no-entry", "-Wl,--strip-all")


@dataclass(frozen=True)
class WebAssembly:
    """A layer or model that was compiled to WebAssembly.

    The WebAssembly module exports these functions:

    - ``init()``: Initialize the module. Call it once.
    - ``run(steps)``: Run at most ``most_steps()`` time steps. It reads the inputs from the memory at
      ``input()``, and writes the outputs to the memory at ``output()``.
    - ``reset()``: Start a new sequence.
    - ``selftest()``: Return 0 if the outputs for an example are right.

    Attributes:
        content: The binary, the content of a ``.wasm`` file.
        input: Number of inputs per time step: float32, or one int32 for an embedding.
        output: Number of outputs per time step, float32.
        bidirectional: Whether each call of ``run`` needs a whole sequence.
    """

    content: bytes
    input: int
    output: int
    bidirectional: bool


def wasm(module: nn.Module, out: str | os.PathLike[str] | None = None, simd: bool = True) -> WebAssembly:
    """Export a layer, or a model that contains layers, to WebAssembly.

    The WebAssembly module has no imports and owns its memory. Browsers, Node and other runtimes can load it.

    Args:
        module: The layer or model, as for :func:`unrolled.export.c`.
        out: The file to write. None to write no file.
        simd: Whether to use SIMD instructions, which all browsers have supported since 2023.

    Returns:
        The WebAssembly module and its sizes.

    Raises:
        TypeError: If ``module`` isn't a torch module.
        ValueError: If it can't be exported, or no compiler is found.
        OSError: If the file can't be written.
    """
    program, example, expected = read_module(module)
    code = CSource("model", Layout(program), example, expected, weights_in_file=False)
    content = _compile(code, simd)
    if out is not None:
        Path(out).write_bytes(content)
    return WebAssembly(content, program.input.width, program.output.width, program.bidirectional)


def _compile(code: CSource, simd: bool) -> bytes:
    line = _compiler(simd)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.h").write_text(code.header())
        (folder / "model.c").write_text(code.source())
        (folder / "module.c").write_text(_module(code))
        line += ["-O3" if simd else "-Os", *_FLAGS, "model.c", "module.c", "-o", "model.wasm"]
        try:
            done = subprocess.run(
                line, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, env=_environment()
            )
        except subprocess.TimeoutExpired:
            raise ExportError(f"{line[0]} took more than {_TIMEOUT} s to compile WebAssembly") from None
        if done.returncode:
            raise ExportError(f"{' '.join(line[:4])} can't compile the module: {_first_error(done.stderr)}")
        return (folder / "model.wasm").read_bytes()


def _module(code: CSource) -> str:
    both = code.program.bidirectional
    return fill(
        template("module.c"),
        name=code.name,
        NAME=code.name.upper(),
        x=code.x_type(),
        steps=_SEQUENCE if both else _CHUNK,
        work=f"static float work[STEPS * {code.name.upper()}_WORK + 1];\n" if both else "",
        argument=", work" if both else "",
        causal=int(not both),
    )


def _compiler(simd: bool) -> list[str]:
    """Return the command that compiles and links WebAssembly.

    Raises:
        ExportError: If there is none.
    """
    zig = shutil.which("zig")
    if importlib.util.find_spec("ziglang") is not None:
        command = [sys.executable, "-m", "ziglang", "cc"]
    elif zig is not None:
        command = [zig, "cc"]
    else:
        clang = shutil.which("clang")
        if clang is None or shutil.which("wasm-ld") is None:
            raise ExportError(_NO_COMPILER)
        return [clang, "--target=wasm32", *(["-msimd128"] if simd else [])]
    return [*command, "-target", "wasm32-freestanding", "-mcpu=generic" + ("+simd128" if simd else "")]


def _environment() -> dict[str, str]:
    """Return the environment for zig, with a cache folder that is writable."""
    folder = cache.user_folder()
    return {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), **os.environ} if folder else dict(os.environ)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it printed no message")
