"""The house rules: which room knows which, and what may not stand in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import unrolled as ur

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "unrolled"
FILES = sorted(SOURCE.rglob("*.py"))
ON_TOP = {
    "trace",
    "conversion",
    "counterpart",
    "cli",
    "arguments",
    "show_command",
    "colors",
    "stepper",
    "show",
    "plot",
    "walkthrough",
    "recognise",
    "files",
    "tables",
    "derivation",
    "explain",
    "gradient",
    "layer_trace",
    "notation",
    "scope",
    "formula",
    "mathml",
    "page",
    "recording",
    "limits",
    "observed",
    "record",
    "health",
    "watch",
    "bench",
    "compare",
    "doctor",
    "ahead",
}


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unrolled":
            found |= {f"{node.module}.{alias.name}".removeprefix("unrolled.") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("unrolled.") for alias in node.names if "unrolled." in alias.name
            }
    return {name.split(".")[0] for name in found}


def test_no_cell_is_known_by_name() -> None:
    """Only cells/, the drop-ins named after torch.nn's, and the export may name a cell."""
    words = {"RAN", "STAR"}  # of English, in small letters
    others = "|".join(set(ur.cells.__all__) - words)
    names = re.compile(rf"\b(?:(?i:{others})|{'|'.join(words)})\b")
    for path in FILES:
        if path.parent.name in ("cells", "io") or path.name in ("drop_in.py", "__init__.py", "custom.py"):
            continue
        tree = ast.parse(path.read_text())
        docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                      and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            text = {ast.Name: "id", ast.Attribute: "attr", ast.Constant: "value"}.get(type(node))
            value = getattr(node, text) if text else None
            if isinstance(value, str) and id(node) not in docstrings:
                assert not names.search(value), f"{path.name}:{node.lineno} names a cell: {value!r}"


def test_data_flows_one_way() -> None:
    for path in FILES:
        known = imports(path)
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room == "cells":
            assert known <= {"cell", "cells"}, path
        if room in ("cell", "sequence", "regularised"):
            assert not known, path
        if room == "variants":
            assert known <= {"cell"}, path
        if room == "engines":
            assert known <= {"cell", "engines", "variants"}, path
        if room in ("layers", "single_step", "drop_in", "asked", "cell_module"):
            assert not known & ON_TOP, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_rooms(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    left = "TO" + "DO|FIX" + "ME|X" + "XX"
    assert not re.search(rf"\b({left})\b", text)


def test_public_names_have_docstrings() -> None:
    for name in ur.__all__:
        assert (getattr(ur, name).__doc__ or "").strip(), name


def test_the_repository_holds_no_path_of_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    for name in listed:
        content = (ROOT / name).read_bytes()
        assert str(ROOT).encode() not in content, name
        assert len(content) < 2**20, name


def test_the_makefile_and_ci() -> None:
    def recipe(target: str) -> str:
        command = ["make", "-n", target, "READY="]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    for tool in ("pytest", "ruff check", "ruff format --check", "mypy"):
        assert tool in recipe("test")
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make lint" in (ROOT / ".pre-commit-config.yaml").read_text()
    for target in ("demo", "lint", "bench", "docs", "clean"):
        assert recipe(target)
