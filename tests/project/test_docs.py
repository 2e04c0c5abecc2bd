"""The documentation: its code runs and prints what the pages show, and the site builds and works offline."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import unrolled as ur
from helpers import processes
from helpers.browser import NOT_FOUND, find_browser, running_browser
from helpers.layer_pairs import FALLBACK_FILTER, NEEDS_COMPILER
from helpers.printed_output import assert_same_output
from unrolled import diagram, plot

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    path.relative_to(DOCS).with_suffix("").as_posix(): path.read_text()
    for path in sorted([*DOCS.glob("*.md"), *DOCS.glob("reference/*.md")])
}
GALLERY = sorted(path.stem for path in DOCS.glob("gallery/*.py"))
CODE = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)$", re.MULTILINE)
README_COMMANDS = set(COMMAND.findall((DOCS.parent / "README.md").read_text()))
NEEDING_COMPILER = ("change", "compiler", "torch_nn")  # pages that use the native engine or torch.export
THRESHOLDS = "unrolled.tracing.thresholds"  # constants, which the index doesn't list one by one
OF_TORCH_ONNX = ("# The axis name", "`isinstance(treespec, LeafSpec)`")  # warnings of torch.onnx.export
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
    filters = ["error", FALLBACK_FILTER, *(f"ignore:{message}" for message in OF_TORCH_ONNX)]
    process = run([*(part for one in filters for part in ("-W", one)), "page.py"], tmp_path)
    assert process.returncode == 0, process.stderr
    *outputs, rest = process.stdout.split("\0")
    assert not rest
    for (_, shown), printed in zip(blocks, outputs, strict=True):
        assert_same_output(shown, printed)


def commands() -> list[Any]:
    """Return the commands in the pages that other tests don't run. ``--watch`` needs a terminal."""
    in_pages = {command for text in PAGES.values() for command in COMMAND.findall(text)}
    assert in_pages
    return [
        pytest.param(command, marks=NEEDS_COMPILER if "build" in command.split() else ())
        for command in sorted(in_pages - README_COMMANDS)
        if "--watch" not in command and command.startswith("unrolled ") and " export " not in command
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
    printed = ""
    for code, *_ in CODE.findall(PAGES["compiler"]):
        (tmp_path / "program.py").write_text(code)
        process = run(
            ["program.py"], tmp_path, UNROLLED_LOG="graph,kernel,emit", UNROLLED_CACHE=str(tmp_path)
        )
        assert process.returncode == 0, process.stderr
        printed += process.stderr
    listings = re.findall(r"^```(text|cpp)\n(.*?)^```$", PAGES["compiler"], re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in listings} == {"text", "cpp"}
    for kind, listing in listings:
        if kind == "cpp":  # complete
            assert listing in printed
        rest = printed
        for line in listing.splitlines():  # some lines of a graph are left out
            _, separator, rest = rest.partition(f"{line}\n")
            assert separator, f"the compiler does not print this listing: {listing}"


def test_modules_named_in_the_pages_exist() -> None:
    source = Path(ur.__file__).parent
    roots = (DOCS.parent, source, source / "engines")
    names = {name for text in PAGES.values() for name in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text)}
    missing = {name for name in names if not any((root / name).exists() for root in roots)}
    assert missing == {"src/unrolled/cells/ema.py"}  # the example of a new cell in cells.md


def public_names() -> list[str]:
    """Return the public names of the package and of its public modules, as the reference writes them."""
    objects = [name for name in ur.__all__ if not isinstance(getattr(ur, name), ModuleType)]
    modules = {module.__name__: module.__all__ for module in (ur.cells, ur.export, ur.io, diagram, plot)}
    names = [f"{module}.{name}" for module, all_names in modules.items() for name in all_names]
    return [*(f"unrolled.{name}" for name in objects), *names]


def documented_names(text: str) -> list[str]:
    """Return the names that the directives of a page document, without methods."""
    names, module = [], "unrolled"
    for kind, argument, options in re.findall(r"^\.\. (\w+):: (\S+)((?:\n {3}:.*)*)", text, re.MULTILINE):
        members = re.search(r":members:(.*)", options)
        if kind == "currentmodule":
            module = argument
        elif kind == "automodule" and members and argument != THRESHOLDS:
            public = members[1].replace(",", " ").split() or import_module(argument).__all__
            names += [f"{argument}.{name}" for name in public]
        elif kind.startswith("auto") and kind != "automodule":
            names.append(argument if argument.startswith("unrolled.") else f"{module}.{argument}")
    return names


