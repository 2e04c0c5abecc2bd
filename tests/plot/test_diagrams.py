"""The diagrams of a layer, unrolled through time and as a graph, show the values of the trace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from plot_helpers import TRACES, Echo, Transposed, heat_maps, image_values, random_trace, texts
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from unrolled import plot
from unrolled.cli.example import WEIGHTS


def count_patches(ax: Axes, kind: type) -> int:
    return sum(isinstance(patch, kind) for patch in ax.patches)


def x_position(ax: Axes, label: str) -> float:
    """Return the x coordinate of the only text with this label."""
    (match,) = (text for text in ax.texts if text.get_text() == label)
    return match.get_position()[0]


def texts_in_column(ax: Axes, label: str) -> list[str]:
    """Return the texts above and below a label, and the label itself."""
    return [text.get_text() for text in ax.texts if text.get_position()[0] == x_position(ax, label)]


def horizontal_length(arrow: FancyArrowPatch) -> float:
    start, _, tip = arrow.get_path().vertices[:3]
    return float(tip[0] - start[0])


def format_values(values: torch.Tensor) -> str:
    return "\n".join(f"{value:.4f}" for value in values.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["one state", "two states", "own cell", "long and wide", "projected"])
@pytest.mark.parametrize("size", [None, (4, 3)])
def test_texts_and_arrows_of_diagrams_do_not_overlap(trace: str, size: tuple[float, float] | None) -> None:
    for draw in (plot.unrolled, plot.layer):
        ax = None if size is None else Figure(size).add_subplot()
        diagram = draw(TRACES[trace](), ax=ax)
        diagram.figure.draw_without_rendering()
        boxes = [(text.get_bbox_patch() or text).get_window_extent() for text in diagram.texts]
        for first, second in itertools.combinations(boxes, 2):
            assert not first.count_overlaps([second])
        arrows = [patch for patch in diagram.patches if isinstance(patch, FancyArrowPatch)]
        for arrow, box in itertools.product(arrows, boxes):
            assert not arrow.get_window_extent().count_overlaps([box])


def test_unrolled_draws_a_box_per_step_and_arrows_for_input_state_and_output(walkthrough: ur.Trace) -> None:
    ax = plot.unrolled(walkthrough)
    assert count_patches(ax, FancyBboxPatch) == 4
    assert (
        count_patches(ax, FancyArrowPatch) == 4 + 4 + 5
    )  # inputs, outputs, and h from the initial to the final state
    assert [f"step {step}" for step in range(4)] == [text for text in texts(ax) if "step" in text]
    for step in range(4):
        assert format_values(walkthrough["h"][step, 0]) in texts_in_column(ax, f"step {step}")
        assert format_values(walkthrough.layers[0].input[step, 0]) in texts_in_column(ax, f"step {step}")
    assert "0.2529\n0.7949\n-0.0466" in texts(ax)
    assert x_position(ax, "initial h") < x_position(ax, "step 0") < x_position(ax, "final h")


@pytest.mark.parametrize("cell", [ur.cells.LSTM, Echo])
def test_unrolled_draws_arrows_and_values_of_every_state(cell: type[ur.Cell]) -> None:
    t = random_trace(cell=cell)
    ax = plot.unrolled(t)
    assert count_patches(ax, FancyArrowPatch) == 4 + 4 + 2 * 5
    output, other = cell.state
    assert {f"initial {output}", f"{output}₀", f"{output}₁", f"{output}₂", f"final {output}"} <= set(
        texts(ax)
    )
    assert texts_in_column(ax, f"initial {other}")[-1] == format_values(torch.zeros(3))
    for step, label in enumerate((f"{other}₀", f"{other}₁", f"{other}₂", f"final {other}")):
        assert format_values(t[other][step, 0]) in texts_in_column(ax, label)
        assert format_values(t[output][step, 0]) in texts_in_column(ax, f"step {step}")


def test_unrolled_shows_the_given_initial_state(walkthrough_layer: ur.RNN) -> None:
    start = torch.tensor([[0.125, -0.5, 2.0]])
    ax = plot.unrolled(ur.trace(walkthrough_layer, torch.ones(2, 2), start))
    assert "0.1250\n-0.5000\n2.0000" in texts(ax)


def test_arrows_of_the_backward_direction_point_left() -> None:
    ax = plot.unrolled(random_trace(cell=ur.cells.GRU, bidirectional=True).layer(0, "backward"))
    order = ["final h", "step 0", "step 1", "step 2", "step 3", "initial h"]
    assert [x_position(ax, label) for label in order] == sorted(x_position(ax, label) for label in order)
    assert "GRU, layer 0, backward" in texts(ax)
    arrows = [horizontal_length(patch) for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    assert sum(arrow < -0.5 for arrow in arrows) == 5
    assert sum(arrow > 0.5 for arrow in arrows) == 0


def test_unrolled_shortens_a_long_sequence() -> None:
    ax = plot.unrolled(random_trace(60, 8, cell=ur.cells.GRU))
    assert [text for text in texts(ax) if "step" in text] == ["step 0", "step 1", "step 2", "step 59"]
    assert texts(ax).count("⋯") == 1
    assert "h₅₈" in texts(ax)
    assert texts(ax).count("8 values") == 4 + 1  # outputs and the initial state
    assert count_patches(ax, FancyArrowPatch) == 4 + 4 + (1 + 2) + 1 + 2


def test_unrolled_draws_the_selected_steps() -> None:
    t = random_trace(9, cell=ur.cells.GRU)
    ax = plot.unrolled(t, steps=[-2, 3, 4])
    assert [text for text in texts(ax) if "step" in text] == ["step 3", "step 4", "step 7"]
    assert texts(ax).count("⋯") == 3
    assert {"h₂", "h₃", "h₄", "h₆", "h₇"} <= set(texts(ax))
    assert not {"initial h", "final h"} & set(texts(ax))


def test_plots_of_a_row_end_at_its_length() -> None:
    t = ur.trace(ur.GRU(2, 3), pack_sequence([torch.randn(4, 2), torch.randn(2, 2)]))
    ax = plot.unrolled(t, batch=1)
    assert count_patches(ax, FancyBboxPatch) == 2
    assert format_values(t["h"][1, 1]) in texts(ax)
    assert image_values(plot.gates(t, ["h"], batch=1)).shape == (3, 2)
    assert len(plot.states(t, batch=1).lines[1].get_ydata()) == 2


def test_diagram_shrinks_to_fit_a_small_axes(walkthrough: ur.Trace) -> None:
    whole, small = Figure().add_subplot(), Figure(figsize=(3, 2)).add_subplot()
    assert plot.unrolled(walkthrough, ax=small) is small
    sizes = [ax.texts[0].get_fontsize() for ax in (plot.unrolled(walkthrough, ax=whole), small)]
    assert sizes[1] < sizes[0] <= 9


def test_edges_of_the_graph_are_the_weights(walkthrough: ur.Trace) -> None:
    ax = plot.layer(walkthrough)
    assert count_patches(ax, Circle) == 2 + 3 + 3
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
def test_large_layers_and_parallel_matrices_are_heat_maps(cell: type[ur.Cell], hidden: int) -> None:
    t = random_trace(hidden=hidden, cell=cell)
    ax = plot.layer(t)
    matrices = {name: getattr(t.layers[0].cell, name) for name in ("W", "V", "U", "weight_ih", "weight_hh")
                if name in cell.params()}  # fmt: skip
    assert [panel.get_title(loc="left") for panel in heat_maps(ax)] == list(matrices)
    limits = {panel.images[0].get_clim() for panel in heat_maps(ax)}
    assert len(limits) == 1
    assert sum(limits.pop()) == 0
    for panel, matrix in zip(heat_maps(ax), matrices.values(), strict=True):
        np.testing.assert_array_equal(image_values(panel), matrix.double().numpy())


def test_matrix_with_the_input_along_its_rows_is_transposed() -> None:
    t = random_trace(cell=Transposed)
    ax = plot.layer(t)
    assert "input\ninto" in texts(ax)
    np.testing.assert_array_equal(ax.collections[-1].get_array(), t.layers[0].cell.into.T.double().flatten())
