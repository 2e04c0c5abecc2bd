"""Dispatch of calls to an engine. The engines agree with the reference engine up to rounding."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import WrapperSpec, wrap
from unrolled.engines import backends, log, memory, reference, registry, run_compiled
from unrolled.engines._torch_private import (
    constant_for_dynamo,
    counts_flops,
    in_onnx_export,
    jit_tracing_state,
)
from unrolled.engines.compiler.batch_layout import batch_sizes_error
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.errors import UnavailableError
from unrolled.engines.selection import current_engine
from unrolled.engines.torch_ops import transforms
from unrolled.engines.torch_ops.onnx import PACKED, OnnxExportError

States = tuple[Tensor, ...]

_ONNX_ADVICE = (
    "torch.onnx.export can't export this call of {}: {}. Or export the layer with unrolled.io.to_onnx. If "
    "torch.nn has the same layer, you can also export the model after unrolled.revert(model)"
)
_TORCHSCRIPT = "dynamo=False doesn't support compiled loops. Pass dynamo=True"


def run(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | Tensor | None = None,
    checkpoint: int | None = None,
    wrapper_specs: Sequence[WrapperSpec] = ((), ()),
    extra_inputs: Tensor | None = None,
) -> list[tuple[Tensor, States]]:
    """Run bound cells over a sequence on the selected engine; see :func:`reference.run`.

    Args:
        cells: One cell for each direction. The first runs forward in time, the second in reverse.
        x: Input of shape ``(time, batch, input)``, or ``(sum of sizes, input)`` if ``sizes`` is given.
        states: Initial states of each cell, each of shape ``(batch, size)``. Zeros if None.
        sizes: Number of sequences at each time step, as in a packed sequence. It never grows over time.
            If None, all sequences have all time steps. A tensor while torch records a graph.
        checkpoint: Save only the states between segments of this many time steps for the backward pass, which
            then recomputes each segment. If None, save all that the backward pass reads. Not with ``sizes``.
        wrapper_specs: Wrappers to apply to each cell. ``states`` are the states of the wrapped cells.
        extra_inputs: Features that the wrappers read in addition to ``x``, with the same layout.

    Returns:
        For each cell its output, with the layout of ``x``, and the final states. The output is the first
        state after each time step. Nothing else uses the memory of the final states.

    Raises:
        OnnxExportError: If ``torch.onnx.export`` is active and can't export the call.
        RuntimeError: If ``engine("native")`` is selected and can't run this call, or the memory of a tensor
            was freed.
    """
    if transforms.maybe_autocast() and transforms.autocast_enabled(x.device.type):
        return _run_with_autocast(cells, x, states, sizes, checkpoint, wrapper_specs, extra_inputs)
    if transforms.active():
        return _run_in_transform(
            cells, _with_extra_inputs(x, extra_inputs), states, sizes, checkpoint, wrapper_specs
        )
    assert not isinstance(sizes, Tensor)  # only while torch records a graph
    if wrapper_specs[0]:
        cells = [wrap(cell, spec) for cell, spec in zip(cells, wrapper_specs, strict=False)]
    return _run_on_an_engine(cells, x, states, sizes, checkpoint, extra_inputs)


def _run_on_an_engine(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | None,
    checkpoint: int | None,
    extra_inputs: Tensor | None,
) -> list[tuple[Tensor, States]]:
    """Run wrapped cells, outside of torch's transforms, on the native engine if it can run them."""
    selected = current_engine()
    name = type(cells[0].innermost).__name__
    reason = "selected" if selected == "reference" else _why_not_native(cells, x, states, extra_inputs)
    slower: str | None = None
    if reason is not None:
        _check_tensors(name, cells, x, states)
        if selected == "auto" and not (x.is_cpu or x.is_meta):
            slower = f"{name} runs step by step on {x.device.type}, which is slower"
            if not x.is_cuda:
                reason = "compiled loops run only on CPUs and CUDA devices"
    else:
        try:
            results = run_compiled.run(cells, x, states, sizes, checkpoint, extra_inputs)
            log.engine.info("%s: native engine (selected: %s)", name, selected)
            return results
        except (UnsupportedError, UnavailableError) as error:
            reason = str(error)
            slower = _slower(name, error)
    if selected == "native":
        raise RuntimeError(f"{name} can't run on the native engine: {reason}")
    log.engine.info("%s: reference engine (%s)", name, reason)
    results = _run_by_reference(cells, _with_extra_inputs(x, extra_inputs), states, sizes, checkpoint)
    if slower is not None:  # only now: if the step itself is wrong, its own error comes first
        log.announce(f"{slower}: {reason}")
    return results


def _slower(name: str, error: UnsupportedError | UnavailableError) -> str:
    """Return the warning for a cell that isn't compiled, without the reason."""
    if isinstance(error, UnavailableError):
        return "Recurrent layers run on the reference engine, which is slower"
    return f"{name} runs on the reference engine, which is slower, because it can't be compiled"


def _run_with_autocast(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | Tensor | None,
    checkpoint: int | None,
    wrapper_specs: Sequence[WrapperSpec],
    extra_inputs: Tensor | None,
) -> list[tuple[Tensor, States]]:
    """Run :func:`run` with the dtypes that autocast chooses."""
    memory.check_not_freed(_tensors(cells, x, states))
    with torch.autocast(x.device.type, enabled=False):
        cells, x, states = transforms.cast_for_autocast(cells, x, states)
        extra_inputs = None if extra_inputs is None else extra_inputs.to(x.dtype)
        return run(cells, x, states, sizes, checkpoint, wrapper_specs, extra_inputs)