def test_every_public_name_is_in_one_topic_of_the_reference_and_in_its_index() -> None:
    topics = {name: documented_names(text) for name, text in PAGES.items() if name.startswith("reference/")}
    index = {f"unrolled.{name}" for name in re.findall(r"^ {3}(\w[\w.]*)$", PAGES["reference/index"], re.M)}
    assert set(public_names()) <= index
    for name in index:
        assert sum(names.count(name) for names in topics.values()) == 1, name
    for name in set(PAGES) - {"reference/index"}:
        if name.startswith("reference/"):
            assert f"({name.removeprefix('reference/')}.md)" in PAGES["reference/index"], name


def rnn(t: ur.Trace) -> None:
    assert_close(t["h"][:2, 0, 2], torch.tensor([-0.74, -0.01]), atol=0.006, rtol=0)
    assert_close(t["h"][:3, 0, 1], torch.tensor([0.55, 0.28, 0.13]), atol=0.006, rtol=0)
    without_first = ur.trace(t.module, torch.tensor([[0.0], [0.0], [0.0], [-1.0], [0.0], [0.0]]))
    assert (t["h"][-1] - without_first["h"][-1]).abs().max() < 0.02


def lstm(t: ur.Trace) -> None:
    assert_close(t["c"][[0, 2, 3], 0, 1], torch.tensor([0.47, 0.38, 0.15]), atol=0.006, rtol=0)
    assert t["f"].min() > 0.95
    assert_close(t["c"][3], t["f"][3] * t["c"][2] + t["i"][3] * t["g"][3])


def gru(t: ur.Trace) -> None:
    assert_close(t["h"][1:], (1 - t["z"][1:]) * t["n"][1:] + t["z"][1:] * t["h"][:-1])
    assert (t["h"][2] - t["h"][1]).abs().max() > 0.05


def slstm(t: ur.Trace) -> None:
    assert abs(t["log_i"][2, 0, 2] - 11.02) < 0.006
    assert 60_500 < math.exp(t["log_i"][2, 0, 2]) < 61_500
    assert t["i"].max() <= 1
    assert (t["c"] / t["n"]).abs().max() <= 1
    assert t["f"][2, 0, 2] < 1e-6


def min_gru(t: ur.Trace) -> None:
    assert_close(t["z"][1], t["z"][2])
    assert_close(t["candidate"][1], t["candidate"][2])
    assert "linear(h" not in inspect.getsource(ur.cells.MinGRU)


def custom_cell(t: ur.Trace) -> None:
    assert_close(t["h"][2, 0], torch.tensor([0.32, 0.875, 0.998]), atol=0.004, rtol=0)


def bidirectional(t: ur.Trace) -> None:
    assert t.layer(1, "backward").input.shape[-1] == 6
    first = ur.trace(t.module, t.input[-1:])  # only the last letter
    assert_close(t.layer(0, "backward")["h"][-1], first.layer(0, "backward")["h"][0])


def text_model(t: ur.Trace, text: str, predictions: list[str]) -> None:
    right = [predicted == letter for predicted, letter in zip(predictions, text[1:], strict=False)]
    assert sum(right) / len(right) > 0.85
    positions = torch.tensor([index - (text.rfind("\n", 0, index) + 1) for index in range(len(text))])
    both = torch.cat((positions[None].float(), t["c"][:, 0].T))
    assert torch.corrcoef(both)[0, 1:].abs().max() > 0.5


CLAIMS = {
    claims.__name__: claims
    for claims in (rnn, lstm, gru, slstm, min_gru, custom_cell, bidirectional, text_model)
}


