"""The compiled loops against the reference engine and torch.nn: numbers, bits, gradients, fallbacks."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import (
    LAYERS,
    NEEDS_COMPILER,
    TOLERANCE,
    assert_as_near,
    assert_close,
    gradients,
    pair,
    team,
    tensors,
)  # fmt: skip
from helpers.user_cell import MGU
from unrolled.cli.bench import apart
from unrolled.cli.bench.grid import Row
from unrolled.engines.native import registry
from unrolled.engines.native.toolchain import build

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
]


def made(kind: str, *sizes: int, **arguments: Any) -> Any:
    if kind == "mgu":
        return ur.Recurrent(MGU, *sizes, **arguments)
    return pair(kind, *sizes, **arguments)[0]


def both_engines(layer: Any, x: torch.Tensor, state: Any = None) -> None:
    """Outputs, final states and every gradient on both engines."""

    def results() -> list[torch.Tensor]:
        values = [part.detach() for part in tensors(layer(x, state))]
        return [*values, *gradients(layer, x, state, weights)]

    def expected() -> list[torch.Tensor]:
        with ur.engine("reference"):
            return results()

    with ur.engine("reference"):
        weights = [torch.randn_like(part) for part in tensors(layer(x, state))]
    with ur.engine("native"):
        actual = results()
    leaves = [*tensors((x, state)), *layer.parameters()]
    assert_as_near(actual, expected(), expected, leaves)


@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_shared_by_threads(kind: str, time: int) -> None:
    ours, theirs = pair(kind, 32, 64)
    x = torch.randn(time, 64, 32)
    with team(2), torch.no_grad(), ur.engine("native"):
        assert_close(ours(x), theirs(x), TOLERANCE[x.dtype])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*LAYERS, "mgu"]),
    sizes=st.tuples(st.integers(1, 40), st.integers(4, 70)),
    time=st.integers(1, 6),
    batch=st.integers(1, 20),
    bidirectional=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_size(
    kind: str, sizes: tuple[int, int], time: int, batch: int, bidirectional: bool, dtype: torch.dtype
) -> None:
    layer = made(kind, *sizes, bidirectional=bidirectional, dtype=dtype)
    both_engines(layer, torch.randn(time, batch, sizes[0], dtype=dtype).requires_grad_())


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from([*LAYERS, "mgu"]),
    hidden=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=9),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_unequal_lengths(
    kind: str, hidden: int, lengths: list[int], threads: int, dtype: torch.dtype
) -> None:
    layer = made(kind, 5, hidden + 4, num_layers=2, bidirectional=True, dtype=dtype)
    x = torch.randn(max(lengths), len(lengths), 5, dtype=dtype).requires_grad_()

    with team(threads):
        both_engines(Padded(layer, lengths), x)


class Padded(nn.Module):
    """A layer on rows of unequal length, given and returned with padding."""

    def __init__(self, layer: nn.Module, lengths: list[int]) -> None:
        super().__init__()
        self.layer, self.lengths = layer, lengths

    def forward(self, x: torch.Tensor, *_: Any) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        output, state = self.layer(packed)
        return nn.utils.rnn.pad_packed_sequence(output)[0], state


@pytest.mark.parametrize("kind", [*LAYERS, "mgu"])
def test_bfloat16_is_at_least_as_exact_as_the_reference(kind: str) -> None:
    layer = made(kind, 9, 33, num_layers=2, dtype=torch.bfloat16)
    x = torch.randn(12, 5, 9, dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    weights = [torch.randn_like(part) for part in tensors(exact(x.double()))]
    found = {}
    for engine in ("native", "reference"):
        with ur.engine(engine):
            found[engine] = [*tensors(layer(x)), *gradients(layer, x, None, [w.bfloat16() for w in weights])]
    truth = [*tensors(exact(x.double())), *gradients(exact, x.double(), None, weights)]
    registry, reference = (
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found[engine], truth, strict=True)]
        for engine in ("native", "reference")
    )
    assert all(a <= 1.1 * b + 2**-9 for a, b in zip(registry, reference, strict=True)), (registry, reference)


@pytest.mark.parametrize("kind", [*LAYERS, "mgu"])
def test_finite_differences(kind: str) -> None:
    torch.manual_seed(4)
    layer = made(kind, 2, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    with ur.engine("native"):
        for function in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert function(lambda x, *_: tuple(tensors(layer(x))), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*LAYERS, "mgu"])
def test_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """For every number of threads, batch, place in it and cut of the sequence, and in every run."""
    layer = made(kind, 9, 37, dtype=dtype)
    x = torch.randn(8, 23, 9, dtype=dtype)
    with torch.no_grad(), ur.engine("native"):
        whole, final = layer(x)
        for batch, row in ((1, 0), (1, 22), (5, 3), (6, 17), (7, 9), (12, 11)):
            part, _ = layer(x[:, row : row + batch])
            assert torch.equal(part, whole[:, row : row + batch])
        for cut in (1, 3, 7):
            first, state = layer(x[:cut])
            second, last = layer(x[cut:], state)
            assert torch.equal(torch.cat([first, second]), whole)
            assert all(torch.equal(a, b) for a, b in zip(tensors(last), tensors(final), strict=True))
        for threads in (1, 2, 3):
            with team(threads):
                assert torch.equal(layer(x)[0], whole)
                assert torch.equal(layer(x[:, 7:9])[0], whole[:, 7:9])


def test_a_backward_that_cannot_be_compiled_is_told_before_it_runs() -> None:
    class Multiplied(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return torch.sigmoid(h + x).prod(-1, keepdim=True) + x

    layer, x = ur.Recurrent(Multiplied, 4, 4), torch.randn(3, 2, 4, requires_grad=True)
    with ur.engine("native"):
        with torch.no_grad():
            output = layer(x)[0]
        with pytest.raises(RuntimeError, match="Multiplied can't run on the native engine: aten.cumprod"):
            layer(x)
    with ur.engine("auto"), pytest.warns(UserWarning, match="Multiplied runs on the reference engine"):
        trained = layer(x)[0]
    assert_close(output, trained, 1e-6)
    trained.sum().backward()
    assert x.grad is not None


def test_vector_functions_are_within_two_units(tmp_path: Path) -> None:
    """exp, sigmoid and tanh of floats of every magnitude and sign, specials included."""

    class Each(ur.Cell):
        weight = ur.Param("hidden", "hidden", init=nn.init.zeros_)
        name: str = "exp"

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            functions = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
            return functions[self.name](x + linear(h, self.weight))

    bits = torch.arange(-(2**31), 2**31, 2**31 // 2**20 + 1, dtype=torch.int64).to(torch.int32)
    specials = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 88.72, -103.9, -87.4, 9.01]
    )
    x = torch.cat([bits.view(torch.float32), specials, torch.linspace(-110, 100, 50_000)])
    for name in ("exp", "sigmoid", "tanh"):
        layer = ur.Recurrent(Each, 1, 1, name=name)
        with torch.no_grad(), ur.engine("native"):
            actual = layer(x.view(1, -1, 1))[0].flatten()
        truth = getattr(torch, name)(x.double())
        assert torch.equal(actual.isnan(), truth.isnan())
        rounded = truth.float()
        same = (actual == rounded) | truth.isnan()
        up = torch.nextafter(rounded.abs(), torch.tensor(torch.inf)).double() - rounded.abs().double()
        error = ((actual.double() - truth).abs() / up)[~same]
        assert not len(error) or error.max() <= 2, (name, error.max(), x[~same][error.argmax()])


def test_nan_and_infinity_travel_as_in_torch() -> None:
    for kind in LAYERS:
        ours, theirs = pair(kind, 4, 20)
        x = torch.randn(5, 3, 4)
        x[2, 1, 0], x[1, 2, 3] = torch.nan, torch.inf
        with torch.no_grad(), ur.engine("native"):
            torch.testing.assert_close(ours(x)[0], theirs(x)[0], equal_nan=True)


def test_strides_zero_rows_and_frozen_parameters() -> None:
    layer = ur.GRU(4, 5, batch_first=True)
    x = torch.randn(6, 8, 8)[::2, ::2, ::2].requires_grad_()
    with ur.engine("native"):
        assert layer(torch.randn(0, 3, 4))[0].shape == (0, 3, 5)
        both_engines(layer, x)
        layer.weight_hh_l0.requires_grad_(False)
        layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is None
    assert layer.weight_ih_l0.grad is not None


def test_a_default_device_of_another_kind() -> None:
    layer, x = ur.LSTM(6, 11), torch.randn(7, 3, 6)
    packed = nn.utils.rnn.pack_padded_sequence(x, [7, 4, 2])
    with torch.device("meta"):  # where memory made by the loops for themselves would have no address
        found = layer(packed), layer(x)
        found[0][0].data.sum().backward()
        with torch.no_grad(), ur.frozen(layer):
            layer(x)
        ur.Stream(layer)(x)
    with ur.engine("reference"):
        torch.testing.assert_close((found[0][0].data, found[1]), (layer(packed)[0].data, layer(x)))


def test_several_python_threads_at_once() -> None:
    layer = ur.LSTM(16, 32)
    inputs = [torch.randn(40, 3, 16) for _ in range(8)]
    with torch.no_grad(), ur.engine("native"):
        expected = [layer(x)[0] for x in inputs]
    found: dict[int, bool] = {}

    def work(k: int) -> None:
        with torch.no_grad(), ur.engine("native"):
            found[k] = all(torch.equal(layer(inputs[k])[0], expected[k]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


def test_what_the_native_engine_leaves_to_the_reference() -> None:
    layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    with ur.engine("auto"):
        assert_close(torch.func.jvp(lambda v: layer(v)[0], (x,), (x,))[0], expected, 1e-5)
    with ur.engine("native"):
        for call, why in (
            (lambda: ur.LSTM(3, 4, dtype=torch.float16)(x.half()), "bfloat16, not torch.float16"),
            (
                lambda: torch.func.jvp(lambda v: layer(v)[0], (x,), (x,)),
                "forward-mode",
            ),
        ):
            with pytest.raises(RuntimeError, match=why):
                call()


def test_a_step_that_cannot_be_captured_is_announced_once() -> None:
    class Branching(ur.Cell):
        weight = ur.Param("hidden", "hidden")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return linear(h, self.weight) + x if h.sum() > -1e9 else h

    class Sorting(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return torch.sort(h + x, -1)[0]

    x = torch.randn(3, 2, 4)
    for cell, why in ((Branching, "can't be captured"), (Sorting, "aten.sort")):
        layer = ur.Recurrent(cell, 4, 4)
        with ur.engine("auto"):
            with pytest.warns(UserWarning, match=f"{cell.__name__} runs on the reference engine.*{why}"):
                layer(x)
            layer(x)  # no second warning: it would be an error here
        with (
            ur.engine("native"),
            pytest.raises(RuntimeError, match=f"{cell.__name__} can't run on the native engine"),
        ):
            layer(x)


def test_the_engine_is_chosen_for_a_block_or_from_here_on() -> None:
    with pytest.raises(ValueError, match="should be 'auto', 'native', 'reference', got 'gpu'"):
        ur.engine("gpu")
    layer = ur.Recurrent(MGU, 3, 4, dtype=torch.float16)
    x = torch.randn(2, 3).half()
    with ur.engine("native"):
        with ur.engine("reference"):
            layer(x)
        with pytest.raises(RuntimeError, match="native engine"):
            layer(x)
    layer(x)


def test_one_source_for_all_sizes() -> None:
    def source(*sizes: int) -> str:
        return registry.compiled(ur.cells.LSTM(*sizes), torch.float32).training.emitted.source

    assert source(3, 8) == source(50, 21)
    for cell in (ur.cells.LSTM(3, 8), ur.cells.GRU(3, 8)):
        assert len({registry.compiled(cell, d).inference.emitted.source for d in registry.DTYPES}) == 2


def test_layers_still_copy_and_pickle_after_a_run() -> None:
    layer, x = ur.GRU(3, 4), torch.randn(2, 3)
    with ur.engine("native"):
        expected = layer(x)[0]
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], expected)


def test_a_graph_is_used_twice_with_retain_graph() -> None:
    layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    with ur.engine("native"):
        loss = layer(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_output_may_be_changed_in_place() -> None:
    layer, theirs = pair("lstm", 3, 4)
    x = torch.randn(5, 2, 3)
    (theirs(x)[0] * 3 + 1).square().sum().backward()  # in place, torch refuses its own output
    with ur.engine("native"):
        output, _ = layer(x)
        output.mul_(3).add_(1)
        output.square().sum().backward()
    assert_close(
        [p.grad for p in layer.parameters()], [p.grad for p in theirs.parameters()], TOLERANCE[x.dtype]
    )


def test_in_place_changes_are_noticed() -> None:
    layer, x = ur.GRU(3, 4), torch.randn(5, 2, 3)
    with ur.engine("native"):
        loss = layer(x)[0].sum()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("layers", "bidirectional"), list(itertools.product([1, 3], [False, True])))
def test_stacks_train_like_torch(layers: int, bidirectional: bool) -> None:
    ours, theirs = pair("lstm", 6, 10, num_layers=layers, bidirectional=bidirectional)
    x, target = torch.randn(7, 4, 6), torch.randn(7, 4, 10 * (1 + bidirectional))
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            with ur.engine("native"):
                nn.functional.mse_loss(layer(x)[0], target).backward()
            optimizer.step()
    assert_close(list(ours.parameters()), list(theirs.parameters()), 1e-4)


def test_no_two_gradients_share_their_memory() -> None:
    """Both biases have the same gradient, and each its own tensor: one may be changed in place."""
    layer, x = ur.RNN(3, 4), torch.randn(5, 2, 3)
    with ur.engine("native"):
        found = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    assert torch.equal(found[2], found[3])
    assert len({part.data_ptr() for part in found}) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_a_team_of_its_own() -> None:
    """The workers of the parent's OpenMP runtime are not there in the child, and must not be waited for."""
    layer, x = ur.LSTM(9, 40), torch.randn(20, 6, 9)
    with team(2), torch.no_grad(), ur.engine("native"):
        expected = layer(x)[0]
        child = os.fork()
        if child == 0:
            same = all(torch.equal(layer(x)[0], expected) for _ in range(3))  # too small for torch's threads
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(layer(x)[0], expected)


