"""Layers whose weights don't change for a while: packed once, called with the least that a call can cost."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.engines.native.kernel import launch
from unrolled.engines.native.prepacked import PrepackedKernel
from unrolled.inference.weight_snapshot import IOLayout, WeightSnapshot
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import SequenceBatch


class frozen:  # noqa: N801  # used in a with statement, as unrolled.engine
    """Promise that the weights of a model's recurrent layers don't change inside a ``with`` block.

    ::

        with torch.no_grad(), unrolled.frozen(model):
            for x in stream:
                y = model(x)

    Runtimes that load a model for inference take its weights once. torch's layers can't, since their
    weights may change between two calls; inside this block ours do so too: at the first call each layer packs
    its weights as its loop reads them, and later calls are spared that, and most checks. The numbers are
    the same, bit for bit. It pays where calls are short: single steps, small layers.

    It holds for float32 and float64 on the native engine, for calls that record no gradients, and for
    sequences that are not packed; other calls run as they do outside. A change of a weight that torch
    notices is an error; one behind its back (``weight.data``, NumPy, another process) is not seen before the
    end of the block.

    Args:
        module: a layer, or a model that holds some.

    Raises:
        TypeError: it is no module.
        RuntimeError: in a call of a layer: a weight was changed or replaced.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"frozen takes a module, got {type(module).__name__}")
        self._layers = [layer for layer in module.modules() if isinstance(layer, Recurrent)]
        self._before: list[Any] = []

    def __enter__(self) -> frozen:
        self._before = [layer._frozen for layer in self._layers]
        for layer in self._layers:
            layer._frozen = FrozenCalls(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            layer._frozen = before


class FrozenCalls:
    """The calls of a frozen layer: they return None where the layer has to go its usual way.

    Args:
        layer: the layer.
        renewed: take changed weights anew, where else they are an error.
    """

    def __init__(self, layer: Recurrent, renewed: bool = False) -> None:
        self._layer, self._renewed = layer, renewed
        self._held = WeightSnapshot(layer)
        self._plans: dict[Any, _Plan | None] = {}

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the layer isn't frozen

    def __call__(self, x: Any, state: Any) -> tuple[Any, Any] | None:
        """The output and the final states, as the layer returns them."""
        layer, held = self._layer, self._held
        if held.changed():
            if not self._renewed:
                raise RuntimeError(
                    f"{type(layer).__name__}: a weight was changed inside unrolled.frozen(...); change "
                    "weights outside the block"
                )
            held = self._held = WeightSnapshot(layer)
            self._plans.clear()
        if not held.takes(x):
            return None
        threads = torch.get_num_threads()
        key = (x.shape, threads)
        try:
            plan = self._plans[key]
        except KeyError:
            routes = held.routes(x.shape, threads)
            plan = self._plans[key] = None if routes is None else _Plan(routes, x.shape, held)
        if plan is None:
            return None
        given: tuple[Tensor, ...] | None = None
        if state is not None:
            given = state if plan.several else (state,)
            if not plan.takes(given):
                given = layer._initial(state, SequenceBatch.of(x, layer.batch_first, layer._label))
        if torch.is_grad_enabled() and (
            held.trains or x.requires_grad or any(part.requires_grad for part in given or ())
        ):
            return None
        return plan.run(x, given)


class _Plan(IOLayout):
    """All routes of a layer for inputs of one shape.

    Attributes:
        several: whether the cell keeps several states.
    """

    def __init__(self, routes: list[list[PrepackedKernel]], shape: torch.Size, held: WeightSnapshot) -> None:
        widths = routes[0][0].widths
        super().__init__(shape, widths[0], held)
        self._routes = routes
        self._alone = routes[0][0] if len(routes) == len(routes[0]) == 1 else None
        lanes = len(routes) * len(routes[0])
        self._states = [
            torch.empty(lanes, self._batch, width, dtype=held.dtype, device="cpu") for width in widths
        ]
        self._shapes = [part.shape for part in self._states]
        self.several = len(widths) > 1

    def takes(self, state: Any) -> bool:
        """Whether these are initial states, of the right shapes each."""
        if type(state) is not tuple or len(state) != len(self._states):
            return False
        for part, shape in zip(state, self._shapes, strict=True):
            if type(part) is not Tensor or part.shape != shape or part.dtype is not self._dtype:
                return False
            if not part.is_cpu or part.is_neg():
                return False
        return True

    def run(self, x: Tensor, initial: tuple[Tensor, ...] | None) -> tuple[Tensor, Any]:
        """The output and the final states, as the layer returns them."""
        x = (x.transpose(0, 1) if self._turned else x).contiguous()
        final = [torch.empty_like(part) for part in self._states]
        ends = [part.data_ptr() for part in final]
        if initial is None:
            starts = None
        else:
            initial = tuple([part.contiguous() for part in initial])
            starts = [part.data_ptr() for part in initial]
        if self._alone is not None:
            output = torch.empty_like(self._output)
            self._alone.run(x.data_ptr(), starts, output.data_ptr(), ends)
        else:
            output = self._through(x, starts, ends)
        output = output.transpose(0, 1) if self._turned else output
        return output, tuple(final) if self.several else final[0]

    def _through(self, x: Tensor, initial: list[int] | None, final: list[int]) -> Tensor:
        """Through several lanes."""
        lane = 0
        for row in self._routes:
            outputs = [torch.empty_like(self._output) for _ in row]
            jobs = []
            for route, output in zip(row, outputs, strict=True):
                jobs.append(route.job(x.data_ptr(), initial, output.data_ptr(), final, lane))
                lane += 1
            launch(jobs)
            for route in row:
                route.done()
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x
