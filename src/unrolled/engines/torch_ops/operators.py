"""The compiled loops as operators, which torch's transforms can take: compile, export, vmap, torch.func.

``unrolled::recurrence`` gives the output and the final states of one direction of a layer, or of both, and
can be differentiated any number of times (``derivatives``); ``recurrence_kept`` gives what its backward
reads too, and ``recurrence_back`` the gradients. A cell stands in a graph as a text (``named``). Calls
outside of any transform don't come here: torch's dispatcher would take longer than a short loop.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import WrapperSpec, wrap
from unrolled.engines import autograd, run_compiled
from unrolled.engines.autograd import DirectionSpec
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.native import registry
from unrolled.engines.native.compiled_cell import CompiledCell
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.engines.torch_ops import cell_text

_Result = TypeVar("_Result")

_compiled: dict[object, CompiledCell] = {}

_INPUTS = "Tensor x, Tensor[] tensors, Tensor? sizes, str lanes"
library: Any = torch.library.Library("unrolled", "DEF")  # type: ignore[no-untyped-call]
library.define(f"recurrence({_INPUTS}) -> Tensor[]")
library.define(f"recurrence_kept({_INPUTS}) -> Tensor[]")
library.define(f"recurrence_back(Tensor[] grads, Tensor[] made, {_INPUTS}, int groups=1) -> Tensor[]")


def described(
    cell: Cell, chain: WrapperSpec, training: bool, dtype: torch.dtype, stateful: bool, back: bool
) -> tuple[str, tuple[str, ...], int, str]:
    """A lane as text, the names of its cell's own tensors, how many states it has, and why not, or "".

    Args:
        cell: without its tensors.
        chain: variants around it.
        training: the mode of the layer.
        dtype: of the call.
        stateful: whether initial states are given.
        back: from the last step to the first.
    """
    cell = wrap(cell, chain)
    text = cell_text.text_of(cell, training)

    def ready() -> CompiledCell:
        step = registry.compiled(cell_text.cell_of(text), dtype)
        step.inference  # noqa: B018  # compiled now: a graph is not to hold what no compiler is there for
        return step

    try:
        own = tuple(elsewhere(ready).captured.own)
    except (UnsupportedError, NoCompilerError) as error:
        return "", (), 0, str(error)
    lane = json.dumps({"cell": text, "stateful": stateful, "back": back, "own": own})
    return lane, own, len(cell.state), ""


described._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see :func:`engines._now`


def elsewhere(make: Callable[[], _Result]) -> _Result:
    """Call in a thread of its own, in which no transform of torch is active."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


@dataclass(frozen=True)
class SerializedDirection:
    """One direction, read from its text.

    Attributes:
        cell: without tensors.
        stateful: whether initial states are given; else they are zeros.
        back: from the last step to the first.
        own: the names of the cell's tensors that are no parameters.
        tensors: its initial states, its parameters and its own tensors.
    """

    cell: Cell
    stateful: bool
    back: bool
    own: tuple[str, ...]
    tensors: Sequence[Any]

    @property
    def states(self) -> Sequence[Any]:
        """The initial states, none where they are zeros."""
        return self.tensors[: len(self.cell.state) if self.stateful else 0]

    @property
    def differentiable(self) -> Sequence[Any]:
        """The tensors that have gradients: the initial states and the parameters."""
        return self.tensors[: len(self.tensors) - len(self.own)]

    @property
    def widths(self) -> list[int]:
        """The features of every state."""
        return list(self.cell.state_sizes().values())

    def bound(self) -> Cell:
        """The cell with its parameters and own tensors."""
        names = (*self.cell.shapes(), *self.own)
        return self.cell.bind(dict(zip(names, self.tensors[len(self.states) :], strict=True)))

    def compiled(self, dtype: torch.dtype) -> CompiledCell:
        """Its compiled step, whatever its own tensors hold."""
        key = (self.cell.identity(), self.cell.training, torch.get_default_dtype(), dtype)
        if key not in _compiled:
            _compiled[key] = elsewhere(lambda: registry.compiled(self.cell, dtype))
        return _compiled[key]

    def kind(self, dtype: torch.dtype) -> DirectionSpec:
        """It as :mod:`autograd` has it, with the values that its own tensors have now."""
        bound = self.bound()
        return DirectionSpec(registry.compiled(bound, dtype), bound, self.stateful, self.back)


