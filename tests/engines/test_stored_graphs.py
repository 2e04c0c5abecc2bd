"""Captured steps as data: what can be stored, and is the same after reading it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.kept_captures import Plain, define
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.step_operations import (
    BINARY,
    CUSTOM_GRADIENTS,
    DISCONTINUOUS,
    PRODUCTS,
    UNARY,
    Get,
    cell_of,
    fit,
)
from unrolled.engines.compiler.capture import capture
from unrolled.engines.compiler.partition import split
from unrolled.engines.compiler.stored_graph import NotStorableError, from_data, to_data

pytestmark = NEEDS_COMPILER


def test_a_cast_to_float32_can_be_stored() -> None:
    """The loop in float64 rounds with an operator of this package."""
    cell = define("(torch.tanh(z).float() * 2).to(z.dtype)")(2, 3)
    captured = capture(cell, torch.float64)
    data = json.loads(json.dumps(to_data(captured)))
    assert "unrolled.round_to_float32.default" in str(data["nodes"])
    assert to_data(from_data(data, cell)) == data


def test_an_operator_of_another_library_is_not_stored() -> None:
    library = torch.library.Library("kept_captures_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    captured = capture(Plain(2, 3), torch.float32)
    node = next(node for node in captured.graph.nodes if node.op == "call_function")
    node.target = torch.ops.kept_captures_test.twice.default
    with pytest.raises(NotStorableError, match="it calls kept_captures_test.twice.default"):
        to_data(captured)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(12))
def test_every_operation_can_be_stored(start: int) -> None:
    functions: list[Callable[..., Tensor]] = [
        *(lambda v, get, f=f: f(v) for f in (UNARY | DISCONTINUOUS | CUSTOM_GRADIENTS).values()),
        *(lambda v, get, f=f: f(v, v.roll(3, 1) * get(v.shape[1])) for f in BINARY.values()),
        *PRODUCTS.values(),
    ]

    def run(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
        v = torch.nn.functional.linear(x, get(8, 3)) + get(8) * states[0]
        return (torch.stack([fit(f(v, get), 8) for f in functions[start::12]]).sum(0),)

    cell = cell_of(run, 3, (8,))(3, 8)
    captured = capture(cell, torch.float32)
    data = json.loads(json.dumps(to_data(captured)))
    rebuilt = from_data(data, cell)
    assert to_data(rebuilt) == data
    for ours, theirs in zip(split(captured), split(rebuilt), strict=True):
        for part in ("prologue", "loop", "epilogue", "inputs", "saved", "old_states", "new_states"):
            assert list(map(str, getattr(ours, part))) == list(map(str, getattr(theirs, part)))
