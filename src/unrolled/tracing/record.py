"""Every recurrent layer of a model traced while the model runs."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import whole
from unrolled.layers.convert import as_recurrent
from unrolled.layers.sequence import SequenceBatch
from unrolled.tracing import hooks
from unrolled.tracing.backward import loss_from_gradients
from unrolled.tracing.hooks import LayerCall, UnseenError
from unrolled.tracing.selection import BatchRows, TraceFilter
from unrolled.tracing.step_recorder import names_of
from unrolled.tracing.trace import Trace, traced

_lock = threading.Lock()
_blocks = 0  # that run, in all threads
_stance: Any = None  # what torch.compile's becomes again after the last of them


@dataclass(eq=False)
class _Layer:
    """A layer, and what is known of its calls.

    Attributes:
        never: why no call of it is recorded.
        not_last: why the last call isn't.
    """

    name: str
    module: nn.Module
    kept: deque[Trace]
    seen: int = 0
    never: str | None = None
    not_last: str | None = None

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.name!r}"


class Record(Mapping[str, Trace]):
    """What :func:`record` gives: traces of a model's recurrent layers, by the names of their modules.

    A mapping of the layers of which there is one: ``rec["encoder.lstm"]`` is that of the last call. The layer
    of a model that is a recurrent layer itself has the name ``""``.
    """

    def __init__(self, model: nn.Module, limits: TraceFilter, calls: int, gradients: bool) -> None:
        self._model = getattr(model, "_orig_mod", model)  # what torch.compile was given
        self._limits, self._gradients = limits, gradients
        self._of: dict[int, _Layer] = {}
        self._layers: dict[str, _Layer] = {}
        for name, module in hooks.layers_of(self._model, "record").items():
            made = _Layer(name, module, deque(maxlen=calls))
            self._layers[name] = self._of.setdefault(id(module), made)
        self._check()
        self._thread = 0
        self._running: contextlib.ExitStack | None = None

    def _check(self) -> None:
        """See which layers can be recorded, and that the limits are of such."""
        known: set[str] = {"x"}
        wrong: list[Exception] = []
        for layer in self._of.values():
            try:
                recurrent = as_recurrent(layer.module)
            except TypeError as error:
                layer.never = str(error)
                continue
            try:
                self._limits.units_of(recurrent.hidden_size)
            except (IndexError, ValueError) as error:
                layer.never = str(error)
                wrong.append(error)
            own = {"x", *names_of(recurrent.cell)}
            known |= own
            if self._limits.names is not None and own.isdisjoint(self._limits.names):
                layer.never = f"it has none of the quantities {', '.join(self._limits.names)}"
        for name in self._limits.names or ():
            if name not in known:
                raise ValueError(f"no layer has a quantity {name!r}: there are {', '.join(sorted(known))}")
        if len(wrong) == len(self._of):
            raise wrong[0]

    def __enter__(self) -> Record:
        if self._running is not None:
            raise RuntimeError("this record is running already: make another one by record(model)")
        self._thread = threading.get_ident()
        self._running = contextlib.ExitStack()
        self._running.enter_context(_uncompiled())
        seen = [layer.module for layer in self._of.values() if layer.never is None]
        self._running.callback(hooks.observe(seen, self._wants, self._take))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def __getitem__(self, name: str) -> Trace:
        """The trace of the last call of a layer.

        Raises:
            KeyError: the model has no such layer, or it wasn't called.
            ValueError: of its last call no trace could be made; why.
        """
        layer = self._layer(name)
        why = layer.never or layer.not_last
        if why is not None:
            raise ValueError(f"there is no trace of {layer}: {why}")
        if not layer.kept:
            others = ", ".join(map(repr, self)) or "none"
            raise KeyError(f"{layer} wasn't called in the block; layers that were: {others}")
        return layer.kept[-1]

    def calls(self, name: str) -> list[Trace]:
        """The traces of a layer's last calls that are kept, the last one at the end.

        Raises:
            KeyError: the model has no such layer.
        """
        return list(self._layer(name).kept)

    def __iter__(self) -> Iterator[str]:
        return (
            layer.name
            for layer in self._of.values()
            if layer.kept and layer.never is None and layer.not_last is None
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        layer = self._layers.get(name) if isinstance(name, str) else None
        return layer is not None and layer.name in iter(self)

    @property
    def nbytes(self) -> int:
        """The bytes of all traces that are kept, the copies of the parameters among them."""
        return _bytes(trace for layer in self._of.values() for trace in layer.kept)

    def __repr__(self) -> str:
        lines = [f"<Record of {type(self._model).__name__}: {_in_words(self.nbytes)} kept"]
        for layer in self._of.values():
            calls = f"{layer.seen} call{'s' * (layer.seen != 1)}"
            why = layer.never or layer.not_last
            text = f"not recorded: {why}" if why else "not called"
            if layer.kept and why is None:
                part = layer.kept[-1].layers[0]
                text = (
                    f"{calls}, {len(layer.kept)} kept, {_in_words(_bytes(layer.kept))}; {part.extent}; "
                    f"{', '.join(part.names)}"
                )
            lines.append(f"  {layer}: {text}")
        return "\n".join(lines) + ">"

    def _layer(self, name: str) -> _Layer:
        if name in self._layers:
            return self._layers[name]
        module = dict(self._model.named_modules(remove_duplicate=False)).get(name)
        known = f"the recurrent layers are {', '.join(map(repr, self._layers))}"
        if hooks.is_single_step(module):
            raise KeyError(f"{name!r} is a single step, which isn't recorded: {hooks.SINGLE_STEPS}; {known}")
        what = "no module of this model" if module is None else f"a {type(module).__name__}"
        raise KeyError(f"{name!r} is {what}: {known}")

    def _wants(self, _: nn.Module) -> bool:
        return threading.get_ident() == self._thread

    def _take(self, module: nn.Module, *call: Any) -> None:
        """A call of a layer, as it comes."""
        layer = self._of[id(module)]
        layer.seen += 1
        try:
            seen = LayerCall.of(module, *call)
            if self._gradients and len(call[-1]) > 2:
                raise UnseenError("gradients=True doesn't follow what comes back through all_states=True")
        except UnseenError as error:
            layer.not_last = f"in its last call {error}"
            return
        with _told_of(layer):
            layer.kept.append(self._trace(layer, seen, call[-1]))
        layer.not_last = None

    def _trace(self, layer: _Layer, seen: LayerCall, returned: Any) -> Trace:
        recurrent, x, state = seen.recurrent, seen.x, seen.state
        index = self._limits.rows_of(SequenceBatch.of(x, recurrent.batch_first, "").batch)
        rows = None if index is None else BatchRows.of(index, x, recurrent.batch_first)
        if rows is not None:
            x, state = rows.of_sequence(x), rows.of_states(state)
        time = SequenceBatch.of(x, recurrent.batch_first, "").time
        selection = self._limits.selection(time, recurrent.hidden_size)
        earlier = [part.cell for part in layer.kept[-1].layers] if layer.kept else None
        if len(layer.kept) == layer.kept.maxlen:
            del layer.kept[0]  # before another one takes memory
        made, result = traced(layer.module, recurrent, x, state, seen.drawn_from, selection, rows, earlier)
        there = seen.as_input(seen.output), seen.final
        if rows is not None and not hooks.agree(
            result, (rows.of_sequence(there[0]), rows.of_states(there[1]))
        ):
            # the step draws random numbers, or its rows depend on each other
            rows, selection = None, replace(selection, rows=index)
            made, result = traced(
                layer.module, recurrent, seen.x, seen.state, seen.drawn_from, selection, None, earlier
            )
        if rows is None and not hooks.agree(result, there):
            warnings.warn(f"the trace of {layer} {hooks.DIFFERS}", stacklevel=2)
        trace = weakref.ref(made)

        def reached(output: Tensor | None, states: list[Tensor | None]) -> None:
            found = trace()
            if found is None or found.layers[0].gradients:
                return
            if rows is not None:
                output = None if output is None else rows.of_sequence(output)
                states = [None if part is None else rows.of_states(part) for part in states]
            found.backward(loss_from_gradients(output, states))
            found.forget()

        if not self._gradients or not seen.on_backward(returned, reached):
            made.forget()
        return made


def record(
    model: nn.Module,
    *,
    steps: Any = None,
    rows: Any = None,
    names: Iterable[str] | None = None,
    units: Any = None,
    calls: int = 1,
    gradients: bool = False,
) -> Record:
    """Trace every recurrent layer of a model, ours and torch.nn's, while the model runs.

    ::

        with unrolled.record(model) as rec:
            model(x).sum().backward()
        rec["encoder.lstm"]["f"]              # a Trace, by the name of the module
        rec["encoder.lstm"].gradient("f")     # with gradients=True

    The model's calls run as without it: the same bits and random draws, hooks, gradients and engine. What a
    layer was given is then run once more, on the reference engine, for the trace. Seen are the calls of this
    thread. A model that ``torch.compile`` compiled runs uncompiled in the
    block. Single steps (cells) are not recorded: what a model does between their calls is its own affair.

    Where what ran once more gives something else than the call, a warning says so.

    The memory that it takes is what the limits leave. For each kept call that is: for every kept step and row
    the kept units of the kept quantities; the input ``x``, if it is among the names; where steps are limited,
    but neither names nor units, the states before each kept step, so that ``explain`` can tell every number;
    the initial and final states; and a copy of the layer's parameters, one for all calls between which they
    don't change. While a layer is traced there are its inputs and outputs of the kept rows beside that; where
    its step draws random numbers or its rows depend on each other, those of all rows. ``gradients`` take what
    a backward of the kept rows through all steps takes.

    Args:
        model: any module that holds recurrent layers.
        steps: which time steps are kept: a number, a slice, a range or a list; negative ones count from the
            end of the longest of the kept rows. None: all. A trace takes and shows their true numbers.
        rows: which rows of the batch: the trace is of them alone, counted anew from 0. None: all.
        names: which quantities, ``"x"`` being the input. None: all.
        units: which units of the hidden size. A quantity of several times as many features, such as the sums
            of all gates, has these units of each part; one whose features don't divide so is kept whole.
            None: all. A trace shows their true numbers.
        calls: of how many calls of each layer, the last ones, the traces are kept.
        gradients: after a backward that reaches a traced call, in the block or later, its trace gets the
            gradient through time of that loss: ``∂loss/∂quantity``. It runs the layer once more, on all steps
            of the kept rows. A second backward changes nothing.

    Raises:
        TypeError, ValueError, IndexError: no module, one without recurrent layers, or a limit that can't be.
            A step or row that a call hasn't is told in that call.
    """
    limits = TraceFilter.of(steps, rows, names, units)
    if not isinstance(gradients, bool):
        raise TypeError(f"gradients should be of type bool, got {gradients!r}")
    return Record(model, limits, whole("calls", calls), gradients)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Have what is compiled run as it was written, or no call would be seen; blocks may end in any order."""
    global _blocks, _stance
    with _lock:
        if _stance is None and "torch._dynamo" in sys.modules:
            _stance = torch.compiler.set_stance("force_eager")
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks and _stance is not None:
                _stance.__exit__(None, None, None)
                _stance = None


@contextlib.contextmanager
def _told_of(layer: _Layer) -> Iterator[None]:
    """Name the layer in what is wrong with a limit."""
    try:
        yield
    except (IndexError, ValueError) as error:
        raise type(error)(f"record of {layer}: {error}") from None


def _bytes(traces: Iterable[Trace]) -> int:
    held: dict[int, int] = {}
    for trace in traces:
        held |= trace.storages()
    return sum(held.values())


def _in_words(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
