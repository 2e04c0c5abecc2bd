"""The page of a trace: one file that works from disk, and the same view in a notebook."""

from __future__ import annotations

import errno
import json
import re
import sys
import warnings
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from unrolled.page.contents import contents
from unrolled.trace import Trace

NOTEBOOK_ROOM = 300_000  # numbers that the view in a notebook keeps
_SCRIPTS = (
    *("numbers", "dom", "layer", "explain", "timeline", "step"),
    *("parameters", "equations", "whole", "gradient", "view"),
)


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


def html(data: dict[str, Any]) -> str:
    """A page with these contents."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False)
    filled = {
        "title": escape(data["title"]),
        "style": style(),
        "script": script() + "\nstart();",
        # no text of a user ends the element that it stands in
        "data": text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    }
    template = _file("page.html")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], template)


def style() -> str:
    """The style sheet of the view."""
    return _file("page.css")


def script() -> str:
    """The scripts of the view as one, without what joins them as modules."""
    texts = [_file(f"{name}.js") for name in _SCRIPTS]
    joined = re.sub(r"^import .*;\n", "", "\n".join(texts), flags=re.MULTILINE)
    return re.sub(r"^export (?=(async )?(function|const|class)\b)", "", joined, flags=re.MULTILINE)


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


def _file(name: str) -> str:
    return (files("unrolled.page") / name).read_text(encoding="utf-8")
