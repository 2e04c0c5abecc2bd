"""Which gradients exist: where autograd returns a tensor, and where it returns None.

A compiled loop could return zeros for a value that the output doesn't depend on, or that it depends on only
through a comparison or ``detach``. Autograd returns None. So one step runs under autograd on fake tensors,
and what it reaches there is followed from step to step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientPaths:
    """The inputs of a step that have a gradient.

    A set of inputs is a number with one bit for each of them: first the states, then x, then the parameters.

    Attributes:
        reached: For each new state, the set of inputs that autograd reaches from it.
        inputs: Number of inputs.
        complete: Whether autograd reaches every input from every new state.
    """

    reached: tuple[int, ...]
    inputs: int
    complete: bool

    @property
    def states(self) -> int:
        """The number of states."""
        return len(self.reached)

    def skips_states(self, output: bool) -> bool:
        """Return whether a state may have a gradient after the last step, but none after earlier steps.

        Args:
            output: Whether a gradient arrives at the output of each step, which is the first state.
        """
        union = functools.reduce(int.__or__, self.reached, int(output))
        all_states = (1 << self.states) - 1
        return union & all_states != all_states

    def of_x_and_params(self) -> list[bool]:
        """Return for x and each parameter whether any state reaches it."""
        union = functools.reduce(int.__or__, self.reached, 0)
        return [bool(union >> k & 1) for k in range(self.states, self.inputs)]

    def from_results(self, steps: int, partial: int, reverse: bool, results: tuple[bool, ...]) -> list[bool]:
        """Return for each initial state, x and each parameter whether it has a gradient.

        Args:
            steps: Number of time steps.
            partial: How many of them, the latest ones, have fewer rows than the first step.
            reverse: Whether the loop runs from the last time step to the first.
            results: For the output and each final state, whether a gradient arrives there.
        """
        return _from_results(self, steps, partial, reverse, results)

    def to_results(self, steps: int, partial: int, reverse: bool, inputs: tuple[bool, ...]) -> list[bool]:
        """Return for the output and each final state whether it depends on inputs that require a gradient.

        Args:
            steps: Number of time steps.
            partial: How many of them, the latest ones, have fewer rows than the first step.
            reverse: Whether the loop runs from the last time step to the first.
            inputs: For each initial state, x and each parameter, whether it requires a gradient.
        """
        return _to_results(self, steps, partial, reverse, inputs)


def gradient_paths(
    step: Callable[[Tensor, list[Tensor], list[Tensor]], tuple[Tensor, ...]],
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
) -> GradientPaths:
    """Run a step under autograd, and return which inputs have a gradient.

    Args:
        step: Takes x, the states and the parameters; returns the new states.
        x: Input. As all tensors here, it may be fake.
        states: States.
        params: Parameters.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (*states, x, *params)]
        new_states = step(inputs[len(states)], inputs[: len(states)], inputs[len(states) + 1 :])
        reached = []
        for state in new_states:
            grads: Sequence[Tensor | None] = [None] * len(inputs)
            if state.requires_grad:
                ones = torch.ones_like(state)
                grads = torch.autograd.grad(state, inputs, ones, retain_graph=True, allow_unused=True)
            reached.append(_bits([grad is not None for grad in grads]))
    complete = all(inputs_reached == _bits([True] * len(inputs)) for inputs_reached in reached)
    return GradientPaths(tuple(reached), len(inputs), complete)


def _bits(flags: Sequence[bool]) -> int:
    return sum(1 << k for k, flag in enumerate(flags) if flag)


def _segments(steps: int, partial: int, reverse: bool) -> list[tuple[int, bool]]:
    """Return runs of steps in the order of the loop: their number, and whether rows are missing."""
    segments = [(steps - partial, False), (partial, True)]
    return segments[::-1] if reverse else segments


@functools.lru_cache(maxsize=1000)
def _from_results(
    paths: GradientPaths, steps: int, partial: int, reverse: bool, results: tuple[bool, ...]
) -> list[bool]:
    output, states = results[0], _bits(results[1:])
    union = 0
    for count, rows_are_missing in reversed(_segments(steps, partial, reverse)):
        for _ in range(count):
            after = states | output  # the output is the first state
            inputs = 0
            for k, reached in enumerate(paths.reached):
                inputs |= reached if after >> k & 1 else 0
            union |= inputs
            before = inputs & ((1 << paths.states) - 1)
            before |= states if rows_are_missing else 0  # the missing rows keep their state
            if before == states:
                break
            states = before
    return [bool((states if k < paths.states else union) >> k & 1) for k in range(paths.inputs)]


@functools.lru_cache(maxsize=1000)
def _to_results(
    paths: GradientPaths, steps: int, partial: int, reverse: bool, inputs: tuple[bool, ...]
) -> list[bool]:
    all_states = (1 << paths.states) - 1
    states, others, output = _bits(inputs) & all_states, _bits(inputs) & ~all_states, False
    for count, rows_are_missing in _segments(steps, partial, reverse):
        for _ in range(count):
            after = _bits([bool(reached & (states | others)) for reached in paths.reached])
            output = output or bool(after & 1)
            after |= states if rows_are_missing else 0
            if after == states:
                break
            states = after
    return [output, *(bool(states >> k & 1) for k in range(paths.states))]
