"""Tests of every published cell: engines, streams, traces, pages, ONNX export and torch.compile."""

from __future__ import annotations

import copy
import functools
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers import by_hand
from helpers.layer_pairs import (
    NEEDS_COMPILER,
    assert_close,
    assert_close_within_rounding,
    tensors,
    values_and_gradients,
)
from helpers.sampling import sample
from helpers.step_batch import BatchCompiler

TIME, BATCH, INPUT, HIDDEN = 5, 3, 8, 4  # with two directions, all layers of a stack have the same input size
SIZES = {"proj_size": 3, "depth": 2, "input_rank": 2, "hidden_rank": 3, "context_size": 3, "state_size": 3,
         "heads": 2}  # fmt: skip


def option_sets(cell: type[ur.Cell]) -> Iterator[dict[str, Any]]:
    """Yield the defaults, and then one option at a time with another value."""
    yield {}
    hints = typing.get_type_hints(cell)
    for name, default in cell.options().items():
        if typing.get_origin(hints[name]) is typing.Literal:
            yield from ({name: value} for value in typing.get_args(hints[name]) if value != default)
        elif hints[name] is bool:
            yield {name: not default}
        elif hints[name] is int:
            yield {name: SIZES.get(name, 2)}


CASES = {
    f"{name} {' '.join(f'{key}={value}' for key, value in options.items())}".strip(): (name, options)
    for name in ur.cells.__all__
    for options in option_sets(getattr(ur.cells, name))
}
PLAIN = [case for case, (_, options) in CASES.items() if not options]
SAMPLED = [case if case in PLAIN else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]
COMPILED = [pytest.param(case, marks=pytest.mark.slow) if case in PLAIN and case not in PLAIN[::14] else case
            for case in SAMPLED]  # fmt: skip


def layer_of(case: str, input_size: int = INPUT, dtype: torch.dtype = torch.float64, **shape: Any) -> Any:
    """Return a layer with random noise added to its initial parameters, so that none of them is zero."""
    name, options = CASES[case]
    layer = ur.Recurrent(getattr(ur.cells, name), input_size, HIDDEN, dtype=dtype, **options, **shape)
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


class Run:
    """A layer with an input and initial states. Calling it returns all results and gradients."""

    def __init__(self, case: str, **shape: Any) -> None:
        self.layer = layer_of(case, **shape)
        layer = self.layer
        dtype = next(layer.parameters()).dtype
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        self.x = torch.randn(TIME, BATCH, layer.input_size, dtype=dtype, requires_grad=True)
        sizes = layer._first.state_sizes().values()
        states = [torch.rand(count, BATCH, size, dtype=dtype, requires_grad=True) for size in sizes]
        self.state = tuple(states) if len(states) > 1 else states[0]
        self.leaves = [self.x, *states, *layer.parameters()]

    def __call__(self, **options: Any) -> list[Tensor]:
        """Return outputs, final states and, with ``all_states``, all states, followed by all gradients."""
        values = list(tensors(list(part.values()) if isinstance(part, dict) else part
                              for part in self.layer(self.x, self.state, **options)))  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in values]
        return values_and_gradients(values, [weight.to(self.x.dtype) for weight in weights], self.leaves)

    def exact(self) -> list[Tensor]:
        """Return the results of a call without options in float64."""
        twin = copy.copy(self)
        twin.layer = copy.deepcopy(self.layer).double()
        twin.x, *states = (leaf.detach().double().requires_grad_() for leaf in (self.x, *tensors(self.state)))
        twin.state = tuple(states) if len(states) > 1 else states[0]
        twin.leaves = [twin.x, *states, *twin.layer.parameters()]
        return twin()

    def streamed(self) -> Tensor:
        """Return the outputs of a stream that gets the sequence in pieces."""
        stream = ur.Stream(self.layer)
        with torch.no_grad():
            return torch.cat([stream(piece) for piece in self.x.split([1, 3, 1])])


