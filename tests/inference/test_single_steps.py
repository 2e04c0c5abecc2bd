"""`Stream` and `frozen` of single-step cells, and of models that call cells and layers step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled import Stream
from unrolled.inference.frozen import FrozenCell
from unrolled.layers.single_step import SingleStep

CELLS = {
    "lstm": ur.LSTMCell,
    "gru": ur.GRUCell,
    "torch lstm": nn.LSTMCell,
    "torch rnn": nn.RNNCell,
    "mgu": lambda *sizes: SingleStep(ur.cells.MGU, *sizes),
}


def run(cell: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    with torch.no_grad():
        for step in x:
            state = cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs), state


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Loop(nn.Module):
    """Calls its cell for every step of a chunk."""

    def __init__(self, cell: nn.Module, zeros: bool = False) -> None:
        super().__init__()
        self.embed, self.cell, self.zeros = nn.Linear(3, 3), cell, zeros

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        if self.zeros:
            state = x.new_zeros(x.shape[1], 4)
            state = (state, state) if "LSTM" in type(self.cell).__name__ else state
        outputs = []
        for step in x:
            state = self.cell(self.embed(step), state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [(3,), ()])
def test_stream_of_a_cell(kind: str, batch: tuple[int, ...]) -> None:
    cell, x = CELLS[kind](3, 4), torch.randn(7, *batch, 3)
    expected, state = run(cell, x)
    stream = Stream(cell)
    outputs = [stream(step) for step in x]
    assert_equal(torch.stack(outputs), expected)
    assert_equal(stream.state, state)
    assert not outputs[0].requires_grad
    if batch:
        stream.reset([False, True, False])
        again = stream(x[0])
        assert_equal(again[1], expected[0, 1])
        assert not torch.equal(again[0], expected[0, 0])
        with pytest.raises(ValueError, match="states have 3 rows, but this chunk has 2 rows: call reset"):
            stream(x[0, :2])
        with pytest.raises(ValueError, match="expected 3 booleans, one per row"):
            stream.reset([True])
    stream.reset()
    assert_equal(stream(x[0]), expected[0])
    stream.state = state
    assert_equal(stream(x[0]), run(cell, x[:1], state)[0][0])
    with pytest.raises(RuntimeError, match="is given a state by its caller"):
        stream(x[0], state)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("zeros", [False, True])
def test_stream_of_a_model_that_loops_over_the_steps(kind: str, zeros: bool) -> None:
    model, x = Loop(CELLS[kind](3, 4), zeros), torch.randn(9, 2, 3)
    with torch.no_grad():
        expected = model(x)
    stream = Stream(model)
    assert_equal(torch.cat([stream(chunk) for chunk in x.split([1, 4, 2, 2])]), expected)
    assert stream.state.keys() == {"cell"}


def test_stream_of_a_model_that_calls_a_layer_step_by_step() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = ur.LSTM(3, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = None, []
            for step in x.split(1):
                y, state = self.lstm(step, state)
                outputs.append(y)
            return torch.cat(outputs)

    model, x = Model(), torch.randn(9, 2, 3)
    with torch.no_grad():
        expected = model(x)
    stream = Stream(model)
    assert_equal(torch.cat([stream(chunk) for chunk in x.split([3, 1, 5])]), expected)


def test_models_whose_states_a_stream_cannot_keep() -> None:
    class Keeps(nn.Module):
        """Keeps its state itself from call to call."""

        def __init__(self) -> None:
            super().__init__()
            self.cell, self.state = ur.GRUCell(3, 4), None

        def forward(self, x: Tensor) -> Any:
            self.state = self.cell(x, self.state)
            return self.state

    class Changes(Loop):
        def forward(self, x: Tensor) -> Any:
            state = self.cell(x[0])
            return self.cell(x[1], state * 0.5)

    model, x = Keeps(), torch.randn(5, 2, 3)
    stream = Stream(model)
    stream(x[0])
    with pytest.raises(RuntimeError, match=r"If the model keeps .* in unrolled.frozen\(model\)"):
        stream(x[1])
    model.state = None
    with torch.no_grad(), ur.frozen(model):
        outputs = torch.stack([model(step) for step in x])
    assert_equal(outputs, run(model.cell, x)[0])
    with pytest.raises(RuntimeError, match="GRUCell 'cell' is given another state than it .*unrolled.frozen"):
        Stream(Changes(ur.GRUCell(3, 4)))(x)


@pytest.mark.parametrize("kind", [kind for kind in CELLS if "torch" not in kind])
def test_frozen_cells(kind: str) -> None:
    cell, x = CELLS[kind](3, 4), torch.randn(6, 5, 3)
    model = Loop(cell)
    with torch.no_grad():
        expected = model(x)
        with ur.frozen(model):
            assert_equal(model(x), expected)
            assert_equal(run(cell, x[:, 0])[0], run(cell, x[:, 0])[0])  # without a batch axis
            model_copy = copy.deepcopy(model)
        assert_equal(model_copy(x), expected)
    with ur.frozen(model):
        assert model(x).requires_grad
    assert "_compiled_call_impl" not in vars(cell)


@NEEDS_COMPILER
def test_changed_weights_of_frozen_cells() -> None:
    cell, x = ur.GRUCell(3, 4), torch.randn(5, 3)
    with torch.no_grad():
        calls = FrozenCell(cell)
        assert_equal(calls(x), cell(x))  # packed weights are used
        with ur.frozen(cell):
            cell(x)
            cell.weight_ih.mul_(2)
            with pytest.raises(RuntimeError, match="GRUCell: weight_ih_l0 was changed inside"):
                cell(x)
        stream = Stream(cell)
        stream(x)
        stream.reset()
        cell.weight_ih.mul_(0.5)
        assert_equal(stream(x), cell(x))
        cell.weight_hh = nn.Parameter(torch.randn(12, 4))
        stream.reset()
        stream(x)
        assert_equal(stream(x), cell(x, cell(x)))
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
        stream.reset()
        stream(x)
        cell.parametrizations.weight_hh.original0.mul_(3)
        state = stream.state
        assert_equal(stream(x), cell(x, state))
        with ur.frozen(cell):
            assert_equal(cell(x), cell(x))


def test_hooks_of_frozen_cells_run() -> None:
    cell, calls = ur.LSTMCell(3, 4), list[int]()
    cell.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), ur.frozen(cell), ur.record(cell) as rec:
        cell(torch.randn(2, 3))
    assert calls == [1]
    assert len(rec) == 1