def test_the_gallery_shows_every_program() -> None:
    for pattern in (r"literalinclude\} gallery/(\w+)\.py", r'<a href="_static/gallery/(\w+)\.html"><b>Open'):
        assert sorted(re.findall(pattern, PAGES["gallery"])) == GALLERY == sorted(CLAIMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=NEEDS_COMPILER if n == "text_model" else ()) for n in CLAIMS]
)
def test_what_the_gallery_says_about_a_program(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variables = runpy.run_path(str(DOCS / "gallery" / f"{name}.py"))
    assert (tmp_path / f"{name}.html").exists()
    trained = (variables["begin"], variables["predicted"]) if name == "text_model" else ()
    CLAIMS[name](variables["t"], *trained)


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


needs_browser = pytest.mark.skipif(find_browser() is None, reason=NOT_FOUND)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


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
def test_the_links_of_the_reference_lead_to_the_names(site: Path) -> None:
    ids = {name: Page(site / f"{name}.html").ids for name in PAGES if name.startswith("reference/")}
    for name in public_names():
        pages = [page for page, found in ids.items() if name in found]
        assert len(pages) == 1, f"{name} is explained in {pages}"
        link = f'href="{pages[0].removeprefix("reference/")}.html#{name}"'
        assert link in (site / "reference" / "index.html").read_text(), f"the index has no link to {name}"


@pytest.mark.slow
def test_the_pages_show_the_generated_content(site: Path) -> None:
    notebook = (site / "notebooks" / "01_open_the_layer.html").read_text()
    assert notebook.count("<iframe") == 2
    assert notebook.count("<details>") == 5
    assert "<math" in notebook
    assert "[4pt]" not in notebook.partition("<math")[2]
    assert "usage: unrolled bench" in (site / "reference" / "commands.html").read_text()
    assert "unrolled.svg" in (site / "see.html").read_text()


@pytest.mark.slow
@needs_browser
def test_the_start_page_shows_the_page_of_its_code_without_scrolling(site: Path, browser: Any) -> None:
    (code, _), *_ = CODE.findall(PAGES["index"])
    assert len(code.splitlines()) <= 8
    variables: dict[str, Any] = {}
    with contextlib.chdir(site.parent):
        exec(code, variables)
        assert Path("lstm.html").read_bytes() == (site / "_static" / "lstm.html").read_bytes()
    tab = browser.new_page(viewport={"width": 1366, "height": 768})
    tab.goto((site / "index.html").as_uri())
    frame = tab.locator("iframe.page")
    assert frame.get_attribute("src") == "_static/lstm.html"
    for shown in (".strip .n", "svg.cell .node", ".tables .n"):
        first = frame.content_frame.locator(shown).first
        first.wait_for()
        box = first.bounding_box()
        assert box["y"] + box["height"] < 768, shown


def search(tab: Any, site: Path, query: str) -> dict[str, str]:
    """Search from a page of the site, and return the passages of each result by its address."""
    tab.goto((site / "start.html").as_uri())
    tab.locator("input[name=q]").fill(query)
    tab.locator("input[name=q]").press("Enter")
    tab.wait_for_function("document.querySelector('.search-summary')?.textContent")  # all results are shown
    results = tab.locator("ul.search > li").all()
    return {
        result.locator("a").first.get_attribute("href"): "\n".join(
            result.locator(".context").all_inner_texts()
        )
        for result in results
    }


@pytest.mark.slow
@needs_browser
def test_the_search_shows_passages_from_disk(site: Path, browser: Any) -> None:
    context = browser.new_context(offline=True)
    tab = context.new_page()
    messages: list[str] = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("dialog", lambda dialog: messages.append(dialog.message))
    words = {name: set(re.findall(r"\b[a-z]{9,}\b", text)) for name, text in PAGES.items()}
    for name in ("deploy", "record", "speed"):  # words that are on no other page, and in no heading
        headings = " ".join(re.findall(r"^#+ (.*)", PAGES[name], re.MULTILINE)).lower()
        others = set().union(*(words[other] for other in words if other != name))
        prose = re.sub(r"^```.*?^```$|`[^`]*`", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
        word = next(word for word in sorted(words[name] - others) if word in prose and word not in headings)
        assert word in search(tab, site, word)[f"{name}.html"].lower()
        assert word in [text.lower() for text in tab.locator("ul.search mark").all_inner_texts()]
    # Two words in other forms, and the name of a function
    found = search(tab, site, "subtracting stabilizers")
    assert "The stabilizer m is subtracted first" in found["gallery.html"]
    found = search(tab, site, "to_flax")
    assert "to_flax" in found["reference/formats.html#unrolled.io.to_flax"]
    found = search(tab, site, "complete source of the GRU cell")
    assert found["reference/cells.html"].startswith("Published cells: ")
    # The words of a search are highlighted in the page of a result, but not in what drawings hide.
    search(tab, site, "forget gate")
    tab.goto((site / "cells.html").as_uri())
    tab.locator("span.highlighted").first.wait_for()
    search(tab, site, "<img src=x onerror=alert()>")
    assert not messages
    context.close()
