"""The page's evaluator runs whole layers as torch does, also with changed numbers."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

import unrolled as ur
from fuzz.program import random_program
from helpers.changed_layers import held_names, run_changed
from helpers.evaluator import assert_equal_on_page, model_data, needs_javascript, run_javascript
from unrolled.tracing.step_graph import model_programs

TIME, BATCH = 5, 2
OPTIONS = {  # of the cells that compute something else with them
    "LSTM": {"proj_size": 3},
    "RNN": {"nonlinearity": "relu"},
    "SLSTM": {"heads": 2},
    "RGLRU": {"heads": 2},
    "RHN": {"depth": 3},
}


def layer_of(cell: type[ur.Cell], dtype: torch.dtype = torch.float32, **options: Any) -> ur.Recurrent:
    """Return a layer with random noise added to its parameters, so that none of them is zero."""
    layer = ur.Recurrent(cell, options.pop("input_size", 4), 4, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


class Noisy(ur.Cell):
    """A cell whose steps draw random numbers."""

    weight_ih = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        noise = torch.randn_like(h)
        g = torch.tanh(linear(dropout(x, 0.4, self.training), self.weight_ih) + noise)
        h = torch.where(torch.rand_like(h) < 0.5, g, 0.5 * h)
        return h


def trace_of(
    layer: nn.Module,
    lengths: list[int] | None = None,
    dtype: torch.dtype | None = None,
    values: tuple[float, ...] = (),
) -> ur.Trace:
    """Trace a random input, ragged if there are lengths, with random initial states.

    Args:
        layer: The layer.
        lengths: The length of each row.
        dtype: The dtype, if the layer has no parameters.
        values: Values to put into the input, one at each step.
    """
    dtype = dtype or next(layer.parameters()).dtype
    x: Any = torch.randn(TIME, BATCH, layer.input_size, dtype=dtype)
    for step, value in enumerate(values):
        x[step, :, 0] = value
    if lengths is not None:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    sizes = [4, 4] if isinstance(layer, nn.LSTM) else layer._first.state_sizes().values()
    count = layer.num_layers * (1 + layer.bidirectional)
    state = tuple(torch.rand(count, BATCH, size, dtype=dtype) for size in sizes)
    return ur.trace(layer, x, state if len(state) > 1 else state[0])


def random_edits(trace: ur.Trace, model: Any, batch: int, dice: random.Random) -> list[list[dict[str, Any]]]:
    """Return lists of edits: none, one value of the input, and for each layer several of each kind.

    Together they change a value of every state and parameter, and hold every quantity.
    """
    length, size = int(trace.layers[0].lengths[batch]), trace.layers[0].input.shape[-1]
    step, unit = dice.randrange(length), dice.randrange(size)
    lists: list[list[dict[str, Any]]] = [[], [{"kind": "input", "step": step, "unit": unit, "value": 1.5}]]
    for part, layer in enumerate(trace.layers):
        states = [
            {"kind": "state", "name": name, "unit": dice.randrange(value.shape[-1]), "value": -0.75}
            for name, value in layer.initial_state.items()
        ]
        weights = [
            {"kind": "parameter", "name": name, "index": dice.randrange(parameter.numel()), "value": 0.5}
            for name, parameter in ((name, getattr(layer.cell, name)) for name in layer.cell.shapes())
        ]
        (program,) = model[part]["program"]["programs"]
        names = [name for name in program["held"] if name in held_names(type(layer.cell))]
        holds = [
            {
                "kind": "hold",
                "name": name,
                "steps": dice.sample(range(length), 2),
                "unit": unit,
                "value": 0.25,
            }
            for name in names
            for unit in (None, dice.randrange(layer.values[name][0, 0].numel()))
            if layer.values[name].is_floating_point()
        ]
        dice.shuffle(holds)
        one_for_each_name = list({hold["name"]: hold for hold in holds}.values())
        values = torch.linspace(0, 1, layer.values[names[-1]][0, 0].numel()).tolist() if names else []
        at_all_steps = [
            {"kind": "hold", "name": n, "steps": None, "unit": None, "value": values} for n in names[-1:]
        ]
        several = (states, weights, one_for_each_name, at_all_steps)
        lists += [[{**edit, "part": part} for edit in edits] for edits in several]
    return lists


def assert_evaluator_agrees(traces: dict[str, ur.Trace], folder: Path, batch: int = 0) -> int:
    """Compare the evaluator with torch for each trace and several edits.

    Returns:
        The number of quantities that were held.
    """
    dice = random.Random(0)
    models = {name: model_data(trace, batch) for name, trace in traces.items()}
    edits = {name: random_edits(trace, models[name], batch, dice) for name, trace in traces.items()}
    cases = [(models[name], edits[name]) for name in traces]
    results = run_javascript("runModels", cases, folder)
    for (name, trace), runs in zip(traces.items(), results, strict=True):
        for edit, run in zip(edits[name], runs, strict=True):
            expected = run_changed(trace.layers, edit, batch)
            for part, layer, values in zip(trace.layers, run, expected, strict=True):
                for quantity, value in values.items():
                    recorded = part.values[quantity][: len(value), batch]
                    describe = f"{name}, {quantity}, {edit}".__str__
                    assert_equal_on_page(layer["values"][quantity], value, describe)
                    if not edit:
                        assert_equal_on_page(layer["values"][quantity], recorded, describe)
                first = 0 if part.direction == "forward" else len(value) - 1
                for state in part.cell.state:
                    last = values[state][len(value) - 1 - first]
                    assert_equal_on_page(layer["finalState"][state], last, describe)
    every_edit = [edit for lists in edits.values() for edit_list in lists for edit in edit_list]
    return len([edit for edit in every_edit if edit["kind"] == "hold"])


@needs_javascript
def test_some_cells(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cells, double = ur.cells, torch.float64
    traces = {
        "lstm": trace_of(nn.LSTM(3, 4, num_layers=2, bidirectional=True), [3, 5]),
        "gru": trace_of(layer_of(cells.GRU, double, bidirectional=True), [4, 2]),
        "slstm": trace_of(layer_of(cells.SLSTM, heads=2)),
        "layer norm": trace_of(layer_of(cells.LayerNormLSTM, double)),
        "noisy": trace_of(layer_of(Noisy), [3, 4]),
        "rnn": trace_of(layer_of(cells.RNN, nonlinearity="relu")),
    }
    assert assert_evaluator_agrees(traces, tmp_path) > 50


@pytest.mark.slow
@needs_javascript
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_cell(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cells = {name: getattr(ur.cells, name) for name in ur.cells.__all__}
    traces = {name: trace_of(layer_of(cell, dtype), [2, 4]) for name, cell in cells.items()}
    for name, options in OPTIONS.items():
        layer = layer_of(cells[name], dtype, input_size=5, num_layers=2, **options)
        traces[f"{name} {options}"] = trace_of(layer)
    for name in cells:
        if name not in OPTIONS:
            traces[f"{name} twice"] = trace_of(layer_of(cells[name], dtype, bidirectional=True))
    for name in cells:
        values = (0.0, math.inf, math.nan)
        traces[f"{name} special"] = trace_of(layer_of(cells[name], dtype), values=values)
    assert assert_evaluator_agrees(traces, tmp_path, batch=1) > 500


@needs_javascript
@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 40), marks=pytest.mark.slow)], ids=str)
def test_random_cells(seeds: range, tmp_path: Path) -> None:
    """The numbers of random cells agree, or there is a reason why they can't be computed."""
    torch.manual_seed(0)
    traces: dict[str, ur.Trace] = {}
    reasons = []
    for generated in map(random_program, seeds):
        dtype = getattr(torch, generated.call.dtype)
        options = {"bias": generated.call.bias, **generated.cell_options()}
        layer = ur.Recurrent(generated.cell(), generated.input, generated.hidden, dtype=dtype, **options)
        trace = trace_of(layer.eval(), None, dtype)
        reason = model_programs(trace)[0].reason
        if reason is None:
            traces[str(generated)] = trace
        else:
            reasons.append(reason)
    assert len(traces) > 0.8 * len(seeds)
    assert all(
        re.match(r"The steps of \w+ can't be recomputed on the page because \w.+\.$", r) for r in reasons
    )
    assert_evaluator_agrees(traces, tmp_path)


