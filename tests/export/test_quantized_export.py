"""Exported C of quantized layers: the bits of a stream, on every instruction set with fused multiply-adds."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import unrolled as ur
from helpers.c_library import IS_X86, NEEDS_CC, Exported, compile_c, streamed
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.user_cell import MGU

CELLS = sorted(name for name in ur.cells.__all__ if issubclass(getattr(ur.cells, name), ur.Cell))
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
SAME_SIZES = ("NAS", "SRU", "UnICORNN")  # the input is as wide as the hidden state

pytestmark = [NEEDS_CC, NEEDS_COMPILER]


class Computed(ur.Cell):
    """Products with parts of a matrix and a matrix that is computed, of parts of the states and the input."""

    state = {"h": "hidden", "c": "2*hidden"}
    joint = ur.Param("input + hidden", "hidden")
    heads = ur.Param("2", "hidden", "hidden")
    scale = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        heads = torch.bmm(c.view(-1, 2, self.hidden).transpose(0, 1), self.heads)
        c = torch.tanh(heads.transpose(0, 1).reshape(-1, 2 * self.hidden))
        u = torch.cat([x, h], 1) @ self.joint + torch.tanh(h) @ (self.joint[self.input :] * self.scale)
        return torch.tanh(u) + c[:, : self.hidden], c


def random(layer: Any) -> Any:
    """Return a layer with biases and weights of different sizes."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.eval()


X = 2 * torch.randn(30, 5)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "two layers": (lambda: ur.GRU(5, 19, num_layers=2), {}),
    "RNN": (lambda: ur.RNN(5, 50), {}),
    "LSTM, bfloat16": (lambda: ur.LSTM(5, 37), {"weights": "bfloat16"}),
    "LSTM, float16": (lambda: ur.LSTM(5, 37), {"weights": "float16"}),
    "both directions": (lambda: ur.LSTM(5, 12, bidirectional=True, num_layers=2), {}),
    "projection": (lambda: ur.LSTM(5, 33, proj_size=7), {}),
    "calibrated": (lambda: ur.LSTM(5, 17), {"calibration": [0.5 * X]}),
    "float input": (lambda: ur.GRU(5, 17), {"quantize_input": False}),
    "zoneout": (lambda: ur.LSTM(5, 9, initial_state="learned", zoneout={"c": 0.3}), {}),
    "own cell": (lambda: ur.Recurrent(MGU, 5, 21), {}),
    "computed": (lambda: ur.Recurrent(Computed, 5, 18), {}),
    "computed, calibrated": (lambda: ur.Recurrent(Computed, 5, 18), {"calibration": [X]}),
    "computed, bfloat16": (lambda: ur.Recurrent(Computed, 5, 18), {"weights": "bfloat16"}),
}
FAST = ("two layers",)


def check(quantized: Any, x: Tensor, exported: Exported) -> None:
    """Compare the bits of exported code and of a stream."""
    expected = quantized(x)[0] if quantized.bidirectional else streamed(quantized, x)
    assert torch.equal(exported.run(x), expected)
    assert exported.selftest() == (0, 0.0)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_it_has_the_bits_of_a_stream(name: str, tmp_path: Path) -> None:
    create, options = CASES[name]
    quantized = ur.quantize(random(create()), **options)
    weights = "file" if name in ("two layers", "LSTM, float16") else "array"
    check(quantized, X, Exported(quantized, tmp_path, weights=weights))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize(("inputs", "hidden"), [(1, 1), (3, 4), (16, 16), (70, 33), (130, 64)])
