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
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from torch import sigmoid, tanh
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from unrolled import plot
from unrolled.cli.example import INPUT, WEIGHTS
from unrolled.plot.curves import _wrapped
from unrolled.tracing.gradient_flow import flow, spectral_radii


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


def keys(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def caption(ax: Axes) -> str:
    """The lines below the picture, unwrapped."""
    (text,) = ax.texts
    return " ".join(text.get_text().split())


def curves(ax: Axes) -> list[Line2D]:
    return [line for line in ax.lines if line.get_linestyle() != "None"]


def marked(ax: Axes) -> list[tuple[str, list[int], float]]:
    """The colour, steps and height of what has no place on the axis."""
    marks = [line for line in ax.lines if line.get_linestyle() == "None"]
    return [(line.get_markerfacecolor(), list(line.get_xdata()), line.get_ydata()[0]) for line in marks]


def rightwards(arrow: FancyArrowPatch) -> float:
    start, _, tip = arrow.get_path().vertices[:3]
    return float(tip[0] - start[0])


def written(values: torch.Tensor) -> str:
    return "\n".join(f"{value:.4f}" for value in values.tolist())


def panels(ax: Axes) -> list[Axes]:
    """The heat maps of a picture, without the scale of the colours."""
    return [panel for panel in (ax, *ax.child_axes) if panel.images]


def words(ax: Axes) -> set[str]:
    """Every line of text of a picture, but for the numbers at its ticks."""
    found = [ax.figure.get_suptitle()]
    for panel in (ax, *ax.child_axes):
        found += [text.get_text() for text in panel.texts]
        found += [panel.get_title(loc="left")]
        found += [panel.get_xlabel(), panel.get_ylabel()] * panel.axison
        found += keys(panel) if panel.get_legend() else []
    return {line.strip() for text in found for line in text.splitlines()}


def labels(svg: bytes) -> set[str]:
    """What an SVG says in its texts; their outlines stand in it, and a comment beside each has its words."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    found = [node.text for node in root.iter() if node.tag is ElementTree.Comment]
    return {line.strip() for text in found for line in text.splitlines()}


def numbers(ax: Axes) -> np.ma.MaskedArray:
    return ax.images[0].get_array()


PICTURES: dict[str, Callable[..., Any]] = {
    "unrolled": plot.unrolled,
    "layer": plot.layer,
    "gates": plot.gates,
    "states": plot.states,
    "gradient": plot.gradient,
}
TRACES: dict[str, Callable[[], Any]] = {
    "one state": lambda: traced(cell=ur.cells.RNN),
    "two states": traced,
    "own cell": lambda: traced(cell=Echo),
    "turned": lambda: traced(cell=Turned),
    "long and wide": lambda: traced(60, 40, cell=ur.cells.GRU),
    "one step, one unit": lambda: traced(1, 1),
    "projected": lambda: traced(cell=ur.cells.LSTM, proj_size=1),
    "backward": lambda: traced(bidirectional=True, num_layers=2),
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
    t = TRACES[trace]()
    if picture == "gradient":
        t.backward(lambda output: output[-1].sum())
    ax = (t.layer(1, "backward") if trace == "backward" else t).plot(picture)
    png, svg = io.BytesIO(), io.BytesIO()
    ax.figure.savefig(png, format="png")
    ax.figure.set_layout_engine("none")  # it is done, and takes longer than all the rest
    ax.figure.savefig(svg, format="svg")
    height, width = imread(io.BytesIO(png.getvalue())).shape[:2]
    assert (width, height) == pytest.approx([100 * inches for inches in ax.figure.get_size_inches()], abs=1)
    assert words(ax) <= labels(svg.getvalue())
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
    code = """if True:
        import sys, torch, unrolled as ur
        t = ur.trace(ur.RNN(2, 3), torch.ones(2, 2))
        assert not any(name.startswith("matplotlib") for name in sys.modules)
        t.plot("states").figure.draw_without_rendering()
        assert "matplotlib.pyplot" not in sys.modules"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "unrolled.plot")
    for name in ("matplotlib", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib: pip install matplotlib$"):
        importlib.import_module("unrolled.plot")
    monkeypatch.delattr(ur, "plot")
    with pytest.raises(ImportError, match=r"pictures need matplotlib: pip install matplotlib$"):
        traced().plot("gates")


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
    assert numbers(plot.gates(t, ["h"], batch=1)).shape == (3, 2)
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
    matrices = {name: getattr(t.layers[0].cell, name) for name in ("W", "V", "U", "weight_ih", "weight_hh")
                if name in cell.params()}  # fmt: skip
    assert [panel.get_title(loc="left") for panel in panels(ax)] == list(matrices)
    limits = {panel.images[0].get_clim() for panel in panels(ax)}
    assert len(limits) == 1
    assert sum(limits.pop()) == 0
    for panel, matrix in zip(panels(ax), matrices.values(), strict=True):
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
    ax = plot.gates(t)
    assert [panel.get_title(loc="left").split(" – ")[0] for panel in panels(ax)] == names
    assert ax.child_axes[: len(names)] == panels(ax)
    for panel, name in zip(panels(ax), names, strict=True):
        np.testing.assert_array_equal(numbers(panel), t[name][:, 0].double().T.numpy())
    limits = {panel.images[0].get_clim() for panel in panels(ax)}
    assert len(limits) == 1
    low, high = limits.pop()
    assert -low == high == pytest.approx(max(float(t[name].abs().max()) for name in names))


def test_a_panel_says_what_the_docstring_of_the_cell_says() -> None:
    gate, memory, _ = panels(plot.gates(traced(cell=Echo)))
    assert gate.get_title(loc="left") == "gate – how much is new"
    assert memory.get_title(loc="left") == "memory"


def test_quantities_of_any_width_may_be_chosen() -> None:
    t = traced(5)
    assert numbers(plot.gates(t, ["input_sum"])).shape == (12, 5)
    ax = Figure().add_subplot()
    assert plot.gates(t, "f", ax=ax) is ax
    assert ax.get_title(loc="left") == "f – forget gate: how much old c stays"


def test_complex_numbers_are_not_drawn_as_their_real_parts() -> None:
    class Turning(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x, h):
            turned = torch.complex(h, linear(x, self.weight))
            h = tanh(turned.abs())
            return h

    trace = ur.trace(ur.Recurrent(Turning, 2, 3), torch.randn(4, 2))
    assert plot.gates(trace).get_title(loc="left") == "h"
    with pytest.raises(ValueError, match="a picture shows real numbers, not complex ones"):
        plot.gates(trace, ["turned"])


def test_what_is_not_finite_has_a_colour_of_its_own() -> None:
    x = torch.ones(6, 2)
    x[3], x[5, 0] = math.nan, math.inf
    t = ur.trace(ur.RNN(2, 3), x)
    panel = plot.gates(t, ["input_sum"])
    image = panel.images[0]
    colors = image.to_rgba(image.get_array())
    finite = t["input_sum"][:, 0].isfinite().T.numpy()
    assert finite.sum() == 3 * 4
    np.testing.assert_array_equal((colors != to_rgba(plot.NAN_COLOR)).any(-1), finite)
    assert image.get_clim()[1] == pytest.approx(float(t["input_sum"][0].abs().max()))
    assert keys(panel.child_axes[-1]) == ["NaN or infinite"]
    assert plot.gates(traced()).child_axes[-1].get_legend() is None


# states


def test_a_line_for_each_unit(walkthrough: ur.Trace) -> None:
    ax = plot.states(walkthrough)
    lines = [line for line in ax.lines if line.get_label().startswith("unit")]
    np.testing.assert_array_equal([line.get_ydata() for line in lines], walkthrough["h"][:, 0].double().T)
    np.testing.assert_array_equal(lines[0].get_xdata(), range(4))


def test_states_that_are_not_finite_are_marked() -> None:
    x = torch.ones(6, 2)
    x[4:] = math.nan
    t = ur.trace(ur.RNN(2, 3), x)
    t["h"][1, 0, 2] = math.inf
    ax = plot.states(t)
    assert marked(ax) == [(plot.NAN_COLOR, [1, 4, 5], 1)]
    assert keys(ax) == ["unit 0", "unit 1", "unit 2", "NaN or infinite"]


def test_a_panel_for_each_state_and_word_of_what_is_left_out() -> None:
    t = traced(10, 40)
    ax = plot.states(t)
    assert [panel.get_title(loc="left") for panel in ax.child_axes] == [
        "h – hidden state",
        "c – cell state",
    ]
    for panel, name in zip(ax.child_axes, ("h", "c"), strict=True):
        lines = panel.lines[1:]
        assert len(lines) == len({line.get_color() for line in lines}) == 8
        np.testing.assert_array_equal(lines[7].get_ydata(), t[name][:, 0, 7].double())
        (whole,) = panel.collections
        edge = whole.get_paths()[0].vertices
        for step in range(10):
            ys = edge[edge[:, 0] == step][:, 1]
            assert (ys.min(), ys.max()) == (t[name][step].double().min(), t[name][step].double().max())
        assert keys(panel)[-1] == "range of all 40"


# gradient


class Scaled(ur.Cell):
    """Multiplies the state by what it reads: ∂loss/∂h of a step is that of the next one times its x."""

    def step(self, x, h):
        h = x * h + 1
        return h


def scaled(*x: float) -> ur.Trace:
    layer = ur.Recurrent(Scaled, 1, 1, bidirectional=True, dtype=torch.float64)
    t = ur.trace(layer, torch.tensor(x, dtype=torch.float64).unsqueeze(1))
    return t.backward(lambda output: output[-1, 0] + output[0, 1])


def test_a_state_that_grew_leaves_no_gate_pale() -> None:
    layer = ur.LSTM(2, 3)
    with torch.no_grad():
        layer.bias_ih_l0.copy_(torch.tensor([9.0, 9.0, 9.0, 9.0]).repeat_interleave(3))  # c counts the steps
    t = ur.trace(layer, torch.randn(9, 2))
    found = {panel.get_title(loc="left"): panel.images[0].get_clim() for panel in panels(t.plot("gates"))}
    (c,) = (title for title in found if title.startswith("c "))
    assert found.pop(c)[1] == pytest.approx(float(t["c"].max()), rel=1e-6)
    assert f"a scale of its own: ±{float(t['c'].max()):.3g}" in c
    (shared,) = set(found.values())
    assert shared[1] == -shared[0] == pytest.approx(1, abs=1e-2)
    assert not any("of its own" in title for title in found)


def test_a_picture_says_which_row_it_shows_and_its_words_fill_the_lines() -> None:
    t = ur.trace(ur.LSTM(2, 8), torch.randn(40, 3, 2)).backward(lambda output: output[-1].sum())
    for kind in ("gates", "states", "gradient"):
        assert t.plot(kind, batch=1).figure.get_suptitle().endswith(", row 1 of 3")
    assert any(text.get_text().endswith(", row 2 of 3") for text in t.plot("unrolled", batch=2).texts)
    assert "row" not in ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)).plot("gates").figure.get_suptitle()
    fact = "the gradient of h fades by a factor of 0.742 a step on its way back: from 2.24 to 1 at step 3"
    for letters in (40, 60, 90, 103):
        lines = _wrapped(fact, letters)
        assert " ".join(line.strip() for line in lines) == fact
        assert max(map(len, lines)) <= letters
        assert len(lines) == 1 or len(lines[-1]) > 0.6 * len(lines[0])


