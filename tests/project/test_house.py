"""The rules of the repository: which package imports which, file sizes, and what must not be committed."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unrolled as ur

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "unrolled"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Which package imports which. cli and unrolled/__init__.py may import anything.
PACKAGES = {
    "cells": set(),
    "engines": {"cells"},
    "layers": {"cells", "engines"},
    "equations": {"cells"},
    "export": {"cells", "engines", "layers"},
    "inference": {"engines", "layers"},
    "io": {"cells", "layers"},
    "quantization": {"cells", "engines", "inference", "layers"},
    "tracing": {"cells", "engines", "layers"},
    "diagram": {"cells", "equations", "tracing"},
    "plot": {"cells", "tracing"},
    "page": {"cells", "diagram", "equations", "export", "layers", "tracing"},
}
MAY_IMPORT_ANYTHING = {"cli", "__init__", "__main__", "_moved_modules"}

# Which part of engines imports which. The compiler knows no backend.
ENGINES = {
    "_torch_private": set(),
    "fork_safety": set(),
    "log": set(),
    "memory": {"_torch_private"},
    "philox": set(),
    "reference": set(),
    "selection": set(),
    "threads": set(),
    "errors": set(),
    "compiler": {"_torch_private", "fork_safety", "log", "memory", "reference"},
    "native/toolchain": {"errors", "fork_safety", "log", "threads"},
    "native": {"compiler", "fork_safety", "log", "memory", "native/toolchain", "threads"},
    "gpu": {"compiler", "errors", "fork_safety", "log", "memory"},
    "backends": {"compiler", "gpu", "native"},
    "draws": {
        "_torch_private",
        "backends",
        "compiler",
        "fork_safety",
        "native",
        "native/toolchain",
        "philox",
        "selection",
    },
    "registry": {"backends", "compiler", "errors", "fork_safety", "memory"},
    "packed_weights": {"compiler", "errors", "native", "registry"},
    "call_plans": {
        "_torch_private",
        "autograd",
        "compiler",
        "directions",
        "draws",
        "errors",
        "log",
        "memory",
        "missing_gradients",
        "native",
        "native/toolchain",
        "registry",
        "run_compiled",
        "selection",
        "threads",
    },
    "directions": {"compiler", "threads"},
    "missing_gradients": {"directions"},
    "autograd": {"_torch_private", "compiler", "directions", "memory", "missing_gradients", "reference"},
    "checkpointing": {"_torch_private", "autograd", "compiler", "directions", "missing_gradients", "threads"},
    "run_compiled": {"autograd", "checkpointing", "compiler", "directions", "registry"},
    "torch_ops": {
        "_torch_private",
        "autograd",
        "backends",
        "compiler",
        "directions",
        "draws",
        "errors",
        "fork_safety",
        "memory",
        "missing_gradients",
        "philox",
        "reference",
        "registry",
        "run_compiled",
    },
    "dispatch": {
        "_torch_private",
        "backends",
        "compiler",
        "errors",
        "log",
        "memory",
        "reference",
        "registry",
        "run_compiled",
        "selection",
        "torch_ops",
    },
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere: lazily and under TYPE_CHECKING, too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            if node.module and node.module.split(".")[0] == "unrolled":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                modules |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] == "unrolled"}
    return modules - {module_name(path)}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def package(module: str) -> str:
    """The package below ``unrolled`` that a module is in; ``unrolled`` itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def engines_part(module: str) -> str:
    """The part of ``engines`` that a module is in: a module or a package."""
    parts = module.split(".")[2:]
    return "/".join(parts[:2]) if parts[:2] == ["native", "toolchain"] else parts[0] if parts else "__init__"


def test_packages_import_what_the_table_says() -> None:
    """Equality, so that a permission that nothing uses shows up."""
    found: dict[str, set[str]] = {name: set() for name in PACKAGES}
    for module, imported in IMPORTS.items():
        if package(module) not in MAY_IMPORT_ANYTHING | {"_version"}:
            found[package(module)] |= {package(name) for name in imported} - {package(module), "_version"}
    assert found == PACKAGES


def test_engines_import_what_the_table_says() -> None:
    found: dict[str, set[str]] = {name: set() for name in ENGINES}
    for module, imported in IMPORTS.items():
        part = engines_part(module)
        if module.startswith("unrolled.engines.") and part in found:
            parts = {engines_part(name) for name in imported if name.startswith("unrolled.engines")}
            found[part] |= parts - {part}
    assert found == ENGINES
    packages = {
        path.parent.name if path.stem == "__init__" else path.stem for path in (SOURCE / "engines").iterdir()
    }
    assert {name.split("/")[0] for name in ENGINES} == packages - {
        "__init__",
        "engines",
        "README",
        "__pycache__",
    }


def test_no_import_circle() -> None:
    left = {name: set(imported) for name, imported in IMPORTS.items()}
    while leaves := {name for name, imported in left.items() if not imported & left.keys()}:
        for name in leaves:
            del left[name]
    assert not left


