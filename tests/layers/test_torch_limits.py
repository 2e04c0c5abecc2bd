"""The table in docs/torch_nn.md: every row is tested with torch.nn and with this library."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER

TABLE = (Path(__file__).parents[2] / "docs" / "torch_nn.md").read_text()
ROWS = re.findall(r"^\| (?!feature \||-)(.*?) \| (.*?) \| (.*?) \|$", TABLE.replace("|---", ""), re.MULTILINE)
KINDS = ("RNN", "GRU", "LSTM")

pytestmark = [NEEDS_COMPILER, pytest.mark.filterwarnings("ignore:.torch.jit")]


def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 2, 3)


def compiles(layer: Any) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=False):  # the default, which the benchmark changes
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        compiled(x())
        compiled(x()[:3])


def exports(layer: Any) -> None:
    sizes = ({0: torch.export.Dim("time", min=2, max=64), 1: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(layer, (x(),), dynamic_shapes=sizes).module()
    assert torch.equal(exported(torch.cat([x(), x()]))[0], layer(torch.cat([x(), x()]))[0])


def maps_over_inputs(layer: Any) -> None:
    assert vmap(lambda x: layer(x)[0])(torch.stack([x(), x()])).shape[:2] == (2, 4)


def loss_of(layer: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(layer, parameters, (x,))[0].square().sum()


def parameters_of(layer: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in layer.named_parameters()}


def maps_over_parameters(layer: Any) -> None:
    stacked = {name: torch.stack([value, -value]) for name, value in parameters_of(layer).items()}
    assert vmap(loss_of(layer), (0, None))(stacked, x()).shape == (2,)


def has_per_sample_gradients(layer: Any) -> None:
    gradients = vmap(grad(loss_of(layer)), (None, 1))(parameters_of(layer), x().unsqueeze(2))
    assert gradients["weight_hh_l0"].shape[0] == 2


def has_a_jvp(layer: Any) -> None:
    jvp(lambda x: layer(x)[0], (x(),), (x(),))


def has_a_hessian(layer: Any) -> None:
    hessian(lambda x: layer(x)[0].square().sum())(x()[:2, :1])


def has_second_gradients(layer: Any) -> None:
    leaf = x().requires_grad_()
    [first] = torch.autograd.grad(layer(leaf)[0].square().sum(), leaf, create_graph=True)
    first.square().sum().backward()


def supports_autocast(layer: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x())[0]
    output.float().sum().backward()


def returns_all_states(layer: Any) -> None:
    assert layer(x(), all_states=True)[2]["h"].requires_grad


def supports_lengths(layer: Any) -> None:
    assert not layer(x(), lengths=[4, 2])[0][2:, 1].any()


def supports_masks(layer: Any) -> None:
    mask = torch.tensor([[True, False], [False, True], [True, True], [True, False]])
    assert not layer(x(), mask=mask)[0][~mask].any()


def takes_the_input_size_from_a_batch(layer: Any) -> None:
    lazy = type(layer)(None, 5)
    lazy(x())
    assert lazy.input_size == 3


def supports_resets(layer: Any) -> None:
    layer(x(), resets=torch.ones(4, 2, dtype=torch.bool))


def has_regularization(layer: Any) -> None:
    type(layer)(3, 5, zoneout=0.1, recurrent_dropout=0.1, variational_dropout=0.1, initial_state="learned")


class Leaky(ur.Cell):
    weight = ur.Param("hidden", "hidden")
    weight_x = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * h + 0.5 * torch.tanh(h @ self.weight.T + x @ self.weight_x.T)


def runs_a_custom_cell(layer: Any) -> None:
    with ur.engine("native"):
        custom = ur.Recurrent(Leaky, 3, 5) if isinstance(layer, ur.Recurrent) else type(layer)(Leaky, 3, 5)
        custom(x())


def is_bit_identical_in_pieces(layer: Any) -> None:
    torch.manual_seed(1)
    layer = type(layer)(64, 96)
    sequence = torch.randn(40, 3, 64)
    with torch.no_grad():
        expected = layer(sequence)[0]
        for cut in range(1, 40):
            first, state = layer(sequence[:cut])
            assert torch.equal(torch.cat([first, layer(sequence[cut:], state)[0]]), expected)
        assert torch.equal(layer(sequence[:, 1:2])[0], expected[:, 1:2])


def exports_a_custom_cell(layer: Any) -> None:
    pytest.importorskip("onnxscript")
    if not isinstance(layer, ur.Recurrent):
        raise TypeError("torch.nn has no layer for a custom cell")
    ur.io.to_onnx(ur.Recurrent(Leaky, 3, 5))


CHECKS: dict[
    str, tuple[Callable[[Any], None], tuple[str, ...]]
] = {  # the check, and the torch.nn layers that fail it
    "torch.compile": (compiles, KINDS),
    "torch.export": (exports, KINDS),
    "torch.vmap` over inputs": (maps_over_inputs, KINDS),
    "torch.vmap` over parameters": (maps_over_parameters, KINDS),
    "per-sample gradients": (has_per_sample_gradients, ("RNN", "GRU")),
    "forward mode": (has_a_jvp, ("LSTM",)),
    "hessian": (has_a_hessian, ("LSTM",)),
    "double backward": (has_second_gradients, ()),
    "autocast": (supports_autocast, ()),
    "all states": (returns_all_states, KINDS),
    "variable lengths": (supports_lengths, KINDS),
    "steps to skip": (supports_masks, KINDS),
    "resets within": (supports_resets, KINDS),
    "input size": (takes_the_input_size_from_a_batch, KINDS),
    "learned initial states": (has_regularization, KINDS),
    "custom cells": (runs_a_custom_cell, KINDS),
    "bit-identical": (is_bit_identical_in_pieces, ("RNN", "GRU")),
    "ONNX export": (exports_a_custom_cell, KINDS),
}


def test_every_row_has_a_check() -> None:
    assert len(ROWS) == len(CHECKS)
    for (row, theirs, ours), (key, (_, failing)) in zip(ROWS, CHECKS.items(), strict=True):
        assert key in row
        assert ours != "no"
        before, _, after = theirs.partition(":")
        if after.strip() == "no":
            assert failing == tuple(kind for kind in KINDS if kind in before)
        else:
            assert failing == (KINDS if before.split()[0] == "no" else ())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", CHECKS)
def test_row(key: str, kind: str) -> None:
    check, failing = CHECKS[key]
    check(getattr(ur, kind)(3, 5))
    theirs = getattr(nn, kind)(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in failing:
            with pytest.raises(Exception):  # noqa: B017, PT011  # torch raises various exceptions
                check(theirs)
        elif (key, kind) != ("autocast", "LSTM"):
            check(theirs)
