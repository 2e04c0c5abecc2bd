"""The step of a cell and its backward as functions of tensors, to be traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines import reference
from unrolled.engines._torch_private import (
    TorchDispatchMode,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    top_saved_tensors_hooks,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from unrolled.engines.compiler.checks import Run, tensor_attributes
from unrolled.engines.compiler.decompositions import trace_decomposed
from unrolled.engines.compiler.gradient_paths import GradientPaths, gradient_paths
from unrolled.engines.compiler.ir import BATCH_SYMBOL
from unrolled.engines.compiler.source_location import BackwardLocationMode, LocationTracker, unsupported


@dataclass
class Arguments:
    """Tensors without data for a step and its backward.

    Attributes:
        params: The parameters, and last the wrappers' extra inputs, if there are any.
        attributes: The cell's tensors that are no parameters.
        x: The input.
        states: The states before the step.
        carries: Gradients of the states that arrive from the following time step.
        grad_output: Gradient of this step's output.
    """

    params: list[Tensor]
    attributes: list[Tensor]
    x: Tensor
    states: list[Tensor]
    carries: list[Tensor]
    grad_output: Tensor

    @property
    def flat(self) -> list[Tensor]:
        """All tensors, in the order of the traced graph's placeholders."""
        return tree_leaves(list(vars(self).values()))

    @property
    def recurrent(self) -> list[bool]:
        """For each of them, whether it is a state or a carry."""
        first = len(self.params) + len(self.attributes) + 1
        count = len(self.states) + len(self.carries)
        return [first <= k < first + count for k in range(first + count + 1)]

    def in_float64(self) -> list[Tensor]:
        """Return all tensors in float64, except for the cell's own."""
        own = range(len(self.params), len(self.params) + len(self.attributes))
        return [tensor if k in own else tensor.double() for k, tensor in enumerate(self.flat)]