@needs_javascript
def test_edits_are_those_of_a_changed_layer(tmp_path: Path) -> None:
    """The changed layer is traced as any other."""
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    x, state = torch.randn(TIME, 1, 3), (torch.randn(4, 1, 4), torch.randn(4, 1, 4))
    model = model_data(ur.trace(layer, x, state))
    edits = [
        {"kind": "input", "step": 2, "unit": 1, "value": -0.3},
        {"kind": "parameter", "part": 0, "name": "weight_ih", "index": 4, "value": 1.25},
        {"kind": "parameter", "part": 3, "name": "bias_hh", "index": 9, "value": -0.5},
        {"kind": "state", "part": 1, "name": "c", "unit": 3, "value": 2.0},
    ]
    with torch.no_grad():
        x[2, 0, 1] = -0.3
        layer.weight_ih_l0.view(-1)[4] = 1.25
        layer.bias_hh_l1_reverse[9] = -0.5
        state[1][1, 0, 3] = 2.0
    expected = ur.trace(layer, x, state)
    ((results,),) = run_javascript("runModels", [(model, [edits])], tmp_path)
    for part, result in zip(expected.layers, results, strict=True):
        for name, values in part.values.items():
            assert_equal_on_page(result["values"][name], values[:, 0], lambda part=part: repr(part))


@needs_javascript
def test_steps_with_different_programs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, program_of_step = torch.randn(TIME, 3), [0, 1, 1, 0, 1]
    layers = [ur.RNN(3, 4, nonlinearity=nonlinearity) for nonlinearity in ("tanh", "relu")]
    layers[1].load_state_dict(layers[0].state_dict())
    ((model,), (other,)) = (model_data(ur.trace(layer, x)) for layer in layers)
    model["program"]["programs"] += other["program"]["programs"]
    model["program"]["programOfStep"] = program_of_step
    ((results,),) = run_javascript("runModels", [([model], [[]])], tmp_path)
    cell, h, rows = nn.RNNCell(3, 4), torch.zeros(4), []
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layers[0].state_dict().items()})
    for step, which in enumerate(program_of_step):
        cell.nonlinearity = ("tanh", "relu")[which]
        h = cell(x[step], h).detach()
        rows.append(h)
    assert_equal_on_page(results[0]["values"]["h"], torch.cat(rows), lambda: "h")
