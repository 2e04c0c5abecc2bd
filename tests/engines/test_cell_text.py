"""Cells as text in torch graphs: round trips, errors, forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers.forks import exit_code_of_child
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.torch_ops import cell_text

INPUT, HIDDEN = 3, 4


class Leaky(ur.Cell):
    """A cell with an option."""

    weight = ur.Param("hidden", "input")
    leak: float = 0.5

    def step(self, x: Tensor, h: Tensor) -> Any:
        return (1 - self.leak) * h + self.leak * torch.tanh(x @ self.weight.T)


def create_local_cell() -> ur.Cell:
    """Create a cell whose class no other process can import."""

    class Local(Leaky):
        pass

    return Local(INPUT, HIDDEN)


def forget(text: str) -> None:
    """Let this process behave like another one, which hasn't serialized the cell."""
    cell_text._cells.pop(text)
    cell_text._recent.pop(text)


def test_a_cell_can_be_restored_from_its_text() -> None:
    cell = Leaky(INPUT, HIDDEN, leak=0.125)
    text = cell_text.serialize_cell(cell, False)
    assert '"leak": 0.125' in text
    forget(text)
    restored = cell_text.deserialize_cell(text)
    assert restored.values.digest == step_values(cell).digest
    assert restored.cell.training is False


def test_a_local_class_can_be_restored_only_in_its_process() -> None:
    cell = create_local_cell()
    text = cell_text.serialize_cell(cell, True)
    assert isinstance(cell_text.deserialize_cell(text).cell, type(cell))
    forget(text)
    with pytest.raises(ValueError, match="Local.*exists only in the process that created the graph"):
        cell_text.deserialize_cell(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("antigravity:Cell", "the cell Cell of the module antigravity: import antigravity first"),
        ("unrolled:engine", "the cell engine of the module unrolled, but the module has no such cell"),
    ],
)
def test_a_text_imports_no_module(name: str, message: str) -> None:
    text = cell_text.serialize_cell(Leaky(INPUT, HIDDEN), False)
    with pytest.raises(ValueError, match=message):
        cell_text.deserialize_cell(text.replace("test_cell_text:Leaky", name))
    assert "antigravity" not in sys.modules


def test_a_forked_child_can_serialize_cells_while_a_thread_of_its_parent_does() -> None:
    cell = create_local_cell()
    assert exit_code_of_child(cell_text._lock, lambda: cell_text.serialize_cell(cell, True)) == 0


def test_the_text_depends_on_what_the_step_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile stores graphs by their texts, and a user may edit the step between two runs.
    before = cell_text.serialize_cell(Leaky(INPUT, HIDDEN), False)
    assert cell_text.serialize_cell(Leaky(INPUT, HIDDEN), False) == before
    monkeypatch.setattr(Leaky, "step", lambda self, x, h: torch.tanh(x @ self.weight.T) - self.leak * h)
    assert cell_text.serialize_cell(Leaky(INPUT, HIDDEN), False) != before


@pytest.mark.slow
def test_the_text_is_the_same_in_every_process() -> None:
    source = (
        "import unrolled as ur; from unrolled.engines.torch_ops import cell_text;"
        "print(*(cell_text.serialize_cell(cell(8, 8), False) for cell in (ur.cells.LSTM, ur.cells.RGLRU)))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
