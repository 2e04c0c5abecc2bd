"""``unrolled show MODEL.py:FUNCTION``: run a model, and show the calls of its recurrent layers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from torch import nn

from unrolled.cli.arguments import UsageError, import_file
from unrolled.io import files
from unrolled.tracing.call_order import ModuleCall
from unrolled.tracing.findings import where
from unrolled.tracing.record import Record, record
from unrolled.tracing.trace import Trace

HELP = "FILE.py:FUNCTION, a function that returns a model and its inputs: return model, x"


def is_model(argument: Path) -> bool:
    """Whether an argument names Python code that builds a model, not a file with weights."""
    return re.search(r"\.py(:\w*)?$", str(argument)) is not None


def run_model(argument: Path) -> Record:
    """Run a model and record its recurrent layers.

    Args:
        argument: A Python file and the name of a function that returns the model and its inputs, such as
            ``model.py:build``.

    Raises:
        UsageError: If there is no such function, it returns something else, or its code raises an error.
    """
    result = call_function(argument, HELP)
    if not isinstance(result, tuple) or len(result) < 2 or not isinstance(result[0], nn.Module):
        raise UsageError(f"{argument} should return a model and its inputs, got {type(result).__name__}")
    model, *inputs = result
    recording = record(model)
    try:
        with recording, torch.no_grad():
            model(*inputs)
    except Exception as error:
        raise UsageError(f"{argument}: the model failed to run ({type(error).__name__}: {error})") from error
    return recording


def call_function(argument: Path, expected: str) -> Any:
    """Call a function of a Python file, and return its result.

    Args:
        argument: The file and the name of the function, such as ``model.py:build``.
        expected: What the argument should be, for the error.

    Raises:
        UsageError: If there is no such function, or its code raises an error.
    """
    location, separator, name = str(argument).rpartition(":")
    if not separator or not name:
        raise UsageError(f"{argument}: expected {expected}")
    try:
        function = getattr(import_file(Path(location)), name, None)
        result = function() if callable(function) else None
    except Exception as error:  # user code can raise anything
        raise UsageError(f"{argument}: failed to run ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise UsageError(f"{location} has no function named {name!r}")
    return result


def select_layer(recording: Record, name: str | None) -> tuple[str, Trace] | None:
    """Return the layer to show and its name.

    Args:
        recording: The recorded layers.
        name: The name of the layer. None if the user didn't choose one.

    Returns:
        The layer; None if there are several and the user didn't choose one.

    Raises:
        UsageError: If there is no such layer.
    """
    if name is None and len(recording) != 1:
        return None
    name = next(iter(recording)) if name is None else name
    if name not in recording:
        reason = recording.not_recorded.get(name)
        problem = f"no recurrent layer {name!r}" if reason is None else f"no trace of {name!r} ({reason})"
        raise UsageError(f"--layer: there is {problem}; available: {', '.join(recording) or 'none'}")
    return name, recording[name]


def read_labels(text: str | None) -> list[str] | None:
    """Return the labels that a user gave: the lines of a file if the text names one, else its characters."""
    if text is None:
        return None
    return files.read_labels(Path(text)) if os.path.isfile(text) else list(text)


def print_calls(console: Console, recording: Record, as_json: bool) -> None:
    """Print the calls of a model's modules in order, with the worst problem of each recurrent layer."""
    calls = recording.call_order
    if as_json:
        print(json.dumps({"calls": [_as_data(call) for call in calls]}, indent=2))
        return
    console.print(Text(type(recording.model).__name__, style="bold"))
    for call in calls:
        console.print(Padding(Text(str(call), style="" if call.is_recurrent else "dim"), (0, 0, 0, 2)))
        for text in _details(call):
            console.print(Padding(Text(text), (0, 0, 0, 6)))
    for name, reason in recording.not_recorded.items():
        console.print(Padding(Text(f"{name}: {reason}"), (0, 0, 0, 2)))
    if recording:
        console.print(
            "\nTo show the values of a layer, add --layer NAME. For a page of the model, add --html FILE."
        )


def _details(call: ModuleCall) -> list[str]:
    if not call.is_recurrent:
        return []
    states = f"initial state: {call.initial_state or 'zeros'}"
    states += f", the final state of {call.state_from}" if call.state_from else ""
    if call.trace is None:
        return [states]
    worst = next(iter(call.trace.health()), None)
    return [states, f"{worst.severity}: {where(worst)}{worst.message}" if worst else "no problem found"]


def _as_data(call: ModuleCall) -> dict[str, Any]:
    findings = call.trace.health() if call.trace else None
    return {
        "name": call.name,
        "module": call.module,
        "recurrent": call.is_recurrent,
        "call": call.number,
        "steps": call.steps,
        "input": call.input,
        "input_from": call.input_from,
        "output": call.output,
        "initial_state": call.initial_state,
        "state_from": call.state_from,
        "final_state": call.final_state,
        "health": None if findings is None else [where(one) + one.message for one in findings],
    }