def test_a_line_of_norms_for_each_quantity() -> None:
    t = traced(20).backward(lambda output: output[-1].sum())
    ax = t.plot("gradient")
    assert ax.get_yscale() == "log"
    assert [line.get_label().split("  ")[0] for line in curves(ax)] == ["i", "f", "g", "o", "c", "h"]
    for line, name in zip(curves(ax), ("i", "f", "g", "o", "c", "h"), strict=True):
        norms = t.gradient(name)[:, 0].double().norm(dim=-1).numpy()
        np.testing.assert_allclose(line.get_ydata(), np.where(norms > 0, norms, np.nan), rtol=1e-6)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in curves(ax)}
    for part in zip(*looks, strict=True):
        assert len(set(part)) >= 4
    assert ax.get_xlim() == (-0.5, 19.5)
    radii = spectral_radii(t.layers[0].cell)["weight_hh"]
    said = caption(ax)
    assert said.startswith(flow(t.layers[0], "c").words)
    assert said.endswith("blocks of weight_hh are " + ", ".join(f"{radius:.3g}" for radius in radii))


def test_the_factor_of_a_linear_recurrence_is_written() -> None:
    ax = scaled(*[0.5] * 6).plot("gradient")
    assert keys(ax) == ["h  ×0.5"]
    assert caption(ax) == (
        "the gradient of h fades by a factor of 0.5 a step on its way back: "
        "from 1 at step 5 to 0.0312 at step 0"
    )
    backward = scaled(*[2] * 6).layer(0, "backward").plot("gradient")
    assert "grows by a factor of 2 a step on its way back: from 1 at step 0 to 32 at step 5" in caption(
        backward
    )
    assert "→" in backward.get_xlabel()
    assert "←" in ax.get_xlabel()


