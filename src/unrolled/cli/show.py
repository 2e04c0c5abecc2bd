"""``unrolled show``: what the user asks for, and which layer and sequence are opened."""

from __future__ import annotations

import argparse
import json
import os
import re
import reprlib
import sys
import warnings
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unrolled.cli import example, terminal
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
from unrolled.io import files
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS
from unrolled.tracing.trace import Trace, trace


def add(commands: Any) -> None:
    """Add the command to those of an argparse parser."""
    parser = commands.add_parser(
        "show",
        help="every number of a recurrent layer, step by step",
        description="Show every number of a recurrent layer: of a small example, or of your own weights.",
        allow_abbrev=False,
    )
    parser.add_argument("weights", nargs="?", type=Path, metavar="WEIGHTS", help=".safetensors, .pt or .pth")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="a sequence: .csv or .npy, rows as time steps"
    )
    parser.add_argument("--layer", metavar="PREFIX", help="which layer of WEIGHTS, by the prefix of its keys")
    parser.add_argument("--cell", metavar="CELL", help=CELL_HELP)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=OPTION_HELP)
    parser.add_argument("--seed", type=_seed, default=0, help="for the weights of an example (default: 0)")
    parser.add_argument(
        "--steps", type=_steps, metavar="LIST", help="time steps from 0, such as 0,2-5 or all"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON for programs, NaN and infinity as text")
    form.add_argument(
        "--watch", action="store_true", help="go through the steps in the terminal, with the arrow keys"
    )
    form.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to look at in a browser: a file of its own"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--labels",
        metavar="TEXT_OR_FILE",
        help="what stands for each time step: a character of a text, or a line of a file",
    )
    parser.add_argument(
        "--as",
        dest="inputs",
        choices=("numbers", "image"),
        help="how the page draws the input (default: numbers)",
    )
    parser.add_argument(
        "--title",
        metavar="TEXT",
        help="of the page (default: the name of the file and the prefix of the layer)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: what is asked for can't be done.
        ValueError, OSError: a file can't be read, or what it holds can't be used.
    """
    _check_page(options)
    console = new_console()
    step_through = _stepper(console) if options.watch else None
    cell = parse_cell(options.cell) if options.cell else None
    given = parse_options(options.option)
    x = files.read_input(options.input) if options.input else None
    title = options.title
    if options.weights is None:
        if options.layer is not None:
            raise UsageError("--layer chooses a layer of WEIGHTS, and no WEIGHTS are given")
        cell = cell or LAYERS[0].cell_class
        check_options(given, [cell])
        if x is not None:
            x = _converted(x, torch.float32, options.input)
        layer, x = example.example(cell, x, options.seed, given)
    else:
        layers = read_layers(options.weights, [cell] if cell else [], given)
        if options.layer is not None or x is not None:
            prefix, layer = _choose(layers, options.layer, options.weights)
            layers = {prefix: layer}
            title = title or ": ".join(filter(None, (options.weights.name, prefix)))
        check_options(given, list(dict.fromkeys(layer.cell for layer in layers.values())))
        if x is None:
            if options.watch or options.html:
                raise UsageError(
                    f"--{'watch' if options.watch else 'html'} shows a sequence: give one with --input FILE"
                )
            _list(console, layers, options.json)
            return
        for name, value in layer.chosen_options().items():
            if given.get(name, value) != value:
                told = f"the weights of {layer} tell {name}={value}"
                raise UsageError(f"--option {name}={given[name]}: {told}")
        x = _fit(x, layer, options.input)
        if not options.json and not options.html:
            terminal.found(console, layers)
            _say_assumed(console, layer, given)
    opened = _trace(layer, x)
    length = int(opened.layers[0].lengths[0])
    steps = _chosen(options.steps, length)
    labels = None if options.labels is None else _labels(options.labels, length)
    if step_through:
        step_through(console, opened, steps or range(length), labels)
    elif options.html:
        _write_page(options, opened, labels, title)
    elif options.json:
        print(json.dumps(terminal.as_data(opened, steps), indent=2, allow_nan=False))
    else:
        terminal.say(console, opened, steps, labels)


def _check_page(options: argparse.Namespace) -> None:
    """Raise where an option would do nothing: one of a page without a page, or of text with one."""
    given = {"--open": options.open, "--title": options.title is not None, "--as": options.inputs}
    for name, is_given in given.items():
        if is_given and not options.html:
            raise UsageError(f"{name} says how a page is to be, and none is asked for: give --html FILE too")
    if options.json and options.labels is not None:
        raise UsageError("--labels names time steps for a reader, and --json is for programs: leave one out")
    if options.html and options.steps:
        raise UsageError(
            "--steps chooses what is printed, and --html writes every step: leave one of them out"
        )


def _write_page(
    options: argparse.Namespace, opened: Trace, labels: list[str] | None, title: str | None
) -> None:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        path = opened.to_html(options.html, labels=labels, inputs=options.inputs or "numbers", title=title)
    for note in notes:
        print(f"unrolled: {note.message}", file=sys.stderr)
    print(f"Wrote {printable(str(path))}: {opened.module} as a page to look at in a browser.", flush=True)
    if options.open and not webbrowser.open(path.resolve().as_uri()):
        raise UsageError("--open: there is no browser that can be started here: open the file yourself")


def _labels(text: str, length: int) -> list[str]:
    """A label for each time step: of a file, if there is one of this name, or the characters."""
    if os.path.isfile(text):  # False for what can't be the name of a file, too
        labels = files.read_labels(Path(text))
        what = f"the file {text} has {len(labels)} lines"
    else:
        labels = list(text)
        what = f"{reprlib.repr(text)} is no file and has {len(labels)} characters"
    if len(labels) != length:
        raise UsageError(f"--labels: {what}, but the sequence has {length} time steps")
    return labels


def _stepper(console: Console) -> Callable[[Console, Trace, Sequence[int], list[str] | None], None]:
    """What goes through the steps, where there is a terminal for it."""
    terminals = (stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if not all(terminals) or console.is_dumb_terminal:
        raise UsageError("--watch needs a terminal to draw in and to read keys from: leave it out elsewhere")
    try:
        from unrolled.cli import stepper
    except ImportError as error:
        raise UsageError(str(error)) from error
    return stepper.step_through


def _trace(layer: Recurrent, x: torch.Tensor) -> Trace:
    try:
        return trace(layer, x)
    except Exception as error:  # the user's own code may raise anything
        if layer.cell in CELLS.values():
            raise
        raise UsageError(
            f"--cell: {layer.cell.__name__} can't be run ({type(error).__name__}: {error})"
        ) from error


def _list(console: Console, layers: dict[str, Recurrent], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"layers": {prefix: repr(layer) for prefix, layer in layers.items()}}, indent=2))
        return
    terminal.found(console, layers)
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
            f"{path} has {x.shape[1]} columns, but the layer takes {layer.input_size} features, such as an "
            f"embedding gives: {layer}. To open it inside of its model: with unrolled.record(model) as rec: "
            "model(...), then rec[name].to_html(FILE)"
        )
    return _converted(x, next(layer.parameters()).dtype, path)


def _converted(x: torch.Tensor, dtype: torch.dtype, path: Path) -> torch.Tensor:
    """The input in the numbers that the layer computes with; raises where one would become infinite."""
    converted = x.to(dtype)
    lost = x[x.isfinite() & converted.isinf()]
    if lost.numel():
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"{path}: {lost[0].item():g} is too large for {name}, in which the layer computes")
    return converted


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
