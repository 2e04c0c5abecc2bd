"""The generated C++: short enough to read, and the same for all sizes."""

from __future__ import annotations

import torch

import unrolled as ur
from unrolled.engines.compiler.generated_code import without_parentheses
from unrolled.engines.compiler.kernel_builder import build_kernel
from unrolled.engines.native.backend import BACKEND, NativeCell
from unrolled.engines.native.codegen import emit
from unrolled.engines.native.cpp_functions import wrapped

MAX_LSTM_LINES = 120


def training_sources(cell: ur.Cell) -> list[str]:
    """Return the sources of the forward and the backward loop for training, without compiling them."""
    compiled = NativeCell(cell, torch.float32, BACKEND, torch.device("cpu"))
    forward = build_kernel(compiled._forward, compiled.dtype, whole=compiled._read_by_backward)
    backward = build_kernel(compiled._backward, compiled.dtype, shifted=compiled.captured.states)
    return [emit(compiled._forward, forward).source, emit(compiled._backward, backward).source]


def test_the_loops_of_an_lstm_are_short() -> None:
    sources = training_sources(ur.cells.LSTM(3, 5))
    assert sum(len(source.splitlines()) for source in sources) <= MAX_LSTM_LINES
    assert max(len(line) for source in sources for line in source.splitlines()) <= 110


def test_the_source_does_not_depend_on_the_sizes() -> None:
    small, large = (training_sources(ur.cells.GRU(*sizes)) for sizes in ((3, 5), (40, 64)))
    assert small == large


def test_parentheses_around_all_of_an_expression() -> None:
    assert without_parentheses("(a + (b * c))") == "a + (b * c)"
    assert without_parentheses("(a) + (b)") == "(a) + (b)"
    assert without_parentheses("f(a)") == "f(a)"


def test_long_lists_are_wrapped() -> None:
    items = [f"item{number} = {number * number}" for number in range(40)]
    lines = list(wrapped("const int ", items, ";"))
    assert len(lines) > 3
    assert max(map(len, lines)) <= 106
    assert " ".join(line.strip() for line in lines) == f"const int {', '.join(items)};"
    assert list(wrapped("using A = B<", [], ">;")) == ["using A = B<>;"]
