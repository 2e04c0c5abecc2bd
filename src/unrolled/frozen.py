"""Layers whose weights don't change for a while: packed once, called with the least that a call can cost."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import engines
from unrolled.engines import native
from unrolled.engines.native.loop import execute
from unrolled.engines.native.route import Route, Weights
from unrolled.layers import Recurrent
from unrolled.sequence import Sequence


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
            layer._frozen = _Frozen(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            layer._frozen = before


class _Frozen:
    """The calls of a frozen layer: they return None where the layer has to go its usual way."""

    def __init__(self, layer: Recurrent) -> None:
        self._layer = layer
        self._held = tuple(map(id, layer._parameters.values()))
        self._versions = [(param, param._version) for param in layer.parameters()]
        self._trains = any(param.requires_grad for param, _ in self._versions)
        self._dtype = self._versions[0][0].dtype if self._versions else None
        self._weights: list[list[Weights | None]] | None = None  # by layer and direction
        self._routes: dict[Any, list[list[Route]]] = {}

    def __call__(self, x: Any, state: Any) -> tuple[Any, Any] | None:
        layer = self._layer
        if type(x) is not Tensor or x.dtype is not self._dtype or x.dim() != 3 or not x.is_cpu:
            return None
        if (
            torch.is_grad_enabled() and (self._trains or x.requires_grad)
        ) or engines.transformed() is not None:
            return None
        steps = x.transpose(0, 1) if layer.batch_first else x
        time, batch, features = steps.shape
        if not steps.is_contiguous() or features != layer.input_size or time == 0 or batch == 0:
            return None
        if (layer.training and layer.dropout > 0) or engines.chosen() == "reference":
            return None
        self._check()
        key = (time, batch, torch.get_num_threads())
        routes = self._routes.get(key)
        if routes is None:
            routes = self._made(time, batch)
            if not routes:
                return None
            self._routes[key] = routes
        initial = (
            None if state is None else layer._initial(state, Sequence.of(x, layer.batch_first, layer._label))
        )
        output, final = _run(routes, steps, initial)
        return output.transpose(0, 1) if layer.batch_first else output, final if len(final) > 1 else final[0]

    def _check(self) -> None:
        for param, version in self._versions:
            if param._version != version:
                break
        else:
            if tuple(map(id, self._layer._parameters.values())) == self._held:
                return
        raise RuntimeError(
            f"{type(self._layer).__name__}: a weight was changed inside unrolled.frozen(...); change weights "
            "outside the block"
        )

    def _made(self, time: int, batch: int) -> list[list[Route]]:
        """The routes of an input shape; none where the native engine can't take them so."""
        if self._weights is None:
            self._weights = [
                [native.weights(self._layer._bind(suffix)) for suffix in suffixes]
                for suffixes in self._layer._stack
            ]
        threads = torch.get_num_threads()
        every = [weights for row in self._weights for weights in row]
        if any(weights is None for weights in every):
            return []
        return [
            [
                Route(weights, time, batch, back, 1 if len(row) == 2 == threads else threads)
                for weights, back in zip(row, (False, True), strict=False)
                if weights is not None
            ]
            for row in self._weights
        ]


def _run(
    routes: list[list[Route]], x: Tensor, initial: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    time, batch, _ = x.shape
    widths = routes[0][0].widths
    lanes = len(routes) * len(routes[0])
    final = tuple([x.new_empty(lanes, batch, width) for width in widths])
    first = None if initial is None else [part.contiguous() for part in initial]
    at = 0
    for row in routes:
        outputs, jobs = [], []
        for route in row:
            output = x.new_empty(time, batch, widths[0])
            jobs.append(route.job(x, first, output, final, at))
            outputs.append(output)
            at += 1
        execute(jobs)
        for route in row:
            route.done()
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return x, final
