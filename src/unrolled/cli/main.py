"""The command ``unrolled``: parse the arguments and run a subcommand."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from unrolled._version import __version__
from unrolled.cli import build, doctor, export, show
from unrolled.cli.arguments import (
    CELL_HELP,
    CELL_WITH_WEIGHTS_HELP,
    OPTION_HELP,
    TORCH_CELLS,
    WEIGHTS_HELP,
    UsageError,
    check_options,
    new_console,
    notes_about,
    parse_cell,
    parse_device,
    parse_options,
    printable,
    read_layers,
)
from unrolled.cli.bench import command as bench
from unrolled.cli.compare import command as compare
from unrolled.io.state_dicts import new_layer
from unrolled.layers.recurrent import Recurrent

DTYPES = ("float32", "float64", "bfloat16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command-line arguments, ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0 for success, 1 for a failed check, 2 for bad usage or bad input, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't encode · × … shows ? instead
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
        if sys.stdout is not None:  # None if the parent process has closed it
            sys.stdout.flush()
    except (UsageError, ValueError, TypeError, IndexError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reading program, such as head, has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if os.environ.get("UNROLLED_TRACEBACK"):
            raise
        print(f"unrolled: {printable(_format_error(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the convention of shells: 128 + SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="unrolled",
        description="Recurrent layers for PyTorch that you can look inside.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"unrolled {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show.add(commands)
    bench.add(commands)
    compare.add(commands)
    doctor_parser = commands.add_parser(
        "doctor",
        help="report whether compiled layers work on this machine, and what they use",
        description="Report the compiler, processor, threads and kernel cache on this machine, and whether "
        "the native engine (compiled kernels) works. With WEIGHTS or --cell, also report for each layer "
        "whether it runs on the native engine or on the reference engine (Python), and why.",
        allow_abbrev=False,
    )
    _add_layer_arguments(doctor_parser)
    doctor_parser.add_argument(
        "--device",
        type=parse_device,
        default="cpu",
        metavar="D",
        help="show how layers run on this device: cpu (default), cuda or cuda:N; no GPU is needed",
    )
    doctor_parser.add_argument("--json", action="store_true", help="print JSON")
    doctor_parser.set_defaults(run=_doctor)
    build_parser = commands.add_parser(
        "build",
        help="compile kernels ahead of time, for machines without a compiler",
        description="Compile kernels into a folder, for the layers of WEIGHTS, --cell or --program; at least "
        "one of them is required. To use the kernels on another machine, copy the folder and set the "
        "environment variable UNROLLED_KERNELS to its path.",
        allow_abbrev=False,
    )
    _add_layer_arguments(build_parser)
    build_parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="output folder")
    build_parser.add_argument(
        "--arch",
        type=_split_list,
        default=[],
        metavar="LIST",
        help="instruction sets to compile for, such as x86-64-v3,x86-64-v4; at run time, the most advanced "
        "one that the processor supports is used (default: native, the instruction set of this machine)",
    )
    build_parser.add_argument(
        "--program",
        type=_split_program,
        default=[],
        help="Python script to run now, so that every kernel that it uses is compiled; put quotes around the "
        "script and its arguments, such as 'score.py --rows 8'. This is the only way to compile the kernels "
        "for layers called with lengths, resets or all_states, or created with zoneout",
    )
    build_parser.add_argument("--inference", action="store_true", help="compile no kernels for training")
    build_parser.set_defaults(run=_build)
    export.add(commands)
    return parser


def _add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select layers."""
    parser.add_argument(
        "weights",
        nargs="*",
        type=Path,
        metavar="WEIGHTS",
        help=f"one or more files: {WEIGHTS_HELP}",
    )
    parser.add_argument(
        "--cell",
        action="append",
        default=[],
        metavar="CELL",
        help=f"{CELL_HELP}; can be repeated. {CELL_WITH_WEIGHTS_HELP}",
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=OPTION_HELP)
    parser.add_argument(
        "--sizes",
        type=_parse_sizes,
        default=(16, 32),
        metavar="INPUT,HIDDEN",
        help="input and hidden size for --cell (default: 16,32); rarely needed, because most kernels work "
        "for all sizes above 1",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype for --cell (default: float32)"
    )


def _doctor(options: argparse.Namespace) -> None:
    data = doctor.collect_report(_select_layers(options), options.device)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        doctor.print_report(new_console(), data)


def _build(options: argparse.Namespace) -> None:
    layers = _select_layers(options)
    if not layers and not options.program:
        raise UsageError("nothing to build: specify WEIGHTS, --cell or --program")
    build.build_kernels(
        layers, options.program, options.out, options.arch, not options.inference, new_console()
    )


def _select_layers(options: argparse.Namespace) -> dict[str, Recurrent]:
    """Return the layers of the weights files by name, or without files a new layer for each cell."""
    cells = {text: parse_cell(text) for text in options.cell}
    cell_options = parse_options(options.option)
    check_options(cell_options, list(cells.values()) or list(TORCH_CELLS.values()))
    if not options.weights:
        dtype = getattr(torch, options.dtype)
        return {
            text: new_layer(cell, *options.sizes, dtype=dtype, **cell_options) for text, cell in cells.items()
        }
    selected: dict[str, Recurrent] = {}
    for path in options.weights:
        file = read_layers(path, list(cells.values()), cell_options)
        for note in notes_about(file):
            print(f"unrolled: {path}: {printable(note)}", file=sys.stderr)
        file_label = f"{path}: " if len(options.weights) > 1 else ""
        selected |= {f"{file_label}{prefix or '(no prefix)'}": layer for prefix, layer in file.layers.items()}
    return selected


def _parse_sizes(text: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"(\d+),(\d+)", text)
    if not sizes or not int(sizes[1]) or not int(sizes[2]):
        raise argparse.ArgumentTypeError(f"expected INPUT,HIDDEN such as 16,32, got {text!r}")
    return int(sizes[1]), int(sizes[2])


def _split_program(text: str) -> list[str]:
    return [text] if Path(text).exists() else shlex.split(text)


def _split_list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _format_error(error: Exception) -> str:
    """Format an exception in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