def read_lanes(text: str, tensors: Sequence[Any]) -> list[SerializedDirection]:
    """The lanes that a text names, with their tensors."""
    found, at = [], 0
    for cell, stateful, back, own in _read(text):
        many = (len(cell.state) if stateful else 0) + len(cell.shapes()) + len(own)
        found.append(SerializedDirection(cell, stateful, back, own, tensors[at : at + many]))
        at += many
    return found


@functools.lru_cache(maxsize=1000)
def _read(text: str) -> list[tuple[Cell, bool, bool, tuple[str, ...]]]:
    return [
        (cell_text.cell_of(what["cell"]), what["stateful"], what["back"], tuple(what["own"]))
        for what in json.loads(text)
    ]


def axes_of_results(read: Sequence[SerializedDirection]) -> list[int]:
    """Of outputs and final states, lane by lane, where the rows of the batch are."""
    return [axis for lane in read for axis in (1, *(0 for _ in lane.widths))]


def axes_kept(read: Sequence[SerializedDirection], dtype: torch.dtype) -> list[int | None]:
    """Of what is kept beside them, where the rows are; None where it has none."""
    shapes = [shape for lane in read for shape in lane.compiled(dtype).shapes_kept]
    return [1 if BATCH_SYMBOL in shape else None for shape in shapes]


def axes_of_gradients(read: Sequence[SerializedDirection], dtype: torch.dtype) -> list[int | None]:
    """Of the gradients that there are, where the rows are; None for those of parameters, which have none."""
    steps = [lane.compiled(dtype).captured for lane in read]
    axes: list[int | None] = [1] if any(step.grad_x for step in steps) else []
    for lane, step in zip(read, steps, strict=True):
        axes += [0] * len(lane.states)
        axes += [None for node in step.grad_params if node is not None]
    return axes


# --- what the operators compute ---


