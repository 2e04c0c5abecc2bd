"""`record` of cells, and of layers that run step by step: consecutive calls are joined into one trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from unrolled.layers.cell_layers import layer_of_cell
from unrolled.layers.single_step import SingleStep

CELLS = [
    nn.LSTMCell,
    ur.LSTMCell,
    nn.GRUCell,
    ur.GRUCell,
    lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
    lambda *sizes, **options: ur.RNNCell(*sizes, nonlinearity="relu", **options),
    lambda *sizes, **options: SingleStep(ur.cells.MGU, *sizes, **options),
]  # fmt: skip


class Decoder(nn.Module):
    """Feeds each output back as the next input."""

    def __init__(self, cell: nn.Module, change: Any = lambda state: state) -> None:
        super().__init__()
        self.embed = nn.Linear(2, cell.input_size, dtype=cell.weight_ih.dtype)
        self.decoder = cell
        self.head = nn.Linear(cell.hidden_size, 2, dtype=cell.weight_ih.dtype)
        self.change = change
        self.inputs: list[Tensor] = []
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def forward(self, y: Tensor, steps: int, state: Any = None) -> Tensor:
        self.inputs, self.states, self.outputs = [], [], []
        for _ in range(steps):
            x = self.embed(y)
            x.retain_grad() if x.requires_grad else None
            self.inputs.append(x)
            state = self.decoder(x, state if state is None else self.change(state))
            h = state[0] if isinstance(state, tuple) else state
            h.retain_grad() if h.requires_grad else None
            self.states.append(h)
            y = self.head(h)
            y.retain_grad() if y.requires_grad else None
            self.outputs.append(y)
        return torch.stack(self.outputs)


@pytest.fixture(autouse=True)
def reference_engine() -> Any:
    with ur.engine("reference"):
        yield


@pytest.mark.parametrize("make", CELLS)
@pytest.mark.parametrize("batch", [(3,), ()])
def test_cells(make: Any, batch: tuple[int, ...], tmp_path: Path) -> None:
    model = Decoder(make(4, 5, dtype=torch.float64))
    y = torch.randn(*batch, 2, dtype=torch.float64)
    plain = model(y, 6)
    with ur.record(model, gradients=True) as rec:
        output = model(y, 6)
        output.square().sum().backward()
    assert torch.equal(output, plain)
    t = rec["decoder"]
    assert t.steps == (0, 1, 2, 3, 4, 5)
    assert t is rec["decoder"]
    states, inputs = torch.stack(model.states), torch.stack(model.inputs)
    rows = (lambda value: value) if batch else (lambda value: value.unsqueeze(1))
    assert_close(t["h"], rows(states.detach()), 1e-12)
    assert_close(t.layers[0].input, rows(inputs.detach()), 1e-12)
    expected = torch.stack([state.grad for state in model.states])
    assert_close(t.gradient("h"), rows(expected), 1e-12)
    recorded = {name: t.gradient(name).clone() for name in t.names}
    # The trace is that of a layer that ran the whole sequence.
    layer = layer_of_cell(model.decoder)
    whole = ur.trace(layer, inputs.detach())
    assert t.names == whole.names
    for name in t.names:
        assert_close(t[name], whole[name], 1e-12)
    assert_close(t.output, whole.output, 1e-12)
    assert t.explain("h", 3, 1) == whole.explain("h", 3, 1)
    assert str(t.health()) == str(whole.health()) or t.layers[0].gradients
    direct = torch.stack([y.grad for y in model.outputs]) @ model.head.weight.detach()
    whole.backward(lambda output: (output * direct).sum())
    for name in t.names:
        assert_close(recorded[name], whole.gradient(name), 1e-12)
    weight = torch.randn_like(whole.output)
    t.backward(lambda output: (output * weight).sum())
    whole.backward(lambda output: (output * weight).sum())
    assert_close(t.gradient("h"), whole.gradient("h"), 1e-12)
    if make not in CELLS[-1:]:
        assert t.check() < 1e-12
    assert "6 calls, 1 sequence of steps recorded" in repr(rec)


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM, ur.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_that_run_step_by_step(make: Any, batch_first: bool) -> None:
    layer = make(3, 4, 2, batch_first=batch_first)
    x = torch.randn(5, 2, 3).transpose(0, int(batch_first))
    pieces = x.split(1, int(batch_first))
    state, outputs = None, []
    with ur.record(layer, gradients=True) as rec:
        for piece in pieces:
            y, state = layer(piece, state)
            outputs.append(y)
        torch.cat(outputs, int(batch_first)).square().sum().backward()
    t, whole = rec[""], ur.trace(layer, x)
    assert t.steps == tuple(range(5))
    whole.backward(lambda output: output.square().sum())
    for index in (0, 1):
        for name in whole.names:
            assert_close(t.layer(index)[name], whole.layer(index)[name], 1e-6)
            assert_close(t.layer(index).gradient(name), whole.layer(index).gradient(name), 1e-5)
    assert_close(t.output, whole.output, 1e-6)
    # Calls of several steps stay calls of their own.
    with ur.record(layer, calls=5) as rec:
        _, state = layer(x[:2] if not batch_first else x[:, :2])
        layer(x[2:] if not batch_first else x[:, 2:], state)
    assert len(rec.calls("")) == 2


def test_several_sequences() -> None:
    cell, y = nn.GRUCell(3, 4), torch.randn(2, 3)
    model = Decoder(cell)
    with ur.record(model, calls=3) as rec:
        for steps in (2, 1, 4, 3):
            model(torch.randn(2, 2), steps)
    assert [len(t.steps) for t in rec.calls("decoder")] == [1, 4, 3]
    assert [call.number for call in rec.call_order if call.name == "decoder"] == [4]
    with ur.record(cell, calls=9) as rec:
        h = cell(y, torch.zeros(2, 4))
        h = cell(y, h.detach().clone())  # equal
        h = cell(y, torch.zeros(2, 4))  # from the start
        h = cell(y, h[:1].expand(2, 4))  # another state, and not in the same call of a model
        cell(y[:1], h[:1])  # another batch size
        cell.eval()
        h = cell(y)
        with torch.no_grad():
            cell.weight_ih.mul_(2)
        cell(y, h)  # other parameters
    assert [len(t.steps) for t in rec.calls("")] == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("make", [nn.LSTMCell, ur.GRUCell])
def test_states_that_the_model_changes(make: Any, tmp_path: Path) -> None:
    def change(state: Any) -> Any:
        return tuple(part * 0.5 for part in state) if isinstance(state, tuple) else state * 0.5

    model, y = Decoder(make(3, 4), change), torch.randn(2, 2)
    with ur.record(model, gradients=True) as rec:
        model(y, 5).square().sum().backward()
    t = rec["decoder"]
    assert t.steps == tuple(range(5))
    assert_close(t["h"], torch.stack(model.states).detach(), 1e-6)
    assert_close(t.gradient("h"), torch.stack([state.grad for state in model.states]), 1e-6)
    before = t.layers[0].state_before(3, 1)["h"]
    assert_close(before, model.states[2][1].detach() * 0.5, 1e-6)
    step = layer_of_cell(model.decoder)._bind("_l0")
    states = [t.layers[0].before[name][3] for name in step.state]
    new = step.step(t.layers[0].input[3], *states)
    assert_close((new if isinstance(new, Tensor) else new[0]).detach(), t["h"][3], 1e-6)
    assert "=" in t.explain("h", 3, 0)
    report = t.health()
    assert report.checked
    reason = "the gradient through time, states that grow: the model changed the states between the steps"
    assert report.not_checked == (reason,)
    for kind in ("gates", "states", "gradient"):
        assert t.plot(kind)
    assert "5 steps × 2 rows" in repr(t)
    assert t.to_html(tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match="this trace doesn't have the whole call"):
        t.backward(lambda y: y.sum())


def test_other_modules_are_not_cells() -> None:
    class Own(nn.RNNCellBase):
        def __init__(self) -> None:
            super().__init__(3, 4, bias=True, num_chunks=1)

    with pytest.raises(ValueError, match="record needs a model with recurrent layers, but Own has none"):
        ur.record(Own())
    with pytest.raises(ValueError, match="Stream expects a recurrent layer or a model that contains one"):
        ur.Stream(Own())


@pytest.mark.parametrize("kind", [ur.GRU, ur.LSTM, ur.LSTMCell])
def test_policies_restart_rows_between_their_calls(kind: Any) -> None:
    """Each call of the model is a step, and the states of some rows are set to zeros before it."""
    layer, masks = kind(2, 3), torch.ones(5, 4, 1)
    masks[1, 2] = masks[3, 0] = masks[3, 3] = 0
    xs, state, states = torch.randn(5, 4, 2), None, []
    with ur.record(layer) as rec, torch.no_grad():
        for x, mask in zip(xs, masks, strict=True):
            if state is not None:
                state = tuple(part * mask for part in state) if isinstance(state, tuple) else state * mask
            states.append(state)
            result = layer(x if kind is ur.LSTMCell else x.unsqueeze(0), state)
            state = result if kind is ur.LSTMCell else result[1]
    t = rec[""]
    assert t.steps == tuple(range(5))
    for step in range(1, 5):
        h = states[step][0] if isinstance(states[step], tuple) else states[step]
        assert torch.equal(t.layers[0].state_before(step, 2)["h"], h.view(-1, 3)[2])
    with torch.no_grad(), ur.record(layer) as rec:  # all rows are new: another sequence
        for x in xs[:2]:
            zeros = tuple(torch.zeros_like(part) for part in state) if isinstance(state, tuple) else state * 0
            layer(x if kind is ur.LSTMCell else x.unsqueeze(0), zeros)
    assert rec[""].steps == (0,)


def test_states_changed_in_place() -> None:
    cell, x = ur.GRUCell(3, 4), torch.randn(5, 2, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(2, 4)
            for step in x:
                h = self.cell(step, h)
                h[0] = 1.0
            return h

    with torch.no_grad(), ur.record(Model()) as rec:
        rec.model(x)
    t = rec["cell"]
    assert len(t.steps) == 5
    assert t.layers[0].before["h"][1:, 0].eq(1).all()
    assert not t["h"][:, 0].eq(1).any()


def test_filters() -> None:
    model, y = Decoder(ur.LSTMCell(3, 4)), torch.randn(4, 2)
    with ur.record(model) as everything:
        model(y, 7)
    for steps, expected in (([1, 4], (1, 4)), (slice(2, None, 2), (2, 4, 6)), (range(3), (0, 1, 2)), (9, ())):
        with ur.record(model, steps=steps, rows=[0, 2], calls=2) as rec:
            model(y, 7)
        if not expected:
            with pytest.raises(KeyError, match="LSTMCell 'decoder' ran none of the selected steps"):
                rec["decoder"]
            continue
        t, whole = rec["decoder"], everything["decoder"]
        assert t.steps == expected
        for name in t.names:
            assert_close(t[name], whole[name][list(expected)][:, [0, 2]], 1e-6)
        assert t.explain("h", expected[-1], 2, 1) == whole.explain("h", expected[-1], 2, 2)
    with ur.record(model, names=["f", "h"], units=[3, 1]) as rec:
        model(y, 7)
    t = rec["decoder"]
    assert t.names == ("f", "h")
    assert_close(t["f"], everything["decoder"]["f"][..., [1, 3]], 1e-6)
    with (
        ur.record(model, steps=[-1]),
        pytest.raises(ValueError, match="record of LSTMCell 'decoder': steps can't be counted from the end"),
    ):
        model(y, 7)


def test_the_page_shows_one_sequence(tmp_path: Path) -> None:
    model = Decoder(nn.LSTMCell(3, 4))
    with ur.record(model) as rec:
        model(torch.randn(2, 2), 6)
    calls = rec.call_order
    assert [(call.name, call.steps) for call in calls] == [("embed", 6), ("decoder", 6), ("head", 6)]
    assert str(calls[1]) == "decoder: LSTMCell(3, 4), 6 × (2, 3) → (2, 4)"
    assert calls[1].trace is rec["decoder"]
    from unrolled.page.model_data import model_data

    data = model_data(rec, None, list("abcdef"), None, 100_000)
    assert data["call"] == "decoder"  # only one call, so its page is all there is
    model = nn.Module()
    model.encoder, model.decoder = nn.GRU(3, 4), Decoder(nn.GRUCell(3, 4))
    with ur.record(model) as rec:
        _, h = model.encoder(torch.randn(3, 2, 3))
        model.decoder(torch.randn(2, 2), 6, h[0])
    data = model_data(rec, None, None, None, 100_000)
    assert [call["name"] for call in data["calls"]] == [
        "encoder",
        "decoder.embed",
        "decoder.decoder",
        "decoder.head",
    ]
    call = data["calls"][2]
    assert (call["input"], call["count"], call["number"]) == ("6 × (2, 3)", 1, 1)
    assert len(data["pages"]) == 2
    assert call["page"] == 1
    page = rec["decoder.decoder"].to_html(tmp_path / "page.html")
    assert page.stat().st_size > 10_000


def test_subclasses_that_override_forward(tmp_path: Path) -> None:
    class Scaled(nn.LSTM):
        def forward(self, x: Tensor, scale: float) -> Any:  # type: ignore[override]
            output, state = super().forward(x * scale)
            return output + 1, state

    class OurScaled(ur.GRU):
        def forward(self, x: Tensor, *args: Any) -> Any:
            return super().forward(x * 3, *args)

    class Cell(nn.LSTMCell):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            h, c = super().forward(x, state)
            return h, c

    class Unrelated(nn.GRU):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return x

    model = nn.ModuleDict({"a": Scaled(3, 4), "b": OurScaled(3, 4), "c": Cell(3, 4), "d": Unrelated(3, 4)})
    x, original = torch.randn(5, 2, 3), nn.LSTM.forward
    with ur.record(model, gradients=True) as rec:
        output, _ = model["a"](x, 2.0)
        nn.LSTM(3, 4)(x)
        second, _ = model["b"](x)
        state = None
        for step in x:
            state = model["c"](step, state)
        model["d"](x)
        (output.sum() + second.sum() + state[0].sum()).backward()
    assert nn.LSTM.forward is original
    assert_close(rec["a"].layers[0].input, x * 2, 1e-6)
    assert_close(rec["a"]["h"], output.detach() - 1, 1e-6)
    assert_close(rec["b"]["h"], second.detach(), 1e-6)
    assert_close(rec["b"].layers[0].input, x * 3, 1e-6)
    assert len(rec["c"].steps) == 5
    for name in "abc":
        assert rec[name].gradient("h").any()
    assert "d" not in rec


@NEEDS_COMPILER
@pytest.mark.parametrize("make", [ur.LSTMCell, lambda *sizes: SingleStep(ur.cells.SCRN, *sizes)])
def test_gradients_on_the_native_engine(make: Any) -> None:
    """There, all states come from one operation, and none is computed from another one outside of it."""
    cell, x = make(3, 4), torch.randn(5, 2, 3)
    traces = []
    for engine in ("native", "reference"):
        with ur.engine(engine), ur.record(cell, gradients=True) as rec:
            state = None
            for step in x:
                state = cell(step, state)
            sum(part.square().sum() for part in state).backward()
        traces.append(rec[""])
    for name in traces[0].names:
        assert_close(traces[0].gradient(name), traces[1].gradient(name), 1e-5)
