"""The pictures hold the trace's numbers, for any cell, and leave pyplot alone."""

from __future__ import annotations

import importlib
import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from torch import sigmoid, tanh
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from unrolled import plot
from unrolled.walkthrough import INPUT, WEIGHTS


class Echo(ur.Cell):
    """Two states, a gate, and two matrices between the same units.

    Quantities:
        gate: how much is new
    """

    state = ("memory", "trail")
    W, V = ur.Param("hidden", "input"), ur.Param("hidden", "input")
    U = ur.Param("hidden", "hidden")

    def step(self, x, memory, trail):
        gate = sigmoid(linear(x, self.W))
        memory = gate * tanh(linear(x, self.V) + linear(memory, self.U)) + (1 - gate) * memory
        trail = trail / 2 + memory
        return memory, trail


class Turned(ur.Cell):
    """Written for x @ weight."""

    into = ur.Param("input", "hidden")
    gain = ur.Param("hidden")

    def step(self, x, h):
        h = tanh(x @ self.into + self.gain * h)
        return h


class Diagonal(ur.Cell):
    gain = ur.Param("hidden")

    def step(self, x, h):
        h = tanh(x + self.gain * h)
        return h


def traced(steps: int = 4, hidden: int = 3, cell: Any = ur.cells.LSTM, **arguments: Any) -> ur.Trace:
    return ur.trace(ur.Recurrent(cell, 2, hidden, **arguments), torch.randn(steps, 2))


@pytest.fixture
def walkthrough() -> ur.Trace:
    layer = ur.RNN(2, 3)
    layer.load_state_dict(WEIGHTS)
    return ur.trace(layer, INPUT)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def count(ax: Axes, kind: type) -> int:
    return sum(isinstance(patch, kind) for patch in ax.patches)


def place(ax: Axes, label: str) -> float:
    """How far to the right the one text with this label stands."""
    (found,) = (text for text in ax.texts if text.get_text() == label)
    return found.get_position()[0]


def beside(ax: Axes, label: str) -> list[str]:
    """What stands above and below this label."""
    return [text.get_text() for text in ax.texts if text.get_position()[0] == place(ax, label)]


def rightwards(arrow: FancyArrowPatch) -> float:
    start, _, tip = arrow.get_path().vertices[:3]
    return float(tip[0] - start[0])


def written(values: torch.Tensor) -> str:
    return "\n".join(f"{value:.4f}" for value in values.tolist())


def numbers(ax: Axes) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


