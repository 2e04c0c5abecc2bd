"""The runtimes that a row is timed on: ours, torch, and other libraries if they are installed."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import unrolled
from unrolled.cli.bench import jax_runtime, onnx_runtimes
from unrolled.cli.bench.rows import CELLS, Row
from unrolled.cli.bench.workload import Call, Loop, Step, Workload

OURS, FROZEN, CHECKPOINT, TORCH = "unrolled", "frozen", "checkpoint", "torch"
ALWAYS = (OURS, FROZEN, CHECKPOINT, TORCH)
"""Runtimes that are always available and can't be selected by the user."""
_MAX_COMPILED_STEPS = 100  # torch.compile unrolls the loop, which takes minutes for more steps


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Args:
        prepare: Returns the function that computes a row. Loading and compiling may be delayed until its
            first call.
        unsupported: Returns the reason why the runtime can't compute a row, or None if it can.
        packages: The packages that the runtime imports.
        quick: Whether it is ready within about a second.
    """

    prepare: Callable[[Workload], Call]
    unsupported: Callable[[Row], str | None] = lambda row: None
    packages: tuple[str, ...] = ()
    quick: bool = True

    def missing_packages(self) -> list[str]:
        """Return the packages that the runtime needs and that aren't installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def _prepare_ours(workload: Workload) -> Call:
    unrolled.engine("native")  # set it once, outside of the timed calls
    if workload.row.mode == "streaming":
        return _prepare_stream(workload)
    return workload.call(workload.ours, workload.ours.parameters())


def _prepare_stream(workload: Workload) -> Call:
    stream, steps = unrolled.Stream(workload.ours), torch.split(workload.x, 1)

    def call() -> list[Tensor]:
        stream.reset()
        outputs = [stream(x_t) for x_t in steps]
        state = stream.state
        return [torch.cat(outputs), *(state if isinstance(state, tuple) else (state,))]

    return call


def _prepare_frozen(workload: Workload) -> Call:
    unrolled.engine("native")
    layer = copy.deepcopy(workload.ours)
    unrolled.frozen(layer).__enter__()  # stays frozen as long as the call is used
    return workload.call(layer, ())


def _prepare_checkpoint(workload: Workload) -> Call:
    unrolled.engine("native")
    length = max(1, math.isqrt(workload.row.time))
    return workload.call(functools.partial(workload.ours, checkpoint=length), workload.ours.parameters())


def _prepare_torch(workload: Workload) -> Call:
    return workload.call(workload.theirs, workload.theirs.parameters())


def _prepare_compile(workload: Workload) -> Call:
    torch.compiler.reset()  # otherwise earlier rows count toward the limit of recompilations
    torch._dynamo.config.allow_rnn = True
    compiled: Any = torch.compile(workload.theirs, fullgraph=True, dynamic=False)
    return workload.call(compiled, workload.theirs.parameters())


def _prepare_compile_step(workload: Workload) -> Call:
    torch.compiler.reset()
    step = Step(workload.ours)
    compiled: Any = torch.compile(step.bound.step, fullgraph=True, dynamic=False)
    return workload.call(Loop(step, compiled), workload.ours.parameters())


