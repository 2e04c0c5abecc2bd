"""Every row of the table in docs/torch_nn.md, on both sides: it tells if torch.nn can what it could not."""

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
ROWS = re.findall(r"^\| (?!what \||-)(.*?) \| (.*?) \| (.*?) \|$", TABLE.replace("|---", ""), re.MULTILINE)
KINDS = ("RNN", "GRU", "LSTM")

pytestmark = [NEEDS_COMPILER, pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")]


def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 2, 3)


def compiles(layer: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(x())
    compiled(x()[:3])


def exports(layer: Any) -> None:
    sizes = ({0: torch.export.Dim("time", min=2, max=64), 1: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(layer, (x(),), dynamic_shapes=sizes).module()
    assert torch.equal(exported(torch.cat([x(), x()]))[0], layer(torch.cat([x(), x()]))[0])


def takes_many(layer: Any) -> None:
    assert vmap(lambda x: layer(x)[0])(torch.stack([x(), x()])).shape[:2] == (2, 4)


def loss_of(layer: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(layer, parameters, (x,))[0].square().sum()


def parameters_of(layer: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in layer.named_parameters()}


def takes_an_ensemble(layer: Any) -> None:
    stacked = {name: torch.stack([value, -value]) for name, value in parameters_of(layer).items()}
    assert vmap(loss_of(layer), (0, None))(stacked, x()).shape == (2,)


def has_gradients_of_samples(layer: Any) -> None:
    found = vmap(grad(loss_of(layer)), (None, 1))(parameters_of(layer), x().unsqueeze(2))
    assert found["weight_hh_l0"].shape[0] == 2


def has_a_jvp(layer: Any) -> None:
    jvp(lambda x: layer(x)[0], (x(),), (x(),))


def has_a_hessian(layer: Any) -> None:
    hessian(lambda x: layer(x)[0].square().sum())(x()[:2, :1])


def has_second_gradients(layer: Any) -> None:
    given = x().requires_grad_()
    [first] = torch.autograd.grad(layer(given)[0].square().sum(), given, create_graph=True)
    first.square().sum().backward()


def takes_autocast(layer: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x())[0]
    output.float().sum().backward()


def gives_every_state(layer: Any) -> None:
    assert layer(x(), all_states=True)[2]["h"].requires_grad


def takes_lengths(layer: Any) -> None:
    assert not layer(x(), lengths=[4, 2])[0][2:, 1].any()


def takes_resets(layer: Any) -> None:
    layer(x(), resets=torch.ones(4, 2, dtype=torch.bool))


def has_options(layer: Any) -> None:
    type(layer)(3, 5, zoneout=0.1, recurrent_dropout=0.1, variational_dropout=0.1, initial_state="learned")


class Leaky(ur.Cell):
    weight = ur.Param("hidden", "hidden")
    weight_x = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * h + 0.5 * torch.tanh(h @ self.weight.T + x @ self.weight_x.T)


def takes_a_cell(layer: Any) -> None:
    with ur.engine("native"):
        made = ur.Recurrent(Leaky, 3, 5) if isinstance(layer, ur.Recurrent) else type(layer)(Leaky, 3, 5)
        made(x())


def has_the_bits_of_pieces(layer: Any) -> None:
    torch.manual_seed(1)
    wide = type(layer)(64, 96)
    given = torch.randn(40, 3, 64)
    with torch.no_grad():
        whole = wide(given)[0]
        for cut in range(1, 40):
            first, state = wide(given[:cut])
            assert torch.equal(torch.cat([first, wide(given[cut:], state)[0]]), whole)
        assert torch.equal(wide(given[:, 1:2])[0], whole[:, 1:2])


def exports_a_cell(layer: Any) -> None:
    pytest.importorskip("onnxscript")
    if not isinstance(layer, ur.Recurrent):
        raise TypeError("torch.nn has no layer of it")
    ur.io.to_onnx(ur.Recurrent(Leaky, 3, 5))


CHECKS: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {  # and which of torch.nn's can't
    "torch.compile": (compiles, KINDS),
    "torch.export": (exports, KINDS),
    "torch.vmap` over inputs": (takes_many, KINDS),
    "torch.vmap` over parameters": (takes_an_ensemble, KINDS),
    "gradients of every sample": (has_gradients_of_samples, ("RNN", "GRU")),
    "forward mode": (has_a_jvp, ("LSTM",)),
    "hessian": (has_a_hessian, ("LSTM",)),
    "second gradients": (has_second_gradients, ()),
    "autocast": (takes_autocast, ()),
    "every state": (gives_every_state, KINDS),
    "rows of several lengths": (takes_lengths, KINDS),
    "episodes": (takes_resets, KINDS),
    "learned initial states": (has_options, KINDS),
    "a cell of one's own": (takes_a_cell, KINDS),
    "the same bits": (has_the_bits_of_pieces, ("RNN", "GRU")),
    "ONNX export": (exports_a_cell, KINDS),
}


def test_every_row_has_its_check() -> None:
    assert len(ROWS) == len(CHECKS)
    for (row, torchs, ours), (key, (_, cannot)) in zip(ROWS, CHECKS.items(), strict=True):
        assert key in row
        assert ours != "no"
        said = torchs.partition(":")
        if said[2].strip() == "no":
            assert cannot == tuple(kind for kind in KINDS if kind in said[0])
        else:
            assert cannot == (KINDS if said[0].split()[0] == "no" else ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", CHECKS)
def test_a_row(key: str, kind: str) -> None:
    check, cannot = CHECKS[key]
    check(getattr(ur, kind)(3, 5))
    theirs = getattr(nn, kind)(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in cannot:
            with pytest.raises(Exception):  # noqa: B017, PT011  # whatever it is that torch says
                check(theirs)
        elif (key, kind) != ("autocast", "LSTM"):
            check(theirs)