def test_sizes(inputs: int, hidden: int, weights: str, tmp_path: Path) -> None:
    quantized, x = ur.quantize(random(ur.GRU(inputs, hidden)), weights), torch.randn(9, inputs)
    check(quantized, x, Exported(quantized, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_every_cell(name: str, tmp_path: Path) -> None:
    quantized = ur.quantize(
        random(ur.Recurrent(getattr(ur.cells, name), 18 if name in SAME_SIZES else 7, 18)), "int8"
    )
    x = 2 * torch.randn(20, quantized.input_size)
    check(quantized, x, Exported(quantized, tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not IS_X86, reason="names x86 instruction sets")
@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
def test_other_instruction_sets(weights: str, tmp_path: Path) -> None:
    """The processor must have AVX2. Without fused multiply-adds, a value may be rounded in another way."""
    quantized = ur.quantize(random(ur.LSTM(5, 37)), weights)
    expected = streamed(quantized, X)
    sets = [("-march=x86-64-v3", f"-DLANES={lanes}") for lanes in (1, 4, 8)]
    sets += [("-march=x86-64-v4",)] if "avx512bw" in CPU_FLAGS else []
    for k, flags in enumerate(sets):
        assert torch.equal(Exported(quantized, tmp_path / str(k), flags).run(X), expected)
    for k, other in enumerate((("-march=x86-64",), ("-march=x86-64", "-DLANES=1"), ("-mavx",))):
        found = Exported(quantized, tmp_path / f"other{k}", other).run(X)
        assert_close(found, expected, atol=0.02 if weights == "int8" else 5e-7, rtol=0)


@pytest.mark.slow
def test_special_values(tmp_path: Path) -> None:
    """Infinity and NaN give NaN, zeros and tiny values give zeros, as in a stream."""
    quantized = ur.quantize(random(ur.RNN(5, 18, nonlinearity="relu")))
    exported = Exported(quantized, tmp_path)
    for value in (float("nan"), float("inf"), -float("inf"), 0.0, 1e-38, 3e38):
        x = X[:4].clone()
        x[0] = 0.0
        x[0, 3] = value
        x[3] = 1e-38
        exported.reset()
        found, expected = exported.run(x), streamed(quantized, x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


class Model(nn.Module):
    """Modules in float32 around quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.enter = nn.Conv1d(5, 12, 3), nn.Linear(12, 12)
        self.first, self.second = ur.GRU(12, 16, batch_first=True), nn.LSTM(16, 12, batch_first=True)
        self.norm, self.leave = nn.LayerNorm(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(F.pad(x, (2, 0)))).transpose(1, 2)
        z = self.enter(y)
        return self.leave(self.norm(self.second(self.first(z)[0])[0] + z))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"keep": "second"}, {"weights": "float16"}])
def test_models_with_float_parts(options: dict[str, Any], tmp_path: Path) -> None:
    model = Model().eval()
    quantized, x = ur.quantize(model, **options), X.T[None].contiguous()
    exported = Exported(quantized, tmp_path)
    found, floats = exported.run(X), model(x)[0].detach()
    # Sums of linear layers are rounded in another way than torch's, so that a value may round to another one.
    tolerance = 1e-5 if "weights" in options else 0.02
    assert_close(found, quantized(x)[0], atol=tolerance, rtol=0)
    assert 0 < float((found - floats).norm() / floats.norm()) < 0.05
    assert exported.selftest()[0] == 0


@pytest.mark.slow
def test_weights_are_small(tmp_path: Path) -> None:
    layer = ur.LSTM(64, 128).eval()
    size = ur.export.c(layer, tmp_path / "float32").weights_bytes
    for weights, share in (("int8", 0.28), ("bfloat16", 0.51), ("float16", 0.51)):
        files = ur.export.c(ur.quantize(layer, weights), tmp_path / weights, weights="file")
        assert files.weights_bytes < share * size
        content = (tmp_path / weights / "model_weights.bin").read_bytes()
        assert len(content) < files.weights_bytes + 256


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
def test_the_code_needs_no_library(weights: str, tmp_path: Path) -> None:
    ur.export.c(ur.quantize(ur.GRU(3, 21).eval(), weights), tmp_path, name="m")
    for level in ("-O0", "-O2", "-Os"):
        compile_c(level, "-c", tmp_path / "m.c", "-o", tmp_path / "m.o")
        done = subprocess.run(["nm", "-u", tmp_path / "m.o"], capture_output=True, text=True, check=True)
        assert {line.split()[-1] for line in done.stdout.splitlines()} <= {"memcpy", "memset"}, level


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_builds_it_for_several_instruction_sets(tmp_path: Path) -> None:
    ur.export.c(ur.quantize(ur.LSTM(2, 20).eval()), tmp_path, name="tone")
    for command in (
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build"],
        ["cmake", "--build", tmp_path / "build"],
        ["ctest", "--test-dir", tmp_path / "build", "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_float64_module_is_refused(tmp_path: Path) -> None:
    quantized = ur.quantize(ur.GRU(3, 4).eval()).double()
    with pytest.raises(ValueError, match=r"has dtype torch.float64, and C code computes in float32"):
        ur.export.c(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()