PICTURES: dict[str, Callable[..., Any]] = {
    "unrolled": plot.unrolled,
    "layer": plot.layer,
    "gates": plot.gates,
    "states": plot.states,
}
TRACES: dict[str, Callable[[], Any]] = {
    "one state": lambda: traced(cell=ur.cells.RNN),
    "two states": traced,
    "own cell": lambda: traced(cell=Echo),
    "turned": lambda: traced(cell=Turned),
    "long and wide": lambda: traced(60, 40, cell=ur.cells.GRU),
    "one step, one unit": lambda: traced(1, 1),
    "projected": lambda: traced(cell=ur.cells.LSTM, proj_size=1),
    "backward": lambda: traced(bidirectional=True, num_layers=2).layer(1, "backward"),
    "bfloat16": lambda: ur.trace(ur.GRU(2, 3).bfloat16(), torch.ones(4, 2, dtype=torch.bfloat16)),
    "zeros": lambda: ur.trace(ur.RNN(2, 3, bias=False), torch.zeros(4, 2)),
    "not finite": lambda: ur.trace(
        ur.RNN(2, 3, nonlinearity="relu"), torch.tensor([[math.inf, math.nan]] * 4)
    ),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("picture", PICTURES)
def test_every_picture_of_every_layer_saves_and_leaves_pyplot_alone(picture: str, trace: str) -> None:
    settings, registered = dict(matplotlib.rcParams), dict(Gcf.figs)
    drawn = PICTURES[picture](TRACES[trace]())
    figure = (drawn[0] if picture == "gates" else drawn).figure
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        file = io.BytesIO()
        figure.savefig(file, format=kind)
        assert file.getvalue().startswith(start)
    assert dict(matplotlib.rcParams) == settings
    assert dict(Gcf.figs) == registered


@pytest.mark.parametrize("trace", ["one state", "two states", "own cell", "long and wide", "projected"])
@pytest.mark.parametrize("size", [None, (4, 3)])
def test_no_two_texts_of_the_drawings_overlap(trace: str, size: tuple[float, float] | None) -> None:
    for draw in (plot.unrolled, plot.layer):
        ax = None if size is None else Figure(size).add_subplot()
        drawn = draw(TRACES[trace](), ax=ax)
        drawn.figure.draw_without_rendering()
        boxes = [(text.get_bbox_patch() or text).get_window_extent() for text in drawn.texts]
        for first, second in itertools.combinations(boxes, 2):
            assert not first.count_overlaps([second])
        arrows = [patch for patch in drawn.patches if isinstance(patch, FancyArrowPatch)]
        for arrow, box in itertools.product(arrows, boxes):
            assert not arrow.get_window_extent().count_overlaps([box])


def test_a_notebook_shows_the_figure(walkthrough: ur.Trace) -> None:
    figure = plot.states(walkthrough).figure
    png, size = figure._repr_png_()
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width / height == pytest.approx(size["width"] / size["height"], rel=0.01)
    assert width > size["width"]


def test_pyplot_is_not_even_imported() -> None:
    code = "import sys, unrolled.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "unrolled.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib: pip install 'unrolled\[plot\]'"):
        importlib.import_module("unrolled.plot")


# unrolled


def test_a_box_for_each_step_and_an_arrow_for_each_thing_that_flows(walkthrough: ur.Trace) -> None:
    ax = plot.unrolled(walkthrough)
    assert count(ax, FancyBboxPatch) == 4
    assert count(ax, FancyArrowPatch) == 4 + 4 + 5  # inputs, outputs, and h from before to after
    assert [f"step {step}" for step in range(4)] == [text for text in texts(ax) if "step" in text]
    for step in range(4):
        assert written(walkthrough["h"][step, 0]) in beside(ax, f"step {step}")
        assert written(walkthrough.layers[0].input[step, 0]) in beside(ax, f"step {step}")
    assert "0.2529\n0.7949\n-0.0466" in texts(ax)
    assert place(ax, "initial h") < place(ax, "step 0") < place(ax, "final h")


@pytest.mark.parametrize("cell", [ur.cells.LSTM, Echo])
def test_every_state_has_its_arrows_and_numbers(cell: type[ur.Cell]) -> None:
    t = traced(cell=cell)
    ax = plot.unrolled(t)
    assert count(ax, FancyArrowPatch) == 4 + 4 + 2 * 5
    output, other = cell.state
    assert {f"initial {output}", f"{output}₀", f"{output}₁", f"{output}₂", f"final {output}"} <= set(
        texts(ax)
    )
    assert beside(ax, f"initial {other}")[-1] == written(torch.zeros(3))
    for step, label in enumerate((f"{other}₀", f"{other}₁", f"{other}₂", f"final {other}")):
        assert written(t[other][step, 0]) in beside(ax, label)
        assert written(t[output][step, 0]) in beside(ax, f"step {step}")


def test_the_initial_state_is_the_one_that_was_given(walkthrough_layer: ur.RNN) -> None:
    start = torch.tensor([[0.125, -0.5, 2.0]])
    ax = plot.unrolled(ur.trace(walkthrough_layer, torch.ones(2, 2), start))
    assert "0.1250\n-0.5000\n2.0000" in texts(ax)


def test_time_runs_from_right_to_left_backwards() -> None:
    ax = plot.unrolled(traced(cell=ur.cells.GRU, bidirectional=True).layer(0, "backward"))
    order = ["final h", "step 0", "step 1", "step 2", "step 3", "initial h"]
    assert [place(ax, label) for label in order] == sorted(place(ax, label) for label in order)
    assert "GRU, layer 0, backward" in texts(ax)
    arrows = [rightwards(patch) for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    assert sum(arrow < -0.5 for arrow in arrows) == 5
    assert sum(arrow > 0.5 for arrow in arrows) == 0


def test_a_long_sequence_is_shortened() -> None:
    ax = plot.unrolled(traced(60, 8, cell=ur.cells.GRU))
    assert [text for text in texts(ax) if "step" in text] == ["step 0", "step 1", "step 2", "step 59"]
    assert texts(ax).count("⋯") == 1
    assert "h₅₈" in texts(ax)
    assert texts(ax).count("8 numbers") == 4 + 1  # outputs and the initial state
    assert count(ax, FancyArrowPatch) == 4 + 4 + (1 + 2) + 1 + 2


def test_chosen_steps() -> None:
    t = traced(9, cell=ur.cells.GRU)
    ax = plot.unrolled(t, steps=[-2, 3, 4])
    assert [text for text in texts(ax) if "step" in text] == ["step 3", "step 4", "step 7"]
    assert texts(ax).count("⋯") == 3
    assert {"h₂", "h₃", "h₄", "h₆", "h₇"} <= set(texts(ax))
    assert not {"initial h", "final h"} & set(texts(ax))


def test_a_row_ends_with_its_own_last_step() -> None:
    t = ur.trace(ur.GRU(2, 3), pack_sequence([torch.randn(4, 2), torch.randn(2, 2)]))
    ax = plot.unrolled(t, batch=1)
    assert count(ax, FancyBboxPatch) == 2
    assert written(t["h"][1, 1]) in texts(ax)
    assert numbers(plot.gates(t, ["h"], batch=1)[0]).shape == (3, 2)
    assert len(plot.states(t, batch=1).lines[1].get_ydata()) == 2


def test_a_drawing_shrinks_into_a_small_axes(walkthrough: ur.Trace) -> None:
    whole, small = Figure().add_subplot(), Figure(figsize=(3, 2)).add_subplot()
    assert plot.unrolled(walkthrough, ax=small) is small
    sizes = [ax.texts[0].get_fontsize() for ax in (plot.unrolled(walkthrough, ax=whole), small)]
    assert sizes[1] < sizes[0] <= 9


# layer


def test_the_edges_are_the_weights(walkthrough: ur.Trace) -> None:
    ax = plot.layer(walkthrough)
    assert count(ax, Circle) == 2 + 3 + 3
    edges = ax.collections[-1]
    assert isinstance(edges, LineCollection)
    weights = torch.cat([WEIGHTS["weight_ih_l0"].flatten(), WEIGHTS["weight_hh_l0"].flatten()])
    np.testing.assert_array_equal(edges.get_array(), weights.double())
    low, high = edges.get_clim()
    assert -low == high == pytest.approx(float(weights.abs().max()))

    feature_1, unit_0 = (ax.patches[place].center for place in (1, 5))
    (x, y), (to_x, to_y) = edges.get_segments()[1]  # weight_ih[0, 1], from feature 1 to unit 0
    assert (y, to_y) == pytest.approx((feature_1[1], unit_0[1]))
    assert feature_1[0] < x < to_x < unit_0[0]


@pytest.mark.parametrize(("cell", "hidden"), [(ur.cells.LSTM, 3), (ur.cells.RNN, 9), (Echo, 2)])
def test_larger_layers_and_parallel_matrices_are_heat_maps(cell: type[ur.Cell], hidden: int) -> None:
    t = traced(hidden=hidden, cell=cell)
    ax = plot.layer(t)
    panels = [panel for panel in ax.child_axes if panel.images]
    matrices = {name: getattr(t.layers[0].cell, name) for name in ("W", "V", "U", "weight_ih", "weight_hh")
                if name in cell.params()}  # fmt: skip
    assert [panel.get_title(loc="left") for panel in panels] == list(matrices)
    limits = {panel.images[0].get_clim() for panel in panels}
    assert len(limits) == 1
    assert sum(limits.pop()) == 0
    for panel, matrix in zip(panels, matrices.values(), strict=True):
        np.testing.assert_array_equal(numbers(panel), matrix.double().numpy())


def test_a_matrix_with_the_input_along_its_rows_is_turned() -> None:
    t = traced(cell=Turned)
    ax = plot.layer(t)
    assert "input\ninto" in texts(ax)
    np.testing.assert_array_equal(ax.collections[-1].get_array(), t.layers[0].cell.into.T.double().flatten())


# gates


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (ur.cells.RNN, ["input_sum", "hidden_sum", "h"]),
        (ur.cells.LSTM, ["i", "f", "g", "o", "c", "h"]),
        (Echo, ["gate", "memory", "trail"]),
    ],
)
def test_a_panel_for_each_quantity_on_one_scale(cell: type[ur.Cell], names: list[str]) -> None:
    t = traced(20, cell=cell)
    panels = plot.gates(t)
    assert [panel.get_title(loc="left").split(" – ")[0] for panel in panels] == names
    for panel, name in zip(panels, names, strict=True):
        np.testing.assert_array_equal(numbers(panel), t[name][:, 0].double().T.numpy())
    limits = {panel.images[0].get_clim() for panel in panels}
    assert len(limits) == 1
    low, high = limits.pop()
    assert -low == high == pytest.approx(max(float(t[name].abs().max()) for name in names))


