"""Python values that a step reads: a change of one has an effect in every engine."""

from __future__ import annotations

import copy
import gc
import importlib
import linecache
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import graph_module
from torch.fx.experimental.proxy_tensor import make_fx

import unrolled as ur
from helpers.changing_cells import CHANGES
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.sampling import sample
from unrolled.engines import registry
from unrolled.engines.compiler import capture
from unrolled.engines.compiler.step_values import MAX_VERSIONS, StepValues
from unrolled.engines.torch_ops import cell_text

INPUT, HIDDEN = 3, 4
X = torch.randn(5, 2, INPUT, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def create_layer(cell: Any, **options: Any) -> ur.Recurrent:
    torch.manual_seed(1)
    return ur.Recurrent(cell, INPUT, HIDDEN, dtype=torch.float64, **options)


def by_reference(layer: Any) -> Tensor:
    with ur.engine("reference"), torch.no_grad():
        output: Tensor = layer(X)[0]
    return output


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    change = CHANGES[name]
    module = change.create_module()
    layer = create_layer(module.Tested)
    values, before = StepValues(layer._first), by_reference(layer)
    assert values._search.watched.unchanged()
    assert values.digest == StepValues(copy.copy(layer)._first).digest
    change.apply(module, layer)
    assert not torch.equal(by_reference(layer), before)  # the change has an effect
    assert not values.unchanged()
    assert StepValues(layer._first).digest != values.digest


def outputs(layer: Any, compiled: Callable[..., Any], stream: ur.Stream) -> dict[str, Tensor]:
    """Return the output of each way to run a layer."""
    stream.reset()
    with torch.no_grad(), ur.engine("native"):
        with ur.frozen(layer):
            frozen = layer(X)[0]
        results = {
            "native": layer(X)[0],
            "frozen": frozen,
            "stream": stream(X),
            "vmap": torch.vmap(lambda x: layer(x)[0])(X[None])[0],
            "make_fx": make_fx(lambda x: layer(x)[0])(X)(X),
            "jit.trace": torch.jit.trace(layer, X)(X)[0],
            "trace": ur.trace(layer, X).output,
            "compile": compiled(X)[0],
        }
    return results


def assert_all_equal(results: dict[str, Tensor], expected: Tensor) -> None:
    for name, output in results.items():
        torch.testing.assert_close(output, expected, msg=lambda message, name=name: f"{name}: {message}")


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
@pytest.mark.parametrize(
    "name",
    [name if name == "class attribute" else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES],
)
def test_a_change_has_an_effect_in_every_engine(name: str) -> None:
    change = CHANGES[name]
    module = change.create_module()
    layer = create_layer(module.Tested)
    torch._dynamo.reset()  # whose limit of recompilations counts those of all layers
    compiled, stream = torch.compile(layer, backend="eager", fullgraph=True), ur.Stream(layer)
    before = outputs(layer, compiled, stream)
    assert_all_equal(before, by_reference(layer))
    change.apply(module, layer)
    assert not torch.equal(by_reference(layer), before["native"])
    assert_all_equal(outputs(layer, compiled, stream), by_reference(layer))


def define_snake(sign: float) -> Any:
    """Define a class anew under the same name, as a cell of a notebook does."""
    module = types.ModuleType("notebook")
    sys.modules["notebook"] = module

    class Snake(ur.Cell):
        w = ur.Param("hidden", "input")

        def step(self, x: Tensor, h: Tensor) -> Any:
            return torch.tanh(x @ self.w.T + sign * h)

    Snake.__module__, Snake.__qualname__ = "notebook", "Snake"
    module.Snake = Snake  # type: ignore[attr-defined]
    return Snake


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
@pytest.mark.slow
def test_a_class_that_is_defined_again_runs_its_new_step_and_graphs_keep_the_old_one() -> None:
    graphs: list[tuple[Any, Tensor]] = []
    torch._dynamo.reset()
    for sign in (1.0, -1.0):
        layer = create_layer(define_snake(sign))
        expected = by_reference(layer)
        assert_all_equal(
            outputs(layer, torch.compile(layer, backend="eager", fullgraph=True), ur.Stream(layer)), expected
        )
        exported = torch.export.export(layer, (X,)).module()
        graphs += [(exported, expected), (torch.jit.trace(layer, X), expected)]
    assert not torch.equal(graphs[0][1], expected)
    for graph, expected in graphs:
        torch.testing.assert_close(graph(X)[0], expected)


RELOADED = """
import torch
import unrolled as ur

SCALE = {scale}

class Reloaded(ur.Cell):
    w = ur.Param("hidden", "input")

    def step(self, x, h):
        return torch.tanh(x @ self.w.T {sign} SCALE * h)
"""


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_a_reloaded_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which a change within a second misses
    file = tmp_path / "reloaded_cell.py"
    file.write_text(RELOADED.format(scale=0.5, sign="+"))
    module = importlib.import_module("reloaded_cell")
    layers = [create_layer(module.Reloaded)]
    torch._dynamo.reset()
    for scale, sign in ((0.5, "+"), (0.5, "-"), (0.75, "-")):
        file.write_text(RELOADED.format(scale=scale, sign=sign))
        linecache.checkcache()
        importlib.reload(module)
        layers.append(create_layer(module.Reloaded))
        for layer in layers:  # the old classes keep their step, which reads the new value of the global
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            assert_all_equal(outputs(layer, compiled, ur.Stream(layer)), by_reference(layer))
    plus, minus = by_reference(layers[0]), by_reference(layers[-1])
    assert not torch.allclose(plus, minus)
    sys.modules.pop("reloaded_cell")


class Looks(ur.Cell):
    """A cell with an option of any type."""

    w = ur.Param("hidden", "input")
    option: object = None

    def step(self, x: Tensor, h: Tensor) -> Any:
        return torch.tanh(x @ self.w.T + h * self.scale())

    def scale(self) -> float:
        option: Any = self.option
        if isinstance(option, np.ndarray):
            return float(option[option.size // 2])
        return float(option() if callable(option) else option)


class Same:
    """An object that doesn't show its value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return "Same()"


class Shown(float):
    def __repr__(self) -> str:
        return "Shown()"


def array_with(value: float) -> np.ndarray:
    array = np.zeros(2001)
    array[1000] = value
    return array


@NEEDS_COMPILER
@pytest.mark.parametrize("option", sample([array_with, Same, Shown, lambda value: lambda: value]))
def test_options_that_look_the_same_are_told_apart(option: Callable[[float], Any]) -> None:
    layers = [create_layer(Looks, option=option(value)) for value in (0.25, 0.75)]
    with torch.no_grad():
        for layer in layers:
            expected = by_reference(layer)
            torch.testing.assert_close(layer(X)[0], expected)
            torch.testing.assert_close(torch.vmap(lambda x, layer=layer: layer(x)[0])(X[None])[0], expected)
    assert not torch.equal(by_reference(layers[0]), by_reference(layers[1]))


@NEEDS_COMPILER
def test_a_value_that_changes_all_the_time_is_not_compiled_again_and_again() -> None:
    layer = create_layer(Looks, option=0.0)
    count = len(registry._cells)
    with torch.no_grad():
        for k in range(MAX_VERSIONS):
            layer._first.option = k / 100
            registry.compiled(layer._first, torch.float64)
        layer._first.option = 0.5
        with pytest.warns(
            UserWarning, match=rf"have changed {MAX_VERSIONS} times, now self.option: make a value"
        ):
            output = layer(X)[0]
        torch.testing.assert_close(output, by_reference(layer))
    assert len(registry._cells) <= count + 2 * MAX_VERSIONS


@NEEDS_COMPILER
def test_a_step_that_changes_a_value_that_it_reads_runs_by_reference() -> None:
    class Counting(Looks):
        calls: object = None

        def step(self, x: Tensor, h: Tensor) -> Any:
            self.calls["n"] += 1  # type: ignore[index]
            return super().step(x, h)

    layer = create_layer(Counting, option=0.5, calls={"n": 0})
    with (
        pytest.warns(UserWarning, match=r"it changes a Python value that it reads: self.calls\['n'\]"),
        torch.no_grad(),
    ):
        output = layer(X)[0]
    layer(X)  # looks for random draws, which runs the step, too
    before = layer._first.calls["n"]  # type: ignore[attr-defined]
    torch.testing.assert_close(layer(X)[0], output)
    assert layer._first.calls["n"] == before + len(X)  # type: ignore[attr-defined]


@pytest.mark.slow
@NEEDS_COMPILER
def test_gradients_of_gradients_refuse_a_value_that_has_changed() -> None:
    layer = create_layer(Looks, option=0.5)
    x = X.clone().requires_grad_()
    loss = layer(x)[0].sum()
    layer._first.option = 0.25
    with pytest.raises(RuntimeError, match=r"Looks: self.option has changed since the graph was created"):
        torch.autograd.grad(loss, x, create_graph=True)


@NEEDS_COMPILER
def test_a_graph_keeps_its_equations_or_is_refused() -> None:
    layer = create_layer(Looks, option=0.5)
    graph = torch.export.export(layer, (X,)).module()
    expected = by_reference(layer)
    layer._first.option = 0.25
    torch.testing.assert_close(graph(X)[0], expected)
    with pytest.raises(
        RuntimeError, match=r"self.option has changed .* wasn't compiled for torch.float32 before"
    ):
        graph.float()(X.float())


def test_caches_of_cells_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_text, "_MAX_CELLS", 3)
    cells = [Looks(INPUT, HIDDEN, option=float(k)) for k in range(10)]
    texts = [cell_text.serialize_cell(cell, False) for cell in cells]
    assert len(cell_text._recent) == 3
    assert [cell_text.deserialize_cell(text).cell.unbound for text in texts] == cells  # while they are alive
    old = weakref.ref(cells[0])
    del cells
    gc.collect()
    assert old() is None


@NEEDS_COMPILER
def test_compiled_cells_that_are_not_used_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MAX_CELLS", 2)
    monkeypatch.setattr(registry, "_cells", {})
    cells = [Looks(INPUT, HIDDEN, option=k / 10) for k in range(3)]
    compiled = [registry.compiled(cell, torch.float64) for cell in cells]
    assert len(registry._cells) == 2
    assert [registry.compiled(cell, torch.float64) for cell in cells] == compiled  # a cell keeps its own
    assert registry.compiled(Looks(INPUT, HIDDEN, option=0.2), torch.float64) is compiled[-1]


def test_torch_keeps_nothing_of_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_MAX_CACHED_RESULTS", 20)
    code = len(graph_module._loader.eval_cache)
    for option in (0.1, 0.2):
        capture.capture(Looks(INPUT, HIDDEN, option=option), torch.float64)
        assert len(graph_module._loader.eval_cache) == code
        assert len(FakeTensorMode.cache) <= 20
