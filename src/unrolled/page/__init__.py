"""The page of a trace: one file that works from disk, and the same view in a notebook."""

from __future__ import annotations

import errno
import json
import sys
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from unrolled.page.assets import html
from unrolled.page.contents import contents
from unrolled.tracing.trace import Trace

NOTEBOOK_ROOM = 300_000  # numbers that the view in a notebook keeps


def write(
    trace: Trace,
    path: str | Path,
    *,
    batch: int,
    labels: Sequence[str] | None,
    inputs: str,
    title: str | None,
    limit: int,
) -> Path:
    """Write the page of a trace; see :meth:`unrolled.Trace.to_html`."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is there, give the path of a file", str(path))
    data = contents(trace, batch, labels, inputs, title, limit)
    path.write_bytes(html(data).encode("utf-8", "replace"))
    for note in data["notes"]:
        warnings.warn(note, stacklevel=3)
    return path


def shown(trace: Trace) -> dict[str, Any]:
    """What a notebook shows of a trace, by MIME type: a widget, or without anywidget the page in a frame."""
    if "IPython" in sys.modules and type(sys.modules["IPython"].get_ipython()).__name__.startswith(
        "Terminal"
    ):
        return {"text/plain": repr(trace)}
    try:
        data = contents(trace, 0, None, "numbers", None, NOTEBOOK_ROOM)
    except ValueError as error:  # such as no time step
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
