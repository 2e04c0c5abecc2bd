"""Tracing of all recurrent layers of a model while the model runs."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from unrolled.cells.base import Cell, positive_int
from unrolled.layers.cell_layers import first_state, is_single_step
from unrolled.layers.sequence import SequenceBatch
from unrolled.tracing import display, eager_stance, hooks
from unrolled.tracing.backward import loss_from_gradients
from unrolled.tracing.call_order import CallOrder, ModuleCall
from unrolled.tracing.call_sequence import CallSequence, is_one_step
from unrolled.tracing.equivalent_layer import equivalent_layer
from unrolled.tracing.hooks import LayerCall, UnsupportedCallError
from unrolled.tracing.recorded_layer import RecordedLayer, format_bytes, total_bytes
from unrolled.tracing.selection import BatchRows, TraceFilter
from unrolled.tracing.step_recorder import quantity_names
from unrolled.tracing.trace import Trace, run_traced


class Record(Mapping[str, Trace]):
    """The result of :func:`record`: traces of a model's recurrent layers and cells, by their names.

    It is a mapping of the layers that have a trace. ``rec["encoder.lstm"]`` is the trace of the layer's last
    call. If the model itself is a recurrent layer, its name is ``""``.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module, trace_filter: TraceFilter, calls: int, gradients: bool) -> None:
        self.model = getattr(model, "_orig_mod", model)  # the module inside of torch.compile's wrapper
        self._filter, self._gradients = trace_filter, gradients
        self._layers_by_id: dict[int, RecordedLayer] = {}
        self._layers_by_name: dict[str, RecordedLayer] = {}
        for name, module in hooks.require_recurrent_layers(self.model, "record").items():
            layer = RecordedLayer(name, module, deque(maxlen=calls))
            self._layers_by_name[name] = self._layers_by_id.setdefault(id(module), layer)
        self._check_filter()
        self._order = CallOrder(self.model, [name for name, _ in self._recordable()])
        self.thread = 0  # that the block runs in
        self._running: contextlib.ExitStack | None = None

    def _check_filter(self) -> None:
        """Find the layers that can't be recorded. Raise an error if the filter fits no layer."""
        known: set[str] = {"x"}
        errors: list[Exception] = []
        for layer in self._layers_by_id.values():
            try:
                recurrent = equivalent_layer(layer.module)
            except TypeError as error:
                layer.never_recorded = str(error)
                continue
            try:
                self._filter.selected_units(recurrent.hidden_size)
            except (IndexError, ValueError) as error:
                layer.never_recorded = str(error)
                errors.append(error)
            names = {"x", *quantity_names(recurrent.cell)}
            known |= names
            if self._filter.names is not None and names.isdisjoint(self._filter.names):
                layer.never_recorded = f"it has none of the quantities {', '.join(self._filter.names)}"
        for name in self._filter.names or ():
            if name not in known:
                available = ", ".join(sorted(known))
                raise ValueError(f"no layer has a quantity {name!r}: choose from {available}")
        if len(errors) == len(self._layers_by_id):
            raise errors[0]

    def _recordable(self) -> list[tuple[str, RecordedLayer]]:
        return [(name, layer) for name, layer in self._layers_by_name.items() if not layer.never_recorded]

    def __enter__(self) -> Record:
        if self._running is not None:
            raise RuntimeError("this record is already running: create another one with record(model)")
        self.thread = threading.get_ident()
        self._running = contextlib.ExitStack()
        self._running.callback(eager_stance.end, self)
        eager_stance.begin(self)
        modules = [layer.module for _, layer in self._recordable()]
        self._running.callback(hooks.observe_calls(modules, self._should_record, self._on_call))
        self._running.callback(self._order.observe())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def __getitem__(self, name: str) -> Trace:
        """Return the trace of a layer's last call. Consecutive calls of one time step each are one trace.

        Raises:
            KeyError: If the model has no such layer, or the layer wasn't called.
            ValueError: If the last call couldn't be traced. The message says why.
        """
        layer = self._layer(name)
        if layer.not_recorded is not None:
            raise ValueError(f"there is no trace of {layer}: {layer.not_recorded}")
        if not layer.traces:
            others = ", ".join(map(repr, self)) or "none"
            called = "ran none of the selected steps" if layer.call_count else "wasn't called in the block"
            raise KeyError(f"{layer} {called}; recorded layers: {others}")
        return layer.traces[-1]

    def calls(self, name: str) -> list[Trace]:
        """Return the recorded traces of a layer, the last call, or sequence of steps, at the end.

        Raises:
            KeyError: If the model has no such layer.
        """
        return list(self._layer(name).traces)

    def __iter__(self) -> Iterator[str]:
        return (
            layer.name for layer in self._layers_by_id.values() if layer.traces and layer.not_recorded is None
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        layer = self._layers_by_name.get(name) if isinstance(name, str) else None
        return layer is not None and layer.name in iter(self)

    @property
    def call_order(self) -> list[ModuleCall]:
        """The calls in the order in which they ended, since the last call of the model itself began.

        They include the modules without children that the model calls between the recurrent layers. At most
        the last 1000 calls are kept.
        """
        return list(self._order.calls)

    @property
    def not_recorded(self) -> dict[str, str]:
        """The recurrent layers without a trace of their last call, and why."""
        layers = self._layers_by_id.values()
        reasons = {
            layer.name: layer.not_recorded or ("" if layer.traces else "not called") for layer in layers
        }
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def nbytes(self) -> int:
        """The memory that all traces take in bytes, including their copies of the parameters."""
        layers = self._layers_by_id.values()
        return total_bytes(trace for layer in layers for trace in (*layer.traces, *layer.pieces))

    def __repr__(self) -> str:
        lines = [f"<Record of {type(self.model).__name__}: {format_bytes(self.nbytes)}"]
        lines += [f"  {layer}: {layer.summary}" for layer in self._layers_by_id.values()]
        return "\n".join(lines) + ">"

    def to_html(
        self,
        path: str | Path,
        *,
        batch: int | Iterable[int] | None = None,
        labels: Sequence[Any] | None = None,
        title: str | None = None,
        limit: int = 3_000_000,
    ) -> Path:
        """Write one interactive page for all recorded layers.

        It opens with the layers in the order of their calls, what flows between them, and the worst problem
        of each. A click opens the page of a layer; see :meth:`Trace.to_html`. If only one call was recorded,
        its page is all there is.

        Args:
            path: Path of the file.
            batch: The row, or several rows. By default, some of the first rows: up to 8 if they are small.
            labels: A label for each time step, or a list of them for each row, as in :meth:`Trace.to_html`.
                Layers that they don't fit, for instance with another number of steps, have none.
            title: Title of the page. None for the class of the model.
            limit: Approximate maximum of numbers to store, for all layers together.

        Returns:
            The path.

        Raises:
            ValueError: If nothing was recorded, no layer has a page, or the labels fit no layer.
            OSError, IndexError, TypeError: As for :meth:`Trace.to_html`.
        """
        options = {"batch": batch, "labels": labels, "title": title, "limit": limit}
        return Path(display.package("page").write_model(self, path, **options))

    def _layer(self, name: str) -> RecordedLayer:
        if name in self._layers_by_name:
            return self._layers_by_name[name]
        module = dict(self.model.named_modules(remove_duplicate=False)).get(name)
        known = f"the recurrent layers are {', '.join(map(repr, self._layers_by_name))}"
        what = "not a module of this model" if module is None else f"a {type(module).__name__}"
        raise KeyError(f"{name!r} is {what}; {known}")

    def _should_record(self, *_: Any) -> bool:
        return threading.get_ident() == self.thread

    def _on_call(self, module: nn.Module, *call_data: Any) -> None:
        """Record a call of a layer, and add it to the order of calls."""
        layer = self._layers_by_id[id(module)]
        self._record_call(layer, module, *call_data)
        args, kwargs, _, result = call_data
        reason = layer.last_not_recorded
        sequence = None if reason else layer.sequences[-1]
        result = (first_state(result), result) if is_single_step(module) else result[:2]
        self._order.add_recurrent(
            layer.name, module, hooks.input_and_state(args, kwargs), result, sequence, reason
        )

    def _record_call(self, layer: RecordedLayer, module: nn.Module, *call_data: Any) -> None:
        layer.call_count += 1
        result = call_data[-1]
        try:
            call = LayerCall.from_forward(module, *call_data)
            if self._gradients and not call.is_single_step and len(result) > 2:
                raise UnsupportedCallError("used all_states=True, which gradients=True doesn't support")
        except UnsupportedCallError as error:
            layer.last_not_recorded = f"its last call {error}"
            if layer.sequences:
                layer.sequences[-1].end()
            return
        with layer.named_in_errors():
            self._add_call(layer, call, call_data)
        layer.last_not_recorded = None

    def _add_call(self, layer: RecordedLayer, call: LayerCall, call_data: Sequence[Any]) -> None:
        """Add a call to the sequence that it continues, or as the first of a new one."""
        model_call = self._order.model_calls
        sequence = layer.sequences[-1] if layer.sequences else None
        if sequence is not None and not sequence.continues(call, model_call):
            sequence = None
        step = 0 if sequence is None else sequence.length
        earlier_cells = layer.last_cells()
        if sequence is None and len(layer.sequences) == layer.sequences.maxlen:
            del layer.sequences[0]  # free its memory before the next trace takes some
        trace = None
        if not self._runs_steps(call) or self._filter.selects_step(step):
            trace = self._trace(layer, call, call_data, earlier_cells)
        if sequence is None or (trace is not None and not sequence.has_parameters_of(trace)):
            sequence = CallSequence(model_call)
            layer.sequences.append(sequence)
        sequence.add(call, trace, model_call)

    def _runs_steps(self, call: LayerCall) -> bool:
        """Whether a call is one step, so that the numbers of the selected steps are those of a sequence."""
        return call.is_single_step or (is_one_step(call) and not self._filter.counts_from_end)

    def _trace(
        self,
        layer: RecordedLayer,
        call: LayerCall,
        call_data: Sequence[Any],
        earlier_cells: list[Cell] | None,
    ) -> Trace:
        recurrent, x, state = call.recurrent, call.input, call.initial_state
        indices = self._filter.selected_rows(SequenceBatch.from_input(x, recurrent.batch_first, "").batch)
        rows = None if indices is None else BatchRows.from_input(indices, x, recurrent.batch_first)
        if rows is not None:
            x, state = rows.select_sequence(x), rows.select_states(state)
        time = SequenceBatch.from_input(x, recurrent.batch_first, "").time
        trace_filter = replace(self._filter, steps=None) if self._runs_steps(call) else self._filter
        selection = trace_filter.selection(time, recurrent.hidden_size)
        trace, result = run_traced(
            layer.module, recurrent, x, state, call.random_state, selection, rows, earlier_cells
        )
        expected = call.with_input_layout(call.output), call.final_state
        if rows is not None and not hooks.results_match(
            result, (rows.select_sequence(expected[0]), rows.select_states(expected[1]))
        ):
            # The step draws random numbers, or its rows depend on each other: run all rows.
            rows, selection = None, replace(selection, rows=indices)
            trace, result = run_traced(
                layer.module,
                recurrent,
                call.input,
                call.initial_state,
                call.random_state,
                selection,
                None,
                earlier_cells,
            )
        if rows is None and not hooks.results_match(result, expected):
            warnings.warn(f"the trace of {layer} {hooks.MISMATCH}", stacklevel=2)
        trace_reference = weakref.ref(trace)

        def store_gradients(output_gradient: Tensor | None, state_gradients: list[Tensor | None]) -> None:
            trace = trace_reference()
            if trace is None or trace.layers[0].gradients:
                return
            if rows is not None:
                output_gradient = None if output_gradient is None else rows.select_sequence(output_gradient)
                state_gradients = [
                    None if gradient is None else rows.select_states(gradient) for gradient in state_gradients
                ]
            trace.backward(loss_from_gradients(output_gradient, state_gradients))
            trace.forget()

        if not self._gradients or not call.on_backward(call_data[:2], call_data[-1], store_gradients):
            trace.forget()
        return trace


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
    """Trace every recurrent layer and cell of a model while the model runs, including those of torch.nn.

    ::

        with unrolled.record(model) as rec:
            model(x).sum().backward()
        rec["encoder.lstm"]["f"]              # a Trace, by the name of the module
        rec["encoder.lstm"].gradient("f")     # with gradients=True

    The model itself runs as it does without recording: the results are bit-identical, and random draws,
    hooks, gradients and engines are the same. For the trace, each layer then runs again with the same input
    on the reference engine. If the result differs from that of the call, a warning says so.

    Consecutive calls of one time step each, of a cell or of a layer, are joined into one trace, whose steps
    are the calls. A call continues the one before if it begins with the state that this one returned, or if
    the model changed this state in between, in the same call of the model. A call without a state, or with
    zeros, starts a new sequence. If the model changed a state, the trace can't run again.

    Only calls of the current thread are recorded. A model that was compiled with ``torch.compile`` runs
    uncompiled in the block. If a subclass overrides ``forward``, its call of ``super().forward`` is recorded.

    The memory of each recorded call is that of:

    * the selected quantities and units of the selected steps and rows, and the input if ``"x"`` is selected;
    * the states before each selected step, if only ``steps`` are limited, but neither ``names`` nor
      ``units``, so that ``explain`` works;
    * the initial and final states;
    * a copy of the layer's parameters, shared by calls with equal parameters.

    While a layer is being traced, the inputs and outputs of the selected rows take memory, too, or those of
    all rows if the step draws random numbers or its rows depend on each other. With ``gradients``, the memory
    is that of a backward pass of the selected rows through all steps.

    Args:
        model: Any module that contains recurrent layers.
        steps: The time steps to record: an integer, a slice, a range or a list. Negative values count from
            the end of the longest selected row. None for all. Traces use the original numbers of the steps.
        rows: The rows of the batch to record. In the trace, they are numbered from 0. None for all.
        names: The quantities to record; ``"x"`` is the input. None for all.
        units: The units of the hidden size to record. If the size of a quantity is a multiple of the hidden
            size, such as for the pre-activations of all gates, they are taken from each part. If it isn't,
            the whole quantity is recorded. None for all. Traces use the original numbers of the units.
        calls: The number of calls of each layer to keep, the last ones. Joined calls count as one.
        gradients: Whether to compute ``∂loss/∂quantity``. The first backward pass that reaches a recorded
            call, in the block or later, adds the gradients to its trace. The layer runs once more for this,
            with all steps of the selected rows.

    Raises:
        TypeError: If the model isn't a module, or an argument has the wrong type.
        ValueError: If the model has no recurrent layers, or an argument selects nothing.
        IndexError: If a unit is out of range. For a step or row, the error is raised by the call of the
            layer.
    """
    trace_filter = TraceFilter.from_arguments(steps, rows, names, units)
    if not isinstance(gradients, bool):
        raise TypeError(f"gradients must be of type bool, got {gradients!r}")
    return Record(model, trace_filter, positive_int("calls", calls), gradients)
