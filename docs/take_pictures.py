"""Take the screenshots in docs/pictures again: .venv/bin/python docs/take_pictures.py."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import unrolled as ur

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.browser import running_browser

FOLDER = Path(__file__).parent / "pictures"
WIDTH = 1180


def small_lstm() -> ur.Trace:
    """Return the trace of an LSTM with three units."""
    torch.manual_seed(5)
    layer = ur.LSTM(2, 3, batch_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    return ur.trace(layer, torch.arange(1.0, 5.0).reshape(1, 4, 1).expand(1, 4, 2))


def wave_lstm() -> ur.Trace:
    """Return the trace of an LSTM with eight units that reads a sine wave."""
    torch.manual_seed(0)
    return ur.trace(ur.LSTM(1, 8), torch.sin(torch.arange(60.0) / 3.2).reshape(60, 1))


def main() -> None:
    """Open both pages in a browser and save a screenshot of each."""
    with running_browser() as browser, tempfile.TemporaryDirectory() as folder:
        page = small_lstm().to_html(Path(folder) / "small.html", title="An LSTM with three units")
        tab = browser.new_page(viewport={"width": WIDTH, "height": 1365})
        tab.goto(page.as_uri())
        for _ in range(2):
            tab.keyboard.press("ArrowRight")
        tab.locator('td[data-key="quantity c"]').nth(1).click()
        tab.screenshot(path=FOLDER / "page.png")

        page = wave_lstm().to_html(Path(folder) / "wave.html")
        tab = browser.new_page(viewport={"width": WIDTH, "height": 890}, color_scheme="dark")
        tab.goto(page.as_uri())
        tab.get_by_text("group similar units").click()
        tab.get_by_role("heading", name="The whole sequence").evaluate("heading => heading.scrollIntoView()")
        tab.screenshot(path=FOLDER / "whole.png")


if __name__ == "__main__":
    main()
