from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unrolled.engines.native.toolchain import cache


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
