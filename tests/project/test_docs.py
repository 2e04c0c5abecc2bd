"""The documentation: its code runs and prints what it says, and its site is whole and needs no net."""

from __future__ import annotations

import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import unrolled as ur
from helpers import processes
from helpers.layer_pairs import NEEDS_COMPILER, QUIET
from helpers.printed_output import assert_as_printed

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
CODE = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)$", re.MULTILINE)
CALLS_NATIVE = ("change", "compiler")  # inside ur.engine("native"), or for what the compiler prints
OUTWARD = {"a": "href"}  # what may lead to the net: where a reader clicks


def run(arguments: list[Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "COLUMNS": "100", **environment}
    return processes.run(*arguments, cwd=folder, env=given)


def page_of(name: str) -> Any:
    return pytest.param(name, marks=NEEDS_COMPILER if name in CALLS_NATIVE else ())


@pytest.mark.parametrize("page", [page_of(name) for name, text in PAGES.items() if CODE.search(text)])
def test_code(page: str, tmp_path: Path) -> None:
    """The blocks of a page follow one another; what one prints is the block of text after it."""
    blocks = CODE.findall(PAGES[page])
    assert len(blocks) == PAGES[page].count("```python")
    (tmp_path / "page.py").write_text("".join(f"{code}\nprint(end='\\0')\n" for code, _ in blocks))
    done = run(["-W", "error", "-W", QUIET, "page.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    *printed, rest = done.stdout.split("\0")
    assert not rest
    for (_, shown), now in zip(blocks, printed, strict=True):
        assert_as_printed(shown, now)


def test_commands_are_those_of_the_readme() -> None:
    """Which tests/project/test_readme.py runs."""
    found = {command for text in PAGES.values() for command in COMMAND.findall(text)}
    assert found
    assert found <= set(COMMAND.findall((DOCS.parent / "README.md").read_text()))


@NEEDS_COMPILER
def test_the_compiler_prints_what_its_page_shows(tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(CODE.findall(PAGES["compiler"])[0][0])
    done = run(["leaky.py"], tmp_path, UNROLLED_LOG="graph,emit", UNROLLED_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^```(text|cpp)\n(.*?)^```$", PAGES["compiler"], re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in shown} == {"text", "cpp"}
    for kind, block in shown:
        if kind == "cpp":  # whole
            assert block in done.stderr
        rest = done.stderr
        for line in block.splitlines():  # of a graph, some lines are left out
            _, there, rest = rest.partition(f"{line}\n")
            assert there, f"the compiler doesn't print, or not at this place: {block}"


class Page(HTMLParser):
    """What a page of the site refers to: tag, attribute and target; and the names of its places."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.places: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            if name in ("src", "href", "data", "poster", "srcset") and value:
                self.links.append((tag, name, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built anew; a warning is an error, and so is a name that can't be looked up."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--nitpicky", "--quiet", "--doctree-dir", folder / "trees"]
    done = run(["-m", "sphinx", *options, DOCS, folder / "html"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def test_the_site_needs_no_net_and_leads_nowhere_wrong(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        for tag, name, target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                inside = parts.scheme == "data" or OUTWARD.get(tag) == name
                assert inside, f"{path.name} takes {target} from the net"
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert there.exists(), f"{path.name} leads to {target}, which is not there"
            if parts.fragment and there.suffix == ".html":
                place = unquote(parts.fragment)
                assert place in pages[there].places, f"{path.name} leads to {target}: no such place"
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", path.read_text()), path
    for path in site.rglob("*.js"):  # what a program fetches by itself
        assert not re.search(r"(?:import|fetch)\s*\(?\s*['\"]https?:", path.read_text()), path


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    places = Page(site / "reference.html").places
    for name in ur.__all__:
        public = getattr(ur, name)
        inside = [f"unrolled.{name}.{part}" for part in getattr(public, "__all__", [])]
        for full in inside or [f"unrolled.{name}"]:
            assert full in places, f"{full} is not in docs/reference.md"


def test_the_pages_show_what_was_made_for_them(site: Path) -> None:
    assert (site / "notebooks" / "01_open_the_layer.html").read_text().count("<img") > 4
    assert "<math" in (site / "notebooks" / "01_open_the_layer.html").read_text()
    assert "usage: unrolled bench" in (site / "reference.html").read_text()
    assert "unrolled.svg" in (site / "index.html").read_text()