def test_modules_at_the_top_level() -> None:
    names = {path.stem for path in SOURCE.glob("*.py")}
    assert names == {"__init__", "__main__", "_moved_modules", "_version"}


def test_tests_mirror_the_packages() -> None:
    folders = {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders == {*PACKAGES, "cli", "conformance", "fuzz", "helpers", "project"}


def test_public_names() -> None:
    """Only public names show, and a module is never hidden by a function of the same name."""
    shown = {name for name in dir(ur) if not name.startswith("__")}
    assert shown == set(ur.__all__)
    for name in ("tracing.trace", "tracing.record", "tracing.watch", "inference.frozen", "layers.convert"):
        module = sys.modules[f"unrolled.{name}"]
        parent, _, child = name.rpartition(".")
        assert getattr(sys.modules[f"unrolled.{parent}"], child) is module


def test_no_cell_is_known_by_name() -> None:
    """Only cells/, the layers named after torch.nn's, io and the benchmark's custom cells may name a cell."""
    words = {"RAN", "STAR"}  # also English words, in lower case
    others = "|".join(set(ur.cells.__all__) - words)
    names = re.compile(rf"\b(?:(?i:{others})|{'|'.join(words)})\b")
    for path in FILES:
        if path.parent.name in ("cells", "io") or path.name in (
            "torch_layers.py",
            "__init__.py",
            "custom.py",
            "_moved_modules.py",
        ):
            continue
        tree = ast.parse(path.read_text())
        docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                      and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            text = {ast.Name: "id", ast.Attribute: "attr", ast.Constant: "value"}.get(type(node))
            value = getattr(node, text) if text else None
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.backends.cudnn.rnn":
                continue  # torch's name of a setting
            if isinstance(value, str) and id(node) not in docstrings:
                assert not names.search(value), f"{path.name}:{node.lineno} names a cell: {value!r}"


PAGE_FILES = sorted(path for path in (SOURCE / "page").iterdir() if path.suffix in (".js", ".css"))


@pytest.mark.parametrize("path", [*FILES, *TESTS, *PAGE_FILES], ids=lambda path: path.name)
def test_files_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    left = "TO" + "DO|FIX" + "ME|X" + "XX"
    assert not re.search(rf"\b({left})\b", text)


def test_functions_of_the_engines_are_short() -> None:
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path.name}: {node.name}")
        for path in FILES
        if path.is_relative_to(SOURCE / "engines") and path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert len(functions) > 500
    assert not [name for lines, name in functions if lines > 60]


def test_public_names_have_docstrings() -> None:
    for name in ur.__all__:
        assert (getattr(ur, name).__doc__ or "").strip(), name


def tracked_files() -> list[str]:
    command = ["git", "ls-files"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not names:
        pytest.skip("not a git checkout")
    return [name for name in names if (ROOT / name).exists()]  # not those deleted but not yet committed


def test_the_repository_holds_no_path_of_a_machine() -> None:
    for name in tracked_files():
        content = (ROOT / name).read_bytes()
        assert str(ROOT).encode() not in content, name
        assert len(content) < 2**20, name


def prose(path: Path) -> str:
    """The text of a file; of a notebook its cells, without their outputs."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_us_spelling() -> None:
    """As in PyTorch: color, optimizer, initialize."""
    british = re.compile(
        r"\b\w*(?:colour|behaviour|neighbour|optimis|initialis|normalis|vectoris|regularis|recognis|serialis"
        r"|organis|summaris|visualis|generalis|parametris|quantis|centred|catalogue|licence|grey)\w*",
        re.IGNORECASE,
    )
    allowed = {"regularised"}  # a module of earlier versions, which pickled layers refer to
    suffixes = {".py", ".md", ".h", ".cpp", ".js", ".css", ".html", ".toml", ".ipynb", ".cff", ".yml"}
    for name in tracked_files():
        if Path(name).suffix in suffixes and name != "tests/project/test_house.py":
            words = {word.lower() for word in british.findall(prose(ROOT / name))} - allowed
            assert not words, f"{name}: {sorted(words)}"


def recipe(target: str) -> str:
    command = ["make", "-n", target, "READY="]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_makefile_and_ci() -> None:
    for tool in ("pytest", "ruff check", "ruff format --check", "mypy"):
        assert tool in recipe("test")
        assert tool in recipe("test-all")
    assert "not slow" in recipe("test")
    assert "not slow" not in recipe("test-all")
    continuous_integration = (ROOT / ".ci" / "run").read_text()
    assert "make test" in continuous_integration
    assert "make test-rest" in continuous_integration
    assert "make lint" in (ROOT / ".pre-commit-config.yaml").read_text()
    for target in ("demo", "lint", "bench", "docs", "clean"):
        assert recipe(target)
