"""Quantization error: for each layer and state over time, and for the whole module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.engines._torch_private import tree_leaves
from unrolled.layers.convert import as_recurrent
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep

_LIMIT = 0.05


@dataclass
class StateError:
    """The quantization error of a state, over all rows and units.

    Attributes:
        rms: Root mean square of the error.
        largest: Largest absolute error.
        relative: ``rms`` divided by the root mean square of the float32 values.
        over_time: ``rms`` of each time step, ``(time,)``, averaged over the batches that have this step.
    """

    rms: float
    largest: float
    relative: float
    over_time: Tensor


@dataclass
class QuantizationReport:
    """The quantization error of a module for batches of data.

    Attributes:
        layers: For each quantized layer the error of each state by name, such as ``"h"``, or
            ``"h_l1_reverse"`` for a stacked or bidirectional layer. Each layer runs on the input that it has
            in the float32 model, so the errors of other layers don't count. For packed inputs, only the error
            of the output is available.
        output: The error of the module's first output, with all layers quantized. Its ``over_time`` has one
            element, because the time axis isn't known.
        limit: The relative error above which a layer is listed in :attr:`inaccurate`.
        score: The scores of the float32 module and of the quantized one, if a scoring function was given.
    """

    layers: dict[str, dict[str, StateError]]
    output: StateError
    limit: float
    score: tuple[float, float] | None = None

    @property
    def inaccurate(self) -> list[str]:
        """Names of the layers with a relative error above the limit, to pass to ``quantize`` as ``keep``."""
        return [
            name
            for name, states in self.layers.items()
            if any(not error.relative <= self.limit for error in states.values())
        ]

    def __str__(self) -> str:
        rows = [("layer", "state", "rms error", "relative", "largest", "first steps", "last steps")]
        for name, states in self.layers.items():
            rows += [(name or "(module)", state, *_cells(error)) for state, error in states.items()]
        rows.append(("output", "", *_cells(self.output)[:3], "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.score is not None:
            before, after = self.score
            change = f" ({(after - before) / abs(before):+.2%})" if before else ""
            lines.append(f"score: {before:.6g} in float32, {after:.6g} quantized{change}")
        if self.inaccurate:
            names = ", ".join(map(repr, self.inaccurate))
            lines.append(
                f"relative error above {self.limit:.0%}: {names}. To keep in float32: keep=[{names}]"
            )
        return "\n".join(lines)


def _cells(error: StateError) -> tuple[str, str, str, str, str]:
    part = max(1, len(error.over_time) // 10)
    ends = error.over_time[:part].mean(), error.over_time[-part:].mean()
    return (
        f"{error.rms:.2g}",
        f"{error.relative:.2%}",
        f"{error.largest:.2g}",
        *(f"{float(end):.2g}" for end in ends),
    )  # type: ignore[return-value]


class ReportFunction:
    """Compare a quantized module with the original.

    It keeps a reference to the original. Copies and pickles of the quantized module don't include it.

    Args:
        module: The quantized module.
        reference: The original.
        layers: Names of the quantized layers.
    """

    def __init__(self, module: nn.Module, reference: nn.Module | None, layers: list[str]) -> None:
        self._module, self._reference, self._layers = module, reference, layers

    def __call__(
        self,
        batches: Iterable[Any],
        score: Callable[[Any], float] | None = None,
        *,
        limit: float = _LIMIT,
        reference: nn.Module | None = None,
    ) -> QuantizationReport:
        """Run both modules on batches of data, and return the differences.

        Args:
            batches: Inputs of the module: a tensor or a tuple of arguments for each call.
            score: A function that takes a module and returns its score, such as the accuracy on test data. It
                is called with the original and with the quantized module.
            limit: The relative error above which the report lists a layer.
            reference: The original. Needed if the quantized module was copied or pickled.

        Raises:
            TypeError: If ``batches`` isn't an iterable of tensors or tuples.
            ValueError: If there are no batches, or ``reference`` is needed.
        """
        reference = self._reference if reference is None else reference
        if reference is None:
            raise ValueError(
                "a copied or pickled module has no float32 model to compare with: pass reference=model"
            )
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches should be a list of inputs of the module, got {type(batches).__name__}: pass [x]"
            )
        output = _Errors()
        layers: dict[str, dict[str, _Errors]] = {name: {} for name in self._layers}
        with torch.no_grad():
            for batch in batches:
                arguments = tuple(batch) if type(batch) in (tuple, list) else (batch,)
                self._compare(reference, arguments, output, layers)
        if not output.count:
            raise ValueError("batches is empty: pass at least one input of the module")
        scores = None if score is None else (float(score(reference)), float(score(self._module)))
        results = {
            name: {state: errors.result() for state, errors in states.items()}
            for name, states in layers.items()
        }
        return QuantizationReport(results, output.result(), limit, scores)

    def _compare(
        self, reference: nn.Module, arguments: Any, output: _Errors, layers: dict[str, dict[str, _Errors]]
    ) -> None:
        """Add the errors of a batch."""
        calls: list[tuple[str, Any, Any]] = []
        handles = [
            reference.get_submodule(name).register_forward_hook(_recorder(name, calls), with_kwargs=True)
            for name in self._layers
        ]
        try:
            expected = reference(*arguments)
        finally:
            for handle in handles:
                handle.remove()
        output.add(_first(self._module(*arguments)).unsqueeze(0), _first(expected).unsqueeze(0))
        steps = dict.fromkeys(self._layers, 0)
        for name, (args, kwargs), result in calls:
            layer = self._module.get_submodule(name)
            for state, (found, right) in _states(
                layer, args, kwargs, result, reference.get_submodule(name)
            ).items():
                errors = layers[name].setdefault(state, _Errors())
                errors.add(found, right, first_step=steps[name])
            if isinstance(layer, SingleStep):
                steps[name] += 1

    def __reduce__(self) -> Any:
        return _restored, (self._module, self._layers)


def _restored(module: nn.Module, layers: list[str]) -> ReportFunction:
    return ReportFunction(module, None, layers)


def _recorder(name: str, calls: list[tuple[str, Any, Any]]) -> Any:
    def record(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        calls.append((name, (args, kwargs), result))

    return record


def _first(result: Any) -> Tensor:
    """Return the first tensor in the output of a module."""
    tensors = [leaf for leaf in tree_leaves(_unpacked(result)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"the module should return a tensor, got {type(result).__name__}")
    return tensors[0].float()


def _unpacked(value: Any) -> Any:
    return value.data if isinstance(value, PackedSequence) else value


def _states(
    layer: nn.Module, args: Any, kwargs: Any, result: Any, reference: nn.Module
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the states of a quantized layer and of the float one in a call, with time as the first axis."""
    assert isinstance(layer, (Recurrent, SingleStep))
    names = list(layer._first.state)
    if isinstance(layer, SingleStep):
        found, right = layer(*args, **kwargs), result
        pairs = zip(
            *(value if isinstance(value, tuple) else (value,) for value in (found, right)), strict=True
        )
        return {name: (a.unsqueeze(0), b.unsqueeze(0)) for name, (a, b) in zip(names, pairs, strict=True)}
    named = {**dict(zip(("x", "state"), args, strict=False)), **kwargs, "all_states": True}
    x, state = named.pop("input", named.get("x")), named.pop("hx", named.get("state"))
    options = {name: value for name, value in named.items() if name not in ("x", "state")}
    if isinstance(x, PackedSequence):  # its rows at each time aren't separated: they count as one step
        found, right = layer(*args, **kwargs)[0], result[0]
        return {names[0]: (found.data.unsqueeze(0), right.data.unsqueeze(0))}
    found = Recurrent.forward(layer, x, state, **options)[2]
    right = Recurrent.forward(as_recurrent(reference), x, state, **options)[2]
    axis = 1 if layer.batch_first and x.dim() == 3 else 0
    suffixes = list(layer._cells) if len(layer._cells) > 1 else [""]
    return {
        f"{name}{suffix}": (found[name][k].movedim(axis, 0), right[name][k].movedim(axis, 0))
        for k, suffix in enumerate(suffixes)
        for name in names
    }


@dataclass
class _Errors:
    """The sums from which a :class:`StateError` is computed."""

    count: int = 0
    squares: float = 0.0
    values: float = 0.0
    largest: float = 0.0
    steps: list[list[float]] = field(default_factory=list)

    def add(self, found: Tensor, right: Tensor, first_step: int = 0) -> None:
        """Add values with time as the first axis."""
        error = (found.double() - right.double()).flatten(1)
        self.count += error.numel()
        self.squares += float(error.square().sum())
        self.values += float(right.double().square().sum())
        self.largest = max(self.largest, float(error.abs().max()))
        for step, value in enumerate(error.square().mean(1).tolist(), first_step):
            while len(self.steps) <= step:
                self.steps.append([])
            self.steps[step].append(value)

    def result(self) -> StateError:
        means = [sum(values) / len(values) for values in self.steps]
        squares = self.squares
        relative = 0.0 if squares == 0 else (squares / self.values) ** 0.5 if self.values else float("inf")
        over_time = torch.tensor(means, dtype=torch.float64).sqrt()
        return StateError((squares / self.count) ** 0.5, self.largest, relative, over_time)
