"""Predictions on the page, below the time steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from page_helpers import OpenPage, needs_browser

import unrolled as ur


@needs_browser
@pytest.mark.slow
def test_predictions_are_below_their_steps(open_page: OpenPage) -> None:
    small = ur.trace(ur.GRU(2, 3), torch.randn(3, 2))
    tab = open_page(small, predictions=["<b>", 7, "\n"])
    columns = tab.locator(".strip .step:not(.start)")
    texts = [columns.nth(k).locator(".prediction").text_content() for k in range(3)]
    assert texts == ["<b>", "7", "⏎"]
    wide = ur.trace(ur.GRU(2, 12), torch.randn(30, 2))
    tab = open_page(wide, predictions=range(30))
    assert tab.locator(".predictions span").all_text_contents() == [str(k) for k in range(30)]


def test_invalid_predictions(tmp_path: Path) -> None:
    t = ur.trace(ur.GRU(2, 3), torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"predictions should have one entry per time step \(3\), got 2"):
        t.to_html(tmp_path / "page.html", predictions=["a", "b"])
    with pytest.raises(TypeError, match="predictions should be an iterable of strings"):
        t.to_html(tmp_path / "page.html", predictions=3)
