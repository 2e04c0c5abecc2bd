"""Kernels of the GPU engine, run from their own source without a GPU, against the reference engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur
from helpers.gpu_engine import gpu_engine
from helpers.sampling import sample
from helpers.user_cell import MGU
from unrolled.engines.gpu.backend import BACKEND

CELLS: list[Any] = [*(getattr(ur.cells, name) for name in ur.cells.__all__), MGU]
CELLS = [cell for cell in CELLS if isinstance(cell, type) and issubclass(cell, ur.Cell)]
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
FAST = [ur.cells.LayerNormGRU, ur.cells.LRU]


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors of a result: of an output, a packed sequence, a state or several."""
    value = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return [value.data]
    return [tensor for part in value for tensor in leaves(part)]


def results(layer: Any, call: Callable[[Any], Any], inputs: list[Tensor]) -> list[Tensor]:
    """Return the results of a call, the gradients of its inputs and parameters, and its inference results."""
    torch.manual_seed(3)
    values = leaves(call(layer))
    weights = [torch.linspace(-1, 1.5, v.numel(), dtype=v.dtype).view_as(v) for v in values]
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    gradients = torch.autograd.grad(loss, [*inputs, *layer.parameters()], allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64)
    torch.manual_seed(3)
    with torch.no_grad():
        inferred = leaves(call(layer))
    return [*values, *(zero if g is None else g for g in gradients), *inferred]


def check(
    layer: Any,
    call: Callable[[Any], Any],
    inputs: list[Tensor],
    launches: int | None = None,
    streamed: bool = False,
) -> None:
    """Compare a call on the GPU engine with the reference engine."""
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    with ur.engine("reference"):
        expected = results(layer, call, inputs)
    with gpu_engine(streamed) as runtime, ur.engine("native"):
        actual = results(layer, call, inputs)
    assert runtime.sources
    assert launches is None or len(runtime.sources) == launches
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not streamed or all("tl.debug_barrier()" in source for source in runtime.sources)


def sequence(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("cell", sample(CELLS, FAST), ids=lambda cell: cell.__name__)
def test_every_cell(cell: Any) -> None:
    layer, x = ur.Recurrent(cell, 5, 6).double(), sequence(4, 3, 5)
    check(layer, lambda layer: layer(x), [x], launches=3)


@pytest.mark.parametrize("cell", sample(CELLS, FAST[:1]), ids=lambda cell: cell.__name__)
def test_every_cell_with_streamed_matrices(cell: Any) -> None:
    layer, x = ur.Recurrent(cell, 5, 6).double(), sequence(4, 3, 5)
    check(layer, lambda layer: layer(x), [x], launches=3, streamed=True)


@STREAMED
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
def test_every_cell_with_more_rows_and_units(cell: Any, streamed: bool) -> None:
    """Of 20 and 72 units: a tile with more columns, and several blocks of columns."""
    layer = ur.Recurrent(cell, 3, 72 if streamed else 20, bidirectional=True).double()
    x = sequence(3, 18, 3)
    check(layer, lambda layer: layer(x), [x], launches=6, streamed=streamed)


@STREAMED
@pytest.mark.parametrize("name", sample(["LSTM", "HGRN", "LayerNormGRU", "LRU", "SLSTM"], ["LSTM"]))
def test_packed_sequences_in_both_directions(name: str, streamed: bool) -> None:
    layer = ur.Recurrent(getattr(ur.cells, name), 4, 6, bidirectional=True).double()
    lengths = torch.cat([torch.full((17,), 5), torch.tensor([4, 2, 2, 1])])
    data = sequence(5, 21, 4)
    check(layer, lambda layer: layer(pack_padded_sequence(data, lengths)), [data], streamed=streamed)


@STREAMED
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
def test_every_cell_with_packed_sequences(cell: Any, streamed: bool) -> None:
    layer, data = ur.Recurrent(cell, 4, 6, bidirectional=True).double(), sequence(5, 4, 4)
    lengths = torch.tensor([5, 4, 2, 1])
    check(layer, lambda layer: layer(pack_padded_sequence(data, lengths)), [data], streamed=streamed)


def test_a_program_skips_the_padding_of_its_rows() -> None:
    """The second tile of rows has one step, and the first one five."""
    layer, data = ur.GRU(3, 4), torch.randn(5, 20, 3)
    lengths = torch.cat([torch.full((16,), 5), torch.ones(4, dtype=torch.int64)])
    with gpu_engine() as runtime, ur.engine("native"), torch.no_grad():
        layer(pack_padded_sequence(data, lengths))
    assert runtime.steps == [5, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sample(["GRU", "LSTM", "RNN"]))
def test_stacks_states_and_projections(kind: str) -> None:
    options = {"proj_size": 3} if kind == "LSTM" else {}
    layer = getattr(ur, kind)(4, 6, 2, bidirectional=True, **options).double()
    x, sizes = sequence(4, 3, 4), [3, 6] if kind == "LSTM" else [6]
    state = tuple(sequence(4, 3, size) for size in sizes)
    argument = state if kind == "LSTM" else state[0]
    check(layer, lambda layer: layer(x, argument), [x, *state], launches=12)


OPTIONS: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": torch.tensor([5, 0, 3, 1])},
    "resets": {"resets": torch.arange(20).view(5, 4) % 3 == 1},
    "checkpoint": {"checkpoint": 2},
    "all_states": {"all_states": True},
}
OPTIONS["all"] = {**OPTIONS["lengths"], **OPTIONS["resets"], **OPTIONS["all_states"]}


