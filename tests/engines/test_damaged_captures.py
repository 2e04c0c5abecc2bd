"""Stored captures that are damaged, wrong or writable by others: they are ignored and replaced."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kept_captures import (
    Plain,
    assert_as_by_reference,
    captured_plain_step,
    compile_cell,
    fresh_layer,
    results,
    stored,
)
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.engines.compiler.kept_captures import CaptureEntry
from unrolled.engines.compiler.stored_graph import to_data
from unrolled.engines.native.toolchain import kept_files

pytestmark = NEEDS_COMPILER


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Change the data of a file, with the right checksum."""
    data = json.loads(file.read_text().partition("\n")[2])
    text = json.dumps(change(data))
    file.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def damaged(data: Any, kind: str) -> Any:
    """Return the data of a captured step with one change."""
    calls = [node for node in data["nodes"] if node[0] == "call_function"]
    match kind:
        case "operator that doesn't exist":
            calls[0][2] = "aten.no_such_operator.default"
        case "operator of another library":
            calls[0][2] = "os.system.default"
        case "operator that writes":
            calls[0][2] = "aten.add_.Tensor"
        case "operator that reads a file":
            calls[0][2:4] = ["aten.from_file.default", ["/dev/zero", True, 3]]
        case "node that comes later":
            calls[0][3] = [{"node": len(data["nodes"])}]
        case "negative node":
            data["x"] = -1
        case "shape":
            data["nodes"][0][5]["shape"] = [30, 2]
        case "dtype":
            data["nodes"][0][5]["dtype"] = "nn"
        case "role":
            del data["new_states"]
        case "number of parameters":
            data["params"].pop()
        case "missing parameter":
            data["params"][0] = None
        case "paths":
            data["paths"] = [["1"], 2, True]
        case "no dictionary":
            return [data]
        case "another operation":
            calls[0][0] = "call_module"
    return data


@pytest.mark.parametrize(
    "kind",
    [
        "operator that doesn't exist", "operator of another library", "operator that writes",
        "operator that reads a file", "node that comes later", "negative node", "shape", "dtype", "role",
        "number of parameters", "missing parameter", "paths", "no dictionary", "another operation",
    ],
)  # fmt: skip
def test_wrong_data_is_replaced(kind: str, captured_cells: list[str], capture_folder: Path) -> None:
    cell, captured = Plain(2, 3), captured_plain_step()
    CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).save(captured)
    [file] = stored(capture_folder)
    content = file.read_text()
    rewrite(file, lambda data: damaged(data, kind))
    assert CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).load() is None
    if kind == "shape":
        assert to_data(compile_cell(cell).captured) == to_data(captured)
        assert captured_cells == ["Plain"]
        assert file.read_text() == content


@pytest.mark.parametrize(
    "kind", ["empty", "cut", "no checksum", "changed", "no JSON", "nested", "no text", "folder"]
)
def test_a_damaged_file_is_replaced(kind: str, captured_cells: list[str], capture_folder: Path) -> None:
    cell = Plain(2, 3)
    CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).save(captured_plain_step())
    [file] = stored(capture_folder)
    content = file.read_bytes()
    if kind == "folder":
        file.unlink()
        (file / "inside").mkdir(parents=True)
    elif kind in ("no JSON", "nested", "no text"):
        new = {"no JSON": b"{", "nested": b"[" * 10**5, "no text": b"\xff\xfe"}[kind]
        file.write_bytes(hashlib.sha256(new).hexdigest().encode() + b"\n" + new)
    else:
        changed = {
            "empty": b"",
            "cut": content[:-9],
            "no checksum": content[65:],
            "changed": content.replace(b"mul", b"add", 1),
        }
        file.write_bytes(changed[kind])
    assert CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).load() is None
    if kind in ("cut", "folder"):
        compile_cell(cell)
        assert captured_cells == ["Plain"]
        assert file.is_dir() or file.read_bytes() == content


@pytest.mark.slow
def test_wrong_random_numbers_are_planned_again(captured_cells: list[str], capture_folder: Path) -> None:
    results(fresh_layer(Plain))
    for wrong in ([["uniform", [1.5]]], [["other", [3]]], [3], "text", {"a": 1}, None):
        for file in stored(capture_folder):
            rewrite(file, lambda _, wrong=wrong: wrong)
        assert_as_by_reference(fresh_layer(Plain))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such permissions")
def test_a_file_that_others_can_write_is_not_read(capture_folder: Path) -> None:
    entry = CaptureEntry(Plain(2, 3), torch.float32, kept_files.KeptFiles())
    entry.save(captured_plain_step())
    [file] = stored(capture_folder)
    assert file.stat().st_mode & 0o777 == 0o600
    assert entry.load() is not None
    file.chmod(0o622)
    assert entry.load() is None
