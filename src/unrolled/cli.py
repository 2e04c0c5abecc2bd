"""The command ``unrolled``: arguments in, text out."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

import unrolled
from unrolled import ahead, doctor, files, show, walkthrough
from unrolled.bench import command as bench
from unrolled.cell import Cell
from unrolled.drop_in import LAYERS
from unrolled.layers import Recurrent
from unrolled.recognise import find_layers, new_layer, parts_of_layers, takes
from unrolled.trace import Trace, trace

DTYPES = ("float32", "float64", "bfloat16")
_OPTION_HELP = "an option of the cell, such as nonlinearity=relu"
CELLS = {layer.__name__.lower(): layer.cell_class for layer in LAYERS}


class UsageError(Exception):
    """What the user gave can't be used; told in one line, with exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, or 2 for bad usage or bad input."""
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
        print(f"unrolled: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="unrolled", description="Recurrent layers you can open.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"unrolled {unrolled.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    see = commands.add_parser(
        "show",
        help="every number of a recurrent layer, step by step",
        description="Show every number of a recurrent layer: of a small example, or of your own weights.",
        allow_abbrev=False,
    )
    see.add_argument("weights", nargs="?", type=Path, metavar="WEIGHTS", help=".safetensors, .pt or .pth")
    see.add_argument(
        "--input", type=Path, metavar="FILE", help="a sequence: .csv or .npy, rows as time steps"
    )
    see.add_argument("--layer", metavar="PREFIX", help="which layer of WEIGHTS, by the prefix of its keys")
    see.add_argument("--cell", metavar="CELL", help=f"{', '.join(CELLS)}, FILE.py:CLASS or MODULE:CLASS")
    see.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=_OPTION_HELP,
    )
    see.add_argument("--seed", type=_seed, default=0, help="for the weights of an example (default: 0)")
    see.add_argument("--steps", type=_steps, metavar="LIST", help="time steps from 0, such as 0,2-5 or all")
    see.add_argument("--json", action="store_true", help="print JSON for programs, NaN and infinity as text")
    see.set_defaults(run=_show)
    bench.add(commands)
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
        help=f"{', '.join(CELLS)}, FILE.py:CLASS or MODULE:CLASS; may be given again",
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=_OPTION_HELP)
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


def _show(options: argparse.Namespace) -> None:
    cell = _cell(options.cell) if options.cell else None
    given = dict(_option(text) for text in options.option)
    console = _console()
    x = files.read_input(options.input) if options.input else None
    if options.weights is None:
        if options.layer is not None:
            raise UsageError("--layer chooses a layer of WEIGHTS, and no WEIGHTS are given")
        cell = cell or LAYERS[0].cell_class
        _check_options(given, [cell])
        layer, x = walkthrough.example(cell, x, options.seed, given)
    else:
        layers = _read_layers(options.weights, [cell] if cell else [], given)
        if options.layer is not None or x is not None:
            prefix, layer = _choose(layers, options.layer, options.weights)
            layers = {prefix: layer}
        _check_options(given, list(dict.fromkeys(layer.cell for layer in layers.values())))
        if x is None:
            _list(console, layers, options.json)
            return
        for name, value in layer.chosen_options().items():
            if given.get(name, value) != value:
                told = f"the weights of {layer} tell {name}={value}"
                raise UsageError(f"--option {name}={given[name]}: {told}")
        if not options.json:
            show.found(console, layers)
            _say_assumed(console, layer, given)
        x = _fit(x, layer, options.input)
    opened = _trace(layer, x)
    steps = _chosen(options.steps, int(opened.layers[0].lengths[0]))
    if options.json:
        print(json.dumps(show.as_data(opened, steps), indent=2, allow_nan=False))
    else:
        show.say(console, opened, steps)


def _read_layers(path: Path, cells: list[type[Cell]], given: dict[str, Any]) -> dict[str, Recurrent]:
    weights = files.read_weights(path)
    layers = find_layers(weights, cells, given)
    if not layers:
        parts = parts_of_layers(weights, cells)
        some = f", though {', '.join(parts[:3])} may be parts of one: not all of it is there" if parts else ""
        raise UsageError(f"{path}: no recurrent layer among its keys{some}")
    return layers


def _check_options(given: dict[str, Any], cells: list[type[Cell]]) -> None:
    """Raise where none of these cells can have a given option: it would do nothing."""
    known = dict.fromkeys(name for cell in cells for name in cell.options())
    for name, value in given.items():
        if name not in known:
            has = f"the options here are {', '.join(known)}" if known else "there are none here"
            raise UsageError(f"--option {name}: no such option of {cells[0].__name__}, {has}")
        if not any(takes(cell, name, value) for cell in cells):
            next(cell for cell in cells if name in cell.options()).check_options({name: value})


