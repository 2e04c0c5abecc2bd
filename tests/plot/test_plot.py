"""All plots save as PNG and SVG, don't use pyplot, and raise clear errors."""

from __future__ import annotations

import importlib
import io
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
from matplotlib.figure import Figure
from matplotlib.image import imread
from plot_helpers import TRACES, Diagonal, heat_maps, image_values, legend_labels, random_trace, texts
from torch import sigmoid, tanh
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from unrolled import plot
from unrolled.plot.curves import _wrap_evenly


def printed_lines(ax: Axes) -> set[str]:
    """Return every line of text of a plot, except for the tick labels."""
    lines = [ax.figure.get_suptitle()]
    for panel in (ax, *ax.child_axes):
        lines += [text.get_text() for text in panel.texts]
        lines += [panel.get_title(loc="left")]
        lines += [panel.get_xlabel(), panel.get_ylabel()] * panel.axison
        lines += legend_labels(panel) if panel.get_legend() else []
    return {line.strip() for text in lines for line in text.splitlines()}


def svg_lines(svg: bytes) -> set[str]:
    """Return every line of text in an SVG. The text is drawn as outlines, with its words in a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    comments = [node.text for node in root.iter() if node.tag is ElementTree.Comment]
    return {line.strip() for text in comments for line in text.splitlines()}


PLOTS: dict[str, Callable[..., Any]] = {
    "unrolled": plot.unrolled,
    "layer": plot.layer,
    "gates": plot.gates,
    "states": plot.states,
    "gradient": plot.gradient,
}


@pytest.mark.slow
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", PLOTS)
def test_every_plot_saves_and_leaves_pyplot_alone(kind: str, trace: str) -> None:
    settings, registered = dict(matplotlib.rcParams), dict(Gcf.figs)
    t = TRACES[trace]()
    if kind == "gradient":
        t.backward(lambda output: output[-1].sum())
    ax = (t.layer(1, "backward") if trace == "backward" else t).plot(kind)
    png, svg = io.BytesIO(), io.BytesIO()
    ax.figure.savefig(png, format="png")
    ax.figure.set_layout_engine("none")  # the layout is done, and is the slowest part
    ax.figure.savefig(svg, format="svg")
    height, width = imread(io.BytesIO(png.getvalue())).shape[:2]
    assert (width, height) == pytest.approx([100 * inches for inches in ax.figure.get_size_inches()], abs=1)
    assert printed_lines(ax) <= svg_lines(svg.getvalue())
    assert dict(matplotlib.rcParams) == settings
    assert dict(Gcf.figs) == registered


def test_figure_has_a_png_representation_for_notebooks(walkthrough: ur.Trace) -> None:
    figure = plot.states(walkthrough).figure
    png, size = figure._repr_png_()
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width / height == pytest.approx(size["width"] / size["height"], rel=0.01)
    assert width > size["width"]


@pytest.mark.slow
def test_pyplot_is_not_imported() -> None:
    code = """if True:
        import sys, torch, unrolled as ur
        t = ur.trace(ur.RNN(2, 3), torch.ones(2, 2))
        assert not any(name.startswith("matplotlib") for name in sys.modules)
        t.plot("states").figure.draw_without_rendering()
        assert "matplotlib.pyplot" not in sys.modules"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_import_error_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("unrolled.plot")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"unrolled\.plot needs matplotlib: pip install matplotlib$"):
        importlib.import_module("unrolled.plot")
    monkeypatch.delattr(ur, "plot")
    with pytest.raises(ImportError, match=r"unrolled\.plot needs matplotlib: pip install matplotlib$"):
        random_trace().plot("gates")


def test_titles_contain_the_row_and_captions_wrap_evenly() -> None:
    t = ur.trace(ur.LSTM(2, 8), torch.randn(40, 3, 2)).backward(lambda output: output[-1].sum())
    for kind in ("gates", "states", "gradient"):
        assert t.plot(kind, batch=1).figure.get_suptitle().endswith(", row 1 of 3")
    assert any(text.get_text().endswith(", row 2 of 3") for text in t.plot("unrolled", batch=2).texts)
    assert "row" not in ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)).plot("gates").figure.get_suptitle()
    fact = "the gradient of h shrinks by a factor of 0.742 per step backward in time: from 2.2 to 1 at step 3"
    for width in (40, 60, 90, 103):
        lines = _wrap_evenly(fact, width)
        assert " ".join(line.strip() for line in lines) == fact
        assert max(map(len, lines)) <= width
        assert len(lines) == 1 or len(lines[-1]) > 0.6 * len(lines[0])


def test_heat_maps_of_large_layers_show_means() -> None:
    t = random_trace(1200, 200, cell=ur.cells.RNN)
    t["h"][700, 0, 60], t["h"][0, 0, 0], t["h"][0, 0, 1] = math.nan, math.inf, -math.inf
    ax = plot.gates(t, "h")
    assert ax.get_title(loc="left") == "h – hidden state (means of 2 × 3 values)"
    assert ax.images[0].get_extent() == [-0.5, 1199.5, 199.5, -0.5]
    exact = t["h"][:, 0].double().T.numpy().reshape(100, 2, 400, 3).swapaxes(1, 2).reshape(100, 400, 6)
    not_finite = ~np.isfinite(exact).all(-1)
    assert not_finite.sum() == 2
    np.testing.assert_array_equal(image_values(ax).mask, not_finite)
    np.testing.assert_allclose(
        image_values(ax)[~not_finite], exact[~not_finite].mean(-1), rtol=1e-12, atol=1e-12
    )
    wide = random_trace(hidden=301, cell=ur.cells.RNN)
    weights = plot.layer(wide)
    assert heat_maps(weights)[1].get_title(loc="left").startswith("weight_hh (means of 2 ×")
    assert heat_maps(weights)[0].images[0].get_extent() == [-0.5, 1.5, 300.5, -0.5]
    assert image_values(heat_maps(weights)[0]).shape == (151, 2)
    exact = wide.layers[0].cell.weight_ih[-1].double().numpy()  # the last block is a single row
    np.testing.assert_allclose(image_values(heat_maps(weights)[0])[-1], exact, rtol=1e-12)


