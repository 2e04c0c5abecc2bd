"""`watch` of cells, and of layers that run step by step: the calls of a sequence are one call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from unrolled.layers.cell_layers import layer_of_cell


@pytest.fixture(autouse=True)
def reference_engine() -> Any:
    with ur.engine("reference"):
        yield


class Loop(nn.Module):
    """Runs its cell, or its layer with one time step per call, over a sequence."""

    def __init__(self, rnn: nn.Module, change: float = 1.0) -> None:
        super().__init__()
        self.embed, self.rnn, self.change = nn.Linear(3, 3, dtype=torch.float64), rnn, change
        self.is_cell = "Cell" in type(rnn).__name__

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in self.embed(x).split(1):
            if self.is_cell:
                state = self.rnn(step[0], state)
                h = state[0] if isinstance(state, tuple) else state
                outputs.append(h.unsqueeze(0))
                if self.change != 1:
                    state = state * self.change
            else:
                output, state = self.rnn(step, state)
                outputs.append(output)
        return torch.cat(outputs)


def whole(model: Loop) -> nn.Module:
    """The same model with a layer that runs the whole sequence in one call."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = model.embed
            self.rnn = layer_of_cell(model.rnn) if model.is_cell else model.rnn

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.embed(x))[0]

    return Whole()


def watched(model: nn.Module, x: Tensor, **options: Any) -> ur.Watch:
    with ur.watch(model, every=1, share=None, **options) as watch:
        model(x).square().sum().backward()
    return watch


@pytest.mark.parametrize(
    "make",
    [nn.LSTMCell, ur.LSTMCell, ur.GRUCell, nn.RNNCell, lambda *a, **k: nn.LSTM(*a, 2, **k), ur.GRU],
)
@pytest.mark.parametrize("rows", [2, 9])
def test_the_records_are_those_of_a_layer(make: Any, rows: int) -> None:
    model, x = Loop(make(3, 4, dtype=torch.float64)), torch.randn(6, 5, 3, dtype=torch.float64)
    watch, expected = (watched(one, x, rows=rows) for one in (model, whole(model)))
    assert len(watch.records) == len(expected.records) > 0
    for record, other in zip(watch.records, expected.records, strict=True):
        assert record.keys() == other.keys()
        for name, value in record.items():
            if isinstance(value, float):
                assert math.isclose(value, other[name], rel_tol=1e-9), (record["quantity"], name)
            else:
                assert value == other[name]
    assert "1 training calls" in repr(watch)
    report, expected_report = watch.health(), expected.health()
    assert [str(one) for one in report] == [str(one) for one in expected_report]
    assert report.checked == expected_report.checked
    model.eval()
    with ur.watch(model) as watch, torch.no_grad():
        model(x)
        model(x)
    assert "2 in eval mode" in repr(watch)
    assert watch.health().checked
    assert len(next(iter(watch._layers.values())).observed.calls) == 6


def test_states_that_the_model_changes() -> None:
    model, x = Loop(ur.GRUCell(3, 4, dtype=torch.float64), 0.5), torch.randn(6, 5, 3, dtype=torch.float64)
    states: list[Tensor] = []

    def keep(module: Any, args: Any, state: Tensor) -> None:
        state.retain_grad()
        states.append(state)

    handle = model.rnn.register_forward_hook(keep)
    watch = watched(model, x, rows=9)
    handle.remove()
    record = next(record for record in watch.records if record["quantity"] == "h")
    norms = [state.grad.norm(dim=-1).mean().item() for state in states]
    assert math.isclose(record["gradient_first"], norms[0], rel_tol=1e-9)
    assert math.isclose(record["gradient_last"], norms[-1], rel_tol=1e-9)
    assert math.isclose(record["norm_last"], states[-1].norm(dim=-1).mean().item(), rel_tol=1e-9)
    assert watch.health().checked


def test_sampling_and_weights() -> None:
    """Every second sequence is sampled, and the weights are those without a watch."""
    results = []
    for is_watched in (False, True):
        torch.manual_seed(3)
        model, x = Loop(nn.LSTMCell(3, 4, dtype=torch.float64)), torch.randn(4, 2, 3, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = ur.watch(model, every=2, share=None) if is_watched else None
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        if watch is not None:
            watch.close()
            assert {record["call"] for record in watch.records} == {2, 4}
        results.append(model.rnn.weight_hh.detach())
    assert torch.equal(*results)


def test_a_cell_itself() -> None:
    cell, x = ur.LSTMCell(3, 4), torch.randn(5, 2, 3)
    with ur.watch(cell, every=1, share=None) as watch:
        for _ in range(2):
            state = None
            for step in x:
                state = cell(step, state)
            state[0].sum().backward()
        state = None
        for step in x:  # only the last step is in the graph of the loss
            state = cell(step, None if state is None else tuple(part.detach() for part in state))
        state[0].sum().backward()
    calls = [record for record in watch.records if record["quantity"] == "c"]
    assert [record["call"] for record in calls] == [1, 2, 7]
    assert [record["norm_growth"] is None for record in calls] == [False, False, True]
    with ur.watch(cell) as watch, torch.no_grad():
        state = None
        for step in x:
            state = cell(step, state)
    assert "1 in eval mode or without gradients" in repr(watch)
    assert watch.health().checked


def test_steps_that_the_loss_does_not_depend_on() -> None:
    cell, x = ur.GRUCell(3, 4, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)

    class Early(Loop):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:3]

    model = Early(cell)
    record = next(one for one in watched(model, x).records if one["quantity"] == "h")
    assert record["gradient_last"] == 0
    assert record["gradient_first"] > 0


def test_subclasses_that_override_forward() -> None:
    class Scaled(nn.GRU):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            output, state = super().forward(x * 3)
            return output * 2, state

    layer, x = Scaled(3, 4, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    forward = nn.GRU.forward
    with ur.watch(layer, every=1, share=None) as watch:
        layer(x)[0].sum().backward()
    assert nn.GRU.forward is forward
    plain = nn.GRU(3, 4, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    with ur.watch(plain, every=1, share=None) as expected:
        (plain(x * 3)[0] * 2).sum().backward()
    assert watch.records == expected.records
