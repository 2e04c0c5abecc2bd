"""``unrolled export``: write a model as self-contained C."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from unrolled.cli.arguments import UsageError, new_console
from unrolled.cli.doctor import format_size
from unrolled.cli.model import call_function
from unrolled.export import CLibrary, c, wasm

_HELP = "FILE.py:FUNCTION, a function that returns a model: return model"


def add(commands: Any) -> None:
    """Add the command to the subparsers of an argument parser."""
    parser = commands.add_parser(
        "export",
        help="write a trained model as self-contained C",
        description="Write a layer, or a model that contains layers, as C11 into a folder, with a "
        "CMakeLists.txt and an example. The code needs no Python and no library, and allocates no memory.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help=_HELP)
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="output folder")
    parser.add_argument("--name", default="model", help="prefix of files and functions (default: model)")
    parser.add_argument(
        "--weights",
        choices=("array", "file"),
        default="array",
        help="where the weights are: an array in the source, or a file to load or map (default: array)",
    )
    parser.add_argument(
        "--wasm", type=Path, metavar="FILE", help="also compile the model to WebAssembly, with zig or clang"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    result = call_function(options.model, _HELP)
    model = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(model, nn.Module):
        raise UsageError(f"{options.model} should return a model, got {type(result).__name__}")
    module = None if options.wasm is None else wasm(model)
    library = c(model, options.out, name=options.name, weights=options.weights)
    text = _summary(type(model).__name__, library)
    if module is not None:
        options.wasm.write_bytes(module.content)
        text += f"\nWrote the WebAssembly module to {options.wasm}: {format_size(len(module.content))}."
    new_console().print(text, soft_wrap=True, highlight=False)


def _summary(model: str, library: CLibrary) -> str:
    functions = "run" if library.bidirectional else "step and run"
    return (
        f"Wrote {model} to {library.folder}: input size {library.input}, output size {library.output}, "
        f"{format_size(library.weights_bytes)} of weights, {library.state_bytes} bytes of state.\n"
        f"{library.name}.h declares {functions}. To build it:\n"
        f"  cmake -S {library.folder} -B {library.folder / 'build'}\n"
        f"  cmake --build {library.folder / 'build'}"
    )
