"""Monitoring of a model's recurrent layers during training."""

from __future__ import annotations

import contextlib
import csv
import functools
import numbers
import os
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from unrolled.cells.base import positive_int
from unrolled.layers.cell_layers import is_single_step
from unrolled.layers.module import parametrizations_in_eval_mode
from unrolled.layers.recurrent import Recurrent
from unrolled.tracing import hooks
from unrolled.tracing.findings import HealthReport, joined
from unrolled.tracing.health import FIELDS, HealthRecord
from unrolled.tracing.hooks import MISMATCH, LayerCall, ModuleHook, UnsupportedCallError
from unrolled.tracing.observed_call import ObservedCall, ObservedSteps
from unrolled.tracing.watch_sample import WatchSample
from unrolled.tracing.watched_steps import MAX_STEPS, StepGroups

_NOT_SCALARS = ("call", "module", "layer", "direction", "quantity", "function")


@dataclass(eq=False)
class _LayerStatus:
    """A monitored layer, and when to sample it next.

    Attributes:
        name: Name of the module.
        training_calls: Number of training calls so far.
        other_calls: Number of calls so far in eval mode or without gradients.
        skipped: Number of samples skipped because of the time budget.
        last_sample: Number of the training call that was sampled last.
        paused_until: No samples are taken before this time of ``time.perf_counter``.
        seconds: Time spent on the layer's samples.
        warned: Whether a warning was given for this layer.
        groups: Decides which calls are steps of one sequence. Such calls count as one.
        sampled: Whether the sequence that runs is sampled.
        continues: Whether the call that runs continues it.
        sample: The sample of the last training call. The graph of the call holds it.
        observed: The last call that was sampled, or that ran in eval mode or without gradients.
        not_observed: Why the last such call couldn't be kept.
        recurrent: The equivalent layer of this library at the last such call.
    """

    name: str
    groups: StepGroups
    sampled: bool = False
    continues: bool = False
    training_calls: int = 0
    other_calls: int = 0
    skipped: int = 0
    last_sample: int = 0
    paused_until: float = 0.0
    seconds: float = 0.0
    warned: bool = False
    observed: ObservedSteps | None = None
    sample: weakref.ref[WatchSample] | None = None
    not_observed: str = ""
    recurrent: Recurrent | None = None

    def __str__(self) -> str:
        others = f", {self.other_calls} in eval mode or without gradients" if self.other_calls else ""
        samples = "sample" if self.skipped == 1 else "samples"
        skipped = f", {self.skipped} {samples} skipped (time budget)" if self.skipped else ""
        return f"{self.name!r}: {self.training_calls} training calls{others}{skipped}"

    def known_recurrent(self, module: nn.Module) -> Recurrent | None:
        """Return the equivalent layer of the last call, which saves time, if its parameters are the same."""
        known = self.recurrent
        if known is None or is_single_step(module) or known.dropout != module.dropout:
            return None
        parameters = [dict(one.named_parameters()) for one in (known, module)]
        if parameters[0].keys() != parameters[1].keys():
            return None
        same = all(parameter is parameters[1][name] for name, parameter in parameters[0].items())
        return known.train(module.training) if same else None


