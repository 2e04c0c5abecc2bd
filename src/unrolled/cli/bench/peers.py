"""The runtimes that a row is timed on: ours, torch, and those that are installed."""

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
from unrolled.cli.bench import graphs, scans
from unrolled.cli.bench.grid import CELLS, Row
from unrolled.cli.bench.work import Call, Loop, Step, Work

OURS, FROZEN, CHECKPOINT, TORCH = "unrolled", "frozen", "checkpoint", "torch"
OWN = (OURS, FROZEN, CHECKPOINT, TORCH)  # always there: not for a user to choose
_UNROLLED_STEPS = 100  # the longest loop that torch.compile is given: it unrolls, minutes beyond


@dataclass(frozen=True)
class Peer:
    """A runtime.

    Args:
        prepare: makes the call that computes a row; loading and compiling may also wait for its first.
        refuses: why it can't take a row, in words; None where it can.
        needs: the packages that it imports.
        quick: whether it is ready within a second or so.
    """

    prepare: Callable[[Work], Call]
    refuses: Callable[[Row], str | None] = lambda row: None
    needs: tuple[str, ...] = ()
    quick: bool = True

    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def _ours(work: Work) -> Call:
    unrolled.engine("native")  # from here on, so that a call of microseconds doesn't choose it anew
    if work.row.mode == "streaming":
        return _stream(work)
    return work.call(work.ours, work.ours.parameters())


def _stream(work: Work) -> Call:
    stream, steps = unrolled.Stream(work.ours), torch.split(work.x, 1)

    def call() -> list[Tensor]:
        stream.reset()
        outputs = [stream(now) for now in steps]
        state = stream.state
        return [torch.cat(outputs), *(state if isinstance(state, tuple) else (state,))]

    return call


def _frozen(work: Work) -> Call:
    unrolled.engine("native")
    layer = copy.deepcopy(work.ours)
    unrolled.frozen(layer).__enter__()  # for as long as the call is used
    return work.call(layer, ())


def _checkpoint(work: Work) -> Call:
    unrolled.engine("native")
    length = max(1, math.isqrt(work.row.time))
    return work.call(functools.partial(work.ours, checkpoint=length), work.ours.parameters())


def _torch(work: Work) -> Call:
    return work.call(work.theirs, work.theirs.parameters())


def _compile(work: Work) -> Call:
    torch._dynamo.reset()  # else the rows before count towards its limit of recompilations
    torch._dynamo.config.allow_rnn = True
    compiled: Any = torch.compile(work.theirs, fullgraph=True, dynamic=False)
    return work.call(compiled, work.theirs.parameters())


def _compile_step(work: Work) -> Call:
    torch._dynamo.reset()
    step = Step(work.ours)
    compiled: Any = torch.compile(step.bound.step, fullgraph=True, dynamic=False)
    return work.call(Loop(step, compiled), work.ours.parameters())


def _onednn(work: Work) -> Call:
    row, memory = work.row, 2  # the number of this kind of layer in oneDNN's interface
    sizes = (memory, row.hidden, 1, True, False, False, row.mode == "training")
    parameters = list(work.theirs.parameters())
    zeros = torch.zeros(1, row.batch, row.hidden)

    run: Any = torch.mkldnn_rnn_layer

    def layer(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, h, c, _ = run(x, *parameters, zeros, zeros, False, [], *sizes)
        return output, (h, c)

    return work.call(layer, parameters)


class _OneState(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        for t in range(x.size(0)):
            h = self.step(x[t], h)
            outputs.append(h)
        return torch.stack(outputs), [h]


class _TwoStates(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        for t in range(x.size(0)):
            h, c = self.step(x[t], h, c)
            outputs.append(h)
        return torch.stack(outputs), [h, c]


def _torchscript(work: Work) -> Call:
    step = Step(work.ours)
    states = step.states(work.x)
    trace: Any = torch.jit.trace
    traced = trace(step, (work.x[0].detach(), *states), check_trace=False)
    loop = torch.jit.script((_OneState if len(states) == 1 else _TwoStates)(traced))
    return work.call(lambda x: loop(x, *states), work.ours.parameters())


def _standard_inference(row: Row) -> str | None:
    return "inference only" if row.mode == "training" else _standard(row)


def _whole(row: Row) -> str | None:
    return "whole sequences only" if row.mode == "streaming" else None


def _standard(row: Row) -> str | None:
    return None if row.standard else "not for custom cells"


def _custom(row: Row) -> str | None:
    return "for custom cells only" if row.standard else _whole(row)


def _short(row: Row) -> str | None:
    long = f"unrolls the loop: up to {_UNROLLED_STEPS} steps" if row.time > _UNROLLED_STEPS else None
    return long or _whole(row)


def _keeps_two_states(row: Row) -> str | None:
    if not torch._C._has_mkldnn:
        return "this torch is built without it"
    two = len(CELLS[row.cell].state) == 2
    return _standard(row) or _whole(row) or (None if two else "torch gives it no layer of this cell")


PEERS: dict[str, Peer] = {
    OURS: Peer(_ours),
    FROZEN: Peer(_frozen, lambda row: "inference only" if row.mode == "training" else None),
    CHECKPOINT: Peer(_checkpoint, lambda row: "for memory only"),
    TORCH: Peer(_torch),
    "compile": Peer(_compile, _short, quick=False),
    "compile-step": Peer(_compile_step, _custom, quick=False),
    "onednn": Peer(_onednn, _keeps_two_states),
    "torchscript": Peer(_torchscript, _custom),
    "onnxruntime": Peer(graphs.onnxruntime, _standard_inference, ("onnx", "onnxruntime")),
    "openvino": Peer(graphs.openvino, _standard_inference, ("onnx", "openvino")),
    "jax": Peer(scans.jax, _standard, ("jax",)),
}


def chosen(names: Sequence[str] | None, full: bool) -> tuple[dict[str, Peer], list[str]]:
    """The runtimes to time, ours, frozen too, and torch first, and the packages that others would need.

    Args:
        names: of the runtimes; None: all that are installed.
        full: with those among all that take long to get ready.

    Raises:
        ValueError: a runtime that is named is not known or not installed.
    """
    known = [name for name in PEERS if name not in OWN]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--peers: there is no runtime {name!r}: there are {', '.join(known)}")
        if lacks := PEERS[name].missing():
            raise ValueError(f"--peers: {name} needs {', '.join(lacks)}: pip install {' '.join(lacks)}")
    wanted = [
        name for name in known if (names is None and (full or PEERS[name].quick)) or name in (names or ())
    ]
    missing = dict.fromkeys(package for name in wanted for package in PEERS[name].missing())
    found = [OURS, FROZEN, TORCH, *(name for name in wanted if not PEERS[name].missing())]
    return {name: PEERS[name] for name in found}, list(missing)


def quietly(prepare: Callable[[], Any]) -> Any:
    """Call with the warnings of other libraries kept from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare()


@functools.cache
def versions() -> dict[str, str]:
    """The version of torch and of every installed package that a runtime needs."""
    names = ["torch", *(package for peer in PEERS.values() for package in peer.needs)]
    installed = {}
    for name in dict.fromkeys(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