def _prepare_onednn(workload: Workload) -> Call:
    row, lstm_mode = workload.row, 2  # the mode number of an LSTM in torch's binding of oneDNN
    sizes = (lstm_mode, row.hidden, 1, True, False, False, row.mode == "training")
    parameters = list(workload.theirs.parameters())
    zeros = torch.zeros(1, row.batch, row.hidden)

    run: Any = torch.mkldnn_rnn_layer

    def layer(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, h, c, _ = run(x, *parameters, zeros, zeros, False, [], *sizes)
        return output, (h, c)

    return workload.call(layer, parameters)


class _OneStateLoop(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        for t in range(x.size(0)):
            h = self.step(x[t], h)
            outputs.append(h)
        return torch.stack(outputs), [h]


class _TwoStateLoop(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        for t in range(x.size(0)):
            h, c = self.step(x[t], h, c)
            outputs.append(h)
        return torch.stack(outputs), [h, c]


def _prepare_torchscript(workload: Workload) -> Call:
    step = Step(workload.ours)
    states = step.zero_states(workload.x)
    trace: Any = torch.jit.trace
    traced = trace(step, (workload.x[0].detach(), *states), check_trace=False)
    loop = torch.jit.script((_OneStateLoop if len(states) == 1 else _TwoStateLoop)(traced))
    return workload.call(lambda x: loop(x, *states), workload.ours.parameters())


def _needs_standard_inference(row: Row) -> str | None:
    return "inference only" if row.mode == "training" else _needs_standard_cell(row)


def _needs_whole_sequence(row: Row) -> str | None:
    return "whole sequences only" if row.mode == "streaming" else None


def _needs_standard_cell(row: Row) -> str | None:
    return None if row.standard else "not for custom cells"


def _needs_custom_cell(row: Row) -> str | None:
    return "for custom cells only" if row.standard else _needs_whole_sequence(row)


def _needs_short_sequence(row: Row) -> str | None:
    if row.time > _MAX_COMPILED_STEPS:
        return f"unrolls the loop: up to {_MAX_COMPILED_STEPS} steps"
    return _needs_whole_sequence(row)


def _needs_two_states(row: Row) -> str | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "torch is built without oneDNN"
    two_states = len(CELLS[row.cell].state) == 2
    return (
        _needs_standard_cell(row)
        or _needs_whole_sequence(row)
        or (None if two_states else "torch has no oneDNN layer for this cell")
    )


RUNTIMES: dict[str, Runtime] = {
    OURS: Runtime(_prepare_ours),
    FROZEN: Runtime(_prepare_frozen, lambda row: "inference only" if row.mode == "training" else None),
    CHECKPOINT: Runtime(_prepare_checkpoint, lambda row: "for memory only"),
    TORCH: Runtime(_prepare_torch),
    "compile": Runtime(_prepare_compile, _needs_short_sequence, quick=False),
    "compile-step": Runtime(_prepare_compile_step, _needs_custom_cell, quick=False),
    "onednn": Runtime(_prepare_onednn, _needs_two_states),
    "torchscript": Runtime(_prepare_torchscript, _needs_custom_cell),
    "onnxruntime": Runtime(
        onnx_runtimes.prepare_onnxruntime, _needs_standard_inference, ("onnx", "onnxruntime")
    ),
    "openvino": Runtime(onnx_runtimes.prepare_openvino, _needs_standard_inference, ("onnx", "openvino")),
    "jax": Runtime(jax_runtime.prepare_jax, _needs_standard_cell, ("jax",)),
}


def select_runtimes(names: Sequence[str] | None, full: bool) -> tuple[dict[str, Runtime], list[str]]:
    """Select the runtimes to time, in addition to ours, frozen and torch.

    Args:
        names: The names of the runtimes, or None for all that are installed.
        full: Whether "all" includes runtimes that take long to prepare.

    Returns:
        The runtimes by name, and the packages that are missing for others.

    Raises:
        ValueError: If a named runtime is unknown or not installed.
    """
    selectable = [name for name in RUNTIMES if name not in ALWAYS]
    for name in names or ():
        if name not in selectable:
            raise ValueError(f"--peers: expected one or more of {', '.join(selectable)}, got {name!r}")
        if missing := RUNTIMES[name].missing_packages():
            raise ValueError(f"--peers: {name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    requested = [
        name
        for name in selectable
        if (names is None and (full or RUNTIMES[name].quick)) or name in (names or ())
    ]
    packages = dict.fromkeys(package for name in requested for package in RUNTIMES[name].missing_packages())
    available = [name for name in requested if not RUNTIMES[name].missing_packages()]
    return {name: RUNTIMES[name] for name in (OURS, FROZEN, TORCH, *available)}, list(packages)


def without_warnings(function: Callable[[], Any]) -> Any:
    """Call a function and ignore its warnings, which come from other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of torch and of all installed packages that a runtime needs."""
    names = ["torch", *(package for runtime in RUNTIMES.values() for package in runtime.packages)]
    installed = {}
    for name in dict.fromkeys(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
