"""What every cell of the package gets, also one that is added: each reader reads each of them."""

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
from helpers.layer_pairs import NEEDS_COMPILER, assert_as_near, assert_close, tensors, with_gradients
from helpers.step_batch import Batch

TIME, BATCH, INPUT, HIDDEN = 5, 3, 8, 4  # both layers of a stack of two directions have one input size
SIZES = {"proj_size": 3, "depth": 2, "input_rank": 2, "hidden_rank": 3, "context_size": 3, "state_size": 3,
         "heads": 2}  # fmt: skip


def choices(cell: type[ur.Cell]) -> Iterator[dict[str, Any]]:
    """The options of a cell that change its equations, one by one away from their defaults."""
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
    for options in choices(getattr(ur.cells, name))
}
PLAIN = [case for case, (_, options) in CASES.items() if not options]
SAMPLED = [case if case in PLAIN else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]


def layer_of(case: str, input_size: int = INPUT, dtype: torch.dtype = torch.float64, **shape: Any) -> Any:
    """A layer with parameters that all count, whatever they begin as."""
    name, options = CASES[case]
    layer = ur.Recurrent(getattr(ur.cells, name), input_size, HIDDEN, dtype=dtype, **options, **shape)
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


class Run:
    """A layer, and an input and states for it."""

    def __init__(self, case: str, **shape: Any) -> None:
        self.layer = layer_of(case, **shape)
        layer = self.layer
        dtype = next(layer.parameters()).dtype
        lanes = layer.num_layers * (2 if layer.bidirectional else 1)
        self.x = torch.randn(TIME, BATCH, layer.input_size, dtype=dtype, requires_grad=True)
        sizes = layer._first.state_sizes().values()
        states = [torch.rand(lanes, BATCH, size, dtype=dtype, requires_grad=True) for size in sizes]
        self.state = tuple(states) if len(states) > 1 else states[0]
        self.leaves = [self.x, *states, *layer.parameters()]

    def __call__(self, **asked: Any) -> list[Tensor]:
        """Outputs, final states and, where they are asked for, all states; and every gradient."""
        values = list(tensors(list(part.values()) if isinstance(part, dict) else part
                              for part in self.layer(self.x, self.state, **asked)))  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in values]
        return with_gradients(values, [weight.to(self.x.dtype) for weight in weights], self.leaves)

    def exact(self) -> list[Tensor]:
        """Those of a plain call in float64."""
        twin = copy.copy(self)
        twin.layer = copy.deepcopy(self.layer).double()
        twin.x, *states = (leaf.detach().double().requires_grad_() for leaf in (self.x, *tensors(self.state)))
        twin.state = tuple(states) if len(states) > 1 else states[0]
        twin.leaves = [twin.x, *states, *twin.layer.parameters()]
        return twin()

    def streamed(self) -> Tensor:
        """The outputs of the sequence that comes piece by piece."""
        stream = ur.Stream(self.layer)
        with torch.no_grad():
            return torch.cat([stream(piece) for piece in self.x.split([1, 3, 1])])


RESETS = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]).bool()
EVERYTHING: dict[str, Any] = {"lengths": [4, 5, 2], "resets": RESETS, "all_states": True}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[Run, Run | None, Run | None]]]:
    """Each case with its loops: one layer in float32; of every other cell a stack of two layers and
    directions in float64; and a layer with as many inputs as units, where that has other parameters."""
    torch.manual_seed(5)
    made, here = {}, [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["case"] for item in here if compiled.__name__ in item.fixturenames}  # type: ignore[attr-defined]
    stacked = set(PLAIN) if len(asked) > len(PLAIN) else set(PLAIN[::2])  # all of them where it is exhaustive
    with Batch() as batch:
        for number, case in enumerate(case for case in CASES if case in asked):
            one, square = Run(case, dtype=torch.float32), Run(case, input_size=HIDDEN)
            alike = set(square.layer._first.shapes()) == set(one.layer._first.shapes())
            stack = Run(case, num_layers=2, bidirectional=True) if case in stacked else None
            with ur.engine("native"):  # gone through once, to know which loops there are
                one()
                one.streamed()
                if stack is not None:
                    stack(**EVERYTHING)
                if not alike:
                    square()
            made[case] = one, stack, None if alike else square
            if number % 12 == 11:
                batch.start()
        batch.finish()
        yield made


@NEEDS_COMPILER
@pytest.mark.parametrize("case", SAMPLED)
def test_both_engines_agree(compiled: Any, case: str) -> None:
    """No fallback: inside ``engine("native")`` that is an error."""
    one, stack, square = compiled[case]
    for run, asked, exact in ((one, {}, one.exact), (stack, EVERYTHING, None), (square, {}, None)):
        if run is None:
            continue
        with ur.engine("native"):
            actual = run(**asked)
        again = functools.partial(run, **asked)
        with ur.engine("reference"):
            assert_as_near(actual, again(), again, run.leaves, exact=exact)
        assert all(value.isfinite().all() for value in actual)


@NEEDS_COMPILER
@pytest.mark.parametrize("case", SAMPLED)
def test_piece_by_piece_gives_the_same_bits(compiled: Any, case: str) -> None:
    one, _, _ = compiled[case]
    with ur.engine("native"), torch.no_grad():
        assert torch.equal(one.streamed(), one.layer(one.x)[0])


@pytest.mark.parametrize("case", CASES)
def test_a_trace_has_every_number(case: str) -> None:
    layer = layer_of(case)
    x = torch.randn(TIME, BATCH, INPUT, dtype=torch.float64)
    t = ur.trace(layer, x)
    with torch.no_grad(), ur.engine("reference"):
        output, _, every = layer(x, all_states=True)
    for name, values in every.items():
        assert_close(t[name], values[0], 1e-12)
    assert_close(t[next(iter(every))], output, 1e-12)
    for name in t.names:
        assert f"= {t[name][2, 0, 0]:.4f}" in t.explain(name, step=2, unit=0)
    words = inspect.getdoc(type(layer._first)) or ""
    for name in every:
        assert f"{name}: " in words, f"the docstring doesn't say what {name} is"


@pytest.mark.parametrize("case", PLAIN)
def test_a_page_can_be_made(case: str, tmp_path: Path) -> None:
    t = ur.trace(layer_of(case), torch.randn(3, 1, INPUT, dtype=torch.float64))
    t.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2**20


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.exhaustive if k % 4 else ()) for k, case in enumerate(PLAIN)],
)
def test_an_onnx_model_gives_the_same_numbers(case: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = layer_of(case, dtype=torch.float32), torch.randn(TIME, BATCH, INPUT)
    model = ur.io.to_onnx(layer).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with torch.no_grad(), ur.engine("reference"):
        expected = layer(x)[0]
    numpy.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


def test_half_of_them_compile_as_one_graph() -> None:
    layers = torch.nn.ModuleList([layer_of(case, dtype=torch.float32) for case in PLAIN[::2]])

    def all_of(x: Tensor) -> list[Tensor]:
        return [layer(x)[0] for layer in layers]

    x = torch.randn(TIME, BATCH, INPUT)
    with torch.no_grad(), ur.engine("reference"):
        assert_close(torch.compile(all_of, fullgraph=True, backend="eager")(x), all_of(x), 1e-6)
