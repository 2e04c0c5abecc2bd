"""Keys of stored captures: what a captured step depends on is captured again after a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers.changing_cells import CHANGES
from helpers.kept_captures import Plain, assert_as_by_reference, compile_cell, define, fresh_layer
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.sampling import sample
from unrolled.cells.wrappers import wrap
from unrolled.engines.compiler import kept_captures
from unrolled.engines.compiler.capture import capture
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.compiler.stored_graph import to_data

pytestmark = NEEDS_COMPILER


def entry_name(cell: ur.Cell, dtype: torch.dtype = torch.float32, training: bool = False) -> str | None:
    """Return the name of the file of a cell, None if it has none."""
    return kept_captures._name("capture", cell, training, dtype)


@pytest.mark.parametrize(
    "name",
    sample(CHANGES, ["option"]),
)
def test_a_change_is_captured_anew(name: str, captured_cells: list[str]) -> None:
    module = CHANGES[name].create_module()
    layer = ur.Recurrent(module.Tested, 3, 4)
    compile_cell(layer._first)
    is_stored = not step_values(layer._first).only_here
    compile_cell(layer._first)
    assert len(captured_cells) == (1 if is_stored else 2)
    CHANGES[name].apply(module, layer)
    changed = compile_cell(layer._first)
    assert len(captured_cells) == (2 if is_stored else 3)
    assert to_data(changed.captured) == to_data(capture(layer._first, torch.float32))
    assert_as_by_reference(layer)


@pytest.mark.slow
def test_a_cell_without_source_is_known_by_its_code(captured_cells: list[str]) -> None:
    """A notebook may define a class again, in the same way or in another one."""
    for count, body in (
        (1, "torch.tanh(z)"),
        (1, "torch.tanh(z)"),
        (2, "torch.sigmoid(z)"),
        (2, "torch.tanh(z)"),
    ):
        assert_as_by_reference(fresh_layer(define(body, module="__main_of_a_notebook__")))
        assert len(captured_cells) == count


def test_code_outside_of_the_class() -> None:
    """Helper functions, base classes, default arguments, closures and what these read."""
    versions = []
    for factor in (1.0, 2.0):
        versions += [
            define("f(z)", before=f"def f(z): return torch.tanh({factor} * z)"),
            define("f(z)", before=f"def g(z): return {factor} * z\ndef f(z): return torch.tanh(g(z))"),
            define("f(z)", before=f"def f(z, a={factor}): return torch.tanh(a * z)"),
            define("f(z)", before=f"def make(a): return lambda z: torch.tanh(a * z)\nf = make({factor})"),
            define("f(z)", before=f"K = [{factor}]\ndef f(z): return torch.tanh(K[0] * z)"),
            define(
                "self.f(z)",
                before=f"class M:\n    def f(self, z): return torch.tanh({factor} * z)",
                members="f = M.f",
            ),
            define(
                "f(z)",
                before=f"import numpy\nA = numpy.array({factor})\ndef f(z): return torch.tanh(float(A) * z)",
            ),
        ]
    names = [entry_name(cls(2, 3)) for cls in versions]
    assert len(set(names) - {None}) == len(versions)
    assert names == [entry_name(cls(2, 3)) for cls in versions]


def test_sizes_options_dtypes_modes_and_wrappers() -> None:
    def names() -> list[str | None]:
        cells = [Plain(2, 3), Plain(2, 4), Plain(3, 3), Plain(2, 3, gain=2.0), Plain(2, 3, gain=2)]
        cells += [wrap(cells[0], (("Masked", ()),)), wrap(cells[0], (("Every", (1,)),))]
        cells += [wrap(cells[0], (("Zoned", ((rate,), drawn)),)) for rate in (0.25, 0.5) for drawn in (0, 1)]
        result = [entry_name(cell) for cell in cells]
        result += [entry_name(cells[0], torch.float64), entry_name(cells[0], training=True)]
        torch.set_default_dtype(torch.float64)
        try:
            return [*result, entry_name(cells[0])]
        finally:
            torch.set_default_dtype(torch.float32)

    assert names() == names()
    assert len(set(names()) - {None}) == 14


@pytest.mark.slow
def test_tensors_that_are_attributes(captured_cells: list[str]) -> None:
    class Scaled(Plain):
        def __init__(self, *sizes: int, **options: Any) -> None:
            super().__init__(*sizes, **options)
            self.scale = torch.tensor([1.0, 2.0, 3.0])
            self.order = torch.tensor([2, 0, 1])

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return super().step(x, h)[:, self.order] * self.scale * torch.tensor([0.5, 1.0, 2.0])

    for order, scale, count in (
        ([2, 0, 1], 1.0, 1),
        ([2, 0, 1], 3.0, 1),
        ([0, 2, 1], 1.0, 2),
        ([0, 2, 1], 3.0, 2),
    ):
        layer = fresh_layer(Scaled)
        layer._first.order = torch.tensor(order)
        layer._first.scale = scale * torch.ones(3)
        with torch.inference_mode():
            layer(torch.randn(1, 1, 2))
        assert_as_by_reference(layer)
        assert len(captured_cells) == count


def test_a_newer_version_of_this_package(captured_cells: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = kept_captures._environment()
    assert environment is not None
    compile_cell(Plain(2, 3))
    monkeypatch.setattr(kept_captures, "_environment", lambda: (*environment, "newer"))
    compile_cell(Plain(2, 3))
    assert len(captured_cells) == 2
