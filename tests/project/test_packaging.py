"""The source distribution, the wheel, and applications that contain the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipapp
import zipfile
from pathlib import Path

import pytest

from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import run_python

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "unrolled"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def test_the_source_distribution_holds_what_its_readme_mentions(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    readme = (ROOT / "README.md").read_text()
    mentioned = {path for path in re.findall(r"\]\(([^)#:]+)\)", readme) if "://" not in path}
    mentioned |= {path.rstrip("/") for path in re.findall(r"`((?:\w+/)+[\w.]*)`", readme)}
    mentioned |= set(re.findall(r"\b((?:examples|notebooks|docs|benchmarks)/[\w/]+\.\w+)", readme))
    assert {"CONTRIBUTING.md", "LICENSE", "docs/pictures/page.png"} <= mentioned
    existing = {path for path in mentioned if (ROOT / path).is_file()}
    assert {"Makefile", "constraints.txt", "pyproject.toml", *existing} <= names
    folders = {path for path in mentioned if (ROOT / path).is_dir()} - {"build/docs"}  # made by make docs
    assert all(any(name.startswith(f"{folder}/") for name in names) for folder in folders)


def test_the_description_of_the_wheel_has_no_broken_pictures_or_links(distributions: Path) -> None:
    (archive,) = distributions.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = wheel.read(name).decode()
    description = metadata.split("\n\n", 1)[1]
    assert description.startswith("# unrolled\n")
    assert "The license is Apache-2.0" in description
    assert not re.findall(r"!\[|\]\((?!https?:)", description)
    python = re.findall(r"^Classifier: Programming Language :: Python :: (3\.\d+)$", metadata, re.MULTILINE)
    assert "3.11" in python


def test_the_wheel_holds_every_file_of_the_package(distributions: Path) -> None:
    (archive,) = distributions.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        names = {name.removeprefix("unrolled/") for name in wheel.namelist()}
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names


APPLICATION = """
import sys
import torch
import unrolled as ur

assert "app.pyz" in ur.__file__
layer, x = ur.LSTM(3, 4), torch.randn(5, 1, 3)
outputs = []
for engine in ("native", "reference"):
    with ur.engine(engine):
        output = layer(x)[0]
        outputs.append((output, *torch.autograd.grad(output.sum(), layer.parameters())))
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*outputs))
assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], outputs[0][0])
trace = ur.trace(layer, x)
trace.to_html(sys.argv[1])
print(trace.explain("h", 1, 0))
"""


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_an_application_in_a_zip_file(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "app" / "unrolled", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "app" / "__main__.py").write_text(APPLICATION)
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz")
    page = tmp_path / "page.html"
    line = [sys.executable, str(tmp_path / "app.pyz"), str(page)]
    environment = {**os.environ, "UNROLLED_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tanh(" in done.stdout
    assert "start();" in page.read_text()
    assert list((tmp_path / "cache").glob("*.so"))


@pytest.mark.slow
def test_looking_for_a_compiler_does_not_start_a_frozen_application_again(tmp_path: Path) -> None:
    """In such an application, sys.executable is the application."""
    pytest.importorskip("ziglang")
    starts, program = tmp_path / "starts", tmp_path / "application"
    program.write_text(f"#!/bin/sh\necho started >> {starts}\n")
    program.chmod(0o755)
    code = f"""
    import sys
    sys.frozen, sys.executable = True, {str(program)!r}
    from unrolled.engines.native.toolchain.compiler import compilers
    print([compiler.title for compiler in compilers()])
    """
    done = run_python(code, PATH="", CXX=None)
    assert "zig" in done.stdout, done.stderr
    assert not starts.exists()


def test_an_application_without_the_data_files_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "unrolled", ignore=shutil.ignore_patterns("__pycache__", "include"))
    code = "import torch, unrolled as ur\nur.GRU(2, 3)(torch.randn(1, 1, 2))"
    done = run_python(code, PYTHONPATH=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: the C++ files of unrolled can't be read"), done.stderr
    assert "--collect-data unrolled" in last


@pytest.mark.parametrize(
    ("missing", "code", "message"),
    [
        ("onnx", "ur.io.to_onnx(ur.GRU(2, 3))", "to_onnx needs onnx: pip install 'unrolled[onnx]'"),
        ("onnx", "ur.io.from_onnx('x.onnx')", "from_onnx needs onnx: pip install 'unrolled[onnx]'"),
        (
            "onnxscript",
            "ur.io.to_onnx(ur.Recurrent(ur.cells.MGU, 2, 3))",
            "to_onnx of MGU as a Scan needs onnxscript: pip install 'unrolled[onnx]'",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(missing: str, code: str, message: str) -> None:
    program = f"""
    import sys

    class Finder:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == {missing!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Finder())
    import unrolled as ur
    import unrolled.io
    {code}
    """
    last = run_python(program).stderr.strip().splitlines()[-1]
    assert last == f"ImportError: {message}"