def test_the_team_of_its_own_gives_the_same_bits(tmp_path: Path) -> None:
    """Where torch's OpenMP runtime can't be found, threads of our own take its place."""
    code = (
        "import ctypes, sys, torch, unrolled as ur\n"
        "from unrolled.engines.native import kernel, matmul\n"
        "kernel._WORTH = 0\n"
        "torch.set_num_threads(3)\n"
        "if sys.argv[1] == 'own':\n"
        "    matmul._team().team_join(None, None, None)\n"
        "torch.manual_seed(0)\n"
        "ur.engine('native')\n"
        "layer, x = ur.GRU(9, 40, bidirectional=True), torch.randn(12, 6, 9)\n"
        "for _ in range(3):\n"
        "    output = layer(x)[0]\n"
        "    gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))\n"
        "torch.save([output.detach(), *gradients], sys.argv[2])\n"
    )
    found = []
    for who in ("own", "torch's"):
        path = tmp_path / f"{who}.pt"
        subprocess.run([sys.executable, "-c", code, who, str(path)], check=True, timeout=120)
        found.append(torch.load(path))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CROWD = """
#include "crowd.h"
Crowd crowd;
extern "C" bool watch() { return crowd.watch(); }
extern "C" bool there(int64_t now) { return crowd.there(now); }
extern "C" void judge(int64_t began, int64_t end, bool watched, int64_t robbed) {
  crowd.judge(began, end, watched, robbed);
}
"""


