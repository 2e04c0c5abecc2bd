"""The documentation: its code runs and prints what the pages show, and the site builds and works offline."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy
import pytest
import safetensors.torch
from torch import nn

import unrolled as ur
from helpers import processes
from helpers.layer_pairs import FALLBACK_FILTER, NEEDS_COMPILER
from helpers.printed_output import assert_same_output

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
CODE = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)$", re.MULTILINE)
README_COMMANDS = set(COMMAND.findall((DOCS.parent / "README.md").read_text()))
NEEDING_COMPILER = ("change", "compiler", "torch_nn")  # pages that use the native engine or torch.export
LINKS_TO_WEB = {"a": "href"}  # the only references that may leave the site: links for the reader


def run(arguments: list[Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return processes.run(*arguments, cwd=folder, env={**os.environ, "COLUMNS": "100", **environment})


def with_marks(page: str) -> Any:
    return pytest.param(page, marks=NEEDS_COMPILER if page in NEEDING_COMPILER else ())


@pytest.mark.slow
@pytest.mark.parametrize("page", [with_marks(name) for name, text in PAGES.items() if CODE.search(text)])
def test_code_prints_what_the_page_shows(page: str, tmp_path: Path) -> None:
    """Run all blocks of a page in order, and compare the output of each with the text block after it."""
    if page == "formats":
        pytest.importorskip("onnxscript")
    blocks = CODE.findall(PAGES[page])
    assert len(blocks) == PAGES[page].count("```python")
    (tmp_path / "page.py").write_text("".join(f"{code}\nprint(end='\\0')\n" for code, _ in blocks))
    process = run(["-W", "error", "-W", FALLBACK_FILTER, "page.py"], tmp_path)
    assert process.returncode == 0, process.stderr
    *outputs, rest = process.stdout.split("\0")
    assert not rest
    for (_, shown), printed in zip(blocks, outputs, strict=True):
        assert_same_output(shown, printed)


def commands() -> list[Any]:
    """Return the commands in the pages that ``test_readme.py`` doesn't run. ``--watch`` needs a terminal."""
    in_pages = {command for text in PAGES.values() for command in COMMAND.findall(text)}
    assert in_pages
    return [
        pytest.param(command, marks=NEEDS_COMPILER if "build" in command.split() else ())
        for command in sorted(in_pages - README_COMMANDS)
        if "--watch" not in command
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_command(command: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(3, 4, num_layers=2), "decoder": nn.GRU(4, 5)})
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    numpy.savetxt(tmp_path / "sequence.csv", numpy.ones((6, 3)), delimiter=",")
    program, *arguments = shlex.split(command)
    process = run([Path(sys.executable).parent / program, *arguments], tmp_path)
    assert process.returncode == 0, process.stderr
    assert "LSTM" in process.stdout or "RNN(" in process.stdout


@pytest.mark.slow
@NEEDS_COMPILER
def test_the_compiler_prints_what_its_page_shows(tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(CODE.findall(PAGES["compiler"])[0][0])
    process = run(["leaky.py"], tmp_path, UNROLLED_LOG="graph,kernel,emit", UNROLLED_CACHE=str(tmp_path))
    assert process.returncode == 0, process.stderr
    listings = re.findall(r"^```(text|cpp)\n(.*?)^```$", PAGES["compiler"], re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in listings} == {"text", "cpp"}
    for kind, listing in listings:
        if kind == "cpp":  # complete
            assert listing in process.stderr
        rest = process.stderr
        for line in listing.splitlines():  # some lines of a graph are left out
            _, separator, rest = rest.partition(f"{line}\n")
            assert separator, f"the compiler does not print this listing: {listing}"


def test_modules_named_in_the_pages_exist() -> None:
    source = Path(ur.__file__).parent
    roots = (DOCS.parent, source, source / "engines")
    names = {name for text in PAGES.values() for name in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text)}
    missing = {name for name in names if not any((root / name).exists() for root in roots)}
    assert missing == {"src/unrolled/cells/ema.py"}  # the example of a new cell in cells.md


def test_the_architecture_page_lists_every_package() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGES["architecture"], re.MULTILINE))
    assert listed == {path.parent.name for path in Path(ur.__file__).parent.glob("*/__init__.py")}


class Page(HTMLParser):
    """The references of a page as tag, attribute and target, and the ids that links can point to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("src", "href", "data", "poster", "srcset") and value:
                self.links.append((tag, name, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site. Warnings and unresolved references are errors."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--nitpicky", "--quiet", "--doctree-dir", folder / "trees"]
    process = run(["-m", "sphinx", *options, DOCS, folder / "html"], folder)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_works_offline_and_has_no_broken_links(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        for tag, name, target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                allowed = parts.scheme == "data" or LINKS_TO_WEB.get(tag) == name
                assert allowed, f"{path.name} loads {target} from the web"
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert file.exists(), f"{path.name} links to {target}, which doesn't exist"
            if parts.fragment and file.suffix == ".html":
                exists = unquote(parts.fragment) in pages[file].ids
                assert exists, f"{path.name} links to {target}, but there is no such id"
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", path.read_text()), path
    for path in site.rglob("*.js"):  # scripts that load others
        assert not re.search(r"(?:import|fetch)\s*\(?\s*['\"]https?:", path.read_text()), path


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = Page(site / "reference.html").ids
    for name in ur.__all__:
        public = getattr(ur, name)
        members = [f"unrolled.{name}.{member}" for member in getattr(public, "__all__", [])]
        for full_name in members or [f"unrolled.{name}"]:
            assert full_name in ids, f"{full_name} is not in docs/reference.md"


@pytest.mark.slow
def test_the_pages_show_the_generated_content(site: Path) -> None:
    assert (site / "notebooks" / "01_open_the_layer.html").read_text().count("<img") > 4
    assert "<math" in (site / "notebooks" / "01_open_the_layer.html").read_text()
    assert "usage: unrolled bench" in (site / "reference.html").read_text()
    assert "unrolled.svg" in (site / "index.html").read_text()
