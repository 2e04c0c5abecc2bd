"""Write the texts of all pages as a script, so that the search shows passages without a server.

Sphinx's search finds pages with an index that is a script. For the passages it fetches the pages, and
browsers don't allow that if the site is opened from disk. ``_static/search.js`` shows the passages instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, NavigableString, Tag
from sphinx.application import Sphinx

_NOT_TEXT = "script, style, svg, iframe, .headerlink, .toctree-wrapper"
_BLOCKS = {"p", "li", "td", "th", "dt", "dd", "pre", "div", "tr", "br", "h1", "h2", "h3", "h4", "summary"}
_HEADINGS = ["h1", "h2", "h3", "h4"]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("html-page-context", _add_scripts)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def passages(html: str) -> list[dict[str, str]]:
    """Split a page into the texts of its sections and of the objects that it documents.

    Args:
        html: The page, as Sphinx has written it.

    Returns:
        For each passage with text: the ``anchor`` that a link can point to, the ``title`` and the ``text``.
    """
    soup = BeautifulSoup(html, "html.parser")
    article = soup.select_one("article[role=main]")
    if article is None:
        return []
    for node in article.select(_NOT_TEXT):
        node.decompose()
    found: list[dict[str, str]] = []
    for node in article.descendants:
        if isinstance(node, Tag):
            if node.get("id") and node.name in ("section", "dt", "tr"):
                anchor = str(node["id"])
                title = "" if node.name == "section" else anchor
                found.append({"anchor": anchor, "title": title, "text": ""})
            elif found and _section_id(node.parent) not in ("", found[-1]["anchor"]):  # after an object
                heading = node.parent.find(_HEADINGS) if node.parent else None
                title = heading.get_text() if heading else ""
                found.append({"anchor": _section_id(node.parent), "title": title, "text": ""})
            if found and node.name in _BLOCKS:
                found[-1]["text"] += " "
        elif found and isinstance(node, NavigableString):
            if node.parent and node.parent.name in _HEADINGS:
                found[-1]["title"] += node
            else:
                found[-1]["text"] += node
    for passage in found:
        passage["text"] = " ".join(passage["text"].split())
        passage["title"] = " ".join(passage["title"].split())
    return [passage for passage in found if passage["text"]]


def _section_id(node: Tag | None) -> str:
    return str(node.get("id", "")) if node and node.name == "section" else ""


def _add_scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if page == "search":
        app.add_js_file("search_texts.js")
        app.add_js_file("search.js")


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    pages = {name: passages((folder / f"{name}.html").read_text()) for name in sorted(app.env.found_docs)}
    texts = json.dumps(pages, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    (folder / "_static" / "search_texts.js").write_text(f"const SEARCH_TEXTS = {texts};\n", encoding="utf-8")
