"""The gradients of the weights on the page: the sum that each of them is, compared with autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ledger import READ_LINES, check_lines
from page_helpers import Mixed, OpenPage, as_number, enter, needs_browser, printed
from torch import Tensor, nn

import unrolled as ur
from helpers.evaluator import needs_javascript, run_javascript
from unrolled.page import layer_data, weight_gradients
from unrolled.page.contents import page_data
from unrolled.tracing import weight_gradients as tracing_gradients

Loss = Callable[[Any], Tensor]


def noisy(layer: ur.Recurrent) -> ur.Recurrent:
    """Add noise to the parameters of a layer, so that none of them is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def layers_of(trace: ur.Trace) -> Any:
    """Return the layers of a page, which must have the gradients of the weights."""
    layers = page_data(trace, None, None, "numbers", None, 3_000_000)["layers"]
    assert [layer["weightGradient"]["reason"] for layer in layers] == [None] * len(layers)
    return layers


def assert_gradients_are_those_of_autograd(
    layer: nn.Module, inputs: Any, loss: Loss, folder: Path
) -> list[Any]:
    """Compare the gradient of every element of every parameter. Returns the layers of the page."""
    layers = layers_of(ur.trace(layer, inputs).backward(loss))
    layer.zero_grad()
    loss(layer(inputs)[0]).backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    [found] = run_javascript("parameterGradients", [layers], folder)
    for data, gradients in zip(layers, found, strict=True):
        suffix = f"_l{data['layer']}{'_reverse' * (data['direction'] == 'backward')}"
        for name, totals in gradients.items():
            wanted = expected[name + suffix]
            assert wanted is not None
            for total in totals.values():
                tolerance = 1e-12 if wanted.dtype is torch.float64 else 5e-6
                scale = wanted.abs().max().item()
                torch.testing.assert_close(
                    total, wanted.double().flatten(), rtol=0, atol=tolerance * scale, msg=f"{name}{suffix}"
                )
    return layers


@needs_javascript
@pytest.mark.parametrize("num_layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_of_every_layer_direction_and_row(num_layers: int, tmp_path: Path) -> None:
    layer = nn.LSTM(3, 4, num_layers=num_layers, bidirectional=True)
    packed = nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    layers = assert_gradients_are_those_of_autograd(layer, packed, lambda y: y.data.square().sum(), tmp_path)
    assert layers[0]["weightGradient"]["rows"].count(0) == 2
    assert layers[0]["weightGradient"]["rows"].count(1) == 4


@pytest.mark.slow
@needs_javascript
@pytest.mark.parametrize("name", ur.cells.__all__)
def test_gradients_of_every_cell(name: str, tmp_path: Path) -> None:
    """In double precision: the terms of a gradient may cancel, as those of HGRN's biases do."""
    layer = noisy(ur.Recurrent(getattr(ur.cells, name), 2, 3, dtype=torch.float64))
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    assert_gradients_are_those_of_autograd(layer, x, lambda y: y.square().sum() + y[-1].sin().sum(), tmp_path)


@pytest.mark.slow
@needs_javascript
def test_gradients_of_an_own_cell(tmp_path: Path) -> None:
    layer = noisy(ur.Recurrent(Mixed, 2, 4))
    assert_gradients_are_those_of_autograd(layer, torch.randn(4, 2, 2), lambda y: y.square().sum(), tmp_path)


@pytest.mark.slow
@needs_javascript
def test_gradients_of_a_layer_whose_steps_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_data, "COMPLETE_VALUES", 0)
    layer = nn.GRU(2, 5)
    layers = assert_gradients_are_those_of_autograd(
        layer, torch.randn(12, 2), lambda y: y.square().sum(), tmp_path
    )
    assert layers[0]["computed"]


def reason_of(trace: ur.Trace) -> Any:
    return page_data(trace, None, None, "numbers", None, 3_000_000)["layers"][0]["weightGradient"]["reason"]


def test_what_is_not_on_the_page_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    layers = page_data(trace, None, None, "numbers", None, 3_000_000)["layers"]
    assert layers[0]["weightGradient"] is None  # no gradients in the trace
    trace.backward(torch.sum)
    assert reason_of(trace) is None
    monkeypatch.setattr(weight_gradients, "MAX_VALUES", 50)
    assert reason_of(trace) == (
        "This page doesn't show the weight gradients of layer 0 (forward), because their sums over 4 steps "
        "need 116 numbers, but at most 50 are stored."
    )
    monkeypatch.setattr(tracing_gradients, "MAX_VALUES", 300)
    assert "84 parameters at 4 steps have too many gradients; at most 300 are computed" in reason_of(trace)


@needs_browser
def test_a_weight_shows_its_gradient(open_page: OpenPage) -> None:
    """As a sum that is right by hand, with the gradient of all rows, also if another row is shown."""
    layer = nn.LSTM(2, 3, batch_first=True)
    x = torch.randn(2, 3, 2)
    trace = ur.trace(layer, x).backward(lambda y: y.square().sum())
    layer(x)[0].square().sum().backward()
    expected = printed(layer.weight_hh_l0.grad[4, 1].item())
    tab = open_page(trace, address="#step=1&unit=4&number=weight_hh&column=1")
    panel = tab.locator(".arithmetic")
    assert panel.locator(".gradient-value").text_content() == f"∂loss/∂Whf[1,1] = {expected}"
    assert "each step of each row adds δ times" in panel.text_content()
    lines = tab.evaluate(READ_LINES)
    assert len(lines) == 2 * 3 + 2
    assert check_lines(lines, "the gradient of W_hf[1,1]")[0] == len(lines)
    assert as_number(lines[-1]["result"]) == as_number(expected)
    spoken = panel.locator("[role=status]").text_content()
    assert spoken.endswith(f"Gradient: {expected}.")
    tab.get_by_role("combobox", name="row").select_option("1")
    assert panel.locator(".gradient-value").text_content().endswith(expected)
    panel.locator(".sum button").last.click()  # what the weight was multiplied with
    assert "number=h" in tab.evaluate("location.hash")


@pytest.mark.slow
@needs_browser
def test_largest_gradients_are_listed(open_page: OpenPage) -> None:
    layer = nn.GRU(2, 3)
    x = torch.randn(4, 2)
    tab = open_page(ur.trace(layer, x).backward(lambda y: y.square().sum()))
    layer(x)[0].square().sum().backward()
    table = tab.get_by_role("table", name="Gradients of the parameters")
    for name in ("weight_ih", "bias_hh"):
        gradient = getattr(layer, f"{name}_l0").grad
        largest = gradient.flatten()[gradient.abs().argmax()].item()
        cells = table.locator("tr", has_text=name).locator("td").all_text_contents()
        assert [cells[0], cells[2]] == [printed(gradient.norm().item()), printed(largest)]
    table.get_by_role("button").first.click()
    row, column = divmod(int(layer.weight_ih_l0.grad.abs().argmax()), 2)
    assert f"unit={row}&number=weight_ih&column={column}" in tab.evaluate("location.hash")
    enter(tab.locator(".drag input[type=text]"), "1.5")
    assert "of the recorded run, without your changes" in tab.locator(".arithmetic").text_content()
