"""The files that ``unrolled show`` writes: the page of a trace or a model, and the picture of a cell."""

from __future__ import annotations

import contextlib
import sys
import warnings
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path

from unrolled.cli.arguments import UsageError, printable
from unrolled.tracing.record import Record
from unrolled.tracing.trace import Trace


def write_drawing(trace: Trace, path: Path, steps: Sequence[int] | None) -> None:
    """Write a picture of the cell with the numbers of the first of some steps.

    Raises:
        UsageError: If the path doesn't end with ``.svg``.
    """
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--plot: expected a file name ending in .svg, got {path}")
    drawing = trace.plot("cell", step=steps[0] if steps else None)
    print(f"Wrote {printable(str(drawing.save(path)))}, a picture of one step of {trace.module}.")


def write_page(
    trace: Trace, path: Path, labels: list[str] | None, inputs: str, title: str | None, open_it: bool
) -> None:
    """Write the page of a trace, and open it in a browser if the user wants it."""
    with _warnings_as_lines():
        trace.to_html(path, labels=labels, inputs=inputs, title=title)
    print(f"Wrote {printable(str(path))}, an interactive page for {trace.module}.", flush=True)
    if open_it:
        _open_page(path)


def write_model_page(
    record: Record, path: Path, labels: list[str] | None, title: str | None, open_it: bool
) -> None:
    """Write the page of a model, and open it in a browser if the user wants it."""
    with _warnings_as_lines():
        record.to_html(path, labels=labels, title=title)
    layers = f"{type(record.model).__name__}: {', '.join(record)}"
    print(f"Wrote {printable(str(path))}, an interactive page for {layers}.", flush=True)
    if open_it:
        _open_page(path)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each warning as a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"unrolled: {warning.message}", file=sys.stderr)


def _open_page(path: Path) -> None:
    if not webbrowser.open(path.resolve().as_uri()):
        raise UsageError("--open: can't start a browser; open the file manually")
