"""New input on the page: the WebAssembly module gives the same outputs as the layer in Python."""

from __future__ import annotations

import struct
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from page_helpers import OpenPage, chromium_only, needs_browser

import unrolled as ur
from helpers.wasm import NEEDS_WASM

pytestmark = [NEEDS_WASM, needs_browser, chromium_only, pytest.mark.slow]

# The picture's numbers: the pointer reads them.
READ = """async ([columns, units]) => {
  const canvas = document.querySelector('.live canvas[aria-label^="the outputs"]');
  const box = canvas.getBoundingClientRect(), numbers = [];
  for (let k = 0; k < columns; k += 1) {
    for (let u = 0; u < units; u += 1) {
      const [x, y] = [(k + 0.5) * box.width / columns, (u + 0.5) * box.height / units];
      const at = { clientX: box.left + x, clientY: box.top + y };
      canvas.dispatchEvent(new PointerEvent("pointermove", at));
      numbers.push(Number(document.querySelector(".live output").textContent.split(": ")[1]));
    }
  }
  return numbers;
}"""


def outputs(page: Any, steps: int, units: int) -> torch.Tensor:
    page.locator(".live canvas[aria-label^='the outputs']").wait_for()
    return torch.tensor(page.evaluate(READ, [steps, units])).reshape(steps, units)


def test_typed_input(open_page: OpenPage) -> None:
    layer = ur.Recurrent(ur.cells.MGU, 2, 5, num_layers=2, initial_state="learned")
    with torch.no_grad():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    page = open_page(ur.trace(layer, torch.randn(3, 2)), live=True)
    field, run = page.locator(".live textarea"), page.get_by_role("button", name="Run", exact=True)
    x = torch.randn(150, 2)  # more than one call of the module takes
    for _ in range(2):  # from the initial state both times
        field.fill("\n".join(f"{a}, {b}" for a, b in x.tolist()))
        run.click()
        result = outputs(page, 150, 5)
        torch.testing.assert_close(result, layer(x)[0].detach(), atol=6e-5, rtol=1e-3)
    assert "150 steps in " in page.locator(".live-status").inner_text()
    for text, message in (
        ("1 2\n3", "Line 2 should have 2 numbers, one for each input, got 1."),
        ("one 2", "Line 1 should contain only numbers, got: one 2"),
        (" ", "The input is empty: enter one line with 2 numbers per time step."),
    ):
        field.fill(text)
        run.click()
        assert page.locator(".live-status").inner_text() == message


def test_both_directions_and_the_recorded_input(open_page: OpenPage) -> None:
    layer, x = ur.GRU(3, 4, bidirectional=True).double(), torch.randn(6, 3, dtype=torch.float64)
    page = open_page(ur.trace(layer, x), live=True)
    page.get_by_role("button", name="Run", exact=True).click()
    torch.testing.assert_close(outputs(page, 6, 8), layer(x)[0].float().detach(), atol=6e-5, rtol=1e-3)
    page.locator(".live textarea").fill("1 2 3\n" * 1025)
    page.get_by_role("button", name="Run", exact=True).click()
    assert "at most 1024 steps, but this one has 1025" in page.locator(".live-status").inner_text()


def test_drawn_input_and_files(open_page: OpenPage, tmp_path: Path) -> None:
    layer = ur.LSTM(1, 4)
    page = open_page(ur.trace(layer, torch.randn(3, 1)), live=True)
    page.get_by_role("tab", name="Draw").click()
    box = page.locator(".live canvas").first.bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 4, steps=30)
    page.mouse.up()
    result = outputs(page, 240, 4)
    torch.testing.assert_close(result, layer(torch.full((240, 1), 0.5))[0].detach(), atol=0.01, rtol=0)

    samples = (0.5 * torch.sin(torch.arange(1500) / 7) * 32767).short()
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(struct.pack("<1500h", *samples.tolist()))
    page.get_by_role("tab", name="File").click()
    page.locator(".live input[type=file]").set_input_files(tmp_path / "tone.wav")
    page.get_by_text("% of real time").wait_for()
    expected = layer(samples.float().unsqueeze(1) / 32768)[0].detach()
    torch.testing.assert_close(outputs(page, 1500, 4), expected, atol=2e-4, rtol=1e-3)
    page.locator(".live input[type=file]").set_input_files(
        {"name": "x.txt", "mimeType": "text/plain", "buffer": b"1\nx"}
    )
    page.get_by_text("x.txt: Line 2 should contain only numbers, got: x").wait_for()


# A microphone whose permission takes until `window.allow()`.
MICROPHONE = """() => {
  window.streams = [];
  navigator.mediaDevices.getUserMedia = () => new Promise((resolve) => {
    const stream = new AudioContext().createMediaStreamDestination().stream;
    window.streams.push(stream);
    window.allow = () => resolve(stream);
  });
}"""
STATES = "() => window.streams.flatMap((stream) => stream.getTracks().map((track) => track.readyState))"


def test_a_microphone_that_is_stopped_before_it_is_allowed(open_page: OpenPage) -> None:
    page = open_page(ur.trace(ur.GRU(1, 4), torch.randn(3, 1)), live=True)
    page.get_by_role("tab", name="Microphone").click()
    page.evaluate(MICROPHONE)
    page.get_by_role("button", name="Listen").click()
    page.get_by_role("tab", name="Type").click()
    page.evaluate("() => window.allow()")
    assert page.evaluate(STATES) == ["ended"]
    page.get_by_role("tab", name="Microphone").click()
    assert page.get_by_role("button", name="Listen").is_visible()