def test_a_panel_says_what_the_docstring_of_the_cell_says() -> None:
    panels = plot.gates(traced(cell=Echo))
    assert panels[0].get_title(loc="left") == "gate – how much is new"
    assert panels[1].get_title(loc="left") == "memory"


def test_quantities_of_any_width_may_be_chosen() -> None:
    t = traced(5)
    (panel,) = plot.gates(t, ["input_sum"])
    assert numbers(panel).shape == (12, 5)
    assert [panel.get_title(loc="left")[0] for panel in plot.gates(t, "f")] == ["f"]


def test_complex_numbers_are_not_drawn_as_their_real_parts() -> None:
    class Turning(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x, h):
            turned = torch.complex(h, linear(x, self.weight))
            h = tanh(turned.abs())
            return h

    trace = ur.trace(ur.Recurrent(Turning, 2, 3), torch.randn(4, 2))
    assert [panel.get_title(loc="left") for panel in plot.gates(trace)] == ["h"]
    with pytest.raises(ValueError, match="a picture shows real numbers, not complex ones"):
        plot.gates(trace, ["turned"])


def test_what_is_not_finite_has_a_colour_of_its_own() -> None:
    x = torch.ones(6, 2)
    x[3], x[5, 0] = math.nan, math.inf
    t = ur.trace(ur.RNN(2, 3), x)
    (panel,) = plot.gates(t, ["input_sum"])
    image = panel.images[0]
    colors = image.to_rgba(image.get_array())
    finite = t["input_sum"][:, 0].isfinite().T.numpy()
    assert finite.sum() == 3 * 4
    np.testing.assert_array_equal((colors != to_rgba(plot.NAN_COLOR)).any(-1), finite)
    assert image.get_clim()[1] == pytest.approx(float(t["input_sum"][0].abs().max()))
    (legend,) = panel.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["NaN or infinite"]
    assert not plot.gates(traced())[0].figure.legends


