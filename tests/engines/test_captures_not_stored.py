"""Captured steps that aren't stored, because another process may capture something else."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from helpers.kept_captures import Plain, captured_plain_step, compile_cell, define, stored
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.engines.compiler import kept_captures
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.kept_captures import CaptureEntry
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.native.toolchain import kept_files

pytestmark = NEEDS_COMPILER

NOT_STORED = {
    "environment variable": ("z * float(os.environ.get('GAIN', '1'))", "import os"),
    "function that reads one": ("z * float(getenv('GAIN', '1'))", "from os import getenv"),
    "file": ("z * (1.0 if open('/dev/null').close() is None else 2.0)", ""),
    "time": ("z * (2.0 if now() < 0 else 1.0)", "from time import time as now"),
    "setting of torch": ("z * (2.0 if torch.get_num_threads() > 10**6 else 1.0)", ""),
    "backend of torch": ("z * (2.0 if torch.backends.mkldnn.is_available() else 1.0)", ""),
    "registered operator": ("torch.ops.aten.tanh(z)", ""),
    "installed package": ("einops.rearrange(z, 'b h -> b h')", "einops = pytest.importorskip('einops')"),
    "module of builtins": ("builtins.abs(z)", "import builtins"),
    "class of an extension": (
        "C.f(z)",
        "import importlib.machinery, types\n"
        "own_extension = sys.modules['own_extension'] = types.ModuleType('own_extension')\n"
        "own_extension.__file__ = 'own_extension' + importlib.machinery.EXTENSION_SUFFIXES[0]\n"
        "class C:\n    __module__ = 'own_extension'\n    f = torch.tanh",
    ),
    "object without values": ("z * (1.0 if marker else 2.0)", "marker = object()"),
    "tensor": ("z * gain", "gain = torch.ones(3)"),
    "module that isn't imported yet": ("later(z)", "def later(z):\n    import colorsys\n    return z"),
    "module that computes its attributes": (
        "z * values.gain",
        "import types\nvalues = types.ModuleType('values')\nvalues.__getattr__ = lambda name: 1.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_STORED)
def test_a_step_that_may_differ_in_other_processes_is_not_stored(
    name: str, captured_cells: list[str], capture_folder: Path
) -> None:
    body, before = NOT_STORED[name]
    sys.modules.pop("colorsys", None)
    cell = define(f"torch.tanh({body})", before=f"import pytest, sys\n{before}")(2, 3)
    assert step_values(cell).only_here
    CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).save(captured_plain_step())
    assert not stored(capture_folder)
    if name == "file":
        for count in (1, 2):
            compile_cell(cell)
            assert captured_cells == ["Own"] * count
        assert not stored(capture_folder)


def test_the_state_of_torch_may_change_a_capture(
    captured_cells: list[str], capture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Count(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with Count():
        compile_cell(Plain(2, 3))
    with torch.autocast("cpu"), pytest.raises(UnsupportedError, match="bfloat16"):
        compile_cell(Plain(2, 3))
    handle = register_module_forward_hook(lambda *_: None)
    try:
        compile_cell(Plain(2, 3))
    finally:
        handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tanh", lambda value: torch.sigmoid(value))
        compile_cell(Plain(2, 3))
    monkeypatch.setenv(kept_files.VARIABLE, "0")
    compile_cell(Plain(2, 3))
    assert len(captured_cells) == 6  # with autocast, also without the backward
    assert not stored(capture_folder)


def test_a_step_that_cannot_be_compiled_is_not_stored(
    captured_cells: list[str], capture_folder: Path
) -> None:
    """Its error names the line, which may be another one in the next process."""
    refused = define(
        "torch.tanh(z) + torch.linalg.eigvals(z.unsqueeze(-1) * z.unsqueeze(1)).real.sum(-1, True)"
    )
    only_forward = define("torch.cholesky_inverse(torch.eye(3) + 0 * z.unsqueeze(1))[..., 0] + z")
    for cls in (refused, only_forward):
        with contextlib.suppress(UnsupportedError):
            compile_cell(cls(2, 3))
    assert not stored(capture_folder)
    assert set(captured_cells) == {"Own"}


def test_sources_that_change_while_a_process_runs(
    captured_cells: list[str], capture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process still runs the old version."""
    monkeypatch.setattr(kept_captures, "_IMPORTED_AT", 0)
    kept_captures._environment.cache_clear()
    try:
        compile_cell(Plain(2, 3))
    finally:
        kept_captures._environment.cache_clear()
    assert not stored(capture_folder)


@pytest.mark.parametrize("kind", ["without sources", "with other files", "in an archive", "missing"])
def test_an_application_without_source_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Any = tmp_path / "unrolled"
    if kind != "missing":
        for part in ("cells", "engines"):
            (package / part).mkdir(parents=True)
            (package / part / "data.h").touch()
            if kind == "with other files":
                (package / part / "other.py").touch()
    if kind == "in an archive":
        package = zipfile.Path(shutil.make_archive(str(tmp_path / "app"), "zip", tmp_path), "unrolled/")
    monkeypatch.setattr(kept_captures, "files", lambda name: package)
    monkeypatch.setattr(kept_captures, "_IMPORTED_AT", time.time() + 10)
    assert kept_captures._environment.__wrapped__() is None
