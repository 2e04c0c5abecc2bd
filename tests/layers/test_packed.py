"""Packed sequences that don't fit together are refused, with every engine and in every kind of call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import unrolled as ur
from unrolled.engines import dispatch
from unrolled.layers.sequence import InputError

SIZES = "batch_sizes of a packed sequence should be"
ORDER = "sorted_indices and unsorted_indices of a packed sequence should be permutations"

INVALID: dict[str, tuple[int, Any, Any, Any, str]] = {
    "grows": (4, tensor([1, 3]), None, None, SIZES),
    "grows later": (6, tensor([2, 1, 1, 2]), None, None, SIZES),
    "more than the rows": (5, tensor([3, 3, 3]), None, None, SIZES),
    "fewer than the rows": (9, tensor([3, 3]), None, None, SIZES),
    "zero": (3, tensor([3, 0]), None, None, SIZES),
    "negative": (3, tensor([4, -1]), None, None, SIZES),
    "empty": (0, tensor([], dtype=torch.int64), None, None, SIZES),
    "overflow": (4, tensor([2**62, 2**62, 2**62, 2**62, 4]), None, None, SIZES),
    "int32": (4, tensor([2, 2], dtype=torch.int32), None, None, SIZES),
    "float": (4, tensor([2.0, 2.0]), None, None, SIZES),
    "a number": (4, tensor(4), None, None, SIZES),
    "2D": (4, tensor([[2, 2]]), None, None, SIZES),
    "lazy zeros": (4, torch._efficientzerotensor((2,), dtype=torch.int64), None, None, "can't read"),
    "too many indices": (4, tensor([2, 2]), tensor([0, 1, 2]), tensor([0, 1, 2]), ORDER),
    "too few indices": (4, tensor([2, 2]), tensor([0]), tensor([0]), ORDER),
    "not a permutation": (4, tensor([2, 2]), tensor([0, 0]), tensor([0, 0]), ORDER),
    "out of range": (4, tensor([2, 2]), tensor([0, 5]), tensor([0, 1]), ORDER),
    "below the range": (4, tensor([2, 2]), tensor([0, -1]), tensor([0, -1]), ORDER),
    "not inverse": (6, tensor([3, 3]), tensor([1, 2, 0]), tensor([1, 2, 0]), ORDER),
    "2D indices": (4, tensor([2, 2]), tensor([[1, 0]]), tensor([[1, 0]]), ORDER),
    "float indices": (4, tensor([2, 2]), tensor([1.0, 0.0]), tensor([1.0, 0.0]), ORDER),
}


def run_frozen(layer: Any, x: Any) -> Any:
    with torch.no_grad(), ur.frozen(layer):
        return layer(x)


def run_stream(layer: Any, x: Any) -> Any:
    stream = ur.Stream(layer)
    stream(pack_sequence([torch.randn(3, 3), torch.randn(2, 3)]))
    return stream(x)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "call": lambda layer, x: layer(x),
    "state": lambda layer, x: layer(x, torch.zeros(1, 2, 4)),
    "frozen": run_frozen,
    "stream": run_stream,
    "trace": ur.trace,
}


@pytest.mark.parametrize("case", INVALID)
def test_what_does_not_fit_is_refused(case: str) -> None:
    rows, sizes, sorted_indices, unsorted_indices, message = INVALID[case]
    x = PackedSequence(torch.randn(rows, 3), sizes, sorted_indices, unsorted_indices)
    layer = ur.GRU(3, 4)
    for call in CALLS.values():
        with pytest.raises(InputError, match=f"{message}|the stream's states have 2 rows"):
            call(layer, x)
    for name in ("native", "reference"):
        with ur.engine(name), pytest.raises(InputError, match=message):
            layer(x)
    with pytest.raises(InputError, match=message):
        ur.LSTM(3, 4, 2, bidirectional=True)(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_data_of_other_dimensions() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(2, 3)])
    for data in (torch.randn(4), torch.randn(2, 2, 3), nested):
        with pytest.raises(InputError, match="packed data must have 2 dimensions"):
            ur.GRU(3, 4)(PackedSequence(data, tensor([2, 2])))


def test_data_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="a packed sequence should contain tensors, got list"):
        ur.GRU(3, 4)(PackedSequence([[1.0, 2.0, 3.0]], tensor([1])))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("sizes", [[1, 3], [3, 3], [4, 0], [2**63, 2**63]])
def test_engines_refuse_sizes_too(engine: str, sizes: list[int]) -> None:
    layer = ur.GRU(3, 4)
    with ur.engine(engine), pytest.raises(ValueError, match=SIZES):
        dispatch.run([layer._bind("_l0")], torch.randn(4, 3), [None], sizes)


@pytest.mark.parametrize("sizes", [tensor([3, 9, 2, 9, 2])[::2], torch._neg_view(tensor([-3, -2, -2]))])
def test_valid_sizes_of_any_memory_layout(sizes: Tensor) -> None:
    layer, theirs = ur.GRU(3, 4), nn.GRU(3, 4)
    theirs.load_state_dict(layer.state_dict())
    data, order = torch.randn(7, 3), tensor([2, 0, 1])
    x = PackedSequence(data, sizes, order, torch.argsort(order))
    expected, state = theirs(PackedSequence(data, tensor([3, 2, 2]), order, torch.argsort(order)))
    actual, final = layer(x)
    torch.testing.assert_close((actual.data, final), (expected.data, state))