# states


def test_a_line_for_each_unit(walkthrough: ur.Trace) -> None:
    ax = plot.states(walkthrough)
    lines = [line for line in ax.lines if line.get_label().startswith("unit")]
    np.testing.assert_array_equal([line.get_ydata() for line in lines], walkthrough["h"][:, 0].double().T)
    np.testing.assert_array_equal(lines[0].get_xdata(), range(4))


def test_a_panel_for_each_state_and_word_of_what_is_left_out() -> None:
    t = traced(10, 40)
    ax = plot.states(t)
    assert [panel.get_title(loc="left") for panel in ax.child_axes] == [
        "h – hidden state (the first 8 of 40 units)",
        "c – cell state (the first 8 of 40 units)",
    ]
    for panel, name in zip(ax.child_axes, ("h", "c"), strict=True):
        lines = panel.lines[1:]
        assert len(lines) == len({line.get_color() for line in lines}) == 8
        np.testing.assert_array_equal(lines[7].get_ydata(), t[name][:, 0, 7].double())


# errors


@pytest.mark.parametrize("picture", ["unrolled", "gates", "states"])
@pytest.mark.parametrize("row", [1, -2])
def test_a_row_that_is_not_there(picture: str, row: int) -> None:
    with pytest.raises(IndexError, match=rf"there is no row {row}: there are 1, counted from 0"):
        PICTURES[picture](traced(), batch=row)


def test_what_can_not_be_drawn_is_named() -> None:
    with pytest.raises(IndexError, match="there is no time step 4: there are 4"):
        plot.unrolled(traced(), steps=[0, 4])
    with pytest.raises(ValueError, match="steps is empty"):
        plot.unrolled(traced(), steps=[])
    with pytest.raises(KeyError, match="no quantity 'z'"):
        plot.gates(traced(), ["i", "z"])
    with pytest.raises(ValueError, match="names is empty"):
        plot.gates(traced(), [])
    with pytest.raises(ValueError, match="Diagonal has no parameter with two axes"):
        plot.layer(ur.trace(ur.Recurrent(Diagonal, 3, 3), torch.ones(2, 3)))
    for draw in PICTURES.values():
        with pytest.raises(TypeError, match="a picture is drawn of a trace or of one of its layers, got RNN"):
            draw(ur.RNN(2, 3))
