"""Make the pictures in docs/pictures again: .venv/bin/python docs/take_pictures.py."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import unrolled as ur
from unrolled.cli import example

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.browser import running_browser

FOLDER = Path(__file__).parent / "pictures"
WINDOW = {"width": 1366, "height": 768}


def small_lstm() -> ur.Trace:
    """Return the trace of the LSTM that ``unrolled show --cell lstm`` shows."""
    layer, x = example.example(ur.cells.LSTM, None, 0, {})
    return ur.trace(layer, x)


def wave_lstm() -> ur.Trace:
    """Return the trace of an LSTM with sixteen units that reads a sine wave."""
    torch.manual_seed(0)
    return ur.trace(ur.LSTM(1, 16), torch.sin(torch.arange(60.0) / 3.2).reshape(60, 1))


def main() -> None:
    """Draw the cell of an LSTM, and save screenshots of two pages in a browser."""
    small_lstm().plot("cell", step=2, unit=1).save(FOLDER / "lstm.svg")
    with running_browser() as browser, tempfile.TemporaryDirectory() as folder:
        page = small_lstm().to_html(Path(folder) / "small.html", title="nn.LSTM(2, 3)")
        tab = browser.new_page(viewport=WINDOW)
        tab.goto(page.as_uri())
        tab.screenshot(path=FOLDER / "page.png")

        page = wave_lstm().to_html(Path(folder) / "wave.html")
        tab = browser.new_page(viewport=WINDOW, color_scheme="dark")
        tab.goto(page.as_uri())
        tab.screenshot(path=FOLDER / "whole.png")


if __name__ == "__main__":
    main()