@pytest.mark.parametrize("name", sample(OPTIONS, ["checkpoint", "all"]))
def test_options_of_a_call(name: str) -> None:
    layer, x = ur.LSTM(3, 5, bidirectional=name != "all").double(), sequence(5, 4, 3)
    check(layer, lambda layer: layer(x, **OPTIONS[name]), [x])


@pytest.mark.parametrize(
    "options",
    sample(
        [
            {"zoneout": 0.3},
            {"recurrent_dropout": 0.4},
            {"initial_state": "learned"},
            {"num_layers": 2, "dropout": 0.5, "zoneout": 0.2},
        ]
    ),
    ids=str,
)
def test_options_of_a_layer(options: dict[str, Any]) -> None:
    layer, x = ur.LSTM(3, 5, **options).double(), sequence(5, 4, 3)
    check(layer, lambda layer: layer(x), [x])


def test_float32() -> None:
    layer, x = ur.GRU(3, 5), torch.randn(4, 3, 3)
    with torch.no_grad():
        with ur.engine("reference"):
            expected = layer(x)[0]
        with gpu_engine() as runtime, ur.engine("native"):
            actual = layer(x)[0]
    assert len(runtime.sources) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class Gated(ur.Cell):
    """The gate of all columns is a product with a single column, which no step needs to compute."""

    weight = ur.Param("hidden", "input")
    weight_gate = ur.Param(1, "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight) + linear(x, self.weight_gate) * h)


class OneColumn(ur.Cell):
    """Products with one column, of one column, and of columns in two runs."""

    state = {"h": "hidden", "a": 1}
    weight = ur.Param("hidden", "input")
    weight_a = ur.Param(1, "hidden")
    weight_h = ur.Param("hidden", 1)
    weight_both = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.tanh(linear(h, self.weight_a) + a)
        mixed = torch.cat((h[:, 2:], a.expand(-1, 2)), -1)
        h = torch.tanh(linear(x, self.weight) + linear(a, self.weight_h) + linear(mixed, self.weight_both))
        return h, a


class Normalized(ur.Cell):
    """Two equal states that no step reads, and reductions of a product and of a product of columns."""

    state = ("y", "z", "h")
    weight = ur.Param("hidden", "input")
    weight_y = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, y: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(linear(x, self.weight) + linear(h, self.weight_y))
        y = layer_norm(linear(h, self.weight_y) + linear(x, self.weight), (self.hidden,))
        y = torch.softmax(y * linear(h, self.weight_y)[:, :1], -1) * h.prod(-1, keepdim=True)
        return y, y, h


class Moved(ur.Cell):
    """Columns in another order, and states that change places."""

    state = ("h", "c")
    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        n = torch.tanh(linear(x, self.weight) + h.flip(-1))
        return c.roll(2, -1) * 0.3 + n, h


class Scaled(ur.Cell):
    """A step that reads a tensor attribute."""

    weight = ur.Param("hidden", "input")

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scale = torch.linspace(0.1, 1, self.hidden, dtype=torch.float64)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight) + h * self.scale)


def test_a_tensor_attribute_that_changes() -> None:
    layer, x = ur.Recurrent(Scaled, 4, 5).double(), sequence(6, 3, 4)
    for _ in range(3):
        check(layer, lambda layer: layer(x), [x], launches=3)
        [cell] = layer._cells.values()
        cell.scale.mul_(0.5)
        cell.scale = cell.scale + 0.25


