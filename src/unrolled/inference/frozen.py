"""Layers with frozen weights: packed once, and then called with little overhead."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from unrolled.engines.native.kernel import launch
from unrolled.engines.native.prepacked import PrepackedKernel
from unrolled.inference.plans import Plan, PlanCache, memoryless
from unrolled.inference.weight_snapshot import WeightSnapshot, is_plain
from unrolled.layers.recurrent import Recurrent


class frozen:  # noqa: N801  # used in a with statement, as unrolled.engine
    """Promise that the weights of a model's recurrent layers don't change inside a ``with`` block.

    ::

        with torch.no_grad(), unrolled.frozen(model):
            for x in stream:
                y = model(x)

    Inference runtimes pack the weights of a model once, when they load it. A torch layer can't, because its
    weights may change between calls. Inside this block, each layer packs its weights at its first call, in
    the order in which its kernel reads them. Later calls skip the packing and most checks. The results are
    bit-identical. This pays off for short calls: single time steps and small layers.

    It applies to float32 and float64 on the native engine, to calls that record no gradients, and to inputs
    that are not packed sequences. Other calls run as usual. A call raises an error if torch detects that a
    weight was changed. A change that torch can't detect (``weight.data``, NumPy, another process) has no
    effect before the end of the block. A change of a Python value that a step reads takes effect at once.

    Args:
        module: A layer, or a model that contains layers.

    Raises:
        TypeError: If ``module`` is not a torch module.
        RuntimeError: In a call of a layer, if a weight was changed or replaced inside the block.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"frozen expects a torch.nn.Module, got {type(module).__name__}")
        self._layers = [layer for layer in module.modules() if isinstance(layer, Recurrent)]
        self._previous: list[Any] = []

    def __enter__(self) -> frozen:
        self._previous = [layer._frozen for layer in self._layers]
        for layer in self._layers:
            layer._frozen = FrozenCalls(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, previous in zip(self._layers, self._previous, strict=True):
            layer._frozen = previous


class FrozenCalls(PlanCache["_FrozenPlan"]):
    """The calls of a layer with packed weights; the arguments are those of :class:`PlanCache`."""

    def __init__(self, layer: Recurrent, allow_changes: bool = False) -> None:
        super().__init__(layer, allow_changes)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the layer isn't frozen

    def __call__(self, x: Any, state: Any) -> tuple[Any, Any] | None:
        """Run the layer, and return its output and final states, or None if it must run as usual.

        Raises:
            RuntimeError: If a weight has changed.
        """
        plan = self.find_plan(x)
        if plan is None:
            return None
        initial: tuple[Tensor, ...] | None = None
        if state is not None:
            is_sequence = type(state) in (tuple, list)
            initial = tuple(state) if is_sequence else (state,)
            if is_sequence is not plan.has_several_states or not plan.supports(initial):
                return None  # the layer converts the state, or raises an error
        if torch.is_grad_enabled() and (
            x.requires_grad
            or any(part.requires_grad for part in initial or ())
            or self._snapshot.requires_grad()
        ):
            return None
        return plan.run(x, initial)

    def _create_plan(
        self, kernels: list[list[PrepackedKernel]], shape: torch.Size, snapshot: WeightSnapshot
    ) -> _FrozenPlan:
        return _FrozenPlan(kernels, shape, snapshot)


class _FrozenPlan(Plan):
    """The kernels of all layers and directions for inputs of one shape.

    Attributes:
        has_several_states: Whether the cell has more than one state, so that states are tuples.
    """

    def __init__(
        self, kernels: list[list[PrepackedKernel]], shape: torch.Size, snapshot: WeightSnapshot
    ) -> None:
        widths = kernels[0][0].widths
        super().__init__(shape, widths[0], snapshot)
        self._kernels = kernels
        self._single_kernel = kernels[0][0] if len(kernels) == len(kernels[0]) == 1 else None
        directions = len(kernels) * len(kernels[0])
        self._state_templates = [
            memoryless(directions, self._batch, width, dtype=snapshot.dtype) for width in widths
        ]
        self._state_shapes = [part.shape for part in self._state_templates]
        self.has_several_states = len(widths) > 1

    def supports(self, state: tuple[Any, ...]) -> bool:
        """Return whether these are initial states with the right number, shapes, dtype and device."""
        if len(state) != len(self._state_shapes):
            return False
        for part, shape in zip(state, self._state_shapes, strict=True):
            if type(part) not in (Tensor, Parameter) or part.shape != shape or part.dtype is not self._dtype:
                return False
            if not is_plain(part):
                return False
        return True

    def run(self, x: Tensor, initial: tuple[Tensor, ...] | None) -> tuple[Tensor, Any]:
        """Return the output and the final states, as the layer returns them."""
        x = (x.transpose(0, 1) if self._transposed else x).contiguous()
        final = [torch.empty_like(part) for part in self._state_templates]
        final_addresses = [part.data_ptr() for part in final]
        if initial is None:
            initial_addresses = None
        else:
            initial = tuple([part.contiguous() for part in initial])
            initial_addresses = [part.data_ptr() for part in initial]
        if self._single_kernel is not None:
            output = torch.empty_like(self._output_template)
            self._single_kernel.run(x.data_ptr(), initial_addresses, output.data_ptr(), final_addresses)
        else:
            output = self._run_layers(x, initial_addresses, final_addresses)
        output = output.transpose(0, 1) if self._transposed else output
        return output, tuple(final) if self.has_several_states else final[0]

    def _run_layers(self, x: Tensor, initial: list[int] | None, final: list[int]) -> Tensor:
        """Run all layers and directions. ``initial`` and ``final`` are addresses of states."""
        direction_index = 0
        for kernels in self._kernels:
            outputs = [torch.empty_like(self._output_template) for _ in kernels]
            calls = []
            for kernel, output in zip(kernels, outputs, strict=True):
                calls.append(kernel.call(x.data_ptr(), initial, output.data_ptr(), final, direction_index))
                direction_index += 1
            launch(calls)
            for kernel in kernels:
                kernel.mark_packed()
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x
