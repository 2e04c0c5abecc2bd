"""What several commands read from their arguments: cells, options, the layers of a file."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.io import files
from unrolled.io.state_dicts import find_layers, parts_of_layers, takes
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS

CELLS = {layer.__name__.lower(): layer.cell_class for layer in LAYERS}
NAMED: dict[str, type[Cell]] = {name.lower(): getattr(cells, name) for name in cells.__all__}
CELL_HELP = f"{', '.join(CELLS)}, another name of unrolled.cells, FILE.py:CLASS or MODULE:CLASS"
OPTION_HELP = "an option of the cell, such as nonlinearity=relu"


class UsageError(Exception):
    """What the user gave can't be used; told in one line, with exit code 2."""


def parse_cell(text: str, option: str = "--cell") -> type[Cell]:
    """The class that ``--cell`` names: one of ours, in any case, or one of a file or module of the user's.

    Args:
        text: the name.
        option: what the user gave it to.

    Raises:
        UsageError: there is no such class, or its file or module can't be loaded.
    """
    if text.lower() in NAMED:
        return NAMED[text.lower()]
    place, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    if not place:
        raise UsageError(f"{option} should be {CELL_HELP}, got {text!r}")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"{option}: {place} can't be loaded ({type(error).__name__}: {error})") from error
    found: Any = getattr(module, name, None)
    if not _is_cell(found):
        has = ", ".join(key for key, value in vars(module).items() if _is_cell(value)) or "none"
        which = f"has no subclass of unrolled.Cell named {name!r}" if name else "should be followed by :CLASS"
        raise UsageError(f"{option}: {place} {which}: the cells in it are {has}")
    cell: type[Cell] = found
    return cell


def _is_cell(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Cell) and value is not Cell


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and typing look a class's module up
    spec.loader.exec_module(module)
    return module


def parse_options(texts: list[str]) -> dict[str, Any]:
    """Every ``--option NAME=VALUE``; what is no Python literal is text.

    Raises:
        UsageError: one has another form.
    """
    return dict(_option(text) for text in texts)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--option should be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def check_options(given: dict[str, Any], cells: list[type[Cell]]) -> None:
    """Raise where none of these cells can have a given option: it would do nothing."""
    known = dict.fromkeys(name for cell in cells for name in cell.options())
    for name, value in given.items():
        if name not in known:
            has = f"the options here are {', '.join(known)}" if known else "there are none here"
            raise UsageError(f"--option {name}: no such option of {cells[0].__name__}, {has}")
        if not any(takes(cell, name, value) for cell in cells):
            next(cell for cell in cells if name in cell.options()).check_options({name: value})


def read_layers(path: Path, cells: list[type[Cell]], given: dict[str, Any]) -> dict[str, Recurrent]:
    """The recurrent layers of a file of weights, by the prefix of their keys.

    Args:
        path: of the file.
        cells: classes to look for beside our own.
        given: options of the cell.

    Raises:
        OSError: the file can't be read.
        ValueError: it holds no weights.
        UsageError: it holds no recurrent layer.
    """
    weights = files.read_weights(path)
    layers = find_layers(weights, cells, given)
    if not layers:
        parts = parts_of_layers(weights, cells)
        some = f", though {', '.join(parts[:3])} may be parts of one: not all of it is there" if parts else ""
        own = "" if cells else "; a layer with a cell of your own is found with --cell FILE.py:CLASS"
        raise UsageError(f"{path}: no recurrent layer among its keys{some}{own}")
    return layers


def words(text: str) -> list[str]:
    """Names with commas between them, as an argument."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return names


def whole_number(text: str) -> int:
    """A whole number from 1, as an argument."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, as an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def check_written(json: Path | None, plot: Path | None) -> None:
    """Raise where results can't be written to the files of ``--json`` and ``--plot``.

    Raises:
        UsageError: there is no such folder, matplotlib is missing, or it can't write such a file.
    """
    for path in filter(None, (json, plot)):
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}")
    if plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix.removeprefix(".").lower() not in kinds:
        raise UsageError(f"--plot should end in .{', .'.join(sorted(kinds))}, got {plot}")


# What moves the cursor, colours or turns the text round: C0 as the pictures that Unicode has of them.
_PICTURES = {code: 0x2400 + code for code in range(32) if code != ord("\n")} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def printable(text: str) -> str:
    """A text from anywhere without what would control the terminal: that stands as characters to see."""
    return text.translate(_PICTURES)


class _Console(Console):
    """A console on which texts from files control nothing."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def new_console() -> Console:
    """The console that every command prints to."""
    console = _Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
    console.width = console.width or 80  # some environments have a terminal of no columns
    return console
