"""Checks of what a layer ignores: its input, its past, and parameters without effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.layers.tensors import tensors
from unrolled.tracing.findings import Finding, number
from unrolled.tracing.growth_checks import grows
from unrolled.tracing.layer_values import STEP_ERRORS, CannotCheckError, LayerValues
from unrolled.tracing.random_state import cuda_devices
from unrolled.tracing.thresholds import DEAD_CHANGE, IGNORED_VARIANCE, SAMPLES

_PERTURBED = 64  # steps in which parameters are replaced
_SMALL_WEIGHT = 0.01  # smaller weights are named as the cause
_SUSPICIOUS = 1e4  # a gradient below this many rounding errors may be no effect; a second run decides


def check_influence(values: LayerValues) -> list[Finding]:
    """Report a layer whose new states don't depend on its input, or not on the states before.

    Raises:
        CannotCheckError: If inputs or states don't differ between steps, or a state grows exponentially.
    """
    if len(values.steps) >= 2 and grows(values):
        raise CannotCheckError("a state grows exponentially")
    cell, x, states = _in_double_precision(values, SAMPLES)
    new = _run(cell, x, states)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    # A single cycle, so that no step keeps its own input.
    shuffled = torch.empty_like(order).scatter_(0, order, order.roll(1))
    findings, undecided = [], []
    for kind, inputs in (("input", [x]), ("past", states)):
        if not any(_varies(part) for part in inputs):
            undecided.append(kind)
            continue
        other_x, other_states = (
            (x[shuffled], states) if kind == "input" else (x, [s[shuffled] for s in states])
        )
        share = explained_variance(new, _run(cell, other_x, other_states))
        if share is not None and share < IGNORED_VARIANCE:
            findings.append(_ignores(values, kind, share))
    if len(undecided) == 2 or (undecided and not findings):
        raise CannotCheckError(f"all steps have the same {' and '.join(undecided)}")
    return findings


def explained_variance(new: Sequence[Tensor], other: Sequence[Tensor]) -> float | None:
    """Estimate the share of the variance of new states that is due to what differs between two runs.

    Args:
        new: The new states, ``(steps, size)`` each.
        other: The new states with a part of the steps' inputs shuffled.

    Returns:
        The total Sobol index of the shuffled part: the largest one of the states. None if nothing varies.
    """
    shares = []
    for a, b in zip(new, other, strict=True):
        a, b = (part.to(torch.complex128 if part.is_complex() else torch.float64) for part in (a, b))
        variance = float((a - a.mean(0)).abs().square().mean(0).sum())
        if variance > 0:
            shares.append(float((a - b).abs().square().mean(0).sum()) / 2 / variance)
    return max(shares) if shares else None


def check_parameters(values: LayerValues) -> list[Finding]:
    """Report weights that are all zero, and parameters without any effect on the new states.

    Raises:
        CannotCheckError: If the steps weren't recorded completely.
    """
    findings = [finding for name in values.cell.shapes() for finding in _zero_weights(values, name)]
    cell, x, states = _in_double_precision(values, _PERTURBED)
    if not (_varies(x) and all(map(_varies, states))):
        raise CannotCheckError("all steps have the same input or states")
    new = _run(cell, x, states)
    for name, suspects in _without_gradient(cell, x, states).items():
        unused = [k for k in suspects if not _differs(new, _run(_perturbed(cell, name, k), x, states))]
        if unused:
            findings.append(_unused(values, name, unused))
    return findings


def _in_double_precision(values: LayerValues, limit: int) -> tuple[Cell, Tensor, list[Tensor]]:
    """Return the cell, and inputs and states of some steps. Low precision would round off small effects."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)

    batch, cell = values.step_batch(limit), values.cell
    parameters = {name: double(getattr(cell, name).detach()) for name in cell.shapes()}
    return cell.bind(parameters), double(batch.x), [double(state) for state in batch.states.values()]


def _run(cell: Cell, x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """Run a step and return its new states. A step that draws random numbers draws the same ones every time.

    Raises:
        CannotCheckError: If the step fails with this number of rows, or in double precision.
    """
    devices = cuda_devices(x)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
            new: Any = cell.step(x.clone(), *(state.clone() for state in states))
            return [part.clone() for part in tensors(new)]
    except STEP_ERRORS:
        raise CannotCheckError("the step doesn't run with other rows or another dtype") from None


def _without_gradient(cell: Cell, x: Tensor, states: Sequence[Tensor]) -> dict[str, list[int]]:
    """Return the blocks of each parameter whose gradient is so small that they may have no effect."""
    every = {name: list(range(_block_count(cell, name))) for name in cell.shapes()}
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda_devices(x)):
        parameters = {name: getattr(cell, name).clone().requires_grad_() for name in cell.shapes()}
        try:
            new = tensors(cell.bind(parameters).step(x.clone(), *(state.clone() for state in states)))
            # Random factors, so that effects on several states don't cancel out.
            loss = torch.stack([(part.abs() * torch.rand_like(part.abs())).sum() for part in new]).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        except STEP_ERRORS:  # the step can't be differentiated
            return every
    size = max(float(part.detach().abs().max()) for part in new)
    suspects: dict[str, list[int]] = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        limit = _SUSPICIOUS * torch.finfo(parameter.dtype).eps * size
        zero = parameter.detach() * 0 if gradient is None else gradient
        blocks = zero.chunk(len(every[name]))
        suspects[name] = [k for k, block in enumerate(blocks) if bool(block.abs().max() <= limit)]
    return suspects


