"""The commands of the documentation that export, build and run C code."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.c_library import NEEDS_CC

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
SECTION = PAGE.partition("## As a C library")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^\$ (.*)$", SECTION, re.MULTILINE)


@pytest.mark.slow
@NEEDS_CC
def test_commands_of_the_page(tmp_path: Path) -> None:
    """In order. Those whose program or package is missing are left out."""
    [code] = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
    model = code.partition("\nlibrary = ")[0]
    (tmp_path / "effect.py").write_text(f"import torch\nimport unrolled as ur\n{model}")
    assert len(COMMANDS) == 11
    for command in COMMANDS:
        name, *arguments = shlex.split(command)
        missing = "ziglang" in arguments and importlib.util.find_spec("ziglang") is None
        if missing or (name in ("cmake", "ctest") and shutil.which(name) is None):
            continue
        program = str(Path(sys.executable).parent / name) if name in ("unrolled", "python") else name
        done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
