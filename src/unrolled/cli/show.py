"""``unrolled show``: parse its arguments, select a layer and a sequence, and show every number of the run."""

from __future__ import annotations

import argparse
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unrolled.cli import example, model, output_files, terminal
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
    parse_options,
    read_layers,
)
from unrolled.io import files
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS
from unrolled.tracing.explain import DIGITS
from unrolled.tracing.trace import Trace, trace

_ALL_STEPS = range(0, -1)  # an impossible range that means all steps


def add(commands: Any) -> None:
    """Add the command to the subparsers of an argument parser."""
    parser = commands.add_parser(
        "show",
        help="show every intermediate value of a recurrent layer, step by step",
        description="Show every intermediate value that a recurrent layer computes, step by step. Without "
        "WEIGHTS, show a small example.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "weights",
        nargs="?",
        type=Path,
        metavar="WEIGHTS",
        help=f"{WEIGHTS_HELP}, or {model.HELP}",
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="input sequence: .csv or .npy file with one row per time step",
    )
    parser.add_argument(
        "--layer",
        metavar="PREFIX",
        help="layer of WEIGHTS to show: its name, or the prefix of its state dict keys, such as encoder",
    )
    parser.add_argument(
        "--cell",
        metavar="CELL",
        help=f"{CELL_HELP} (default: {next(iter(TORCH_CELLS))}). {CELL_WITH_WEIGHTS_HELP}",
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=OPTION_HELP)
    parser.add_argument(
        "--seed",
        type=_parse_seed,
        default=0,
        help="random seed for the example that is shown without WEIGHTS (default: 0)",
    )
    parser.add_argument(
        "--steps",
        type=_parse_steps,
        metavar="LIST",
        help="time steps to show, such as 0,2-5 or all; the first step is 0",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="leave nothing out: print all steps and numbers, and the arithmetic behind each of them",
    )
    parser.add_argument(
        "--digits",
        type=_parse_digits,
        default=DIGITS,
        metavar="N",
        help=f"decimal places of all numbers, or exact for as many as they have (default: {DIGITS}). In "
        "arithmetic, numbers have more where this makes the result right",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON, with NaN and infinity as strings")
    output.add_argument(
        "--watch", action="store_true", help="step through the sequence in the terminal with the arrow keys"
    )
    output.add_argument(
        "--html", type=Path, metavar="FILE", help="write an interactive, self-contained HTML page"
    )
    output.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write an SVG picture of the cell with the numbers of one step (the first of --steps)",
    )
    parser.add_argument("--open", action="store_true", help="open the page that --html writes in a browser")
    parser.add_argument(
        "--labels",
        metavar="TEXT_OR_FILE",
        help="labels of the time steps: an existing file with one label per line, or a text with one "
        "character per time step",
    )
    parser.add_argument(
        "--as",
        dest="inputs",
        choices=("numbers", "image"),
        help="show the input in the HTML page as numbers or as the pixels of an image (default: numbers)",
    )
    parser.add_argument(
        "--title",
        metavar="TEXT",
        help="title of the HTML page (default: file name and layer prefix)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: If the arguments can't be used.
        ValueError, OSError: If a file can't be read or has unusable content.
    """
    _check_combinations(options)
    console = new_console()
    step_through = _load_stepper(console) if options.watch else None
    cell = parse_cell(options.cell) if options.cell else None
    cell_options = parse_options(options.option)
    x = files.read_input(options.input) if options.input else None
    title = options.title
    if options.weights is not None and model.is_model(options.weights):
        _run_model(options, console, step_through)
        return
    if options.weights is None:
        if options.layer is not None:
            raise UsageError("--layer needs a WEIGHTS file")
        cell = cell or LAYERS[0].cell_class
        check_options(cell_options, [cell])
        if x is not None:
            x = _convert_dtype(x, torch.float32, options.input)
        layer, x = example.example(cell, x, options.seed, cell_options)
    else:
        file = read_layers(options.weights, [cell] if cell else [], cell_options)
        layers, notes = file.layers, notes_about(file)
        if options.layer is not None or x is not None:
            prefix, layer = _select_layer(layers, notes, options.layer, options.weights)
            layers = {prefix: layer}
            title = title or ": ".join(filter(None, (options.weights.name, prefix)))
        check_options(cell_options, list(dict.fromkeys(layer.cell for layer in layers.values())))
        if x is None:
            if options.watch or options.html or options.plot:
                option = "--watch" if options.watch else "--html" if options.html else "--plot"
                raise UsageError(f"{option} needs an input sequence: add --input FILE")
            _list_layers(console, layers, notes, options.json)
            return
        for name, value in layer.chosen_options().items():
            if cell_options.get(name, value) != value:
                raise UsageError(
                    f"--option {name}={cell_options[name]}: the weights have {name}={value} ({layer})"
                )
        x = _prepare_input(x, layer, options.input)
        if not (options.json or options.html or options.plot):
            terminal.print_layers(console, layers)
            _print_assumed_options(
                console, layer, layer.chosen_options() if file.stores_options else cell_options
            )
    _show_trace(options, console, _run_layer(layer, x), title, step_through)


def _run_model(options: argparse.Namespace, console: Console, step_through: _StepThrough | None) -> None:
    """Run a model of the user, and show it or one of its layers."""
    for name in ("input", "cell", "option"):
        if getattr(options, name):
            raise UsageError(f"--{name} can't be combined with a model")
    recording = model.run_model(options.weights)
    selected = model.select_layer(recording, options.layer)
    if selected is not None:
        name, layer_trace = selected
        _show_trace(options, console, layer_trace, options.title or name or None, step_through)
    elif options.html:
        labels = model.read_labels(options.labels)
        output_files.write_model_page(recording, options.html, labels, options.title, options.open)
    elif options.watch or options.plot or options.steps or options.full or options.labels:
        raise UsageError(f"the model has {len(recording)} recorded layers: choose one with --layer NAME")
    else:
        model.print_calls(console, recording, options.json)


def _show_trace(
    options: argparse.Namespace,
    console: Console,
    layer_trace: Trace,
    title: str | None,
    step_through: _StepThrough | None,
) -> None:
    """Show a trace in the form that the user chose."""
    length = int(layer_trace.layers[0].lengths[0])
    steps = _select_steps(options.steps, length)
    labels = None if options.labels is None else _read_labels(options.labels, length)
    if step_through:
        step_through(console, layer_trace, steps or range(length), labels, options.digits)
    elif options.html:
        inputs = options.inputs or "numbers"
        output_files.write_page(layer_trace, options.html, labels, inputs, title, options.open)
    elif options.plot:
        output_files.write_drawing(layer_trace, options.plot, steps)
    elif options.json:
        print(json.dumps(terminal.as_data(layer_trace, steps), indent=2, allow_nan=False))
    else:
        terminal.print_trace(console, layer_trace, steps, labels, full=options.full, digits=options.digits)


def _check_combinations(options: argparse.Namespace) -> None:
    """Raise an error if an option would have no effect in combination with the others."""
    page_options = {"--open": options.open, "--title": options.title is not None, "--as": options.inputs}
    for name, is_used in page_options.items():
        if is_used and not options.html:
            raise UsageError(f"{name} needs --html FILE")
    if options.json and options.labels is not None:
        raise UsageError("--labels can't be combined with --json")
    if options.html and options.steps:
        raise UsageError("--steps can't be combined with --html: the page always shows all steps")

    outputs = {
        "--json": options.json,
        "--html": options.html,
        "--plot": options.plot,
        "--watch": options.watch,
    }
    for option, is_used in outputs.items():
        if is_used and options.full:
            raise UsageError(f"--full can't be combined with {option}")
        if is_used and options.digits != DIGITS and not options.watch:
            raise UsageError(f"--digits can't be combined with {option}")


def _read_labels(text: str, length: int) -> list[str]:
    """Return a label for each time step: the lines of a file if `text` names one, else its characters."""
    if os.path.isfile(text):  # unlike Path.is_file, also False for text that can't be a file name
        labels = files.read_labels(Path(text))
        source = f"the file {text} has {len(labels)} lines"
    else:
        labels = list(text)
        source = f"{reprlib.repr(text)} is not a file and has {len(labels)} characters"
    if len(labels) != length:
        raise UsageError(f"--labels: {source}, but the sequence has {length} time steps")
    return labels


_StepThrough = Callable[[Console, Trace, Sequence[int], list[str] | None, int | None], None]


def _load_stepper(console: Console) -> _StepThrough:
    """Return the function for ``--watch``; raise an error if there is no interactive terminal."""
    are_terminals = (stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if not all(are_terminals) or console.is_dumb_terminal:
        raise UsageError("--watch needs an interactive terminal")
    try:
        from unrolled.cli import stepper
    except ImportError as error:
        raise UsageError(str(error)) from error
    return stepper.step_through


def _run_layer(layer: Recurrent, x: torch.Tensor) -> Trace:
    try:
        return trace(layer, x)
    except Exception as error:  # user code can raise anything
        if layer.cell in TORCH_CELLS.values():
            raise
        raise UsageError(
            f"--cell: {layer.cell.__name__} failed to run ({type(error).__name__}: {error})"
        ) from error


def _list_layers(console: Console, layers: dict[str, Recurrent], notes: list[str], as_json: bool) -> None:
    if as_json:
        listed = {prefix: repr(layer) for prefix, layer in layers.items()}
        print(json.dumps({"layers": listed} | ({"notes": notes} if notes else {}), indent=2))
        return
    terminal.print_layers(console, layers)
    for note in notes:
        console.print(note)
    needed = "--layer PREFIX and --input FILE" if len(layers) > 1 else "--input FILE"
    console.print(f"\nTo show the values of a layer, add {needed}.")


def _print_assumed_options(console: Console, layer: Recurrent, cell_options: dict[str, Any]) -> None:
    """Print the options of the cell that were neither given nor can be inferred from the weights."""
    options = layer.chosen_options()
    assumed = [f"{k}={v}" for k, v in options.items() if k not in cell_options and type(v) is not int]
    if assumed:
        console.print(
            f"Assuming {', '.join(assumed)}, since the weights don't contain it. Use --option to change it."
        )
    console.print()


def _select_layer(
    layers: dict[str, Recurrent], notes: list[str], prefix: str | None, path: Path
) -> tuple[str, Recurrent]:
    names = ", ".join(f"{name or '(no prefix)'}: {layer}" for name, layer in layers.items())
    if prefix is None:
        if len(layers) > 1:
            raise UsageError(f"{path} has {len(layers)} recurrent layers ({names}); choose one with --layer")
        return next(iter(layers.items()))
    prefix = prefix.rstrip(".")
    if prefix not in layers:
        about = "".join(f"; {note}" for note in notes if note.startswith(f"{prefix}:"))
        raise UsageError(f"{path} has no recurrent layer {prefix!r}{about} (available: {names})")
    return prefix, layers[prefix]


def _prepare_input(x: torch.Tensor, layer: Recurrent, path: Path) -> torch.Tensor:
    """Check the number of features and convert the input to the dtype of the layer."""
    if x.shape[1] != layer.input_size:
        raise UsageError(
            f"{path} has {x.shape[1]} columns, but the layer expects {layer.input_size} features ({layer}). "
            "If its input comes from another module, such as an embedding, record the layer while the model "
            "runs: with unrolled.record(model) as rec: model(...); then call rec[name].to_html(FILE)"
        )
    return _convert_dtype(x, next(layer.parameters()).dtype, path)


def _convert_dtype(x: torch.Tensor, dtype: torch.dtype, path: Path) -> torch.Tensor:
    """Convert the input to a dtype; raise an error if a finite number becomes infinite."""
    converted = x.to(dtype)
    overflowed = x[x.isfinite() & converted.isinf()]
    if overflowed.numel():
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"{path}: {overflowed[0].item():g} is too large for {name}, the dtype of the layer")
    return converted


def _select_steps(ranges: list[range] | None, length: int) -> list[int] | None:
    if ranges is None:
        return None
    if ranges == [_ALL_STEPS]:
        return list(range(length))
    for steps in ranges:
        if steps[-1] >= length:
            raise UsageError(f"--steps: time step {steps[-1]} is out of range; the last one is {length - 1}")
    return [step for steps in ranges for step in steps]


def _parse_seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text!r}")
    return seed


def _parse_digits(text: str) -> int | None:
    if text == "exact":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 15:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 15 or exact, got {text!r}")
    return int(text)


def _parse_steps(text: str) -> list[range]:
    """Parse steps such as ``0,2-5``, or ``all``, into ranges."""
    if text == "all":
        return [_ALL_STEPS]
    matches = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    ranges = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches if match]
    if len(ranges) < len(matches) or not all(ranges):
        raise argparse.ArgumentTypeError(f"expected time steps such as 0,2-5 or all, got {text!r}")
    return ranges
