"""`Watch.health`: problems in the last observed calls, in training and in eval mode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.recorded_models import CoupledRows, RandomStep
from unrolled.tracing import observed_call


@pytest.fixture(autouse=True)
def reference_engine() -> Iterator[None]:
    """Compiling would take most of the time of these tests."""
    with ur.engine("reference"):
        yield


def model(shut: bool = True) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"encoder": nn.LSTM(3, 8, 2, bidirectional=True), "decoder": ur.GRU(16, 8)})
    if shut:
        with torch.no_grad():
            layers["encoder"].bias_ih_l1[9] = -12
    return layers


def run(layers: nn.ModuleDict, x: Any) -> Tensor:
    output: Tensor = layers["decoder"](layers["encoder"](x)[0])[0]
    return output


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_eval_mode_gives_the_same_findings(context: Any) -> None:
    layers, x = model().eval(), torch.randn(6, 4, 3)
    expected = ur.trace(layers["encoder"], x).health()
    with ur.watch(layers) as watch, context():
        run(layers, torch.randn(5, 2, 3))
        expected_output = run(layers, x)
    torch.randn(1)
    state = torch.get_rng_state()
    found = watch.health()
    assert [str(one) for one in found] == [str(one) for one in expected]
    (finding,) = found
    assert (finding.module, finding.layer, finding.direction) == ("encoder", 1, "forward")
    assert (
        str(found)
        .splitlines()[1]
        .startswith("warning: encoder, layer 1, forward: Forget gate f[1] stays shut")
    )
    assert any(text.startswith("decoder: the layer uses its input") for text in found.checked)
    assert any("no backward pass reached the call" in text for text in found.not_checked)
    assert torch.equal(state, torch.get_rng_state())
    with context():
        assert torch.equal(run(layers, x), expected_output)


def test_training_uses_the_parameters_and_gradients_of_the_sampled_call() -> None:
    layers, x = model(), torch.randn(12, 4, 3)
    optimizer = torch.optim.SGD(layers.parameters(), 1e6)
    with ur.watch(layers, every=1, share=None) as watch:
        run(layers, x)[-1].square().sum().backward()
        optimizer.step()  # it ruins the parameters
        optimizer.zero_grad()
        first = watch.health()
        run(layers, x * math.inf).sum().backward()
        second = watch.health()
    assert [one.kind for one in first] == ["gate shut"]
    assert any("encoder: the gradient neither explodes nor vanishes" in text for text in first.checked)
    assert not first.not_checked
    assert "The input has infinity" in second[0].message or "The input has NaN" in second[0].message


def test_changed_inputs_and_parameters_after_the_call() -> None:
    layer, x = nn.GRU(3, 8).eval(), torch.randn(9, 2, 3)
    with ur.watch(layer) as watch:
        layer(x)
        x.fill_(math.nan)  # a reused buffer
        assert not watch.health().findings
        with torch.no_grad():
            layer.weight_hh_l0 += 1
    found = watch.health()
    assert any("returned another final state than this run" in text for text in found.not_checked)


@pytest.mark.parametrize(
    "case", ["packed", "lengths", "batch first", "random step", "coupled rows", "float64"]
)
def test_layouts(case: str) -> None:
    options: dict[str, Any] = {"dtype": torch.float64} if case == "float64" else {}
    cells = {"random step": RandomStep, "coupled rows": CoupledRows}
    if case in cells:
        layer = ur.Recurrent(cells[case], 3, 4)
    else:
        layer = ur.GRU(3, 4, batch_first=case == "batch first", **options)
    x: Any = torch.randn(6, 4, 3, **options)
    x[2, 3, 1] = math.nan
    row = 2 if case == "batch first" else 3
    arguments = {"lengths": [4, 6, 1, 3]} if case == "lengths" else {}
    if case == "packed":
        x = pack_sequence([x[:n, k] for k, n in enumerate((3, 1, 6, 4))], enforce_sorted=False)
    with ur.watch(layer.eval()) as watch:
        layer(x, **arguments)
    found = watch.health()
    assert row in found[0].rows
    assert found[0].severity == "error"
    assert not any("returned another final state" in text for text in found.not_checked)


def test_calls_with_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a call has too many numbers, only its first rows and the rows with NaN are checked."""
    monkeypatch.setattr(observed_call, "RECORDED_NUMBERS", 16 * 4 * 6 * 5)  # five rows
    layer, x = ur.GRU(3, 4), torch.randn(6, 40, 3)
    x[2, 33, 1] = math.nan
    with ur.watch(layer, every=1, share=None) as watch:
        layer(x)[0].square().sum().backward()
    found = watch.health()
    assert found[0].rows == (33,)
    assert "in row 33" in found[0].message
    assert "the other rows: only 5 of 40 rows were checked, to save memory" in found.not_checked
    assert any("gradient" in one.kind for one in found)
    packed = pack_sequence([x[:n, k] for k, n in enumerate([2, 6] * 20)], enforce_sorted=False)
    with ur.watch(layer.eval()) as watch:
        layer(packed)
    assert watch.health()[0].rows == (33,)


def test_layers_without_a_call() -> None:
    layers = model()
    watch = ur.watch(layers, every=7, share=None)
    assert "all of it: the layer wasn't called" in str(watch.health())
    layers["encoder"](torch.randn(5, 2, 3))
    assert "encoder: all of it: the first sample is training call 7" in str(watch.health())
    layers["decoder"].eval()(torch.randn(5, 2, 16), resets=torch.zeros(5, 2, dtype=torch.bool))
    assert "decoder: all of it: the call used resets=" in str(watch.health())
    assert not watch.health().findings
    watch.close()


def test_module_that_changes_between_calls() -> None:
    layer, x = nn.LSTM(3, 4, 2).eval(), torch.randn(5, 2, 3)
    with ur.watch(layer) as watch:
        layer(x)
        layer.weight_ih_l0 = nn.Parameter(torch.full_like(layer.weight_ih_l0, math.nan))
        layer(x)
        assert watch.health()[0].parameter == ("weight_ih", 0)
        nn.utils.parametrizations.orthogonal(layer, "weight_hh_l0")
        layer.weight_ih_l0 = nn.Parameter(torch.randn_like(layer.weight_ih_l0))
        layer(x)
        assert not [one for one in watch.health() if one.severity == "error"]
