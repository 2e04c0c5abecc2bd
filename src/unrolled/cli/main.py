"""The command ``unrolled``: arguments in, text out."""

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
from unrolled.cli import build, doctor, show
from unrolled.cli.arguments import (
    CELL_HELP,
    CELLS,
    OPTION_HELP,
    UsageError,
    check_options,
    new_console,
    parse_cell,
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
    """Run the command; the exit code: 0, 2 for bad usage or bad input, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without · × … shows ? in their place
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
        if sys.stdout is not None:  # closed by who started the command
            sys.stdout.flush()
    except (UsageError, ValueError, TypeError, IndexError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if os.environ.get("UNROLLED_TRACEBACK"):
            raise
        print(f"unrolled: {printable(_one_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells say it
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="unrolled", description="Recurrent layers you can open.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unrolled {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show.add(commands)
    bench.add(commands)
    compare.add(commands)
    look = commands.add_parser(
        "doctor",
        help="what this machine gives the compiled loops, and which engine a layer takes",
        description="Say compiler, instruction set, threads and cache of this machine, and which engine each "
        "layer of WEIGHTS or of CELL would take, and why.",
        allow_abbrev=False,
    )
    _add_layers(look)
    look.add_argument("--json", action="store_true", help="print JSON for programs")
    look.set_defaults(run=_doctor)
    make = commands.add_parser(
        "build",
        help="compile kernels ahead of time, for machines without a compiler",
        description="Compile the kernels of the recurrent layers of WEIGHTS, or of CELL, or all that PROGRAM "
        "uses, into a folder to ship. Where it runs, the environment variable UNROLLED_KERNELS names that "
        "folder.",
        allow_abbrev=False,
    )
    _add_layers(make)
    make.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="where to put them")
    make.add_argument(
        "--arch",
        type=_words,
        default=[],
        metavar="LIST",
        help="instruction sets, such as x86-64-v3,x86-64-v4; the best that runs is taken "
        "(default: native, this machine's own)",
    )
    make.add_argument(
        "--program",
        type=_program,
        default=[],
        help="a Python program to run here, with its arguments in quotes ('score.py --rows 8'): the kernels "
        "that it uses are shipped too, such as those of calls with lengths, resets or all_states, and of "
        "layers with zoneout",
    )
    make.add_argument("--inference", action="store_true", help="without what gradients need")
    make.set_defaults(run=_build)
    return parser


def _add_layers(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which layers."""
    parser.add_argument(
        "weights",
        nargs="*",
        type=Path,
        metavar="WEIGHTS",
        help=".safetensors, .pt or .pth, several if wished",
    )
    parser.add_argument(
        "--cell",
        action="append",
        default=[],
        metavar="CELL",
        help=f"{CELL_HELP}; may be given again",
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=OPTION_HELP)
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=(16, 32),
        metavar="INPUT,HIDDEN",
        help="of a layer of CELL (default: 16,32; for most cells one kernel serves all sizes above 1)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of a layer of CELL (default: float32)"
    )


def _doctor(options: argparse.Namespace) -> None:
    data = doctor.examine(_layers(options))
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        doctor.say(new_console(), data)


def _build(options: argparse.Namespace) -> None:
    layers = _layers(options)
    if not layers and not options.program:
        raise UsageError("nothing to build: give WEIGHTS, --cell or --program")
    build.save(layers, options.program, options.out, options.arch, not options.inference, new_console())


def _layers(options: argparse.Namespace) -> dict[str, Recurrent]:
    """The layers of the files, or where there are none one of each cell."""
    cells = {text: parse_cell(text) for text in options.cell}
    given = parse_options(options.option)
    check_options(given, list(cells.values()) or list(CELLS.values()))
    found: dict[str, Recurrent] = {}
    for path in options.weights:
        layers = read_layers(path, list(cells.values()), given)
        before = f"{path}: " if len(options.weights) > 1 else ""
        found |= {f"{before}{prefix or '(no prefix)'}": layer for prefix, layer in layers.items()}
    if not options.weights:
        dtype = getattr(torch, options.dtype)
        found = {text: new_layer(cell, *options.sizes, dtype=dtype, **given) for text, cell in cells.items()}
    return found


def _sizes(text: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"(\d+),(\d+)", text)
    if not sizes or not int(sizes[1]) or not int(sizes[2]):
        raise argparse.ArgumentTypeError(f"expected INPUT,HIDDEN such as 16,32, got {text!r}")
    return int(sizes[1]), int(sizes[2])


def _program(text: str) -> list[str]:
    return [text] if Path(text).exists() else shlex.split(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