RESETS = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]).bool()
ALL_OPTIONS: dict[str, Any] = {"lengths": [4, 5, 2], "resets": RESETS, "all_states": True}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[Run, Run | None, Run | None]]]:
    """Compile the kernels of all selected cases.

    Yields:
        For each case a layer in float32, a bidirectional stack in float64, and a layer with equal input and
        hidden sizes. The stack is None for every other cell, except in exhaustive runs. The last layer is
        None if its parameters have the same names.
    """
    torch.manual_seed(5)
    runs, items = {}, [item for item in request.session.items if item.path == request.path]
    selected = {item.callspec.params["case"] for item in items if compiled.__name__ in item.fixturenames}  # type: ignore[attr-defined]
    stacked = set(PLAIN) if len(selected) > len(PLAIN) else set(PLAIN[::2])
    with BatchCompiler() as batch:
        for number, case in enumerate(case for case in CASES if case in selected):
            single, square = Run(case, dtype=torch.float32), Run(case, input_size=HIDDEN)
            same_parameters = set(square.layer._first.shapes()) == set(single.layer._first.shapes())
            stack = Run(case, num_layers=2, bidirectional=True) if case in stacked else None
            with ur.engine("native"):  # collect the kernels that these calls need
                single()
                single.streamed()
                if stack is not None:
                    stack(**ALL_OPTIONS)
                if not same_parameters:
                    square()
            runs[case] = single, stack, None if same_parameters else square
            if number % 12 == 11:
                batch.start()
        batch.finish()
        yield runs


@NEEDS_COMPILER
@pytest.mark.parametrize("case", COMPILED)
def test_both_engines_agree(compiled: Any, case: str) -> None:
    """Inside ``engine("native")`` a fallback is an error."""
    single, stack, square = compiled[case]
    for run, options, exact in ((single, {}, single.exact), (stack, ALL_OPTIONS, None), (square, {}, None)):
        if run is None:
            continue
        with ur.engine("native"):
            actual = run(**options)
        recompute = functools.partial(run, **options)
        with ur.engine("reference"):
            assert_close_within_rounding(actual, recompute(), recompute, run.leaves, exact=exact)
        assert all(value.isfinite().all() for value in actual)


@NEEDS_COMPILER
@pytest.mark.parametrize("case", COMPILED)
def test_streams_are_bit_identical_to_whole_sequences(compiled: Any, case: str) -> None:
    single, _, _ = compiled[case]
    with ur.engine("native"), torch.no_grad():
        assert torch.equal(single.streamed(), single.layer(single.x)[0])


@pytest.mark.parametrize("case", sample(CASES, list(CASES)[::3]))
def test_trace_and_explain(case: str) -> None:
    layer = layer_of(case)
    x = torch.randn(TIME, BATCH, INPUT, dtype=torch.float64)
    t = ur.trace(layer, x)
    with torch.no_grad(), ur.engine("reference"):
        output, _, states = layer(x, all_states=True)
    for name, values in states.items():
        assert_close(t[name], values[0], 1e-12)
    assert_close(t[next(iter(states))], output, 1e-12)
    for name in t.names:
        line = t.explain(name, step=2, unit=0)
        assert float(line.rpartition("= ")[2].replace("−", "-")) == pytest.approx(
            t[name][2, 0, 0].item(), abs=1e-4
        )
        assert (
            by_hand.is_right(line, {other: t[other][2, 0].flatten().tolist() for other in t.names})
            is not False
        )
    docstring = inspect.getdoc(type(layer._first)) or ""
    for name in states:
        assert f"{name}: " in docstring, f"the docstring doesn't describe {name}"


@pytest.mark.parametrize("case", sample(PLAIN, PLAIN[::6]))
def test_page(case: str, tmp_path: Path) -> None:
    t = ur.trace(layer_of(case), torch.randn(3, 1, INPUT, dtype=torch.float64))
    t.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.exhaustive if k % 4 else ()) for k, case in enumerate(PLAIN)],
)
def test_onnx_export(case: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = layer_of(case, dtype=torch.float32), torch.randn(TIME, BATCH, INPUT)
    model = ur.io.to_onnx(layer).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with torch.no_grad(), ur.engine("reference"):
        expected = layer(x)[0]
    numpy.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_other_cell_compiles_in_one_graph() -> None:
    layers = torch.nn.ModuleList([layer_of(case, dtype=torch.float32) for case in PLAIN[::2]])

    def run_all(x: Tensor) -> list[Tensor]:
        return [layer(x)[0] for layer in layers]

    x = torch.randn(TIME, BATCH, INPUT)
    with torch.no_grad(), ur.engine("reference"):
        assert_close(torch.compile(run_all, fullgraph=True, backend="eager")(x), run_all(x), 1e-6)