def _varies(tensor: Tensor) -> bool:
    return bool((tensor != tensor[0]).any())


def _differs(new: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether any state differs by more than rounding."""
    for a, b in zip(new, other, strict=True):
        limit = DEAD_CHANGE * torch.finfo(a.dtype).eps * a.abs().amax(-1, keepdim=True)
        if bool(((a - b).abs() > limit).any()) or not b.isfinite().all():
            return True
    return False


def _block_count(cell: Cell, name: str) -> int:
    """Return the number of blocks of a parameter with one row for each unit, such as 4 for four gates."""
    rows: int = getattr(cell, name).shape[0]
    by_unit = "hidden" in str(cell.params()[name].shape[0]) and rows % cell.hidden == 0
    return rows // cell.hidden if by_unit else 1


def _block(cell: Cell, name: str, index: int) -> Tensor:
    block: Tensor = getattr(cell, name).chunk(_block_count(cell, name))[index]
    return block


def _perturbed(cell: Cell, name: str, index: int) -> Cell:
    """Return the cell with random numbers added to one block of a parameter, as large as the block itself."""
    parameter = getattr(cell, name).detach().clone()
    block = parameter.chunk(_block_count(cell, name))[index]
    size = max(float(block.abs().square().mean().sqrt()), 0.1)
    noise = torch.randn(block.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block += size * noise.to(block)
    return cell.bind({name: parameter})


def _weights_of(values: LayerValues, kind: str) -> list[str]:
    """Return the parameters that multiply the input or a state, as far as their declared shapes tell."""
    cell, word = values.cell, {"input": "input", "past": "hidden"}[kind]
    params = {name: cell.params()[name].shape for name in cell.shapes()}
    return [name for name, shape in params.items() if len(shape) == 2 and word in str(shape[1])]


def _ignores(values: LayerValues, kind: str, share: float) -> Finding:
    what, effect = {
        "input": ("its input", "with the inputs of the steps exchanged"),
        "past": ("its past", "with the states before the steps exchanged"),
    }[kind]
    difference = f"only {number(100 * share, 2)} %" if share else "0 %"
    message = f"The layer ignores {what}: {effect}, the new states differ by {difference} of their variance."
    names = _weights_of(values, kind)
    largest = {name: float(getattr(values.cell, name).abs().max()) for name in names}
    small = [
        f"all numbers of {name} are 0" if not size else f"the largest number of {name} is {number(size)}"
        for name, size in largest.items()
        if size < _SMALL_WEIGHT
    ]
    if small:
        message += f" The cause is that {' and '.join(small)}."
    return values.finding(
        f"ignores {kind}", "warning", message, "x" if kind == "input" else ", ".join(values.cell.state),
        steps=tuple(values.steps), values={"share": share}, parameter=(names[0], 0) if small else None,
    )  # fmt: skip


def _zero_weights(values: LayerValues, name: str) -> list[Finding]:
    """Report blocks of a weight that are all zero, unless the cell begins with zeros there."""
    cell = values.cell
    if getattr(cell, name).dim() < 2 or cell.params()[name].init is nn.init.zeros_:
        return []
    zero = [k for k in range(_block_count(cell, name)) if not _block(cell, name, k).any()]
    if not zero:
        return []
    message = f"The weights {_block_names(values, name, zero)} are all zero, so nothing passes through them."
    return [_parameter_finding(values, "zero weights", message, name, zero[0])]


def _unused(values: LayerValues, name: str, unused: Sequence[int]) -> Finding:
    names = _block_names(values, name, unused)
    if " and " in names:
        subject, pronoun = f"rows {names} of {name} have", "them"
    else:
        subject, pronoun = f"{'bias' if name.startswith('bias') else 'parameter'} {names} has", "it"
    message = f"The {subject} no effect: with other numbers in {pronoun}, all new states are the same."
    return _parameter_finding(values, "unused parameter", message, name, unused[0])


def _parameter_finding(values: LayerValues, kind: str, message: str, name: str, block: int) -> Finding:
    row = block * values.cell.hidden if _block_count(values.cell, name) > 1 else 0
    return values.finding(kind, "note", message, name, parameter=(name, row))


def _block_names(values: LayerValues, name: str, blocks: Sequence[int]) -> str:
    """Return the name of a parameter, or of some of its blocks by their gates."""
    hidden = values.cell.hidden
    if len(blocks) == _block_count(values.cell, name):
        return name
    names = values.part.row_names
    texts = []
    for k in blocks:
        block = names.block(name, k * hidden)
        is_gate = block.rows == range(k * hidden, (k + 1) * hidden)
        texts.append(names.symbol(name, block) if is_gate else f"{name}[{k * hidden}:{(k + 1) * hidden}]")
    return f"{', '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else texts[0]