def _infer(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> list[Tensor]:
    read, given = read_lanes(text, tensors), []
    x, columns = _apart(x, read)
    for lane in read:
        kind, own = lane.kind(x.dtype), [*_plain(lane), *columns]
        states = tuple(own[: kind.states]) if kind.stateful else None
        given.append(
            run_compiled.DirectionCall(kind.compiled, kind.cell, own[kind.states :], states, kind.back)
        )
    results = run_compiled.infer(given, x, _layout(x, sizes))
    return [tensor for output, final in results for tensor in (output, *final)]


def _keep(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> list[Tensor]:
    read = read_lanes(text, tensors)
    x, columns = _apart(x, read)
    kinds = [lane.kind(x.dtype) for lane in read]
    flat = [tensor for lane in read for tensor in (*_plain(lane), *columns)]
    results: list[Tensor] = []
    extras: list[Tensor] = []
    made = autograd.forward(kinds, _layout(x, sizes), x, flat)
    for kind, (kept, final, values) in zip(kinds, made, strict=True):
        results += (kept[0], *final)
        extras += [state for state in kept[1:] if state is not None]
        extras += [values[node] for node in kind.compiled.held]
    taken = {tensor.untyped_storage().data_ptr() for tensor in (x, *tensors, *results) if tensor.numel()}
    for k, (tensor, axis) in enumerate(zip(extras, axes_kept(read, x.dtype), strict=True)):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()  # an operator's results share no memory
        taken.add(tensor.untyped_storage().data_ptr())
        extras[k] = tensor if axis is None else tensor.view(*x.shape[:-1], tensor.shape[-1])
    return results + extras


def _back(
    grads: Sequence[Tensor],
    made: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int = 1,
) -> list[Tensor]:
    read = read_lanes(text, tensors)
    x, columns = _apart(x, read)
    kinds = [lane.kind(x.dtype) for lane in read]
    flat = [tensor for lane in read for tensor in (*_plain(lane), *columns)]
    outputs, extras = made[: len(read)], made[len(read) :]
    rows = [axis is not None for axis in axes_kept(read, x.dtype)]
    rest = iter([e.flatten(0, -2) if of_rows else e for e, of_rows in zip(extras, rows, strict=True)])
    kept = []
    for kind, output in zip(kinds, outputs, strict=True):
        states: list[Tensor | None] = [output.contiguous()]
        states += [
            None if size is None else next(rest).contiguous() for size in kind.compiled.states_kept[1:]
        ]
        kept.append((states, {node: next(rest).contiguous() for node in kind.compiled.held}))
    layout = _layout(x, sizes)
    found = autograd.gradients(kinds, layout, x, flat, kept, grads, groups)
    if columns and found[0] is not None:
        found[0] = torch.cat((found[0], torch.zeros_like(columns[0])), -1)
    return [tensor.contiguous() for tensor in found if tensor is not None]


def _apart(x: Tensor, read: Sequence[SerializedDirection]) -> tuple[Tensor, list[Tensor]]:
    """x, and the columns beside it that variants read, as the loops take them."""
    x, width = x.resolve_neg(), read[0].cell.input
    if x.shape[-1] == width:
        return x, []
    return x[..., :width].contiguous(), [x[..., width:].contiguous()]


def _plain(lane: SerializedDirection) -> list[Tensor]:
    return [tensor.resolve_neg().contiguous() for tensor in lane.differentiable]


def _layout(x: Tensor, sizes: Tensor | None) -> Layout:
    return Layout.of(x, None if sizes is None else sizes.tolist())


library.impl("recurrence", _infer, "CPU")
library.impl("recurrence_kept", _keep, "CPU")
library.impl("recurrence_back", _back, "CPU")


# --- the shapes of it, where there is no data ---


def _shapes(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> list[Tensor]:
    results = []
    for lane in read_lanes(text, tensors):
        batch: Any = x.shape[1]
        if sizes is not None:
            context = torch.library.get_ctx()
            batch = lane.states[0].shape[0] if lane.stateful else context.new_dynamic_size()
        results.append(x.new_empty(*x.shape[:-1], lane.widths[0]))
        results += [x.new_empty(batch, width) for width in lane.widths]
    return results


def _shapes_kept(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> list[Tensor]:
    extras = [
        x.new_empty((*x.shape[:-1], shape[-1]) if BATCH_SYMBOL in shape else shape)
        for lane in read_lanes(text, tensors)
        for shape in lane.compiled(x.dtype).shapes_kept
    ]
    return [*_shapes(x, tensors, sizes, text), *extras]


def _shapes_back(
    grads: Sequence[Tensor],
    made: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int = 1,
) -> list[Tensor]:
    read = read_lanes(text, tensors)
    found = [x.new_empty(x.shape)] if axes_of_gradients(read, x.dtype)[:1] == [1] else []
    first = () if groups == 1 else (groups,)
    for lane in read:
        found += [state.new_empty(state.shape) for state in lane.states]
        params = lane.differentiable[len(lane.states) :]
        nodes = lane.compiled(x.dtype).captured.grad_params
        for param, node in zip(params, nodes, strict=True):
            if node is not None:
                found.append(param.new_empty((*first, *param.shape)))
    return found


torch.library.register_fake("unrolled::recurrence", _shapes, lib=library)
torch.library.register_fake("unrolled::recurrence_kept", _shapes_kept, lib=library)
torch.library.register_fake("unrolled::recurrence_back", _shapes_back, lib=library)