class Named(ur.Cell):
    """Its names are also names in the generated kernels."""

    state = ("c", "s0")
    rows = ur.Param("hidden", "input")
    tanh = ur.Param("hidden")
    s0_0 = ur.Param("hidden", "hidden")
    v1 = ur.Param("hidden")
    initial0 = ur.Param("hidden")

    def step(self, x: Tensor, c: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
        sigmoid = torch.sigmoid(self.v1)
        c = torch.tanh(linear(x, self.rows) + linear(s0, self.s0_0, self.tanh)) * sigmoid + c
        return torch.sigmoid(c) * self.initial0, torch.tanh(c + s0)


@STREAMED
@pytest.mark.parametrize("cell", sample([Gated, OneColumn, Normalized, Moved, Named], [OneColumn, Named]))
@pytest.mark.parametrize("lengths", sample([None, [6, 4, 1]], [[6, 4, 1]]), ids=str)
def test_columns_of_steps(cell: Any, lengths: list[int] | None, streamed: bool) -> None:
    layer, data = ur.Recurrent(cell, 4, 5).double(), sequence(6, 3, 4)

    def call(layer: Any) -> Any:
        return layer(data if lengths is None else pack_padded_sequence(data, torch.tensor(lengths)))

    check(layer, call, [data], streamed=streamed)


class Own(MGU):
    """A cell of its own, so that no other test has compiled it."""


@pytest.mark.parametrize("case", sample([(Moved, 70), (ur.cells.LRU, 300), (ur.cells.LSTM, 100)]), ids=str)
def test_what_is_too_large_for_registers(case: tuple[Any, int]) -> None:
    """A step that is cut into many pieces, wide values, and large matrices."""
    cell, size = case
    loop: Any = BACKEND.compile(cell(4, size), torch.float32, torch.device("cpu")).inference
    assert {spec.choice.strategy for spec in loop.specs} == {"persistent", "streamed"}


def test_a_device_with_too_little_memory() -> None:
    layer, x = ur.Recurrent(Own, 3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        with ur.engine("reference"):
            expected = layer(x)[0]
        with gpu_engine() as runtime, ur.engine("native"):
            runtime.refused = "s0_0"  # a state in registers
            for _ in range(2):
                torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)
            assert all("tl.debug_barrier()" in source for source in runtime.sources)
            runtime.refused = "kernel"
            for _ in range(2):
                with pytest.raises(RuntimeError, match="engine: Triton can't compile its kernel"):
                    layer(x)


class Captured(MGU):
    """A cell that no other test has run."""


def test_capturing_a_graph_before_a_kernel_is_compiled() -> None:
    layer, x = ur.Recurrent(Captured, 3, 4), torch.randn(5, 2, 3)
    with gpu_engine() as runtime, ur.engine("native"), torch.no_grad():
        runtime.capturing = True
        with pytest.raises(RuntimeError, match="run the same call once before the capture"):
            layer(x)
        runtime.capturing = False
        expected = layer(x)[0]
        runtime.capturing = True
        assert torch.equal(layer(x)[0], expected)


class Unknown(ur.Cell):
    """A step with an operation that kernels don't have."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.special.bessel_j0(linear(x, self.weight) + h)


def test_an_unsupported_operation_falls_back_with_one_warning() -> None:
    layer, x = ur.Recurrent(Unknown, 3, 4), torch.randn(2, 2, 3)
    with gpu_engine() as runtime, warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(x)
    [message] = [str(one.message) for one in messages]
    assert message.startswith("Unknown runs on the reference engine, which is slower")
    assert not runtime.sources


class Transformed(MGU):
    """A cell that no other test has compiled."""


def test_transforms() -> None:
    """The operators of torch.compile, vmap and torch.func run the same kernels."""
    layer, x = ur.Recurrent(Transformed, 3, 5).double(), torch.randn(4, 6, 3, dtype=torch.float64)
    params = dict(layer.named_parameters())

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, (row.unsqueeze(1),))[0].sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 1))
    with ur.engine("reference"):
        expected = per_sample(params, x)
    with gpu_engine() as runtime, ur.engine("native"):
        actual = per_sample(params, x)
    assert len(runtime.sources) == 2
    for name in params:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


def test_second_gradients() -> None:
    layer, x = ur.Recurrent(MGU, 2, 3).double(), sequence(3, 2, 2)
    with gpu_engine(), ur.engine("native"):
        assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x, fast_mode=True)