class TraceableStep:
    """The step of a cell, inside a fake tensor mode.

    Args:
        cell: The cell, with its options. Its parameters need not be bound.
        dtype: Dtype of the parameters, the input and the states.
        training: Whether to trace the backward too. Without it, every gradient is None.
        constant_attributes: Tensor attributes whose values become constants.

    Attributes:
        attributes: The cell's other tensors that are no parameters, by name.
        extra_width: Number of features that wrappers read in addition to the input.
        state_sizes: Width of each state.
        tracker: The line of the step that runs.
    """

    def __init__(
        self, cell: Cell, dtype: torch.dtype, training: bool, constant_attributes: dict[str, Tensor]
    ) -> None:
        self.cell, self.dtype, self.training = cell, dtype, training
        attributes = tensor_attributes(cell).items()
        self.attributes = {name: value for name, value in attributes if name not in constant_attributes}
        self.extra_width = cell.features - cell.input
        self.state_sizes = list(cell.state_sizes().values())
        self.tracker = LocationTracker(cell)
        self._vjp: Any = torch.func.vjp

    def arguments(self) -> Arguments:
        """Return tensors without data for :meth:`trace`."""
        (params, attributes), (x, states) = self._parameters(), self._inputs(BATCH_SYMBOL)
        if self.extra_width:
            x = torch.empty(BATCH_SYMBOL, self.cell.input, dtype=self.dtype)
            params.append(torch.empty(BATCH_SYMBOL, self.extra_width, dtype=self.dtype))
        carries = [torch.empty_like(state) for state in states]
        return Arguments(params, attributes, x, states, carries, torch.empty_like(states[0]))

    def trace(self, arguments: Arguments) -> fx.GraphModule:
        """Trace the step and its backward.

        Returns:
            The graph. Its outputs are the new states and the gradients of the parameters, the input and the
            states.
        """
        values = tuple(vars(arguments).values())

        def function(*values: Any) -> Any:  # make_fx counts the arguments of a method with self
            return self._forward_and_backward(*values)

        try:
            return trace_decomposed(function, values)
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            self._vjp = _vjp  # torch.func needs an autograd.Function with setup_context
            return trace_decomposed(function, values)

    def paths(self) -> GradientPaths:
        """Return which inputs autograd reaches from each new state."""
        (params, attributes), (x, states) = self._parameters(), self._inputs(BATCH_SYMBOL)

        def step(x: Tensor, states: list[Tensor], params: list[Tensor]) -> tuple[Tensor, ...]:
            return self._step(self._bind(params, attributes, self.cell.training), x, states)

        with _ZerosOnCPU():  # type: ignore[no-untyped-call]
            return gradient_paths(step, x, states, params)

    def run(self, training: bool) -> Run:
        """Return a function that runs the step for a batch size.

        Args:
            training: Whether the cell is in training mode.
        """
        cell = self.cell
        params, attributes = self._parameters()
        bound = self._bind(params, attributes, training)
        names = [*cell.shapes(), *self.attributes, "x", *cell.state]

        def run(batch: int) -> tuple[dict[str, Tensor], Callable[[], Any]]:
            x, states = self._inputs(batch)
            inputs = dict(zip(names, [*params, *attributes, x, *states], strict=True))
            return inputs, lambda: self._check_states(self._step(bound, x, states), tuple(states))

        return run

    def _parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        params = [torch.empty(shape, dtype=self.dtype) for shape in self.cell.shapes().values()]
        return params, [torch.empty_like(tensor) for tensor in self.attributes.values()]

    def _inputs(self, batch: int) -> tuple[Tensor, list[Tensor]]:
        x = torch.empty(batch, self.cell.features, dtype=self.dtype)
        return x, [torch.empty(batch, size, dtype=self.dtype) for size in self.state_sizes]

    def _bind(self, params: list[Tensor], attributes: list[Tensor], training: bool) -> Cell:
        names = [*self.cell.shapes(), *self.attributes]
        bound = self.cell.bind(dict(zip(names, [*params, *attributes], strict=True)))
        bound.training = training
        return bound

    def _step(self, bound: Cell, x: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        with self.tracker:
            new_states = bound.step(x, *states)
        return new_states if isinstance(new_states, tuple) else (new_states,)

    def _forward_and_backward(
        self,
        params: list[Tensor],
        attributes: list[Tensor],
        x: Tensor,
        states: list[Tensor],
        carries: list[Tensor],
        grad_output: Tensor,
    ) -> Any:
        count = len(self.cell.shapes())
        params, extra_inputs = params[:count], params[count:]

        def forward(params: list[Tensor], x: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
            x = torch.cat((x, *extra_inputs), -1) if extra_inputs else x
            return self._step(self._bind(params, attributes, self.cell.training), x, states)

        if not self.training:
            return forward(params, x, states), [None] * (count + 1 + len(states))
        new_states: Any
        new_states, vjp = self._vjp(forward, params, x, states)
        self.tracker.current = None  # an error from here on is in torch's backward, not in a line of the step
        with BackwardLocationMode(), _ZerosOnCPU():  # type: ignore[no-untyped-call]
            return new_states, vjp((carries[0] + grad_output, *carries[1:]))

    def _check_states(self, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> None:
        """Check that a step returns its states with their shapes and dtypes.

        Raises:
            UnsupportedError: If a state has another dtype. The next step would then compute in that dtype.
        """
        reference.check_step(self.cell, new, old)
        for name, after, before in zip(self.cell.state, new, old, strict=True):
            if after.dtype is not before.dtype:
                kinds = f"its step returns {name} as {after.dtype} instead of {before.dtype}"
                raise unsupported(f"{kinds}; write .to(x.dtype)", self.tracker.step)


class _ZerosOnCPU(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Create zeros on the CPU where torch would create them on the meta device.

    Some gradients, such as that of ``sgn``, are zeros without memory. For operations that need memory, torch
    turns them into ordinary zeros, but with fake tensors it creates these on the wrong device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Suspend what torch.func doesn't support: hooks for saved tensors, anomaly detection, inference mode."""
    hooks = []
    while (top := top_saved_tensors_hooks(False)) is not None:
        pop_saved_tensors_hooks()
        hooks.append(top)
    try:
        with torch.autograd.set_detect_anomaly(False), torch.inference_mode(False):
            yield
    finally:
        for pack, unpack in reversed(hooks):
            push_saved_tensors_hooks(pack, unpack)


def _vjp(function: Callable[..., tuple[Tensor, ...]], *primals: Any) -> tuple[tuple[Tensor, ...], Any]:
    """Return what ``torch.func.vjp`` returns, computed by torch.autograd."""
    with torch.enable_grad():
        primals = tree_map(lambda primal: primal.detach().requires_grad_(), primals)
        outputs = function(*primals)

    def backward(gradients: tuple[Tensor, ...]) -> Any:
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        inputs, structure = tree_flatten(primals)
        results: Any = [None] * len(inputs)
        if pairs:
            used, used_gradients = zip(*pairs, strict=True)
            results = torch.autograd.grad(used, inputs, used_gradients, allow_unused=True)
        filled = [torch.zeros_like(v) if g is None else g for g, v in zip(results, inputs, strict=True)]
        return tree_unflatten(filled, structure)

    return outputs, backward
