"""The template, the style sheet and the scripts of the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

_SCRIPTS = (
    "numbers", "tensor_functions", "evaluator", "steps", "dom", "digits", "rows", "labels",
    "weighted_rows", "names", "tensor_names", "formula", "derivation", "model", "long_run", "edits",
    "symbols", "gates", "not_finite", "words", "heat_map_grid", "map_controls", "comparison", "scales",
    "address", "view", "cells", "color_scale", "heat_maps", "strip", "tables", "drawing", "legend",
    "equations", "ledger", "normalization", "normalization_ledger", "weight_gradient", "arithmetic",
    "editor", "weights", "sequence", "passages", "text", "live_model", "live", "gradient", "player",
    "tour", "own_changes", "guide", "keys", "about", "dragging", "inline_arithmetic", "app", "overview",
    "start",
)  # fmt: skip


def html(data: dict[str, Any]) -> str:
    """Return the page with the given data as HTML."""
    json_text = json.dumps(data, allow_nan=False, ensure_ascii=False)
    values = {
        "wasm": " 'wasm-unsafe-eval'" if data.get("live") else "",
        "title": escape(data["title"]),
        "style": style(),
        "script": script() + "\nstart();",
        # escaped so that no text of a user can close the script element
        "data": json_text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    }
    template = _read("page.html")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def style() -> str:
    """Return the style sheet."""
    return _read("page.css") + _read("drawing.css")


def script() -> str:
    """Return all scripts as one."""
    return joined(_SCRIPTS)


def joined(names: Iterable[str]) -> str:
    """Return some scripts as one, without imports, exports, indentation and comments on their own lines."""
    texts = "\n".join(_read(f"{name}.js") for name in names)
    texts = re.sub(r"^ *(//.*|/\*\*(?s:.*?)\*/)\n", "", texts, flags=re.MULTILINE)
    texts = re.sub(r"^ +|\n(?=\n)", "", texts, flags=re.MULTILINE)
    texts = re.sub(r"^import .*;\n", "", texts, flags=re.MULTILINE)
    return re.sub(r"^export (?=(async )?(function|const|class)\b)", "", texts, flags=re.MULTILINE)


def _read(name: str) -> str:
    return (files("unrolled.page") / name).read_text(encoding="utf-8")
