"""The plot of a text: its colors are the values of the trace, and its labels are set in lines."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from plot_helpers import random_trace, texts

import unrolled as ur
from unrolled import plot
from unrolled.plot.figures import COLORMAP, GATE_COLORMAP, NAN_COLOR

LINES = "to be\nor not to be\n"


def test_colors_are_the_values_of_the_unit() -> None:
    t = ur.trace(ur.LSTM(2, 5), torch.randn(len(LINES), 3, 2))
    ax = t.plot("text", labels=LINES, unit=-2, batch=1)
    assert "".join(texts(ax)) == LINES.replace("\n", "⏎")
    (image,) = ax.images
    places = [(row, column) for row, line in enumerate(LINES.splitlines(True)) for column in range(len(line))]
    for step, (row, column) in enumerate(places):
        expected = COLORMAP((t["h"][step, 1, 3].item() + 1) / 2)
        np.testing.assert_allclose(image.get_array()[row, column], expected, atol=0.01)
        assert ax.texts[step].get_position() == (column, row)
    assert image.get_array().shape == (2, 13, 4)
    assert ax.get_title(loc="left") == "h[3] – hidden state"
    gate = t.plot("text", labels=LINES, quantity="f")
    expected = GATE_COLORMAP(t["f"][4, 0, 0].item())
    np.testing.assert_allclose(gate.images[0].get_array()[0, 4], expected, atol=0.01)
    bar = gate.child_axes[0]
    assert bar.get_ylim() == (0, 1)


def test_large_values_have_a_larger_scale_and_nan_has_its_color() -> None:
    t = random_trace(4)
    t["c"][:, 0, 0] = torch.tensor([4.0, -2.0, math.nan, 0.0])
    ax = plot.text(t, "abcd", quantity="c")
    expected = [COLORMAP(1.0), COLORMAP(0.25), to_rgba(NAN_COLOR), COLORMAP(0.5)]
    np.testing.assert_allclose(ax.images[0].get_array()[0], expected, atol=0.01)
    assert ax.child_axes[0].get_ylim() == (-4, 4)
    ax.figure.savefig(io.BytesIO())


def test_words_and_long_lines() -> None:
    words = ["It", "was", "the", "best"]
    ax = random_trace(4).plot("text", labels=words, width=11)
    assert texts(ax) == ["It ", "was ", "the ", "best "]
    assert [text.get_position()[1] for text in ax.texts] == [0, 0, 0, 1]
    characters = random_trace(25).plot("text", labels="x" * 25, width=10)
    assert characters.images[0].get_array().shape[:2] == (3, 10)
    assert characters.images[0].get_array()[2, 5, 3] == 0  # beyond the end of the text
    own = Figure((4, 3)).add_subplot()
    assert random_trace(3).plot("text", labels="abc", ax=own) is own
    assert all(text.get_color() in ("#000000", "#ffffff") for text in own.texts)


def test_text_is_readable_on_its_color() -> None:
    t = random_trace(2)
    t["h"][:, 0, 0] = torch.tensor([1.0, 0.0])
    ax = plot.text(t, "ab")
    assert [to_hex(text.get_color()) for text in ax.texts] == ["#ffffff", "#000000"]


def test_error_messages() -> None:
    t = random_trace(3)
    with pytest.raises(TypeError, match="the plot 'text' needs labels: an iterable of strings"):
        t.plot("text", unit=1)
    with pytest.raises(ValueError, match=r"labels should have one entry per time step \(3\), got 2"):
        t.plot("text", labels="ab")
    with pytest.raises(IndexError, match="unit 3 is out of range: there are 3"):
        t.plot("text", labels="abc", unit=3)
    with pytest.raises(KeyError, match="no quantity 'z'"):
        t.plot("text", labels="abc", quantity="z")
    with pytest.raises(ValueError, match="width must be greater than zero, got 0"):
        t.plot("text", labels="abc", width=0)