def _trace(layer: Recurrent, x: torch.Tensor) -> Trace:
    try:
        return trace(layer, x)
    except Exception as error:  # the user's own code may raise anything
        if layer.cell in CELLS.values():
            raise
        raise UsageError(
            f"--cell: {layer.cell.__name__} can't be run ({type(error).__name__}: {error})"
        ) from error


def _doctor(options: argparse.Namespace) -> None:
    data = doctor.examine(_layers(options))
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        doctor.say(_console(), data)


def _build(options: argparse.Namespace) -> None:
    layers = _layers(options)
    if not layers and not options.program:
        raise UsageError("nothing to build: give WEIGHTS, --cell or --program")
    ahead.save(layers, options.program, options.out, options.arch, not options.inference, _console())


def _layers(options: argparse.Namespace) -> dict[str, Recurrent]:
    """The layers of the files, or where there are none one of each cell."""
    cells = {text: _cell(text) for text in options.cell}
    given = dict(_option(text) for text in options.option)
    _check_options(given, list(cells.values()) or list(CELLS.values()))
    found: dict[str, Recurrent] = {}
    for path in options.weights:
        layers = _read_layers(path, list(cells.values()), given)
        before = f"{path}: " if len(options.weights) > 1 else ""
        found |= {f"{before}{prefix or '(no prefix)'}": layer for prefix, layer in layers.items()}
    if not options.weights:
        dtype = getattr(torch, options.dtype)
        found = {text: new_layer(cell, *options.sizes, dtype=dtype, **given) for text, cell in cells.items()}
    return found


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
    console.width = console.width or 80  # some environments have a terminal of no columns
    return console


def _list(console: Console, layers: dict[str, Recurrent], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"layers": {prefix: repr(layer) for prefix, layer in layers.items()}}, indent=2))
        return
    show.found(console, layers)
    console.print("\nGive a sequence with --input FILE to open a layer.")


def _say_assumed(console: Console, layer: Recurrent, given: dict[str, Any]) -> None:
    chosen = layer.chosen_options()
    assumed = [f"{k}={v}" for k, v in chosen.items() if k not in given and type(v) is not int]
    if assumed:
        console.print(f"No weight tells {', '.join(assumed)}: that is the default, --option sets it.")
    console.print()


def _choose(layers: dict[str, Recurrent], prefix: str | None, path: Path) -> tuple[str, Recurrent]:
    names = ", ".join(f"{name or '(no prefix)'}: {layer}" for name, layer in layers.items())
    if prefix is None:
        if len(layers) > 1:
            raise UsageError(
                f"{path} holds {len(layers)} recurrent layers ({names}): choose one with --layer"
            )
        return next(iter(layers.items()))
    prefix = prefix.rstrip(".")
    if prefix not in layers:
        raise UsageError(f"{path} has no recurrent layer {prefix!r}: it has {names}")
    return prefix, layers[prefix]


def _fit(x: torch.Tensor, layer: Recurrent, path: Path) -> torch.Tensor:
    if x.shape[1] != layer.input_size:
        raise UsageError(
            f"{path} has {x.shape[1]} columns, but the layer takes {layer.input_size} features: {layer}"
        )
    return x.to(next(layer.parameters()).dtype)


def _cell(text: str) -> type[Cell]:
    if text in CELLS:
        return CELLS[text]
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise UsageError(f"--cell should be {', '.join(CELLS)}, FILE.py:CLASS or MODULE:CLASS, got {text!r}")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"--cell: {place} can't be loaded ({type(error).__name__}: {error})") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Cell)):
        raise UsageError(f"--cell: {place} has no subclass of unrolled.Cell named {name!r}")
    return found


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and typing look a class's module up
    spec.loader.exec_module(module)
    return module


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--option should be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, below 2**63, got {text!r}")
    return seed


def _steps(text: str) -> list[range] | None:
    """``0,2-5`` as ranges; None for ``all``."""
    if text == "all":
        return [range(0, -1)]
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part]
    if len(ranges) < len(parts) or not all(ranges):
        raise argparse.ArgumentTypeError(f"expected steps such as 0,2-5 or all, got {text!r}")
    return ranges


def _sizes(text: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"(\d+),(\d+)", text)
    if not sizes or not int(sizes[1]) or not int(sizes[2]):
        raise argparse.ArgumentTypeError(f"expected INPUT,HIDDEN such as 16,32, got {text!r}")
    return int(sizes[1]), int(sizes[2])


def _program(text: str) -> list[str]:
    return [text] if Path(text).exists() else shlex.split(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _chosen(ranges: list[range] | None, length: int) -> list[int] | None:
    if ranges is None:
        return None
    if ranges == [range(0, -1)]:
        return list(range(length))
    for part in ranges:
        if part[-1] >= length:
            raise UsageError(
                f"--steps: there is no step {part[-1]}, the sequence has {length} counted from 0"
            )
    return [step for part in ranges for step in part]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
