"""Generate content when the site is built: copies of the notebooks, figures, MathML and interactive pages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shutil
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import table_of_cells
import torch
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from matplotlib.axes import Axes
from sphinx.application import Sphinx

import unrolled as ur
from unrolled.cli import example, main

HERE = Path(__file__).parent


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("builder-inited", lambda app: make())
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def make() -> None:
    """Copy the notebooks and draw the figures. Sphinx can't read notebooks outside of its source folder."""
    notebooks = {path.name: path for path in (HERE.parent / "notebooks").glob("*.ipynb")}
    for name, path in notebooks.items():
        notebook = json.loads(path.read_bytes())
        show_traces(notebook, HERE / "_made" / "pages", path.stem)
        _write(HERE / "notebooks" / name, json.dumps(notebook).encode())
    for path in (HERE / "notebooks").glob("*.ipynb"):
        if path.name not in notebooks:  # renamed or removed since the last build
            path.unlink()
    layer, x = example.example(ur.cells.RNN, None, 0, {})
    _draw("unrolled", ur.trace(layer, x).plot("unrolled"))
    _draw("gates", wave().plot("gates"))
    _draw("gradient", wave().plot("gradient"))
    write_pages(HERE / "_made" / "pages")
    make_gallery(HERE / "_made" / "pages" / "gallery", HERE / "_made" / "gallery")
    _write(HERE / "_made" / "commands.md", commands().encode())
    _write(HERE / "_made" / "cells.html", table_of_cells.table().encode())


def show_traces(notebook: dict[str, Any], folder: Path, name: str) -> None:
    """Replace the text of each trace in a notebook by its page, which a stored notebook doesn't contain.

    Args:
        notebook: The notebook. Its cells run up to the last one that shows a trace.
        folder: Where to write the pages.
        name: Beginning of the file names.
    """
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [cell for cell in cells if any(map(_is_trace, cell["outputs"]))]
    if not shown:
        return
    folder.mkdir(parents=True, exist_ok=True)
    variables: dict[str, Any] = {}
    for cell in cells[: cells.index(shown[-1]) + 1]:
        code = re.sub(r"^( *)%pip .*", r"\1pass", "".join(cell["source"]), flags=re.M)
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            exec(code, variables)
        if cell in shown:
            trace = variables[code.splitlines()[-1]]
            page = trace.to_html(folder / f"{name}_{shown.index(cell) + 1}.html")
            attributes = f'class="page" src="../_static/{page.name}" title="{escape(repr(trace))}"'
            cell["outputs"][-1]["data"] = {"text/html": f"<iframe {attributes}></iframe>"}


def _is_trace(output: dict[str, Any]) -> bool:
    return "".join(output.get("data", {}).get("text/plain", "")).startswith("<Trace of")


def _finish(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        shutil.copytree(HERE / "_made" / "pages", Path(app.outdir, "_static"), dirs_exist_ok=True)


def write_pages(folder: Path) -> None:
    """Write the interactive pages that ``index.md`` and ``see.md`` show."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        _run_first_example("index.md")  # writes lstm.html
    _run_first_example("see.md")["t"].to_html(folder / "layer.html", title="LSTM(2, 3)")
    wave().to_html(folder / "wave.html", title="An LSTM reads a wave")


def _run_first_example(page: str) -> dict[str, Any]:
    """Run the first code block of a page, and return its variables."""
    code = re.findall(r"^```python\n(.*?)^```$", (HERE / page).read_text(), re.M | re.S)[0]
    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, variables)
    return variables


def make_gallery(pages: Path, drawings: Path) -> None:
    """Run the programs in ``gallery/``: each one writes its page. Also draw the cell that each one traces."""
    pages.mkdir(parents=True, exist_ok=True)
    for path in sorted((HERE / "gallery").glob("*.py")):
        with contextlib.chdir(pages):
            trace = runpy.run_path(str(path))["t"]
        for theme in ("light", "dark"):
            drawing = trace.plot("cell", step=3, unit=1, theme=theme)
            _write(drawings / f"{path.stem}-{theme}.svg", drawing.svg.encode())


def wave() -> ur.Trace:
    """Trace an LSTM with eight units on a slow wave of 60 steps, with the gradient of its last output."""
    torch.manual_seed(0)
    t = ur.trace(ur.LSTM(1, 8), torch.sin(torch.arange(60) * torch.pi / 10).unsqueeze(1))
    return t.backward(lambda output: output[-1].sum())


def commands() -> str:
    """Return the help texts of all commands as Markdown."""
    overview = _help()
    names = re.findall(r"^ {4}(\w+) ", overview, re.MULTILINE)
    parts = [("unrolled", overview), *((f"unrolled {name}", _help(name)) for name in names)]
    return "\n".join(f"## {title}\n\n```text\n{text}```\n" for title, text in parts)


def _help(*command: str) -> str:
    text = io.StringIO()
    os.environ["COLUMNS"] = "96"  # of argparse's lines
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main.main([*command, "--help"])
    return text.getvalue()


def _draw(name: str, axes: Axes) -> None:
    text = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # make the file reproducible
        axes.get_figure(root=True).savefig(text, format="svg", metadata={"Date": None})
    _write(HERE / "_made" / f"{name}.svg", text.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Write a file unless its content is unchanged, because Sphinx rebuilds pages whose files are newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _mathml(tex: str, as_block: bool) -> str:
    """Convert TeX to MathML, which browsers render without scripts from the web."""
    return str(tex2mathml(re.sub(r"\\\\\[[\w.]+\]", r"\\\\", tex), as_block=as_block))
