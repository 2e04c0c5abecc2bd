"""``unrolled build``: compile the kernels of a model ahead of time."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from unrolled.cli import doctor
from unrolled.engines.native.toolchain import build, export, prebuilt
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.layers.recurrent import Recurrent


def build_kernels(
    layers: Mapping[str, Recurrent],
    program: Sequence[str],
    folder: Path,
    archs: Sequence[str],
    training: bool,
    console: Console,
) -> None:
    """Compile the kernels of some layers, and those that a program uses, into a folder.

    Args:
        layers: The layers by name.
        program: A Python file and its arguments, or empty. The program is run, because calls with lengths,
            resets or all_states use separate kernels.
        folder: The output folder. It is created if it doesn't exist.
        archs: Names of instruction sets; ``"native"`` is that of this machine. If empty, the instruction set
            of this process.
        training: Whether to compile the kernels for gradients, too.
        console: The console to print the summary to.

    Raises:
        ValueError: If a layer can't be compiled, an instruction set is unknown, there is no compiler, or the
            program fails or uses no kernel.
        OSError: If the folder can't be written to.
    """
    try:
        archs = [build.check_arch(arch, "--arch") for arch in archs] or [build.arch()]
        for entry in doctor.layer_engines(layers, training=training):
            label = f"{entry['layer']}: {entry['cell']}, {entry['dtype']}"
            if entry["inference"]["engine"] != "native":
                raise ValueError(f"{label} can't be compiled: {entry['inference']['why']}")
            modes = "inference only"
            if training and entry["training"]["engine"] == "native":
                modes = "inference and training"
            elif training:
                modes += f"; training can't be compiled: {entry['training']['why']}"
            console.print(f"{label}: {modes}")
        for mode in (False, True)[: 1 + training]:  # a step may do something else in the other mode
            for layer in layers.values():
                layer.train(mode)
            doctor.layer_engines(layers, training=mode)
        if program:
            _run_program(program)
            if not build.requested_sources():
                raise ValueError(
                    f"{program[0]} used no kernels: it ran no layers, or only on the reference engine"
                )
            console.print(f"{program[0]}: all kernels that it uses", soft_wrap=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusable kernel cache doesn't matter here
            libraries = export.save(build.requested_sources(), folder, archs)
    except NoCompilerError as error:
        raise ValueError(str(error)) from None
    size = sum(path.stat().st_size for path in libraries)
    console.print(
        f"Wrote {doctor.format_count(len(libraries))} ({', '.join(archs)}; {doctor.format_size(size)}) "
        f"to {folder}.\n"
        f"To use them, set {prebuilt.VARIABLE}={folder.absolute()}",
        soft_wrap=True,
    )


def _run_program(command: Sequence[str]) -> None:
    """Run a Python program with its arguments in this process, as ``python PROGRAM ARGUMENTS`` would."""
    original, program = (sys.argv, sys.path), command[0]
    sys.argv, sys.path = list(command), [str(Path(program).parent.absolute()), *sys.path]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise ValueError(f"{program} exited with {error.code}") from None
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{program} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.argv, sys.path = original