def test_zeros_and_what_is_not_finite_stand_beside_the_axis() -> None:
    ax = scaled(9, 2, 0, 0.5, 0.5).plot("gradient")
    ((color, steps, height),) = marked(ax)
    assert (color, steps) == ("white", [0, 1])
    assert 0 < height < 0.1
    np.testing.assert_array_equal(curves(ax)[0].get_ydata(), [np.nan, np.nan, 0.25, 0.5, 1])
    assert keys(ax) == ["h  ×0.5", "exactly 0"]
    falling = scaled(9, 2, 0, 1e-3, 0.1).plot("gradient")
    (band,) = falling.patches
    top = falling.transData.inverted().transform(falling.transAxes.transform((0, band.get_height())))[1]
    ticks = [*falling.get_yticks(), *falling.get_yticks(minor=True)]
    assert 0.5e-4 < top <= min(ticks) < 2e-4 < 1 <= max(ticks)

    ax = scaled(9, math.nan, 0.5, math.inf, 0.5).plot("gradient")
    ((color, steps, height),) = marked(ax)
    assert (color, steps) == (plot.NAN_COLOR, [0, 1, 2])
    assert 0.9 < height < 1
    assert keys(ax) == ["h  ×0.5", "NaN or infinite"]

    t = traced(5).backward(lambda output: output.sum() * 0)
    rows = marked(t.plot("gradient"))
    assert len({height for _, _, height in rows}) == 6
    assert all(steps == [0, 1, 2, 3, 4] for _, steps, _ in rows)