def _with_extra_inputs(x: Tensor, extra_inputs: Tensor | None) -> Tensor:
    return x if extra_inputs is None else torch.cat((x, extra_inputs), -1)


def which(
    cell: Cell, x: Tensor, state: States, training: bool, device: torch.device | None = None
) -> tuple[str, str]:
    """Return the engine that ``"auto"`` selects for a call, and the reason.

    This compiles the kernels that the native engine needs for the call.

    Args:
        cell: A cell that is bound to its parameters.
        x: Input of shape ``(time, batch, input)``.
        state: Initial states, each of shape ``(batch, size)``.
        training: Whether the call is differentiated.
        device: The device of the call, if the tensors are on another one. It needn't exist.

    Returns:
        ``"native"`` or ``"reference"``, and the reason.
    """
    backend, missing = backends.backend_for(device or x.device), None
    if device is None or device == x.device:
        reason = _why_not_native([cell], x, [state])
    else:
        supported = x.dtype in backend.dtypes
        reason = None if supported else f"compiled loops on {device.type} don't support {x.dtype}"
        missing = backend.unavailable(device)
    if reason is None:
        try:
            compiled = registry.compiled(cell, x.dtype, device or x.device)
            if training:
                compiled.prepare_training()
            else:
                compiled.inference  # noqa: B018  # the first access compiles it
            explanation = backend.explain(compiled, training)
            if missing is None:
                return "native", explanation
            reason = f"{missing}; on a GPU: {explanation}"
        except (UnsupportedError, UnavailableError) as error:
            reason = str(error)
    return "reference", reason


def in_transform() -> bool:
    """Return whether a torch transform or autocast is active."""
    return transforms.active() or (transforms.maybe_autocast() and transforms.autocast_enabled("cpu"))


def _run_in_transform(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | Tensor | None,
    checkpoint: int | None,
    wrapper_specs: Sequence[WrapperSpec],
) -> list[tuple[Tensor, States]]:
    """Run :func:`run` inside a torch transform, as a torch operator or on the reference engine."""
    selected, forward_mode, onnx_export = _conditions()
    name = type(cells[0].innermost).__name__
    if forward_mode:
        reason = "forward-mode differentiation is active"
    elif selected == "reference":
        reason = "the reference engine is selected"
    elif selected == "auto" and counts_flops():
        reason = "torch counts FLOPs, which it doesn't know of the compiled loops"
    else:
        if onnx_export == "torchscript":
            raise OnnxExportError(_ONNX_ADVICE.format(name, _TORCHSCRIPT))
        if onnx_export and sizes is not None:
            raise OnnxExportError(PACKED.format(name))
        results = transforms.run(cells, x, states, sizes, wrapper_specs)
        if not isinstance(results, str):
            return results
        if onnx_export:
            raise OnnxExportError(_ONNX_ADVICE.format(name, results))
        reason = results
    if selected == "native":
        raise RuntimeError(f"{name} can't run on the native engine: {reason}")
    if isinstance(sizes, Tensor):
        raise RuntimeError(
            f"{name} can't run on a packed sequence while torch records a graph: {reason}. The reference "
            "engine would make its lengths constants of the graph: pass a padded input and lengths"
        )
    memory.check_meta(name, _tensors(cells, x, states))
    cells = [wrap(cell, spec) for cell, spec in zip(cells, wrapper_specs, strict=False)]
    return _run_by_reference(cells, x, states, sizes, checkpoint)


@constant_for_dynamo
def _conditions() -> tuple[str, bool, str]:
    """Return the selected engine, whether forward mode is active, and which exporter to ONNX, if any."""
    exporter = "torch.export" if jit_tracing_state() is None else "torchscript"
    return current_engine(), transforms.in_forward_mode(), exporter if in_onnx_export() else ""


def _run_by_reference(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | None,
    checkpoint: int | None,
) -> list[tuple[Tensor, States]]:
    error = "" if sizes is None else batch_sizes_error(sizes, len(x))
    if error:
        raise ValueError(error)
    run = reference.run
    if checkpoint is not None and torch.is_grad_enabled():
        run = functools.partial(reference.run_in_segments, checkpoint)
    results = [
        run(cell, x, state, sizes, reverse)
        for cell, state, reverse in zip(cells, states, (False, True), strict=False)
    ]
    # Copies, because the last step's graph reads its states, which the caller may change in place.
    return [(output, tuple([part.clone() for part in final])) for output, final in results]


def _tensors(cells: Sequence[Cell], x: Tensor, states: Sequence[States | None]) -> list[Tensor]:
    tensors = [x]
    for cell, state in zip(cells, states, strict=True):
        attributes = cell.__dict__
        tensors += [attributes[name] for name in cell.shapes()]
        tensors += state or ()
    return tensors


def _check_tensors(name: str, cells: Sequence[Cell], x: Tensor, states: Sequence[States | None]) -> None:
    """Raise RuntimeError if torch's operations would crash, read random memory or raise an unclear error."""
    memory.check_dense(name, [x, *(part for state in states for part in state or ())])
    tensors = _tensors(cells, x, states)
    memory.check_not_freed(tensors)
    memory.check_meta(name, tensors)


def _why_not_native(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    extra_inputs: Tensor | None = None,
) -> str | None:
    """Return why the native engine can't run a call, or None if it can."""
    tensors = _tensors(cells, x, states)
    if extra_inputs is not None:
        tensors.append(extra_inputs)
    return backends.unsupported(tensors)
