"""The health of a model's recurrent layers while it trains."""

from __future__ import annotations

import csv
import functools
import numbers
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import whole
from unrolled.layers.module import at_rest
from unrolled.tracing import hooks
from unrolled.tracing.health import FIELDS, Figures, examine
from unrolled.tracing.hooks import DIFFERS, LayerCall, UnseenError

_NOT_SCALARS = ("call", "module", "layer", "direction", "quantity", "function")


@dataclass(eq=False)
class _Layer:
    """A layer, and when it is looked at next.

    Attributes:
        seen: its training calls so far.
        others: its calls so far in eval mode or without gradients.
        put_off: how many looks that were due waited, for the share of time that looking may take.
        at: the number of the call that was looked at last.
        rests: until when it is left alone, on the clock of ``time.perf_counter``.
        spent: the seconds that looking at it took.
        told: whether it was told why nothing can be said of it.
    """

    name: str
    seen: int = 0
    others: int = 0
    put_off: int = 0
    at: int = 0
    rests: float = 0.0
    spent: float = 0.0
    told: bool = False

    def __str__(self) -> str:
        others = f", {self.others} in eval mode or without gradients" * bool(self.others)
        put_off = f", looks put off for the share of time: {self.put_off}" * bool(self.put_off)
        return f"{self.name!r}: {self.seen} training calls{others}{put_off}"


class Watch:
    """What :func:`watch` gives: the records so far, in ``records``; iterating gives those that are new.

    Attributes:
        records: one dictionary for each quantity of each layer and direction of each call looked at.
    """

    def __init__(self, model: nn.Module, every: int, rows: int, share: float | None) -> None:
        by_name = hooks.layers_of(model, "watch")
        for name, module in model.named_modules():
            if "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None:
                what = f"module {name!r}" if name else "the model"
                raise ValueError(
                    f"watch can't see calls inside of what torch.compile made, as {what} is: watch and train "
                    "the model as it was before"
                )
        self._every, self._rows, self._share = every, rows, share
        modules = {id(module): module for module in by_name.values()}
        self._layers: dict[int, _Layer] = {}
        for name, module in by_name.items():
            self._layers.setdefault(id(module), _Layer(name))
        self.records: list[Figures] = []
        self._given = self._given_scalars = 0
        self._begun = time.perf_counter()
        self._end: Any = hooks.observe(list(modules.values()), self._wants, self._take)

    @property
    def seconds(self) -> float:
        """How long looking has taken."""
        return sum(layer.spent for layer in self._layers.values())

    def close(self) -> None:
        """Look at no further call; the records stay."""
        if self._end is not None:
            self._end()
            self._end = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        told = any(layer.told for layer in self._layers.values())
        if kind is None and not self.records and not told:
            warnings.warn(f"nothing was recorded by {self!r}: {self._why_empty()}", stacklevel=2)

    def __iter__(self) -> Iterator[Figures]:
        """The records that iterating hasn't given yet."""
        while self._given < len(self.records):
            self._given += 1
            yield self.records[self._given - 1]

    def scalars(self) -> Iterator[tuple[str, float, int]]:
        """The figures that this hasn't given yet, for TensorBoard: ``writer.add_scalar(*scalar)``.

        Yields:
            ``"encoder.lstm/l0_forward/f/saturated"``, the figure, and the number of the call.
        """
        while self._given_scalars < len(self.records):
            self._given_scalars += 1
            record = self.records[self._given_scalars - 1]
            where = f"l{record['layer']}_{record['direction']}/{record['quantity']}"
            where = f"{record['module']}/{where}" if record["module"] else where
            for name in FIELDS:
                if name not in _NOT_SCALARS and record[name] is not None:
                    yield f"{where}/{name}", float(record[name]), record["call"]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all records, a line each; what doesn't apply is left empty.

        Raises:
            OSError: the file can't be written.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.records)

    def _why_empty(self) -> str:
        seen = max(layer.seen for layer in self._layers.values())
        if not seen:
            return "a watch looks at calls in training mode with gradients, and none was seen"
        if seen < self._every:
            return f"the first look is at call {self._every}: give a smaller every"
        return "no backward reached the calls that were looked at"

    def __repr__(self) -> str:
        calls = ", ".join(map(str, self._layers.values()))
        state = "closed" if self._end is None else f"every {self._every}"
        return f"<Watch, {state}; {calls}; {len(self.records)} records>"

    def _wants(self, module: nn.Module) -> bool:
        layer = self._layers[id(module)]
        if not module.training or not torch.is_grad_enabled():
            layer.others += 1
            return False
        layer.seen += 1
        since = layer.seen - layer.at
        if since < self._every:
            return False
        rests = time.perf_counter() < layer.rests
        layer.put_off += rests and since % self._every == 0
        return not rests

    def _take(self, module: nn.Module, *call: Any) -> None:
        """A call that is to be looked at."""
        begun = time.perf_counter()
        layer = self._layers[id(module)]
        layer.at = number = layer.seen
        try:
            seen = LayerCall.of(module, *call)
            if not seen.output.numel():
                raise UnseenError("it was given a batch without rows")
        except (UnseenError, TypeError) as error:
            self._tell(layer, str(error))
            return
        with at_rest(module):
            seen.recurrent = seen.recurrent.with_cells()
        versions = [one._version for one in module.parameters()]
        spent = [time.perf_counter() - begun]

        def reached(output: Tensor | None, states: list[Tensor | None]) -> None:
            begun = time.perf_counter()
            if self._end is None or len(spent) > 1:  # closed, or reached before
                return
            spent.append(0.0)
            held = (*module.parameters(), *seen.recurrent.parameters())
            if any(type(one) not in (Tensor, nn.Parameter) for one in held):
                self._tell(layer, "its parameters are of a subclass of torch.Tensor (spread over processes?)")
                return
            if versions != [one._version for one in module.parameters()]:
                self._tell(layer, "its parameters change before a backward ends")
                return
            differs = functools.partial(self._tell, layer, "what ran again " + DIFFERS, "may be wrong about")
            found = examine(seen, output, states, self._rows, differs)
            place = {"call": number, "module": layer.name}
            self.records += [figures | place for figures in found]
            now = time.perf_counter()
            cost = now - begun + spent[0]
            layer.spent += cost
            if self._share is not None:
                makes_up = len(self._layers) / self._share  # each layer has its part of the share
                layer.rests = max(now + cost * makes_up, self._begun + (layer.spent + cost) * makes_up)

        seen.on_backward(call[-1], reached)

    def _tell(self, layer: _Layer, why: str, what: str = "can't tell the health of") -> None:
        if not layer.told:
            layer.told = True
            warnings.warn(f"watch {what} {layer.name!r}: {why}", stacklevel=2)