@pytest.mark.parametrize("x", [(9, 1e-200, 1e-120, 0), (9, 1e200, 1e100), (9, 1e-160, 1e-160), (1,)])
def test_the_ends_of_float64(x: tuple[float, ...]) -> None:
    ax = scaled(*x).plot("gradient")
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    seen = [y for y in curves(ax)[0].get_ydata() if math.isfinite(y)]
    assert all(low <= y <= high < math.inf for y in seen)


def test_a_gradient_needs_backward() -> None:
    with pytest.raises(ValueError, match=r"no gradients yet: call backward of the trace first, with"):
        traced().plot("gradient")
    with pytest.raises(ValueError, match="x is the input: there are gradients of"):
        scaled(1).plot("gradient", names="x")


# all of them


def test_large_layers_are_drawn_as_means() -> None:
    t = traced(1200, 200, cell=ur.cells.RNN)
    t["h"][700, 0, 60], t["h"][0, 0, 0], t["h"][0, 0, 1] = math.nan, math.inf, -math.inf
    ax = plot.gates(t, "h")
    assert ax.get_title(loc="left") == "h – hidden state (means of 2 × 3 numbers)"
    assert ax.images[0].get_extent() == [-0.5, 1199.5, 199.5, -0.5]
    exact = t["h"][:, 0].double().T.numpy().reshape(100, 2, 400, 3).swapaxes(1, 2).reshape(100, 400, 6)
    broken = ~np.isfinite(exact).all(-1)
    assert broken.sum() == 2
    np.testing.assert_array_equal(numbers(ax).mask, broken)
    np.testing.assert_allclose(numbers(ax)[~broken], exact[~broken].mean(-1), rtol=1e-12, atol=1e-12)
    wide = traced(hidden=301, cell=ur.cells.RNN)
    weights = plot.layer(wide)
    assert panels(weights)[1].get_title(loc="left").startswith("weight_hh (means of 2 ×")
    assert panels(weights)[0].images[0].get_extent() == [-0.5, 1.5, 300.5, -0.5]
    assert numbers(panels(weights)[0]).shape == (151, 2)
    exact = wide.layers[0].cell.weight_ih[-1].double().numpy()  # alone in the last of the rows
    np.testing.assert_allclose(numbers(panels(weights)[0])[-1], exact, rtol=1e-12)