def test_plot_method_draws_the_same_as_the_function() -> None:
    layer = ur.GRU(2, 3, num_layers=2, bidirectional=True)
    t = ur.trace(layer, pack_sequence([torch.randn(4, 2), torch.randn(2, 2)])).backward(
        lambda output: output.data.sum()
    )
    part = t.layer(1, "backward")
    np.testing.assert_array_equal(
        image_values(part.plot("gates", names=["h"], batch=1)), part["h"][:2, 1].double().numpy().T
    )
    assert texts(t.plot("unrolled", steps=[0])) == texts(plot.unrolled(t, steps=[0]))
    for kind in PLOTS:
        ax = Figure((12, 8)).add_subplot()
        assert part.plot(kind, ax=ax) is ax


def test_svg_text_stays_text_if_rcparams_say_so(walkthrough: ur.Trace) -> None:
    svg = io.BytesIO()
    ax = walkthrough.plot("states")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        ax.figure.savefig(svg, format="svg")
    nodes = ElementTree.fromstring(svg.getvalue()).iter("{http://www.w3.org/2000/svg}text")
    assert printed_lines(ax) <= {"".join(node.itertext()) for node in nodes}


@pytest.mark.parametrize("kind", ["unrolled", "gates", "states", "gradient"])
@pytest.mark.parametrize("row", [1, -2])
def test_row_out_of_range(kind: str, row: int) -> None:
    with pytest.raises(IndexError, match=rf"row {row} is out of range: there are 1, counted from 0"):
        PLOTS[kind](random_trace(), batch=row)


def test_error_messages_for_invalid_arguments() -> None:
    with pytest.raises(IndexError, match="time step 4 is out of range: there are 4"):
        plot.unrolled(random_trace(), steps=[0, 4])
    with pytest.raises(ValueError, match="steps is empty"):
        plot.unrolled(random_trace(), steps=[])
    with pytest.raises(KeyError, match="no quantity 'z'"):
        plot.gates(random_trace(), ["i", "z"])
    with pytest.raises(ValueError, match="names is empty"):
        plot.gates(random_trace(), [])
    with pytest.raises(ValueError, match="Diagonal has no two-dimensional parameter to draw"):
        plot.layer(ur.trace(ur.Recurrent(Diagonal, 3, 3), torch.ones(2, 3)))
    with pytest.raises(
        ValueError, match="should be one of cell, gates, states, gradient, unrolled, layer, text, got 'gate'"
    ):
        random_trace().plot("gate")
    with pytest.raises(ValueError, match=r"got \['gates'\]"):
        random_trace().plot(["gates"])
    with pytest.raises(TypeError, match="the plot 'layer' has no option 'batch': its options are ax"):
        random_trace().plot("layer", batch=0)
    with pytest.raises(TypeError, match="no option 'trace'"):
        random_trace().plot("gates", trace=None)
    for draw in PLOTS.values():
        with pytest.raises(TypeError, match="expected a Trace or one of its layers, got RNN"):
            draw(ur.RNN(2, 3))


@pytest.mark.parametrize("kind", ["gates", "states", "gradient", "unrolled", "layer"])
def test_error_messages_for_invalid_axes(kind: str, walkthrough: ur.Trace) -> None:
    trace, figure = walkthrough.backward(torch.sum), Figure()
    for ax, error, message in (
        (figure.subplots(2), TypeError, "ax should be a single matplotlib Axes, .* got ndarray"),
        (figure, TypeError, "got Figure"),
        (figure.add_subplot(projection="polar"), ValueError, "ax has the projection 'polar'"),
        (figure.add_subplot(projection="3d"), ValueError, "ax has the projection '3d'"),
        (figure.add_axes((0, 0, 0, 1)), ValueError, "ax has a width or height of 0"),
    ):
        with pytest.raises(error, match=message):
            trace.plot(kind, ax=ax)


def test_special_characters_in_names_and_descriptions() -> None:
    class SpecialCharacters(ur.Cell):
        r"""Descriptions that look like formulas to matplotlib.

        Quantities:
            _gate: between $1 and $2_{
            h: $\frac$ of it
        """

        weight_hh = ur.Param("hidden", "hidden")

        def step(self, x, h):
            _gate = sigmoid(x + linear(h, self.weight_hh))
            h = tanh(_gate)
            return h

    trace = ur.trace(ur.Recurrent(SpecialCharacters, 3, 3), torch.randn(4, 3)).backward(torch.sum)
    ax = trace.plot("gates")
    ax.figure.savefig(io.BytesIO())
    titles = [panel.get_title(loc="left") for panel in ax.child_axes]
    assert r"_gate – between $1 and $2_{" in titles
    ax = trace.plot("gradient")
    ax.figure.savefig(io.BytesIO())
    labels = [text.get_text().split("×")[0].strip() for text in ax.get_legend().get_texts()]
    assert labels[:2] == ["_gate", "h"]
    with pytest.raises(
        TypeError, match="names should be the name of a quantity or an iterable of names, got 5"
    ):
        trace.plot("gates", names=5)
    with pytest.raises(
        TypeError, match=r"steps should be an iterable of time steps, such as \[0, -1\], got 2"
    ):
        trace.plot("unrolled", steps=2)
