from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import unrolled as ur
from unrolled.engines import registry
from unrolled.engines.compiler import compiled_cell
from unrolled.engines.compiler.capture import capture
from unrolled.engines.native.toolchain import cache, kept_files


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel cache of one test, not created yet. No other variable affects the toolchain."""
    for name in ("CXX", "UNROLLED_KERNELS", "UNROLLED_ARCH", "UNROLLED_LOG"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "kernels"
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    return folder


@pytest.fixture
def build_log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """A function that returns the messages of the build stage that were logged since its last call."""
    caplog.set_level("INFO", "unrolled.build")

    def new_messages() -> list[str]:
        messages = caplog.messages[:]
        caplog.clear()
        return messages

    return new_messages


@pytest.fixture
def capture_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for captured steps. Compiled kernels are in the usual cache."""
    monkeypatch.setenv(kept_files.VARIABLE, "1")
    monkeypatch.setattr(kept_files, "_folder", lambda: tmp_path / "captures")
    (tmp_path / "captures").mkdir()
    return tmp_path / "captures"


@pytest.fixture
def captured_cells(capture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cells whose steps are captured during the test."""
    names: list[str] = []

    def counted(cell: ur.Cell, *arguments: Any, **options: Any) -> Any:
        names.append(type(cell.innermost).__name__)
        return capture(cell, *arguments, **options)

    monkeypatch.setattr(compiled_cell, "capture", counted)
    monkeypatch.setattr(registry, "_cells", {})
    return names
