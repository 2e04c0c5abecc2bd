"""Compile a model's kernels ahead of time: what ``unrolled build`` does."""

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


def save(
    layers: Mapping[str, Recurrent],
    program: Sequence[str],
    folder: Path,
    archs: Sequence[str],
    training: bool,
    console: Console,
) -> None:
    """Compile the kernels of layers, and those that a program uses, into a folder, and say what is in it.

    Args:
        layers: by name.
        program: a Python file and its arguments, run here, if any; its layers may be asked for resets, every
            state and the like, which have kernels of their own.
        folder: made where it isn't there.
        archs: names of instruction sets, ``"native"`` for this machine's own; none: that of this process.
        training: whether gradients will be wanted too.
        console: where to print.

    Raises:
        ValueError: a layer that the compiler can't take, an instruction set that it doesn't know, no
            compiler, or a program that fails or uses no kernel.
        OSError: the folder can't be written to.
    """
    try:
        archs = [build.check_arch(arch, "--arch") for arch in archs] or [build.arch()]
        for found in doctor.engines_of(layers, training=training):
            label = f"{found['layer']}: {found['cell']}, {found['dtype']}"
            if found["inference"]["engine"] != "native":
                raise ValueError(f"{label} can't be compiled: {found['inference']['why']}")
            told = "inference"
            if training:
                compiled = found["training"]["engine"] == "native"
                told += " and training" if compiled else f"; not training: {found['training']['why']}"
            console.print(f"{label}: {told}")
        if program:
            _run(program)
            if not build.asked():
                raise ValueError(
                    f"{program[0]} used no kernel: its layers ran on the reference engine, if at all"
                )
            console.print(f"{program[0]}: what it uses", soft_wrap=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a cache that can't be used: the folder can, or raises
            made = export.save(build.asked(), folder, archs)
    except NoCompilerError as error:
        raise ValueError(str(error)) from None
    size = sum(path.stat().st_size for path in made)
    console.print(
        f"{len(made)} libraries for {', '.join(archs)}, {doctor.bytes_in_words(size)}, in {folder}\n"
        f"Where they are to run: {prebuilt.VARIABLE}={folder.absolute()}",
        soft_wrap=True,
    )


def _run(line: Sequence[str]) -> None:
    """Run a program with its arguments as Python does."""
    before, program = (sys.argv, sys.path), line[0]
    sys.argv, sys.path = list(line), [str(Path(program).parent.absolute()), *sys.path]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise ValueError(f"{program} ended with {error.code}") from None
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{program} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.argv, sys.path = before