def watch(model: nn.Module, every: int = 100, *, rows: int = 4, share: float | None = 0.05) -> Watch:
    """Look at every so many training calls of each recurrent layer of a model: its health, as plain records.

    ::

        with unrolled.watch(model) as watch:
            for x, y in batches:
                ...                                       # train as ever
                for tag, value, call in watch.scalars():  # what is new, for TensorBoard
                    writer.add_scalar(tag, value, call)
        watch.to_csv("health.csv")

    A training call is one in training mode with gradients enabled. After a backward that reaches it, some of
    its rows run once more, forward and backward. Training goes on as without it: the same weights, bit for
    bit, and the same random draws. Calls inside of what ``torch.compile`` made are not seen, nor single steps
    (cells). A block that ends without a record warns and says why.

    A record has the number of the ``call``, from 1; the ``module`` by name; ``layer`` and ``direction``; the
    ``quantity``, and of it:

    * ``mean`` and ``std`` over steps, rows and units.
    * ``function`` and ``saturated``, where a function that flattens out made it (sigmoid, tanh, relu, …): the
      share of numbers where its slope is below 5 % of its steepest.
    * of a state: ``dead``, how many units never change over steps and rows but for rounding; ``norm_first``
      and ``norm_last``, its norm after the first and the last step that run, the mean over rows;
      ``norm_growth``, by what factor that grows in a step. ``gradient_first``, ``gradient_last`` and
      ``gradient_growth`` are the same of the loss's gradient, which flows from the last step to the first: a
      growth well below 1 means that it vanishes, above 1 that it explodes.
    * ``radius``: a record of its own for each ``hidden × hidden`` block of a parameter that weighs a state:
      its spectral radius.

    None stands for what doesn't apply; NaN and infinity are told as they are.

    Args:
        model: any module that holds recurrent layers, ours or torch.nn's.
        every: training calls of a layer from one look to the next, at least; the first look is at this one.
        rows: of how many rows of the batch, the first ones; fewer where sequences are longer than 1000 steps.
            Where a step draws random numbers or its rows depend on each other, it is all rows.
        share: of the time of training, the most that looking may take: what each look takes is measured, and
            the next one waits until, with it, all would be no more than this share of the time since the
            watch began, and the last one no more than that of the time since it. None: however long it takes.

    Raises:
        TypeError, ValueError: no module, one without recurrent layers or made by ``torch.compile``, or an
            argument that can't be.
    """
    given = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if share is not None and not (given and 0 < share <= 1):
        raise ValueError(f"share should be a number above 0 and up to 1, or None, got {share!r}")
    return Watch(model, whole("every", every), whole("rows", rows), share)
