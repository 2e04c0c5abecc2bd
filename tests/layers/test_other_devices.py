"""Layers on a device that the compiled loops don't support: tensors that say so, and compute on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import unrolled as ur
from unrolled.engines import log


class OnOtherDevice(Tensor):
    """A tensor on a device of type "lazy", which needs no driver. The CPU computes its values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnOtherDevice:
        create: Any = Tensor._make_wrapper_subclass
        tensor: OnOtherDevice = create(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device="lazy"
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.values if isinstance(value, OnOtherDevice) else value

        kwargs = {**(kwargs or {})}
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        results = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        return tree_map(lambda value: cls(value) if isinstance(value, Tensor) else value, results)


def moved(module: nn.Module) -> Any:
    """Return a copy of a module with its parameters on another device."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnOtherDevice(parameter.detach()), requires_grad=False)
    return module


def close(results: Any, expected: Any) -> None:
    torch.testing.assert_close(results.values, expected, rtol=1e-5, atol=1e-6)


def test_one_warning_and_the_same_results(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_announced", {})
    layer, x = ur.Recurrent(ur.cells.MGU, 3, 5), torch.randn(4, 2, 3)
    resets = torch.rand(4, 2) < 0.5
    there = moved(layer)
    with torch.no_grad():
        close(there(OnOtherDevice(x))[0], layer(x)[0])
        close(there(OnOtherDevice(x), resets=OnOtherDevice(resets))[0], layer(x, resets=resets)[0])
    [warning] = [str(each.message) for each in recwarn]
    reason = "compiled loops run only on CPUs and CUDA devices"
    assert warning == f"MGU runs step by step on lazy, which is slower: {reason}"
    with ur.engine("native"), pytest.raises(RuntimeError, match="MGU can't run on the native engine"):
        there(OnOtherDevice(x))


@pytest.mark.filterwarnings("ignore:.*step by step")
def test_streams_frozen_models_and_records() -> None:
    layer, x = ur.GRU(3, 5, num_layers=2, batch_first=True), torch.randn(2, 6, 3)
    there = moved(layer)
    expected = layer(x)[0].detach()
    with torch.no_grad():
        stream = ur.Stream(there)
        for t in range(6):
            close(stream(OnOtherDevice(x[:, t : t + 1])), expected[:, t : t + 1])
        with ur.frozen(there):
            close(there(OnOtherDevice(x))[0], expected)
        with ur.record(there) as record:
            there(OnOtherDevice(x))
    close(record[""].output, expected)
