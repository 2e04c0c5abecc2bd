"""Captured steps that are read from the kernel cache: nothing is captured, with the same code and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import unrolled as ur
from helpers.kept_captures import (
    Plain,
    assert_as_by_reference,
    compile_cell,
    define,
    new_process,
    results,
    run_cells,
    stored,
)
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.engines import draws
from unrolled.engines.compiler.compiled_cell import CompiledCell

pytestmark = NEEDS_COMPILER
CELLS = sorted(name for name in ur.cells.__all__ if isinstance(getattr(ur.cells, name), type))
FAST = ("GRU", "MinGRU", "SLSTM")


def sources(compiled: CompiledCell) -> list[str]:
    """Return the C++ of all loops of a cell."""
    loops: Any = [compiled._generated_for_inference, *compiled._generated_for_training]
    return [loop.spec.source for loop in loops]


@pytest.mark.slow
@pytest.mark.parametrize("names", [FAST[:1], tuple(CELLS)], ids=len)
def test_a_warm_process_captures_nothing_and_gives_the_same_bits(
    names: tuple[str, ...], capture_folder: Path
) -> None:
    cold, (captured, _) = run_cells(names, capture_folder, warm=False)
    assert captured == list(names)
    assert len(stored(capture_folder)) == 2 * len(
        names
    )  # the captured step, and the random numbers that it draws
    warm, about = run_cells(names, capture_folder, warm=True)
    assert about == [[], []]
    assert warm == cold


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CELLS]
)
def test_a_stored_capture_gives_the_same_code(name: str, captured_cells: list[str]) -> None:
    cell = getattr(ur.cells, name)(6, 8)
    new, old = compile_cell(cell), compile_cell(cell)
    assert captured_cells == [name]
    assert sources(new) == sources(old)
    assert new.captured.paths == old.captured.paths
    assert [node.name for node in new.captured.graph.nodes] == [
        node.name for node in old.captured.graph.nodes
    ]


def test_a_step_that_is_the_same_in_both_modes_is_stored_once(
    captured_cells: list[str], capture_folder: Path
) -> None:
    layer = ur.Recurrent(Plain, 2, 3)
    results(layer)
    new_process()
    layer = ur.Recurrent(Plain, 2, 3).eval()
    results(layer)
    assert captured_cells == ["Plain"]

    class Noisy(Plain):
        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return super().step(x, h) * (2 if self.training else 1)

    for training in (True, False, True, False):
        new_process()
        assert_as_by_reference(ur.Recurrent(Noisy, 2, 3).train(training))
    assert captured_cells == ["Plain", "Noisy", "Noisy"]


def test_random_numbers_and_extra_inputs(captured_cells: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = define("torch.nn.functional.dropout(torch.tanh(z), 0.5, self.training)")
    planned: list[ur.Cell] = []
    plan = draws._plan

    def counted(cell: ur.Cell, *arguments: Any) -> Any:
        planned.append(cell)
        return plan(cell, *arguments)

    monkeypatch.setattr(draws, "_plan", counted)
    for _ in range(2):
        new_process()
        layer = ur.Recurrent(dropout, 4, 5)
        assert_as_by_reference(layer)
    assert captured_cells == ["Own"]
    assert len(planned) == 1
