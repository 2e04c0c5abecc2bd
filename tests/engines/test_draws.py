"""Random numbers in a step: the same for every engine, number of threads, batch and order of rows."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.noisy_layers import NoisyCell, TwoStates, layer_of, run, seeded
from helpers.sampling import sample
from unrolled.engines import draws as drawing
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.layers.single_step import SingleStep

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated:DeprecationWarning")

DTYPES = (torch.float32, torch.float64)


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@NEEDS_COMPILER
@pytest.mark.parametrize("cell", sample([TwoStates, NoisyCell]))
@pytest.mark.parametrize("dtype", sample(DTYPES))
@pytest.mark.parametrize("stacked", sample([True, False]))
def test_engines_agree(cell: type[ur.Cell], dtype: torch.dtype, stacked: bool) -> None:
    """Output, states and gradients of both engines, and float32 against float64."""
    layer = layer_of(cell, dtype, **({"num_layers": 2, "bidirectional": True} if stacked else {}))
    x = torch.randn(7, 4, 3, dtype=dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-12
    expected, native = run("reference", layer, x), run("native", layer, x)
    assert_close(native, expected, tolerance)
    assert_equal(run("native", layer, x), native)
    assert not torch.allclose(run("native", layer, x, seed=2)[0], native[0])
    torch.manual_seed(1)
    first, second = layer(x)[0], layer(x)[0]
    assert torch.equal(first, native[0])
    assert not torch.allclose(first, second)  # each call has its own numbers
    wide = layer_of(cell, torch.float64, **({"num_layers": 2, "bidirectional": True} if stacked else {}))
    wide.load_state_dict(layer.state_dict())
    assert_close(run("reference", wide, x.double()), [part.double() for part in expected], 1e-3)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [True, False])
def test_call_options(bidirectional: bool) -> None:
    layer = layer_of(dtype=torch.float64, num_layers=2, bidirectional=bidirectional)
    x, resets = torch.randn(7, 4, 3).double(), torch.rand(7, 4) < 0.3
    for options in (
        {"lengths": [3, 7, 0, 5]},
        {"resets": resets},
        {"lengths": [3, 7, 1, 5], "resets": resets},
    ):
        assert_close(run("native", layer, x, **options), run("reference", layer, x, **options), 1e-12)
    plain = run("native", layer, x)
    for engine in ("native", "reference"):
        assert_close(run(engine, layer, x, checkpoint=3), plain, 1e-12)
        torch.manual_seed(1)
        with ur.engine(engine):
            _, final, states = layer(x, all_states=True)
        assert_close(final.detach(), plain[1], 1e-12)
        assert_close(states["h"][-2 if bidirectional else -1, -1].detach(), plain[0][-1, :, :6], 1e-12)
    assert torch.equal(run("native", layer, x, checkpoint=3)[0], plain[0])


@NEEDS_COMPILER
@pytest.mark.parametrize("engine", ["native", "reference"])
def test_draws_depend_on_row_and_step_of_the_user(engine: str) -> None:
    """A row of a batch with lengths has the same numbers as in the whole batch, wherever it is sorted to."""
    layer, x = layer_of(dtype=torch.float64), torch.randn(7, 4, 3).double()
    whole = run(engine, layer, x)[0]
    lengths = [3, 7, 2, 5]
    padded = run(engine, layer, x, lengths=lengths)[0]
    packed = pack_sequence([x[:n, k] for k, n in enumerate(lengths)], enforce_sorted=False)
    torch.manual_seed(1)
    with ur.engine(engine):
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(layer(packed)[0])
    for row, length in enumerate(lengths):
        assert_close(padded[:length, row], whole[:length, row], 1e-12)
        assert_close(unpacked[:length, row].detach(), whole[:length, row], 1e-12)
    batch_first = layer_of(dtype=torch.float64, batch_first=True)
    assert_close(run(engine, batch_first, x.transpose(0, 1))[0].transpose(0, 1), whole, 1e-12)
    assert_close(run(engine, layer, x[:, 0])[0], whole[:, 0], 1e-12)


@NEEDS_COMPILER
def test_thread_count_and_batch_do_not_matter() -> None:
    layer, x = layer_of(num_layers=2), torch.randn(9, 40, 3)
    results = []
    for threads in (1, 2, 3):
        before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
        results.append(run("native", layer, x))
        torch.set_num_threads(before)
    assert_equal(results[0][:2], results[1][:2])
    assert_equal(results[0][:2], results[2][:2])
    assert torch.equal(run("native", layer, x[:, :7])[0], results[0][0][:, :7])
    assert torch.equal(run("native", layer, x[:4])[0], results[0][0][:4])


@pytest.mark.slow
def test_directions_and_layers_have_their_own_numbers() -> None:
    class Noise(ur.Cell):
        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.randn_like(h) + 0 * (x.sum(-1, keepdim=True) + h)

    layer = ur.Recurrent(Noise, 3, 6, num_layers=3, bidirectional=True)
    _, _, states = layer(torch.randn(50, 20, 3), all_states=True)
    rows = states["h"].flatten(1)
    assert torch.corrcoef(rows).triu(1).abs().max() < 5 / rows.shape[1] ** 0.5
    assert_close(rows.std(1), torch.ones(6), 0.05)


@pytest.mark.slow
def test_one_draw_of_torchs_generator_for_each_call() -> None:
    layer, x = layer_of(num_layers=3, bidirectional=True), torch.randn(4, 2, 3)
    torch.manual_seed(5)
    layer(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    drawing.draw_seed()
    assert torch.equal(torch.get_rng_state(), state)


@NEEDS_COMPILER
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(dtype=torch.float64), torch.randn(5, 4, 3).double()
    expected = run("reference", layer, x)

    def fail(*args: Any) -> None:
        raise NoCompilerError("no compiler")

    monkeypatch.setattr(drawing.compiled_philox, "fill", fail)
    assert_equal(run("reference", layer, x), expected)


@NEEDS_COMPILER
@pytest.mark.slow
def test_regularization_and_draws() -> None:
    options = {"recurrent_dropout": 0.4, "zoneout": 0.2, "variational_dropout": 0.1}
    layer, x = layer_of(dtype=torch.float64, num_layers=2, **options), torch.randn(7, 4, 3).double()
    assert_close(run("native", layer, x), run("reference", layer, x), 1e-12)
    lengths = {"lengths": [3, 7, 1, 5]}
    assert_close(run("native", layer, x, **lengths), run("reference", layer, x, **lengths), 1e-12)


def test_other_dtypes_use_torchs_generator() -> None:
    layer, x = layer_of(dtype=torch.bfloat16), torch.randn(5, 4, 3).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        first = layer(x)[0]
        torch.manual_seed(1)
        assert torch.equal(first, layer(x)[0])
    assert first.isfinite().all()


def test_a_single_step_module() -> None:
    module = SingleStep(NoisyCell, 3, 6, dtype=torch.float64)
    x, h = torch.randn(4, 3).double(), torch.randn(4, 6).double()
    results = []
    for engine in ("auto", "reference"):
        torch.manual_seed(2)
        with ur.engine(engine):
            results.append(module(x, h))
    assert_close(results[0], results[1], 1e-12)
    assert not torch.allclose(module(x, h), results[0])


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_step_that_starts_and_stops_drawing() -> None:
    class Switched(ur.Cell):
        sigma = 0.0

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            h = torch.tanh(x + h)
            return h + self.sigma * torch.randn_like(h) if self.sigma else h

    layer, x = ur.Recurrent(Switched, 3, 3), torch.randn(4, 2, 3)
    with ur.engine("native"):
        quiet = layer(x)[0]
        Switched.sigma = 0.5
        noisy = seeded(layer, x)[0]
        with ur.engine("reference"):
            assert_close(noisy, seeded(layer, x)[0], 1e-5)
        assert not torch.allclose(noisy, quiet)
        Switched.sigma = 0.0
        assert torch.equal(layer(x)[0], quiet)
