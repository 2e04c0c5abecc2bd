"""Layers with frozen weights: packed once, and then called with little overhead."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from unrolled.engines.native.kernel import launch
from unrolled.engines.native.prepacked import PrepackedKernel
from unrolled.inference.call_override import override_calls
from unrolled.inference.custom_calls import has_custom_call
from unrolled.inference.plans import Plan, PlanCache, memoryless
from unrolled.inference.weight_snapshot import WeightSnapshot, is_plain
from unrolled.layers.cell_layers import as_sequence, layer_of_cell
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep


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
    that are not packed sequences. Other calls run as usual. So do those of torch.nn's layers and cells, and
    those of single-step cells in other threads than that of the block. A call raises an error if torch
    detects that a weight was changed. A change that torch can't detect (``weight.data``, NumPy, another
    process) has no effect before the end of the block. A change of a Python value that a step reads takes
    effect at once.

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
        self._cells = [cell for cell in module.modules() if isinstance(cell, SingleStep)]
        self._previous: list[Any] = []
        self._overrides = contextlib.ExitStack()

    def __enter__(self) -> frozen:
        self._previous = [layer._frozen for layer in self._layers]
        for layer in self._layers:
            layer._frozen = FrozenCalls(layer)
        if self._cells:
            frozen_cells = {id(cell): FrozenCell(cell) for cell in self._cells}

            def call_cell(cell: Any, call: Any, args: Any, kwargs: Any) -> Any:
                result = None
                if not kwargs and len(args) in (1, 2) and not has_custom_call(cell):
                    result = frozen_cells[id(cell)](*args)
                return call(*args, **kwargs) if result is None else result

            self._overrides.enter_context(override_calls(self._cells, call_cell))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, previous in zip(self._layers, self._previous, strict=True):
            layer._frozen = previous
        self._overrides.close()


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


class FrozenCell:
    """The calls of a single-step cell with packed weights: sequences of one time step.

    Args:
        cell: The cell.
        allow_changes: Pack the weights again if they have changed. If False, a change is an error.
    """

    def __init__(self, cell: SingleStep, allow_changes: bool = False) -> None:
        self._cell, self._layer = cell, layer_of_cell(cell)
        self._calls = FrozenCalls(self._layer, allow_changes)
        self._calls.label = type(cell).__name__

    def __call__(self, x: Any, state: Any = None) -> Any:
        """Run a step, and return the new state, or None if the cell must run as usual.

        Raises:
            RuntimeError: If a weight has changed.
        """
        if type(x) is not Tensor or x.dim() != 2 or torch.compiler.is_compiling():
            return None
        if not self._update():
            return None
        result = self._calls(x.unsqueeze(0), None if state is None else as_sequence(state))
        if result is None:
            return None
        final = result[1]
        return tuple(part[0] for part in final) if isinstance(final, tuple) else final[0]

    def _update(self) -> bool:
        """Give the layer the parameters and the mode of the cell; return whether all are parameters."""
        layer, own, parameters = self._layer, self._cell._parameters, self._layer._parameters
        if self._cell.training is not layer.training:
            layer.train(self._cell.training)
        for name, full_name, _ in layer._named["_l0"]:
            parameter = own.get(name)
            if parameter is None:
                return False  # computed in each call, by a parametrization
            if parameters.get(full_name) is not parameter:
                parameters[full_name] = parameter  # the calls notice that it is another one
        return True


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
