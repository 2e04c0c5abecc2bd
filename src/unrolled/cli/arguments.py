"""Command-line arguments shared by several commands: cells, cell options, layers from a weights file."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from unrolled import cells
from unrolled.cells.base import Cell
from unrolled.io.layer_files import LayerFile, load_layers
from unrolled.io.state_dicts import accepts_option
from unrolled.layers.torch_layers import LAYERS
from unrolled.tracing.explain import MINUS

TORCH_CELLS = {layer.__name__.lower(): layer.cell_class for layer in LAYERS}
ALL_CELLS: dict[str, type[Cell]] = {name.lower(): getattr(cells, name) for name in cells.__all__}
CELL_HELP = (
    f"{', '.join(TORCH_CELLS)}, another cell in unrolled.cells, or your own class as FILE.py:CLASS or "
    "MODULE:CLASS"
)
CELL_WITH_WEIGHTS_HELP = (
    "With WEIGHTS, layers of this cell are found too. Without it, they are if no other cell has such weights"
)
WEIGHTS_HELP = (
    "file with weights (torch.save, safetensors, .npz) or with a model (ONNX, Keras), whatever its suffix"
)
OPTION_HELP = "cell option, such as nonlinearity=relu; can be repeated"


class UsageError(Exception):
    """A bad argument or input file. The command prints it in one line and exits with code 2."""


def parse_cell(text: str, option: str = "--cell") -> type[Cell]:
    """Return the cell class that an argument names.

    Args:
        text: The name of a cell of `unrolled.cells` in upper or lower case, or a class in a file or module.
        option: The command-line option that the text was given to, for error messages.

    Raises:
        UsageError: If there is no such class, or its file or module can't be loaded.
    """
    if text.lower() in ALL_CELLS:
        return ALL_CELLS[text.lower()]
    location, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    if not location:
        raise UsageError(f"{option}: unknown cell {text!r}; expected {CELL_HELP}")
    try:
        module = (
            import_file(Path(location)) if location.endswith(".py") else importlib.import_module(location)
        )
    except Exception as error:  # user code can raise anything
        raise UsageError(f"{option}: can't load {location} ({type(error).__name__}: {error})") from error
    value: Any = getattr(module, name, None)
    if not _is_cell(value):
        defined = ", ".join(key for key, value in vars(module).items() if _is_cell(value)) or "none"
        problem = f"has no subclass of unrolled.Cell named {name!r}" if name else "must be followed by :CLASS"
        raise UsageError(f"{option}: {location} {problem} (cells found: {defined})")
    cell: type[Cell] = value
    return cell


def _is_cell(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Cell) and value is not Cell


def import_file(path: Path) -> Any:
    """Import a Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and typing look up a class's module
    spec.loader.exec_module(module)
    return module


def parse_options(texts: list[str]) -> dict[str, Any]:
    """Parse every ``--option NAME=VALUE``. A value that isn't a Python literal is kept as text.

    Raises:
        UsageError: If an option doesn't have this form.
    """
    return dict(_parse_option(text) for text in texts)


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--option: expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def check_options(options: dict[str, Any], cells: list[type[Cell]]) -> None:
    """Raise an error if no cell accepts an option, since the option would have no effect."""
    known = dict.fromkeys(name for cell in cells for name in cell.options())
    for name, value in options.items():
        if name not in known:
            subject = f"{cells[0].__name__} has no" if len(cells) == 1 else "none of the cells has an"
            raise UsageError(f"--option: {subject} option {name!r} (available: {', '.join(known) or 'none'})")
        if not any(accepts_option(cell, name, value) for cell in cells):
            next(cell for cell in cells if name in cell.options()).check_options({name: value})


def read_layers(path: Path, cells: list[type[Cell]], options: dict[str, Any]) -> LayerFile:
    """Load the recurrent layers of a file, keyed by their names.

    Args:
        path: The file, with weights or with a stored model.
        cells: Cell classes to look for in addition to those of torch.nn.
        options: Options of the cells.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file has an unknown format or is damaged.
        UsageError: If the file holds no recurrent layer, a package is missing, or the cells have no effect.
    """
    try:
        file = load_layers(path, cells, options)
    except ImportError as error:
        raise UsageError(str(error)) from error
    if file.stores_cells and cells:
        raise UsageError(f"--cell has no effect, because {path} says which cells its layers have")
    notes = notes_about(file)
    if file.layers:
        return file
    parts = f"; found {', '.join(file.keys[:3])}, but other parameters are missing" if file.keys else ""
    if notes:
        parts = f"; {'; '.join(notes)}"
    custom = "" if cells or notes else "; for a custom cell, add --cell FILE.py:CLASS"
    raise UsageError(f"{path}: no recurrent layer found{parts}{custom}")


def notes_about(file: LayerFile) -> list[str]:
    """Return what was assumed about the layers of a file, and which ones were left out and why."""
    return file.notes + [
        f"{prefix or 'its weights'}: several cells have such weights, choose one with --cell: "
        f"{', '.join(names).lower()}"
        for prefix, names in file.ambiguous.items()
    ]


def comma_separated(text: str) -> list[str]:
    """Parse an argument of comma-separated names."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected comma-separated names, got {text!r}")
    return names


def positive_int(text: str) -> int:
    """Parse an argument that must be a positive integer."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def parse_device(text: str) -> str:
    """Parse a device: ``cpu``, ``cuda`` or ``cuda:N``."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return text


def positive_float(text: str) -> float:
    """Parse an argument that must be a positive finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def check_output_files(json: Path | None, plot: Path | None) -> None:
    """Check early that the files of ``--json`` and ``--plot`` can be written.

    Raises:
        UsageError: If a folder doesn't exist, matplotlib is missing, or it doesn't support the file type.
    """
    for path in filter(None, (json, plot)):
        if not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} doesn't exist")
    if plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    file_types = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix.removeprefix(".").lower() not in file_types:
        raise UsageError(
            f"--plot: expected a file name ending in .{', .'.join(sorted(file_types))}, got {plot}"
        )


# C0 control codes become Unicode's control pictures. C1 codes and the characters that change the text
# direction become the replacement character.
_REPLACEMENTS = {code: 0x2400 + code for code in range(32) if code != ord("\n")} | {0x7F: 0x2421}
_REPLACEMENTS |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


_SIGNS = {
    MINUS: "-",
    "≈": "~",
    "·": "*",
    "×": "x",
    "–": "-",
}  # with what replaces them in an encoding such as Latin-1


def printable(text: str) -> str:
    """Replace control characters, which could manipulate the terminal, with visible ones."""
    return text.translate(_REPLACEMENTS)


class _Console(Console):
    """A console that replaces control characters in text, which may come from untrusted files.

    It also replaces the signs of arithmetic that its encoding doesn't have.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        replacements = {ord(sign): text for sign, text in _SIGNS.items() if not _encodes(self.encoding, sign)}
        for segment in super().render(renderable, options):
            text = printable(segment.text).translate(replacements)
            yield segment if segment.control else segment._replace(text=text)


def _encodes(encoding: str, text: str) -> bool:
    """Whether an encoding has some characters."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def new_console() -> Console:
    """Create the console that every command prints to."""
    console = _Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
    console.width = console.width or 80  # some environments report zero columns
    return console
