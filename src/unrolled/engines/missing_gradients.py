"""Which gradients autograd would compute, and which are None because no path leads to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from unrolled.engines.directions import DirectionSpec, group_by_direction

_Result = TypeVar("_Result")


def constant_results(
    specs: Sequence[DirectionSpec],
    steps: int,
    sizes: list[int] | None,
    requires_grad: Sequence[bool],
    results: Sequence[_Result],
) -> list[_Result]:
    """Return the outputs and final states that no gradient flows through, because nothing before needs one.

    Args:
        specs: The directions.
        steps: Number of time steps, if ``sizes`` is None.
        sizes: Number of sequences at each time step of packed input.
        requires_grad: Whether a gradient is required: for x, and for the tensors of each direction.
        results: Output and final states of each direction.
    """
    if all_complete(specs) and (len(specs) == 1 or requires_grad[0] or all(requires_grad[1:])):
        return []
    differentiable: list[bool] = []
    offset = 1
    for spec in specs:
        flags = requires_grad[offset : offset + spec.tensor_count - spec.extra_input_count]
        offset += spec.tensor_count
        paths = spec.compiled.captured.paths
        assert paths is not None
        states = flags[: spec.state_count] if spec.stateful else (False,) * paths.states
        inputs = (*states, requires_grad[0], *flags[spec.state_count :])
        differentiable += paths.to_results(*_steps(steps, sizes), spec.reverse, inputs)
    return [result for result, flag in zip(results, differentiable, strict=True) if not flag]


def existing_gradients(
    specs: Sequence[DirectionSpec],
    steps: int,
    sizes: list[int] | None,
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of x and of the tensors, with None where autograd has no path to them.

    Args:
        specs: The directions.
        steps: Number of time steps, if ``sizes`` is None.
        sizes: Number of sequences at each time step of packed input.
        grads: Gradients of the output and of the final states of each direction. None if there is none.
        results: Gradients of x and of the tensors.
    """
    outputs = [grads[0], grads[1 + len(specs[0].cell.state)]] if len(specs) == 2 else grads[:1]
    if all_complete(specs) and all(grad is not None for grad in outputs):
        return list(results)
    x_exists, exists = False, list[bool]()
    for spec, (grad_output, grad_final) in zip(specs, group_by_direction(grads, specs), strict=True):
        paths = spec.compiled.captured.paths
        assert paths is not None
        given = tuple([grad is not None for grad in (grad_output, *grad_final)])
        flags = paths.from_results(*_steps(steps, sizes), spec.reverse, given)
        x_exists = x_exists or flags[paths.states]
        exists += [*(flags[: paths.states] if spec.stateful else ()), *flags[paths.states + 1 :]]
        exists += [False] * spec.extra_input_count
    return [result if flag else None for result, flag in zip(results, [x_exists, *exists], strict=True)]


def unused_states_spread(
    specs: Sequence[DirectionSpec], grads: Sequence[Tensor | None], results: Sequence[Tensor | None]
) -> bool:
    """Return whether infinity may have spread from a state that nothing uses, because 0 · infinity is NaN.

    autograd doesn't visit such a state. It may also be a state that is used only after the last step.
    """
    if all_complete(specs) or not (any(grad is None for grad in grads) or states_are_skipped(specs, grads)):
        return False
    return not all(bool(result.isfinite().all()) for result in results if result is not None)


def states_are_skipped(specs: Sequence[DirectionSpec], grads: Sequence[Tensor | None]) -> bool:
    """Return whether a state may have a gradient after the last step, but none after earlier steps."""
    for spec, (grad_output, _) in zip(specs, group_by_direction(grads, specs), strict=True):
        paths = spec.compiled.captured.paths
        if paths is None or paths.skips_states(grad_output is not None):
            return True
    return False


def all_complete(specs: Sequence[DirectionSpec]) -> bool:
    """Return whether autograd reaches every input of every step from every new state."""
    for spec in specs:
        paths = spec.compiled.captured.paths
        if paths is None or not paths.complete:
            return False
    return True


def _steps(steps: int, sizes: list[int] | None) -> tuple[int, int]:
    """Return the number of time steps, and how many of them have fewer rows than the first."""
    return (steps, 0) if sizes is None else (len(sizes), len(sizes) - sizes.count(sizes[0]))
