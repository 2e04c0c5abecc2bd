"""The interactive page of a trace: a self-contained HTML file, or a view in a notebook."""

from __future__ import annotations

import errno
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from unrolled.page.assets import html
from unrolled.page.contents import page_data
from unrolled.page.live_data import live_data
from unrolled.page.model_data import model_data
from unrolled.tracing.record import Record
from unrolled.tracing.trace import Trace

NOTEBOOK_LIMIT = 300_000  # values in the view of a notebook


def write(
    trace: Trace,
    path: str | Path,
    *,
    batch: int | Iterable[int] | None,
    labels: Sequence[Any] | None,
    inputs: str,
    title: str | None,
    limit: int,
    predictions: Sequence[Any] | None,
    baseline: Trace | None,
    live: bool,
) -> Path:
    """Write the page of a trace to a file; see :meth:`unrolled.Trace.to_html`."""
    path = _check_path(path)
    data = page_data(trace, batch, labels, inputs, title, limit, predictions, baseline)
    if live:
        data["live"] = live_data(trace)
    return _write_page(path, data, data["notes"])


def write_model(
    record: Record,
    path: str | Path,
    *,
    batch: int | Iterable[int] | None,
    labels: Sequence[Any] | None,
    title: str | None,
    limit: int,
) -> Path:
    """Write the page of a model to a file; see :meth:`unrolled.Record.to_html`."""
    path = _check_path(path)
    data = model_data(record, batch, labels, title, limit)
    pages = data.get("pages", [data])
    names = [f"{page['call']}: " if len(pages) > 1 else "" for page in pages]
    notes = [f"{name}{note}" for name, page in zip(names, pages, strict=True) for note in page["notes"]]
    return _write_page(path, data, notes)


def _check_path(path: str | Path) -> Path:
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder doesn't exist", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the path of a file, but this is a folder", str(path))
    return path


def _write_page(path: Path, data: dict[str, Any], notes: Iterable[str]) -> Path:
    path.write_bytes(html(data).encode("utf-8", "replace"))
    for note in notes:
        warnings.warn(note, stacklevel=4)
    return path


def notebook_view(trace: Trace) -> dict[str, Any]:
    """Return the representations of a trace in a notebook, by MIME type.

    The view is a widget, or the page in a frame if anywidget is not installed. In a terminal, it is text.
    """
    if "IPython" in sys.modules and type(sys.modules["IPython"].get_ipython()).__name__.startswith(
        "Terminal"
    ):
        return {"text/plain": repr(trace)}
    try:
        data = page_data(trace, None, None, "numbers", None, NOTEBOOK_LIMIT)
    except ValueError as error:  # such as a trace without time steps
        return {"text/plain": f"{trace!r}\n({error})"}
    try:
        from unrolled.page.widget import TraceView
    except ImportError:
        frame = (
            f'<iframe srcdoc="{escape(html(data))}" sandbox="allow-scripts" title="{escape(repr(trace))}" '
        )
        style = "width: 100%; height: 900px; border: 0"
        return {"text/plain": repr(trace), "text/html": f'{frame} style="{style}"></iframe>'}
    widget, *_ = TraceView(contents=json.dumps(data))._repr_mimebundle_() or ({},)
    return {**widget, "text/plain": repr(trace)}
