"""Export a module as a folder of C."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from unrolled.export.c_source import CSource
from unrolled.export.layout import Layout
from unrolled.export.modules import read_module
from unrolled.export.project import project_files

_RESERVED = frozenset(
    [
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum"),
        *("extern", "float", "for", "goto", "if", "inline", "int", "long", "register", "restrict", "return"),
        *("short", "signed", "sizeof", "static", "struct", "switch", "typedef", "union", "unsigned", "void"),
        *("volatile", "while", "example"),
    ]
)


@dataclass(frozen=True)
class CLibrary:
    """An exported module.

    Attributes:
        folder: The folder with its files.
        name: The prefix of its files and functions.
        files: Its files.
        input: Number of inputs of a time step.
        output: Number of outputs of a time step.
        weights_bytes: Size of its weights.
        state_bytes: Size of the memory of one state.
        bidirectional: Whether it runs whole sequences only.
    """

    folder: Path
    name: str
    files: tuple[Path, ...]
    input: int
    output: int
    weights_bytes: int
    state_bytes: int
    bidirectional: bool


def c(
    module: nn.Module,
    out: str | os.PathLike[str],
    name: str = "model",
    weights: Literal["array", "file"] = "array",
) -> CLibrary:
    """Export a layer, or a model that contains layers, as self-contained C11.

    The folder contains ``name.h`` and ``name.c``, a ``CMakeLists.txt``, a template for pkg-config and
    a short example. The code uses no heap, no locks, no threads and no system calls, and needs no library. It
    computes one row, one time step per call::

        static model_state state;
        model_init(&state);
        model_step(&state, x, y);

    The module is exported in evaluation mode. Layers may have any cell, several layers, both directions (the
    code then runs whole sequences), learned initial states and zoneout. A model may also contain
    ``nn.Linear``, causal ``nn.Conv1d``, ``nn.BatchNorm1d``, ``nn.LayerNorm``, an ``nn.Embedding`` of its
    input, activations, and elementwise functions of values of the same time step.

    The output of a layer has the bits of :class:`unrolled.Stream` on the same instruction set. Layers that
    :func:`unrolled.quantize` returned keep their weights in int8 or 16 bits.

    Args:
        module: A layer of unrolled or torch.nn, or a model with one input that contains some, in float32 on
            the CPU, also with quantized weights. It isn't changed.
        out: The output folder. It is created if it doesn't exist; files of the same names are replaced.
        name: Prefix of all files and functions, a C identifier.
        weights: ``"array"``: the weights are an array in ``name.c``. ``"file"``: they are the file
            ``name_weights.bin``, which the program loads or maps and passes to ``name_init``.

    Returns:
        The files and sizes.

    Raises:
        TypeError: If ``module`` isn't a torch module.
        ValueError: If it can't be exported, or ``name`` or ``weights`` is invalid. The folder stays as it is.
        OSError: If the folder can't be written to.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in _RESERVED:
        raise ValueError(f"name should be a C identifier, such as 'model', got {name!r}")
    if weights not in ("array", "file"):
        raise ValueError(f"weights should be 'array' or 'file', got {weights!r}")
    program, example, expected = read_module(module)
    layout = Layout(program)
    code = CSource(name, layout, example, expected, weights == "file")
    contents: dict[str, str | bytes] = {
        f"{name}.h": code.header(),
        f"{name}.c": code.source(),
        **project_files(code),
    }
    if weights == "file":
        contents[f"{name}_weights.bin"] = code.weights_file()
    return CLibrary(
        Path(out),
        name,
        _write(Path(out), contents),
        program.input.width,
        program.output.width,
        4 * (layout.weights.numel() + layout.words.numel()),
        4 * layout.memory + (16 if weights == "file" else 4),
        program.bidirectional,
    )


def _write(folder: Path, contents: dict[str, str | bytes]) -> tuple[Path, ...]:
    """Write files into a folder: first into a new one next to it, so that nothing is half-written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, "not a folder", str(folder))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in contents.items():
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
        folder.mkdir(exist_ok=True)
        for name in contents:
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)
    return tuple(folder / name for name in contents)
