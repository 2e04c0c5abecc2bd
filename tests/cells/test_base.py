"""Declarations of a cell: sizes, options, states, and error messages for invalid declarations."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.sampling import sample
from unrolled.cells.base import size_of


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_size_expressions(a: int, b: int, k: int) -> None:
    names = {"a": a, "b": b}
    assert size_of(f"{k}*a + (b - a)//{k}", names) == k * a + (b - a) // k
    assert size_of("a or b", names) == (a or b)
    assert size_of(k, names) == k


@pytest.mark.parametrize(
    "expression",
    ["4*hiden", "hidden**2", "__import__('os')", "hidden.real", "2.5*hidden", "f(hidden)", "hidden +", ""],
)
def test_invalid_size_expressions(expression: str) -> None:
    with pytest.raises(ValueError, match="the size"):
        size_of(expression, {"hidden": 3})


def test_size_errors_name_the_parameter() -> None:
    class Misspelled(ur.Cell):
        weight = ur.Param("hiden", "input")

    with pytest.raises(ValueError, match="Misspelled.weight: the size 'hiden'.*names input, hidden"):
        ur.Recurrent(Misspelled, 2, 3)


class Optional(ur.Cell):
    """A cell with options, conditional parameters and initializers."""

    rank: int = 0
    mode: Literal["a", "b"] = "a"
    scale: float = 1.0

    weight = ur.Param("hidden", "rank or input")
    low = ur.Param("rank", "input", init=nn.init.ones_)
    bias_only = ur.Param("hidden", init=nn.init.zeros_)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        x = x if self.low is None else x @ self.low.T
        return self.scale * nn.functional.linear(x, self.weight, self.bias_only) + h


@pytest.mark.slow
def test_options_shape_the_parameters() -> None:
    plain = ur.Recurrent(Optional, 4, 3)
    assert {k: tuple(v.shape) for k, v in plain.named_parameters()} == {
        "weight_l0": (3, 4),
        "bias_only_l0": (3,),
    }
    low = ur.Recurrent(Optional, 4, 3, rank=2, bias=False, scale=0.5)
    assert {k: tuple(v.shape) for k, v in low.named_parameters()} == {"weight_l0": (3, 2), "low_l0": (2, 4)}
    assert repr(low) == "Recurrent(Optional, 4, 3, rank=2, scale=0.5, bias=False)"
    assert torch.equal(low.low_l0, torch.ones(2, 4))
    assert not plain.bias_only_l0.any()
    x = torch.randn(1, 4)
    expected = 0.5 * x @ low.low_l0.T @ low.weight_l0.T
    assert torch.allclose(low(x)[0], expected)


class Initialized(ur.Cell):
    """A cell with a conditional parameter, and one whose initial value depends on another parameter."""

    level: float = 0.5
    gated: bool = False

    state = ("h",)
    weight = ur.Param("hidden", "input")
    size = ur.Param("hidden", init=lambda size, cell: size.copy_(cell.level * cell.weight.norm(dim=1)))
    bias = ur.Param("hidden", init=nn.init.zeros_, when=lambda cell: cell.gated)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return self.size * nn.functional.linear(x, self.weight, self.bias) + h


def test_initializers_see_earlier_parameters() -> None:
    for layer in (
        ur.Recurrent(Initialized, 4, 3, level=2.0),
        ur.Recurrent(Initialized, 4, 3, 2, bidirectional=True),
    ):
        layer.reset_parameters()
        for suffix in ("_l0", f"_l{layer.num_layers - 1}"):
            weight, size = getattr(layer, f"weight{suffix}"), getattr(layer, f"size{suffix}")
            assert torch.allclose(size, layer.chosen_options()["level"] * weight.norm(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "exists"), [({}, False), ({"gated": True}, True),
                                              ({"gated": True, "bias": False}, False)])  # fmt: skip
def test_conditional_parameter(options: dict[str, Any], exists: bool) -> None:
    layer = ur.Recurrent(Initialized, 4, 3, **options)
    assert hasattr(layer, "bias_l0") is exists
    assert layer(torch.randn(2, 4))[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SLSTM", {"heads": 4}, "heads should divide hidden_size=6, so that .*, got 4"),
        ("RGLRU", {"heads": 0}, "heads should divide hidden_size=6, so that .*, got 0"),
        ("FastRNN", {"input_rank": 3}, "input_rank should be 0 .* or a rank from 1 to 2, .* got 3"),
        ("FastGRNN", {"hidden_rank": 7}, "hidden_rank should be 0 .* or a rank from 1 to 6, .* got 7"),
        ("RHN", {"depth": 0}, "depth should be a positive number of highway layers, got 0"),
        ("LRU", {"r_min": 0.9, "r_max": 0.5}, "0 <= r_min < r_max <= 1, got .* r_min=0.9, r_max=0.5"),
        ("HGRN", {"lower_bound": 1.0}, "lower_bound should be at least 0 and below 1, got 1.0"),
        ("SCRN", {"context_size": -1}, "context_size should be a number of units, .* got -1"),
        ("JANET", {"t_max": -1}, "t_max should be a number of time steps, or 0 to disable it, got -1"),
        ("STAR", {"t_max": -1}, "t_max should be a number of time steps, or 0 to disable it, got -1"),
        ("QRNN", {"pooling": "g"}, "Unknown pooling 'g'. Select from 'f' or 'fo' or 'ifo'."),
        ("SLSTM", {"dtype": torch.complex64}, "SLSTM can't be computed in torch.complex64 .*: use a real"),
        ("LiGRU", {"dtype": torch.complex128}, "LiGRU can't be computed in torch.complex128"),
    ],
)
def test_invalid_options_of_published_cells(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ur.Recurrent(getattr(ur.cells, name), 2, 6, **options)


def test_unknown_option_of_a_published_cell() -> None:
    with pytest.raises(TypeError, match="MGU has no option 'heads'"):
        ur.Recurrent(ur.cells.MGU, 2, 6, heads=2)


def test_complex_dtype() -> None:
    layer = ur.Recurrent(ur.cells.UGRNN, 2, 3, dtype=torch.complex64)
    assert layer(torch.randn(4, 2, dtype=torch.complex64))[0].dtype == torch.complex64


def test_invalid_options() -> None:
    with pytest.raises(ValueError, match="Unknown mode 'c'. Select from 'a' or 'b'"):
        ur.Recurrent(Optional, 4, 3, mode="c")
    with pytest.raises(TypeError, match="rank should be of type int, got: float"):
        ur.Recurrent(Optional, 4, 3, rank=1.5)
    with pytest.raises(TypeError, match="scale should be of type float, got: str"):
        ur.Recurrent(Optional, 4, 3, scale="x")
    assert ur.Recurrent(Optional, 4, 3, scale=2).chosen_options()["scale"] == 2
    with pytest.raises(ValueError, match="Optional.* would have the shape"):
        ur.Recurrent(Optional, 4, 3, rank=-1)
    with pytest.raises(TypeError, match="Optional has no option 'depth': its options are rank, mode, scale"):
        Optional(4, 3, depth=1)

    class RequiredOption(ur.Cell):
        heads: int

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return h

    with pytest.raises(TypeError, match="RequiredOption needs the option 'heads'"):
        ur.Recurrent(RequiredOption, 4, 3)


def test_invalid_declarations() -> None:
    with pytest.raises(TypeError, match=r"state should be a tuple of names, such as \('h',\)"):
        type("Text", (ur.Cell,), {"state": "h"})
    with pytest.raises(TypeError, match="state should be"):
        type("Empty", (ur.Cell,), {"state": ()})
    with pytest.raises(
        TypeError, match=r"should take \(self, x, h, c\) to match its state, got \(self, x, h\)"
    ):
        type("Short", (ur.Cell,), {"state": ("h", "c"), "step": lambda self, x, h: h})
    with pytest.raises(TypeError, match="Param needs the size of each dimension"):
        ur.Param()
    with pytest.raises(NotImplementedError, match="Stepless has no step"):
        ur.Recurrent(type("Stepless", (ur.Cell,), {}), 2, 3)(torch.randn(4, 2))


def test_error_for_a_parameter_of_an_unbound_cell() -> None:
    with pytest.raises(AttributeError, match=r"Optional.weight has no tensor yet.*bind"):
        _ = Optional(4, 3).weight


def test_a_bound_cell_can_be_called_directly() -> None:
    weights = {"weight": torch.randn(3, 4), "bias_only": torch.randn(3)}
    bound = Optional(4, 3).bind(weights)
    x = torch.randn(2, 4)
    assert torch.equal(bound.step(x, torch.zeros(2, 3)), nn.functional.linear(x, *weights.values()))


@pytest.mark.slow
def test_states_of_several_sizes() -> None:
    class Wide(ur.Cell):
        state = {"h": "hidden", "memory": "2*hidden"}
        weight = ur.Param("2*hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor, memory: torch.Tensor) -> Any:
            memory = 0.5 * memory + x @ self.weight.T
            return memory[:, : self.hidden], memory

    layer = ur.Recurrent(Wide, 4, 3, num_layers=2, bidirectional=True, batch_first=True)
    output, (h, memory) = layer(torch.randn(5, 7, 4))
    assert (output.shape, h.shape, memory.shape) == ((5, 7, 6), (4, 5, 3), (4, 5, 6))
    with pytest.raises(ValueError, match=r"Expected hidden size \(4, 5, 6\).*for the state memory"):
        layer(torch.randn(5, 7, 4), (h, h))


@pytest.mark.slow
def test_inheritance() -> None:
    class Damped(ur.cells.LSTM):
        rate: float = 0.9

        def step(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
            h, c = super().step(x, h, c)
            return self.rate * h, c

    layer = ur.Recurrent(Damped, 4, 3, rate=1.0)
    twin = nn.LSTM(4, 3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 4)
    assert torch.allclose(layer(x)[0], twin(x)[0], atol=1e-6)
    t = ur.trace(layer, x)
    assert {"input_sum", "hidden_sum", "i", "f", "g", "o", "c", "h"} <= set(t.names)


class WithModule(ur.Cell):
    """A cell with a module as an attribute, which is not allowed."""

    state = ("h",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.map = nn.Linear(self.input, self.hidden)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.map(x) + h)


class WithParameter(ur.Cell):
    """A cell with a parameter as a class attribute, which is not allowed."""

    state = ("h",)
    weight = nn.Parameter(torch.ones(3))

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.weight + h)


def test_parameters_and_modules_as_attributes_are_errors() -> None:
    for cell, attribute in ((WithModule, "map is a Linear"), (WithParameter, "weight is a Parameter")):
        with pytest.raises(
            TypeError, match=rf"{cell.__name__}\.{attribute}, which a layer would neither train nor"
        ):
            ur.Recurrent(cell, 3, 3)


class WrongShapes(ur.Cell):
    """A cell that multiplies matrices of incompatible shapes."""

    state = ("h",)
    weight = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.nn.functional.linear(h, self.weight))


def test_an_error_in_a_step_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ur.Recurrent(WrongShapes, 3, 4)(torch.randn(5, 2, 3))
    assert not caplog.records


@NEEDS_COMPILER
def test_the_fallback_warning_has_the_callers_line() -> None:
    class Bessel(ur.Cell):
        state = ("h",)
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(torch.nn.functional.linear(x, self.weight) + h)

    with pytest.warns(UserWarning, match="on the reference engine") as caught:
        ur.Recurrent(Bessel, 3, 4)(torch.randn(5, 2, 3))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sample(sorted(ur.cells.__all__), ("LRU", "RGLRU", "STAR")))
def test_initial_parameters_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """They are finite, and as large as those in float32."""
    cell = getattr(ur.cells, name)
    half, full = (ur.Recurrent(cell, 30, 40, dtype=of) for of in (dtype, torch.float32))
    for (key, value), expected in zip(half.named_parameters(), full.parameters(), strict=True):
        assert value.dtype == dtype
        assert value.isfinite().all(), key
        low, high = expected.min() - 0.01, expected.max() + 0.01
        slack = (high - low) / 2
        assert low - slack <= value.float().min(), key
        assert value.float().max() <= high + slack, key


def test_decays_in_bfloat16_are_those_of_the_paper() -> None:
    layer = ur.Recurrent(ur.cells.RGLRU, 4, 500, dtype=torch.bfloat16)
    a = torch.exp(-8 * torch.nn.functional.softplus(layer.decay_l0.double()))
    assert 0.898 < a.min() < 0.92
    assert 0.98 < a.max() < 0.9995
