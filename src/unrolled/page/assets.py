"""The style sheet, the scripts and the template of the page."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from typing import Any

_SCRIPTS = (
    *("numbers", "dom", "layer", "explain", "timeline", "step"),
    *("parameters", "equations", "whole", "gradient", "view"),
)


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


def _file(name: str) -> str:
    return (files("unrolled.page") / name).read_text(encoding="utf-8")