def test_threads_give_way_where_others_keep_the_cores_busy() -> None:
    """By a clock of the test's own: what is measured on a busy machine is in benchmarks/RESULTS.md."""
    crowd = build.load(CROWD)
    crowd.watch.restype = crowd.there.restype = ctypes.c_bool
    clock, ms = 0, 1_000_000

    def call(took: int, robbed: int) -> None:
        nonlocal clock
        watched = crowd.watch()
        crowd.judge(*map(ctypes.c_int64, (clock, clock + took)), watched, ctypes.c_int64(robbed))
        clock += took

    def there(later: int = 0) -> bool:
        return bool(crowd.there(ctypes.c_int64(clock + later)))

    call(ms // 10, ms)  # a short call is not looked at, nor is the first of the long ones
    assert not crowd.watch()
    call(10 * ms, 10 * ms)
    assert crowd.watch()
    for _ in range(2):  # that threads were kept from their cores once or twice is chance
        call(10 * ms, 10 * ms)
        assert not there()
    call(10 * ms, 10 * ms)
    assert there()
    assert there(79 * ms)
    assert not there(80 * ms)
    for _ in range(3):  # tried again, and as bad: sixteen times, and no more than that
        clock += 200 * ms
        call(10 * ms, 10 * ms)
        assert there(159 * ms)
        assert not there(160 * ms)
    clock += 200 * ms
    call(10 * ms, 3 * ms)  # the cores are free again: threads from now on, until three calls in a row
    assert not there()
    for _ in range(2):
        call(10 * ms, 10 * ms)
        assert not there()


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("rnn", "gru")), "lstm"],
)
def test_the_peak_of_training_is_no_more_than_that_of_torch(kind: str) -> None:
    row = Row(kind, 32, 1000, 256, "training")
    assert apart.peak_memory(row, "unrolled") <= apart.peak_memory(row, "torch")


