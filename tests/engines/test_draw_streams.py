"""Streams, records and traces of layers that draw random numbers: the numbers of the layer's own call."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.noisy_layers import NoisyModel, layer_of, seeded

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated:DeprecationWarning")


@NEEDS_COMPILER
@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("sizes", [[4, 1, 4], [1] * 9, [9]])
@pytest.mark.slow
def test_a_stream_continues_the_numbers(engine: str, sizes: list[int]) -> None:
    model, x = NoisyModel(), torch.randn(9, 4, 3)
    with ur.engine(engine), torch.no_grad():
        for module in (model, model.below):
            whole = seeded(module, x)
            whole = whole if isinstance(whole, Tensor) else whole[0]
            stream = ur.Stream(module)
            for _ in range(2):
                parts = seeded(lambda stream=stream: [stream(chunk) for chunk in x.split(sizes)])
                assert torch.equal(torch.cat(parts), whole)
                stream.reset()


@NEEDS_COMPILER
@pytest.mark.slow
def test_records_of_a_stream() -> None:
    model, x = NoisyModel(torch.float64), torch.randn(9, 4, 3).double()
    whole = seeded(model, x).detach()
    for rows in (None, [1, 3]):
        stream = ur.Stream(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with ur.record(model, calls=9, rows=rows) as rec:
                parts = seeded(lambda stream=stream: [stream(chunk) for chunk in x.split([1, 4, 4])])
        assert torch.equal(torch.cat(parts), whole)
        recorded = torch.cat([trace["h"] for trace in rec.calls("above")])
        assert_close(recorded, whole if rows is None else whole[:, rows], 1e-12)


@pytest.mark.slow
@NEEDS_COMPILER
def test_traces_and_explanations() -> None:
    layer, x = layer_of(num_layers=2, bidirectional=True, dtype=torch.float64), torch.randn(5, 3, 3).double()
    output = seeded(layer, x)[0].detach()
    trace = seeded(ur.trace, layer, x)
    assert_close(trace.output, output, 1e-12)
    for part in trace.layers:
        arguments = {"layer": part.layer, "direction": part.direction, "batch": 1}
        value = part["noise"][2, 1, 4].item()
        noise = f"{value:.4f}".replace("-", "−")
        explained = trace.explain("new", 2, 4, **arguments)
        assert explained.startswith("tanh(")
        factors = [float(text.replace("−", "-")) for text in re.findall(r"·\(?(−?[\d.]+)", explained)]
        assert any(factor == pytest.approx(value, abs=1e-4) for factor in factors)
        assert trace.explain("noise", 2, 4, **arguments) == f"{noise} = {noise}"
    trace.backward(lambda output: output.sin().sum() + 0 * output.sum())
    leaf = x.clone().requires_grad_()
    seeded(layer, leaf)[0].sin().sum().backward()
    assert trace.gradient("noise").abs().sum() > 0
    weights = layer.log_sigma_l1
    expected = (trace.gradient("noise", layer=1) * trace.layer(1)["noise"]).sum((0, 1))
    assert_close(expected, weights.grad, 1e-10)
