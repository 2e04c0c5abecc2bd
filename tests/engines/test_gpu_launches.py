"""Launches of GPU kernels on a machine without a GPU: devices, 64-bit offsets, and what can't run."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

import unrolled as ur
from helpers.sampling import sample
from helpers.triton_standin import OutOfBoundsError, StandIn
from unrolled.engines import backends
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.gpu import runtime
from unrolled.engines.gpu.backend import BACKEND, GpuBackend
from unrolled.engines.gpu.runtime import TritonRuntime

DEVICE = torch.device("cuda", 1)


@dataclass
class FakeDevice(StandIn):
    """A runtime that records launches, with the device that is current in each.

    Attributes:
        launches: The arguments and options of each launch.
        current: The current device.
    """

    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    current: torch.device | None = None

    @contextlib.contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        self.current = device
        yield
        self.current = None

    def load(self, source: str) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            tensors = [value for value in args if isinstance(value, Tensor)]
            assert {tensor.device for tensor in tensors} == {self.current}
            assert all(tensor.is_contiguous() for tensor in tensors)
            self.launches.append((args, options))

        class Function:
            def __getitem__(self, grid: tuple[int]) -> Any:
                return launch

        return Function()


def train(compiled: CompiledCell, layout: Layout, rows: tuple[int, ...], device: torch.device) -> None:
    """Run the forward and backward loops of a cell on tensors without values."""
    x = torch.empty(*rows, 5, device=device)
    params = [torch.empty(node.meta["val"].shape, device=device) for node in compiled.captured.params]
    call, every, final, values = compiled.forward_call(params, x, None, layout, False, 1, True)
    compiled.backend.launch([call])
    grads = tuple(torch.empty_like(part) for part in final)
    output = torch.empty_like(every[0])
    saved = compiled.select_saved(values)
    call, initial, values = compiled.backward_call(
        saved, params, x, None, every, output, grads, layout, False, 1
    )
    compiled.backend.launch([call])
    grad_params, grad_x = compiled.gradients(values, layout.rows, (True,) * (len(params) + 1))
    results = [*final, *initial, *grad_params, grad_x]
    assert {part.device for part in results if part is not None} == {device}


class Constant(ur.Cell):
    """A step with a tensor of its own."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight) + h * torch.tensor([1.0, 2.0, 0.5, -1.0, 0.3, 0.1]))


@pytest.mark.parametrize("cell", sample([Constant, ur.cells.CoRNN, ur.cells.LSTM, ur.cells.LayerNormGRU]))
def test_launches_on_their_own_device_without_synchronization(cell: Any) -> None:
    """Fake tensors know their device, and raise an error if a value is read."""
    fake = FakeDevice()
    compiled = GpuBackend(fake).compile(cell(5, 6), torch.float32, DEVICE)
    packed = Layout.of(torch.empty(9, 5), [3, 3, 2, 1])
    packed.rows, packed._indices_before, packed._indices_before_reverse  # noqa: B018  # on the CPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        train(compiled, Layout(4, 3), (4, 3), DEVICE)
        train(compiled, packed, (9,), DEVICE)
    assert len(fake.launches) == 4
    assert [options["SHIFT"] for _, options in fake.launches][::2] == [0, 0]
    assert all(options["PRECISION"] == "tf32" for _, options in fake.launches)


def test_precision_follows_that_of_recurrent_layers_on_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    for dtype in (torch.float32, torch.float64):
        fake = FakeDevice()
        compiled = GpuBackend(fake).compile(ur.cells.MGU(5, 6), dtype, DEVICE)
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(4, 3, 5, dtype=dtype, device=DEVICE)
            params = [
                torch.empty(n.meta["val"].shape, dtype=dtype, device=DEVICE) for n in compiled.captured.params
            ]
            call, *_ = compiled.inference_call(params, x, None, Layout(4, 3), False, 1)
            compiled.backend.launch([call])
        assert fake.launches[0][1]["PRECISION"] == "ieee"


class SmallOffsets(StandIn):
    """A runtime for kernels with 32-bit row numbers."""

    def load(self, source: str) -> Any:
        changed = source.replace("tl.program_id(0).to(tl.int64)", "tl.program_id(0)")
        return super().load(changed.replace("tl.cast(batch, tl.int64)", "tl.cast(batch, tl.int32)"))


def test_offsets_have_64_bits() -> None:
    """The last rows of tensors with 3 · 2³² and more elements. Tensors on the meta device need no memory."""
    meta, layout = torch.device("meta"), Layout(4, 2**27)
    for backend in (GpuBackend(StandIn()), GpuBackend(SmallOffsets())):
        compiled = backend.compile(ur.cells.LSTM(5, 6), torch.float32, meta)
        expected = (
            pytest.raises((OutOfBoundsError, RuntimeError))
            if isinstance(backend.runtime, SmallOffsets)
            else contextlib.nullcontext()
        )
        with expected:
            train(compiled, layout, (4, 2**27), meta)


def test_why_a_call_cannot_run() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = torch.empty(3, device=DEVICE), torch.empty(3, device="cuda:0")
        backend = GpuBackend(FakeDevice())

        def reason(*tensors: Tensor) -> str | None:
            return backend.supports(tensors, tensors[0].dtype, in_graph=True)

        assert reason(x, x) is None
        assert reason(x, weight) == "inputs and parameters are on different devices, cuda:1 and cuda:0"
        assert reason(x, weight.cpu()) == "inputs and parameters are on different devices, cuda:1 and cpu"
        assert (
            reason(x.short()) == "GPU kernels support float32, float64, bfloat16 and float16, not torch.int16"
        )
        message = "inputs and parameters have different dtypes, torch.float32 and torch.float64"
        assert reason(x, x.double()) == message
        assert backends.backend_for(x.device) is BACKEND
    if not torch.cuda.is_available():
        assert BACKEND.runtime.unavailable(DEVICE) == "torch finds no CUDA device"


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages for a device that is too old, and for a Triton that is missing, too old or broken."""
    installed: dict[str, Any] = {"version": None, "capability": (9, 0)}

    def version(name: str) -> str:
        if installed["version"] is None:
            raise runtime.PackageNotFoundError(name)
        return str(installed["version"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: installed["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(runtime, "version", version)
    monkeypatch.setitem(sys.modules, "triton", None)
    unavailable = runtime._unavailable.__wrapped__
    assert str(unavailable("cuda", 0)).startswith("Triton is not installed: install torch's build for CUDA")
    installed["version"] = "2.1.0"
    assert unavailable("cuda", 0) == "Triton 2.1.0 is too old: install version 3.3 or later"
    installed["version"] = "3.6.0+git5e12"
    assert str(unavailable("cuda", 0)).startswith("Triton can't be imported: ")
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert unavailable("cuda", 0) is None
    installed["capability"] = (7, 5)
    assert unavailable("cuda", 0) == "Tesla T4 has compute capability 7.5: kernels need 8.0 or higher"
    assert unavailable("mps", None) == "compiled loops run on the CPU and on CUDA devices, not on mps"


def test_the_guard_selects_the_device_of_a_tensor() -> None:
    guard = TritonRuntime().guard(DEVICE)
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == DEVICE.index


@pytest.mark.parametrize("name", ["recurrence", "recurrence_kept", "recurrence_back"])
def test_operators_of_graphs_have_kernels_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unrolled::{name}", "CUDA")