@pytest.mark.parametrize("checkpoint", [None, 10])
def test_a_loss_that_is_kept_keeps_nothing_else(checkpoint: int | None) -> None:
    layer, x = ur.LSTM(4, 16), torch.randn(50, 8, 4)
    loss = layer(x, checkpoint=checkpoint)[0].square().mean()
    loss.backward(retain_graph=True)
    held = _numbers()
    first = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    loss.backward()
    assert_close([parameter.grad for parameter in layer.parameters()], first, 0)
    assert held - _numbers() > 4000  # outputs and what the backward reads, or the states between segments
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def _numbers() -> int:
    """How many numbers tensors hold, each once."""
    gc.collect()
    found = [value for value in gc.get_objects() if type(value) is torch.Tensor]
    return sum({value.data_ptr(): value.numel() for value in found}.values())


@pytest.mark.parametrize("kind", LAYERS)
def test_many_gradients_at_once(kind: str) -> None:
    layer, theirs = pair(kind, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for one, more in ((theirs, {}), (layer, {}), (layer, {"checkpoint": 2})):
        output = one(x, **more)[0]
        leaves = [x, *one.parameters()]
        many = torch.randn(6, *output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        found.append(torch.autograd.grad(output, leaves, many, is_grads_batched=True, retain_graph=True))

        def back(grad: torch.Tensor, output: Any = output, leaves: Any = leaves) -> Any:
            return torch.autograd.grad(output, leaves, grad, retain_graph=True)

        if one is layer:
            found.append(torch.vmap(back)(many))
    for other in found[1:]:
        assert_close(other, found[0], 1e-12)