def test_the_method_draws_what_the_function_draws() -> None:
    layer = ur.GRU(2, 3, num_layers=2, bidirectional=True)
    t = ur.trace(layer, pack_sequence([torch.randn(4, 2), torch.randn(2, 2)])).backward(
        lambda output: output.data.sum()
    )
    part = t.layer(1, "backward")
    np.testing.assert_array_equal(
        numbers(part.plot("gates", names=["h"], batch=1)), part["h"][:2, 1].double().numpy().T
    )
    assert texts(t.plot("unrolled", steps=[0])) == texts(plot.unrolled(t, steps=[0]))
    for kind in PICTURES:
        ax = Figure((12, 8)).add_subplot()
        assert part.plot(kind, ax=ax) is ax


def test_text_stays_text_where_the_user_wants_it(walkthrough: ur.Trace) -> None:
    svg = io.BytesIO()
    ax = walkthrough.plot("states")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        ax.figure.savefig(svg, format="svg")
    nodes = ElementTree.fromstring(svg.getvalue()).iter("{http://www.w3.org/2000/svg}text")
    assert words(ax) <= {"".join(node.itertext()) for node in nodes}


# errors


@pytest.mark.parametrize("picture", ["unrolled", "gates", "states", "gradient"])
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
    with pytest.raises(
        ValueError, match="should be one of gates, states, gradient, unrolled, layer, got 'gate'"
    ):
        traced().plot("gate")
    with pytest.raises(ValueError, match=r"got \['gates'\]"):
        traced().plot(["gates"])
    with pytest.raises(TypeError, match="a picture of layer has no option 'batch': it has ax"):
        traced().plot("layer", batch=0)
    with pytest.raises(TypeError, match="no option 'trace'"):
        traced().plot("gates", trace=None)
    for draw in PICTURES.values():
        with pytest.raises(TypeError, match="a picture is drawn of a trace or of one of its layers, got RNN"):
            draw(ur.RNN(2, 3))


@pytest.mark.parametrize("picture", ["gates", "states", "gradient", "unrolled", "layer"])
def test_an_axes_that_can_not_be_drawn_on(picture: str, walkthrough: ur.Trace) -> None:
    trace, figure = walkthrough.backward(torch.sum), Figure()
    for ax, error, words in (
        (figure.subplots(2), TypeError, "ax should be one Axes of matplotlib, .* got ndarray"),
        (figure, TypeError, "got Figure"),
        (figure.add_subplot(projection="polar"), ValueError, "this one is polar"),
        (figure.add_subplot(projection="3d"), ValueError, "this one is 3d"),
        (figure.add_axes((0, 0, 0, 1)), ValueError, "ax has no room"),
    ):
        with pytest.raises(error, match=words):
            trace.plot(picture, ax=ax)


def test_words_and_names_that_matplotlib_reads_otherwise() -> None:
    class Priced(ur.Cell):
        r"""Its words look like formulas.

        Quantities:
            _gate: between $1 and $2_{
            h: $\frac$ of it
        """

        weight_hh = ur.Param("hidden", "hidden")

        def step(self, x, h):
            _gate = sigmoid(x + linear(h, self.weight_hh))
            h = tanh(_gate)
            return h

    trace = ur.trace(ur.Recurrent(Priced, 3, 3), torch.randn(4, 3)).backward(torch.sum)
    ax = trace.plot("gates")
    ax.figure.savefig(io.BytesIO())
    titles = [panel.get_title(loc="left") for panel in ax.child_axes]
    assert r"_gate – between $1 and $2_{" in titles
    ax = trace.plot("gradient")
    ax.figure.savefig(io.BytesIO())
    keys = [text.get_text().split("×")[0].strip() for text in ax.get_legend().get_texts()]
    assert keys[:2] == ["_gate", "h"]
    with pytest.raises(TypeError, match="names should be the names of quantities, got 5"):
        trace.plot("gates", names=5)
    with pytest.raises(TypeError, match=r"steps should be several time steps, such as \[0, -1\], got 2"):
        trace.plot("unrolled", steps=2)
