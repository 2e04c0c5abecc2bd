"""Frozen layers: bit-identical results, errors for changed weights, fallbacks for other calls."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, pair, tensors, use_threads
from unrolled.engines.native import matmul
from unrolled.inference.plans import MAX_PLANS

pytestmark = NEEDS_COMPILER


@pytest.fixture(autouse=True)
def _native() -> Any:
    with ur.engine("native"), torch.no_grad():
        yield


def assert_same(a: Any, b: Any) -> None:
    assert all(torch.equal(p, q) for p, q in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_bit_identical_to_a_layer_that_is_not_frozen(kind: str, bidirectional: bool) -> None:
    layer, theirs = pair(kind, 9, 37, num_layers=2, bidirectional=bidirectional)
    inputs = [torch.randn(time, batch, 9) for time, batch in ((1, 1), (7, 1), (1, 5), (30, 3), (12, 40))]
    states = [tuple(torch.randn_like(part) for part in tensors(layer(x)[1])) for x in inputs]
    states = [state if len(state) > 1 else state[0] for state in states]
    expected = [(layer(x), layer(x, state)) for x, state in zip(inputs, states, strict=True)]
    with ur.frozen(layer):
        for _ in range(2):  # the first call packs the weights
            for x, state, (plain, stateful) in zip(inputs, states, expected, strict=True):
                assert_same(layer(x), plain)
                assert_same(layer(x, state), stateful)
    torch.testing.assert_close(expected[3][0][0], theirs(inputs[3])[0])


def call_with_busy_threads(call: Callable[[], Any]) -> Any:
    """Run a call from inside a task of the thread pool, so that it gets no other thread."""
    results = []
    callback_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    work = callback_type(lambda data, thread, count: results.append(call()) if thread == 0 else None)
    matmul._thread_pool().thread_pool_run(2, None, work, None)
    return results[0]


def test_bit_identical_with_and_without_other_threads() -> None:
    """Matrices packed for several threads are used by a single thread, and the reverse."""
    layer, x = ur.RNN(9, 37), torch.randn(12, 40, 9)
    expected = layer(x)
    for first, second in ((0, 1), (1, 0)):
        with use_threads(2), ur.frozen(layer):
            for busy in (first, second, first):
                assert_same(call_with_busy_threads(lambda: layer(x)) if busy else layer(x), expected)


def test_unsupported_calls_run_as_usual() -> None:
    layer = ur.LSTM(4, 6, batch_first=True)
    x = torch.randn(3, 5, 4)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 2, 3], batch_first=True, enforce_sorted=False)
    calls = (lambda: layer(x), lambda: layer(x[0]), lambda: layer(packed), lambda: layer(x[:0]))
    expected = [call() for call in calls]
    with ur.frozen(layer):
        for call, result in zip(calls, expected, strict=True):
            assert_same(call(), result)
        with torch.enable_grad():
            layer(x)[0].sum().backward()
        with pytest.raises(ValueError, match=r"input.size\(-1\) must be equal to input_size"):
            layer(torch.randn(3, 5, 3))
        with pytest.raises(ValueError, match="Expected hidden size"):
            layer(x, (torch.zeros(1, 2, 6), torch.zeros(1, 3, 6)))
    assert layer.weight_hh_l0.grad is not None


def test_inputs_and_states_with_any_memory_layout() -> None:
    layer = ur.GRU(4, 6, batch_first=True)
    for x in (
        torch.randn(3, 5, 4),
        torch.randn(3, 4, 5).mT,
        torch.randn(1, 5, 8)[..., ::2],
        torch.randn(3, 1, 4),
    ):
        state = torch.randn(6, x.shape[0], 1).permute(2, 1, 0)
        expected = layer(x), layer(x, state)
        with ur.frozen(layer):
            assert_same((layer(x), layer(x, state)), expected)
            assert layer(x)[0].shape == expected[0][0].shape
    with ur.frozen(layer), pytest.raises(TypeError, match="a tensor"):
        layer(x, (state,))


def test_a_state_can_require_gradients() -> None:
    layer = ur.RNN(2, 3).requires_grad_(False)
    x, state = torch.randn(4, 1, 2), torch.randn(1, 1, 3, requires_grad=True)
    with torch.enable_grad(), ur.frozen(layer):
        layer(x, state)[0].sum().backward()
    assert state.grad is not None


def test_a_change_of_dtype_is_an_error() -> None:
    layer, x = ur.GRU(4, 5), torch.randn(6, 2, 4)
    with ur.frozen(layer):
        layer(x)
        layer.double()
        for inputs in (x, x.double()):
            with pytest.raises(RuntimeError, match="GRU: weight_ih_l0 was changed inside unrolled.frozen"):
                layer(inputs)


@pytest.mark.parametrize("index", range(4))
def test_a_weight_that_moved_in_memory_is_an_error(index: int) -> None:
    layer, x = ur.GRU(4, 5), torch.randn(6, 2, 4)
    for move in (nn.Parameter.share_memory_, lambda param: setattr(param, "data", torch.randn(1000))):
        with ur.frozen(layer):
            layer(x)
            name, parameter = list(layer.named_parameters())[index]
            move(parameter)
            with pytest.raises(RuntimeError, match=f"GRU: {name} was changed inside unrolled.frozen"):
                layer(x)


def test_a_changed_weight_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), ur.GRU(4, 5))
    x = torch.randn(6, 2, 4)
    before = model(x)
    with ur.frozen(model):
        assert_same(model(x), before)
        model[1].weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="GRU: weight_hh_l0 was changed inside unrolled.frozen"):
            model(x)
    changed = model(x)
    assert not torch.equal(changed[0], before[0])
    with ur.frozen(model):
        assert_same(model(x), changed)
        model[1].weight_hh_l0 = nn.Parameter(torch.zeros(15, 5))
        with pytest.raises(RuntimeError, match="GRU: weight_hh_l0 was replaced inside unrolled.frozen"):
            model(x)


def test_blocks_can_be_nested() -> None:
    layer, x = ur.RNN(3, 4), torch.randn(5, 2, 3)
    with ur.frozen(layer):
        with ur.frozen(layer):
            layer(x)
        layer(x)
    assert layer._frozen is None
    with pytest.raises(TypeError, match="frozen expects a torch.nn.Module, got int"):
        ur.frozen(3)  # type: ignore[arg-type]


def test_a_copy_of_a_frozen_layer_is_not_frozen() -> None:
    layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad(), ur.frozen(layer):
        expected = layer(x)[0]
        for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(clone(x)[0], expected)
            clone.weight_hh_l0.mul_(2)
            assert not torch.equal(clone(x)[0], expected)


def test_the_number_of_plans_is_bounded() -> None:
    layer = ur.RNN(2, 3)
    with ur.frozen(layer):
        for steps in range(1, 2 * MAX_PLANS):
            layer(torch.randn(steps, 1, 2))
            assert len(layer._frozen._snapshot.plans) <= MAX_PLANS
        x = torch.randn(3, 1, 2)
        output, _ = layer(x)
    assert torch.equal(output, layer(x)[0])