class Watch:
    """The result of :func:`watch`. Iterating yields the records that are new since the last iteration.

    Attributes:
        records: All records so far: a dictionary for each quantity of each layer and direction, for each
            sampled call.
    """

    def __init__(self, model: nn.Module, every: int, rows: int, share: float | None) -> None:
        by_name = hooks.require_recurrent_layers(model, "watch")
        for name, module in model.named_modules():
            if "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None:
                what = f"module {name!r}" if name else "the model"
                raise ValueError(
                    f"watch can't see calls inside a compiled module, and {what} was compiled with "
                    "torch.compile: watch and train the uncompiled model"
                )
        self._every, self._rows, self._share = every, rows, share
        modules = {id(module): module for module in by_name.values()}
        self._layers: dict[int, _LayerStatus] = {}
        for name, module in by_name.items():
            self._layers.setdefault(id(module), _LayerStatus(name, StepGroups(model, module)))
        self.records: list[HealthRecord] = []
        self._records_yielded = self._scalars_yielded = 0
        self._start = time.perf_counter()
        self._model_calls = 0
        self._hooks = contextlib.ExitStack()
        model_hook: Any = model.register_forward_pre_hook(ModuleHook(self._on_model_call, 2))
        self._hooks.callback(model_hook.remove)
        self._hooks.callback(hooks.observe_calls(list(modules.values()), self._should_sample, self._on_call))
        self._closed = False

    @property
    def seconds(self) -> float:
        """The time spent on samples so far, in seconds."""
        return sum(layer.seconds for layer in self._layers.values())

    def close(self) -> None:
        """Stop monitoring. The records stay."""
        self._hooks.close()
        self._closed = True

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        layers = self._layers.values()
        warned = any(layer.warned for layer in layers)
        only_other_calls = any(layer.observed for layer in layers) and not any(
            layer.training_calls for layer in layers
        )
        if kind is None and not self.records and not warned and not only_other_calls:
            warnings.warn(f"{self!r} has no records: {self._why_empty()}", stacklevel=2)

    def __iter__(self) -> Iterator[HealthRecord]:
        """Yield the records that weren't yielded before."""
        while self._records_yielded < len(self.records):
            self._records_yielded += 1
            yield self.records[self._records_yielded - 1]

    def scalars(self) -> Iterator[tuple[str, float, int]]:
        """Yield the numbers that weren't yielded before, for TensorBoard: ``writer.add_scalar(*scalar)``.

        Yields:
            A tag such as ``"encoder.lstm/l0_forward/f/saturated"``, the number, and the number of the call.
        """
        while self._scalars_yielded < len(self.records):
            self._scalars_yielded += 1
            record = self.records[self._scalars_yielded - 1]
            prefix = f"l{record['layer']}_{record['direction']}/{record['quantity']}"
            prefix = f"{record['module']}/{prefix}" if record["module"] else prefix
            for name in FIELDS:
                if name not in _NOT_SCALARS and record[name] is not None:
                    yield f"{prefix}/{name}", float(record[name]), record["call"]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all records to a CSV file, one line each. Fields that don't apply are empty.

        Raises:
            OSError: If the file can't be written.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.records)

    def health(self) -> HealthReport:
        """Look for problems, such as NaNs and stuck gates, in the last call of each layer that was observed.

        These are the calls in eval mode or without gradients, and the sampled training calls. The call runs
        once more for this, with the parameters that it had if it was a training call. The gradient through
        time is checked if a backward pass reached the call.

        Returns:
            A report in words, the worst problem first. Print it, or iterate over its findings.
        """
        return joined(self._diagnose(layer).of_module(layer.name) for layer in self._layers.values())

    def _diagnose(self, layer: _LayerStatus) -> HealthReport:
        if layer.observed is not None:
            return layer.observed.diagnose()
        why = layer.not_observed or "the layer wasn't called"
        if layer.training_calls and not layer.not_observed:
            why = f"the first sample is training call {self._every}, so use a smaller every="
        return HealthReport([], not_checked=[f"all of it: {why}"])

    def _why_empty(self) -> str:
        calls = max(layer.training_calls for layer in self._layers.values())
        if not calls:
            return "watch samples calls in training mode with gradients, but there was none"
        if calls < self._every:
            return f"the first sample is call {self._every}, so use a smaller every="
        return "no backward pass reached the sampled calls"

    def __repr__(self) -> str:
        calls = ", ".join(map(str, self._layers.values()))
        state = "closed" if self._closed else f"every {self._every}"
        return f"<Watch, {state}; {calls}; {len(self.records)} records>"

    def _on_model_call(self, *_: Any) -> None:
        self._model_calls += 1

    def _should_sample(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        layer = self._layers[id(module)]
        layer.continues = layer.groups.continues(module, args, kwargs, self._model_calls)
        if not layer.continues:
            layer.sampled = self._should_sample_sequence(layer, module)
        return layer.sampled

    def _should_sample_sequence(self, layer: _LayerStatus, module: nn.Module) -> bool:
        """Decide whether to sample a call, and the steps that continue it."""
        if not module.training or not torch.is_grad_enabled():
            layer.other_calls += 1
            return True
        layer.training_calls += 1
        since_last = layer.training_calls - layer.last_sample
        if since_last < self._every:
            return False
        paused = time.perf_counter() < layer.paused_until
        layer.skipped += paused and since_last % self._every == 0
        return not paused

    def _on_call(self, module: nn.Module, *call_data: Any) -> None:
        """Prepare a sample of a call, to be taken when a backward pass reaches the call."""
        start = time.perf_counter()
        layer = self._layers[id(module)]
        layer.groups.ended(call_data[-1])
        is_training = module.training and torch.is_grad_enabled()
        if not layer.continues:
            layer.observed, layer.sample, layer.not_observed = None, None, ""
        elif layer.observed is None or len(layer.observed.calls) == MAX_STEPS:
            return
        try:
            call = LayerCall.from_forward(module, *call_data, recurrent=layer.known_recurrent(module))
            if not call.output.numel():
                raise UnsupportedCallError("had a batch without rows")
        except (UnsupportedCallError, TypeError) as error:
            layer.observed = layer.sample = None
            layer.not_observed = str(error) if isinstance(error, TypeError) else f"the call {error}"
            if is_training:
                layer.last_sample = layer.training_calls
                self._warn(layer, layer.not_observed)
            return
        layer.recurrent = call.recurrent
        earlier = layer.observed.calls[0].recurrent if layer.observed else None
        observed = ObservedCall.from_call(module, call, is_training, earlier)
        layer.observed = layer.observed or ObservedSteps([])
        layer.observed.calls.append(observed)
        if not is_training:
            return
        layer.last_sample = layer.training_calls
        sample = None if layer.sample is None else layer.sample()
        if sample is None:
            with parametrizations_in_eval_mode(module):
                call.recurrent = call.recurrent.with_cells()
            sample = WatchSample(module, layer.training_calls, self._rows)
            layer.sample = weakref.ref(sample)
        else:
            call.recurrent = sample.calls[0].recurrent
        sample.add(call, observed, functools.partial(self._take_sample, layer))
        sample.seconds += time.perf_counter() - start
        call.on_backward(call_data[:2], call_data[-1], sample.stores(len(sample.calls) - 1))

    def _take_sample(self, layer: _LayerStatus, sample: WatchSample) -> None:
        """Compute the health of a call, or of a sequence of calls, that a backward pass has reached."""
        start = time.perf_counter()
        if self._closed or sample.is_taken:  # closed, or sampled in an earlier backward pass
            return
        sample.is_taken = True
        reason = sample.reason_against()
        if reason is not None:
            self._warn(layer, reason)
            return
        warn_mismatch = functools.partial(
            self._warn, layer, f"the rerun of the call {MISMATCH}", "may be wrong about"
        )
        where = {"call": sample.call_number, "module": layer.name}
        self.records += [record | where for record in sample.health(warn_mismatch)]
        now = time.perf_counter()
        cost = now - start + sample.seconds
        layer.seconds += cost
        if self._share is not None:
            # Training time per second of samples; all layers share it.
            ratio = len(self._layers) / self._share
            layer.paused_until = max(
                now + cost * ratio,
                self._start + (layer.seconds + cost) * ratio,
            )

    def _warn(self, layer: _LayerStatus, why: str, what: str = "can't compute the health of") -> None:
        """Warn about a layer, but only once."""
        if not layer.warned:
            layer.warned = True
            warnings.warn(f"watch {what} {layer.name!r}: {why}", stacklevel=2)


def watch(model: nn.Module, every: int = 100, *, rows: int = 4, share: float | None = 0.05) -> Watch:
    """Monitor the recurrent layers of a model during training: saturated gates, dead units, gradients.

    ::

        with unrolled.watch(model) as watch:
            for x, y in batches:
                ...                                       # the usual training step
                for tag, value, call in watch.scalars():  # new values, for TensorBoard
                    writer.add_scalar(tag, value, call)
        watch.to_csv("health.csv")

    Each layer is sampled every ``every`` training calls. A training call is one in training mode with
    gradients enabled. After a backward pass that reaches the call, some of its rows run once more, forward
    and backward. Training itself doesn't change: the weights are bit-identical, and so are the random draws.
    Calls in code that ``torch.compile`` compiled aren't sampled. A ``with`` block that ends without any
    record gives a warning that says why, unless all calls were in eval mode or without gradients.

    The calls of a single-step cell in one call of the model count as one, and so do those of a layer with one
    time step each. A call without a state starts a new sequence.

    :meth:`Watch.health` reports problems of the last call in words, also in eval mode and without gradients.
    For this, the watch keeps a copy of the call's input and states; and of the parameters and gradients, if
    it was a sampled training call.

    A record has the number of the ``call``, counted from 1, the name of the ``module``, the ``layer``, the
    ``direction`` and the ``quantity``. The other fields describe the quantity:

    * ``mean`` and ``std`` over steps, rows and units.
    * ``function``: the function that computed it, if it is one that flattens out, such as sigmoid, tanh or
      relu. ``saturated``: the fraction of values where its slope is below 5 % of its maximum.
    * For a state, ``dead``: the number of units that never change over steps and rows, up to rounding.
    * For a state, ``norm_first`` and ``norm_last``: its norm after the first and the last step that run,
      averaged over the rows. ``norm_growth``: the growth factor of the norm per step.
    * For a state, ``gradient_first``, ``gradient_last`` and ``gradient_growth``: the same for the gradient of
      the loss, which flows from the last step to the first. A growth factor well below 1 means that the
      gradient vanishes, one above 1 that it explodes.
    * ``radius``: the spectral radius, in a separate record for each gate's ``hidden × hidden`` block of a
      hidden-to-hidden weight.

    Fields that don't apply are None. NaN and infinity are kept.

    Args:
        model: Any module that contains recurrent layers of this library or of torch.nn.
        every: Minimum number of training calls of a layer from one sample to the next. The first sample is
            taken at this call.
        rows: Number of rows of the batch to use, from the first. Sequences longer than 1000 steps use fewer.
            All rows are used if the step draws random numbers or its rows depend on each other.
        share: Maximum fraction of the training time to spend on samples. The cost of each sample is measured.
            The next one waits until the total cost, including an estimate for it, is below this fraction of
            the time since the start, and the last cost is below this fraction of the time since the last
            sample. None for no limit.

    Raises:
        TypeError: If the model isn't a module, or an argument has the wrong type.
        ValueError: If the model has no recurrent layers or is compiled with ``torch.compile``, or an argument
            is out of range.
    """
    is_number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 < share <= 1):
        raise ValueError(f"share must be a number above 0 and up to 1, or None, got {share!r}")
    return Watch(model, positive_int("every", every), positive_int("rows", rows), share)
