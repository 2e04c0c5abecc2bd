"""The names of the rows of weighted sums and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import unrolled as ur
from unrolled.cells.base import Cell
from unrolled.io.state_dicts import new_layer
from unrolled.tracing.row_names import RowBlock, RowNames, row_names
from unrolled.tracing.step_recorder import run_with_locals


def names_of(layer: nn.Module, x: Tensor | None = None) -> RowNames:
    x = torch.randn(2, 1, 2) if x is None else x
    return ur.trace(layer, x).layers[0].row_names


def labels(names: RowNames, name: str, count: int) -> list[str]:
    return [names.label(name, row) for row in range(count)]


def test_lstm() -> None:
    names = names_of(nn.LSTM(2, 2))
    expected = ["i[0]", "i[1]", "f[0]", "f[1]", "g[0]", "g[1]", "o[0]", "o[1]"]
    for name in ("input_sum", "hidden_sum", "weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        assert labels(names, name, 8) == expected
    assert labels(names, "c", 2) == labels(names, "x", 2) == ["unit 0", "unit 1"]
    blocks = names.blocks["weight_hh"]
    assert blocks[1] == RowBlock("f", range(2, 4), 0)
    assert [names.symbol("weight_hh", block) for block in blocks] == ["W_hi", "W_hf", "W_hg", "W_ho"]
    assert [names.symbol("bias_ih", block) for block in blocks] == ["b_ii", "b_if", "b_ig", "b_io"]
    assert [names.part("bias_ih", block) for block in blocks] == [f"bias_ih[{gate}]" for gate in "ifgo"]
    assert names.element("bias_ih", 3) == "b_if[1]"
    assert names.element("weight_hh", 7, 0) == "W_ho[1, 0]"
    projected = names_of(nn.LSTM(2, 3, proj_size=1))
    assert projected.element("weight_hr", 0, 2) == "W_hr[0, 2]"
    assert projected.element("weight_hh", 3, 0) == "W_hf[0, 0]"


def test_gru_and_rnn() -> None:
    names = names_of(nn.GRU(2, 3))
    for name in ("input_sum", "hidden_sum", "weight_hh", "bias_ih"):
        assert [block.gate for block in names.blocks[name]] == ["r", "z", "n"]
        assert labels(names, name, 9)[5:7] == ["z[2]", "n[0]"]
    assert names.element("weight_ih", 6, 1) == "W_in[0, 1]"
    for nonlinearity in ("tanh", "relu"):
        names = names_of(nn.RNN(2, 3, nonlinearity=nonlinearity))
        assert labels(names, "input_sum", 3) == ["unit 0", "unit 1", "unit 2"]
        assert names.element("weight_hh", 2, 1) == "W_hh[2, 1]"
        assert names.element("bias_ih", 2) == "b_ih[2]"


@pytest.mark.parametrize(
    ("cell", "name", "gates"),
    [
        ("SLSTM", "weight_hh", "i f z o"),  # behind logarithms
        ("MinLSTM", "weight_ih", "f i candidate"),  # normalized by their sum
        ("MGU", "weight_hh", "f candidate"),  # split before it is multiplied
        ("LayerNormLSTM", "gain_hh", "i f g o"),
        ("RAN", "weight_ih", "content i f"),  # content has no activation function
        ("SRU", "weight_c", "f r"),
    ],
)
def test_other_cells(cell: str, name: str, gates: str) -> None:
    names = names_of(new_layer(getattr(ur.cells, cell), 2, 3))
    assert [block.gate for block in names.blocks[name]] == gates.split()
    assert names.element("weight_ih", 0, 1) in ("weight_ih[0, 1]", f"weight_ih[{gates.split()[0]}][0, 1]")


class Mixed(Cell):
    """The activation function runs before the split, the weights are multiplied from the right."""

    state = ("h",)
    weight = ur.Param("input", "2*hidden")
    weight_m = ur.Param("hidden", "hidden")
    weight_p = ur.Param("3*hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        gates = torch.sigmoid(x @ self.weight)
        keep, take = gates[:, ::2], gates[:, 1::2]
        passes = linear(x, self.weight_p)
        first, second, third = passes.chunk(3, -1)
        m = torch.tanh(h @ self.weight_m + first * second)
        left, right = torch.tanh(third), torch.sigmoid(third)
        h = keep * h + take * m + left * right
        return h


def test_a_custom_cell() -> None:
    names = names_of(ur.Recurrent(Mixed, 2, 3))
    assert labels(names, "weight", 6) == ["keep[0]", "take[0]", "keep[1]", "take[1]", "keep[2]", "take[2]"]
    assert names.label("gates", 3) == "take[1]"
    assert names.by_column == {"weight", "weight_m"}
    assert [block.gate for block in names.blocks["weight_m"]] == ["m"]
    # first and second both end in m; third ends in two gates
    assert [block.gate for block in names.blocks["passes"]] == ["first", "second", "third"]
    assert names.part("weight_p", names.blocks["weight_p"][2]) == "weight_p[third]"


@pytest.mark.parametrize("function", ["softmax", "softmin", "log_softmax"])
def test_a_function_of_all_units_is_an_activation(function: str) -> None:
    class Shared(Cell):
        state = ("h",)
        weight = ur.Param("2*hidden", "input")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            first, second = linear(x, self.weight).chunk(2, -1)
            keep, g = getattr(nn.functional, function)(first, -1), torch.tanh(second)
            write = 1 - keep
            h = keep * h + write * g
            return h

    names = names_of(ur.Recurrent(Shared, 2, 3))
    assert [block.gate for block in names.blocks["weight"]] == ["keep", "g"]
    assert names.element("weight", 1, 0) == "weight[keep][1, 0]"


class Unnamed(Cell):
    state = ("h",)
    weight = ur.Param("3*hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight)
        gate = torch.sigmoid(sums[:, :2])
        h = gate * h + torch.tanh(sums[:, 2:4]) * torch.sigmoid(sums[:, 4:])
        return h


def test_rows_of_no_single_gate() -> None:
    names = names_of(ur.Recurrent(Unnamed, 2, 2))
    assert labels(names, "sums", 6) == ["gate[0]", "gate[1]", "row 2", "row 3", "row 4", "row 5"]
    assert [names.part("weight", block) for block in names.blocks["weight"]] == [
        "weight[gate]",
        "weight[2:6]",
    ]
    assert names.element("weight", 3, 0) == "weight[3, 0]"
    assert names.label("other", 3) == "unit 3"


def test_a_step_that_rejects_random_numbers() -> None:
    class Positive(Cell):
        weight = ur.Param("2*hidden", "input")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            if (x < 0).any():
                raise ValueError
            a, b = linear(x, self.weight).chunk(2, -1)
            h = torch.sigmoid(a) * torch.tanh(b)
            return h

    names = names_of(ur.Recurrent(Positive, 8, 2), torch.rand(2, 1, 8))
    assert labels(names, "weight", 2) == ["unit 0", "unit 1"]


def check_gradients(cell: str, **options: Any) -> None:
    """Compare the names with the gradients of the gates with respect to the parameters."""
    layer = new_layer(getattr(ur.cells, cell), 3, 4, dtype=torch.float64, **options)
    found = ur.trace(layer, torch.randn(1, 1, 3, dtype=torch.float64)).layers[0].cell
    names = row_names(found)
    parameters = {name: getattr(found, name).detach().requires_grad_() for name in found.shapes()}
    assert set(names.blocks) & set(parameters)
    cell_with_gradients = found.bind(parameters)
    slopes: dict[tuple[str, str], Tensor] = {}
    for _ in range(8):  # relu and maximum have no gradient in half of the cases
        x = torch.randn(1, 3, dtype=torch.float64)
        scales = 10.0 ** torch.randint(-2, 2, (len(found.state),))
        sizes = found.state_sizes().values()
        state = [
            scale * torch.randn(1, size, dtype=torch.float64)
            for scale, size in zip(scales, sizes, strict=True)
        ]
        _, quantities = run_with_locals(cell_with_gradients, x, *state)
        for parameter in parameters:
            for gate in {block.gate for block in names.blocks.get(parameter, ()) if block.gate}:
                slopes.setdefault((parameter, gate), torch.zeros(()).double())
                rows = [
                    torch.autograd.grad(v, parameters[parameter], retain_graph=True, allow_unused=True)[0]
                    for v in quantities[gate].flatten()
                ]
                assert all(row is not None for row in rows), (parameter, gate)
                slopes[parameter, gate] = slopes[parameter, gate] + torch.stack(rows).abs()
    mixes_units = any("norm" in name or "gain" in name for name in parameters)
    for (parameter, gate), slope in slopes.items():
        per_row = slope.flatten(2).sum(2) if slope.dim() > 2 else slope
        for block in names.blocks[parameter]:
            for row in block.rows if block.gate == gate else ():
                assert per_row[block.unit(row), row] > 0, (parameter, gate, row)
                if not mixes_units and names.is_split(parameter):
                    assert per_row[:, row].count_nonzero() == 1, (parameter, gate, row)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "MGU", "SLSTM"])
def test_gates_depend_on_their_rows(cell: str) -> None:
    check_gradients(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", sorted(ur.cells.__all__))
def test_gates_depend_on_their_rows_in_every_cell(cell: str) -> None:
    check_gradients(cell)


def test_large_layers_are_quick() -> None:
    names = names_of(nn.LSTM(8, 400), torch.randn(1, 1, 8))
    assert names.label("weight_hh", 401) == "f[1]"
