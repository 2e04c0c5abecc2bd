"""The plots over time show the gates, states and gradients of the trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from plot_helpers import Echo, heat_maps, image_values, legend_labels, marker_rows, random_trace
from torch import tanh
from torch.nn.functional import linear

import unrolled as ur
from unrolled import plot
from unrolled.tracing.gradient_flow import gradient_flow, spectral_radii


def caption(ax: Axes) -> str:
    """Return the text below the plot without line breaks."""
    (text,) = ax.texts
    return " ".join(text.get_text().split())


def curves(ax: Axes) -> list[Line2D]:
    return [line for line in ax.lines if line.get_linestyle() != "None"]


class Scaled(ur.Cell):
    """Multiplies the state by the input, so that ∂loss/∂h is multiplied by x at each step back."""

    def step(self, x, h):
        h = x * h + 1
        return h


def scaled_trace(*x: float) -> ur.Trace:
    layer = ur.Recurrent(Scaled, 1, 1, bidirectional=True, dtype=torch.float64)
    t = ur.trace(layer, torch.tensor(x, dtype=torch.float64).unsqueeze(1))
    return t.backward(lambda output: output[-1, 0] + output[0, 1])


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (ur.cells.RNN, ["input_sum", "hidden_sum", "h"]),
        (ur.cells.LSTM, ["i", "f", "g", "o", "c", "h"]),
        (Echo, ["gate", "memory", "trail"]),
    ],
)
def test_gates_have_a_panel_each_on_one_color_scale(cell: type[ur.Cell], names: list[str]) -> None:
    t = random_trace(20, cell=cell)
    ax = plot.gates(t)
    assert [panel.get_title(loc="left").split(" – ")[0] for panel in heat_maps(ax)] == names
    assert ax.child_axes[: len(names)] == heat_maps(ax)
    for panel, name in zip(heat_maps(ax), names, strict=True):
        np.testing.assert_array_equal(image_values(panel), t[name][:, 0].double().T.numpy())
    limits = {panel.images[0].get_clim() for panel in heat_maps(ax)}
    assert len(limits) == 1
    low, high = limits.pop()
    assert -low == high == pytest.approx(max(float(t[name].abs().max()) for name in names))


def test_panel_titles_contain_descriptions_from_the_docstring() -> None:
    gate, memory, _ = heat_maps(plot.gates(random_trace(cell=Echo)))
    assert gate.get_title(loc="left") == "gate – how much is new"
    assert memory.get_title(loc="left") == "memory"


def test_gates_of_any_width_can_be_selected() -> None:
    t = random_trace(5)
    assert image_values(plot.gates(t, ["input_sum"])).shape == (12, 5)
    ax = Figure().add_subplot()
    assert plot.gates(t, "f", ax=ax) is ax
    assert ax.get_title(loc="left") == "f – forget gate: how much of the old c is kept"


def test_complex_quantities_are_left_out_or_rejected() -> None:
    class Rotating(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x, h):
            rotated = torch.complex(h, linear(x, self.weight))
            h = tanh(rotated.abs())
            return h

    trace = ur.trace(ur.Recurrent(Rotating, 2, 3), torch.randn(4, 2))
    assert plot.gates(trace).get_title(loc="left") == "h"
    with pytest.raises(ValueError, match="complex numbers can't be plotted"):
        plot.gates(trace, ["rotated"])


def test_nan_and_infinity_have_their_own_color() -> None:
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
    assert legend_labels(panel.child_axes[-1]) == ["NaN or infinite"]
    assert plot.gates(random_trace()).child_axes[-1].get_legend() is None


def test_large_cell_state_has_its_own_color_scale() -> None:
    layer = ur.LSTM(2, 3)
    with torch.no_grad():
        layer.bias_ih_l0.copy_(torch.tensor([9.0, 9.0, 9.0, 9.0]).repeat_interleave(3))  # c counts the steps
    t = ur.trace(layer, torch.randn(9, 2))
    ranges = {panel.get_title(loc="left"): panel.images[0].get_clim() for panel in heat_maps(t.plot("gates"))}
    (c,) = (title for title in ranges if title.startswith("c "))
    assert ranges.pop(c)[1] == pytest.approx(float(t["c"].max()), rel=1e-6)
    assert f"own color scale: ±{float(t['c'].max()):.3g}" in c
    (shared,) = set(ranges.values())
    assert shared[1] == -shared[0] == pytest.approx(1, abs=1e-2)
    assert not any("own color scale" in title for title in ranges)


def test_states_have_a_line_per_unit(walkthrough: ur.Trace) -> None:
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
    assert marker_rows(ax) == [(plot.NAN_COLOR, [1, 4, 5], 1)]
    assert legend_labels(ax) == ["unit 0", "unit 1", "unit 2", "NaN or infinite"]


def test_states_have_a_panel_each_and_the_range_of_all_units() -> None:
    t = random_trace(10, 40)
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
        assert legend_labels(panel)[-1] == "range of all 40 units"


def test_gradient_has_a_line_of_norms_per_quantity() -> None:
    t = random_trace(20).backward(lambda output: output[-1].sum())
    ax = t.plot("gradient")
    assert ax.get_yscale() == "log"
    assert [line.get_label().split("  ")[0] for line in curves(ax)] == ["i", "f", "g", "o", "c", "h"]
    for line, name in zip(curves(ax), ("i", "f", "g", "o", "c", "h"), strict=True):
        norms = t.gradient(name)[:, 0].double().norm(dim=-1).numpy()
        np.testing.assert_allclose(line.get_ydata(), np.where(norms > 0, norms, np.nan), rtol=1e-6)
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in curves(ax)}
    for property_values in zip(*styles, strict=True):
        assert len(set(property_values)) >= 4
    assert ax.get_xlim() == (-0.5, 19.5)
    radii = spectral_radii(t.layers[0].cell)
    caption_text = caption(ax)
    assert caption_text.startswith(gradient_flow(t.layers[0], "c").summary)
    formatted_radii = ", ".join(f"weight_hh[{gate}] {radii[f'weight_hh[{gate}]']:.3g}" for gate in "ifgo")
    assert caption_text.endswith(f"spectral radii: {formatted_radii}")


def test_gradient_factor_of_a_linear_recurrence() -> None:
    ax = scaled_trace(*[0.5] * 6).plot("gradient")
    assert legend_labels(ax) == ["h  ×0.5"]
    assert caption(ax) == (
        "the gradient of h shrinks by a factor of 0.5 per step backward in time: "
        "from 1 at step 5 to 0.0312 at step 0"
    )
    backward = scaled_trace(*[2] * 6).layer(0, "backward").plot("gradient")
    assert "grows by a factor of 2 per step backward in time: from 1 at step 0 to 32 at step 5" in caption(
        backward
    )
    assert "→" in backward.get_xlabel()
    assert "←" in ax.get_xlabel()


def test_norms_that_are_zero_or_not_finite_are_marked_outside_of_the_scale() -> None:
    ax = scaled_trace(9, 2, 0, 0.5, 0.5).plot("gradient")
    ((color, steps, height),) = marker_rows(ax)
    assert (color, steps) == ("white", [0, 1])
    assert 0 < height < 0.1
    np.testing.assert_array_equal(curves(ax)[0].get_ydata(), [np.nan, np.nan, 0.25, 0.5, 1])
    assert legend_labels(ax) == ["h  ×0.5", "exactly 0"]
    falling = scaled_trace(9, 2, 0, 1e-3, 0.1).plot("gradient")
    (band,) = falling.patches
    top = falling.transData.inverted().transform(falling.transAxes.transform((0, band.get_height())))[1]
    ticks = [*falling.get_yticks(), *falling.get_yticks(minor=True)]
    assert 0.5e-4 < top <= min(ticks) < 2e-4 < 1 <= max(ticks)

    ax = scaled_trace(9, math.nan, 0.5, math.inf, 0.5).plot("gradient")
    ((color, steps, height),) = marker_rows(ax)
    assert (color, steps) == (plot.NAN_COLOR, [0, 1, 2])
    assert 0.9 < height < 1
    assert legend_labels(ax) == ["h  ×0.5", "NaN or infinite"]

    t = random_trace(5).backward(lambda y: y.sum() * 0)
    rows = marker_rows(t.plot("gradient"))
    assert len({height for _, _, height in rows}) == 6
    assert all(steps == [0, 1, 2, 3, 4] for _, steps, _ in rows)


@pytest.mark.slow
@pytest.mark.parametrize("x", [(9, 1e-200, 1e-120, 0), (9, 1e200, 1e100), (9, 1e-160, 1e-160), (1,)])
def test_gradient_norms_at_the_limits_of_float64(x: tuple[float, ...]) -> None:
    ax = scaled_trace(*x).plot("gradient")
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    seen = [y for y in curves(ax)[0].get_ydata() if math.isfinite(y)]
    assert all(low <= y <= high < math.inf for y in seen)


def test_gradient_plot_needs_backward() -> None:
    with pytest.raises(ValueError, match=r"no gradients yet: call trace.backward\(target\) or .* first"):
        random_trace().plot("gradient")
    with pytest.raises(ValueError, match="x is the input, which has no gradient here: choose from"):
        scaled_trace(1).plot("gradient", names="x")
