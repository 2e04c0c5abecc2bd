"""Compile the layer to WebAssembly, so that the page can run it on new input."""

from __future__ import annotations

import base64
import copy

from unrolled.export.wasm import wasm
from unrolled.tracing.trace import Trace


def live_data(trace: Trace) -> dict[str, str]:
    """Return the layer of a trace as WebAssembly, in float32.

    Raises:
        ValueError: If it can't be exported, or no compiler is found.
    """
    layer = copy.deepcopy(trace.recurrent).cpu().float()
    try:
        module = wasm(layer)
    except ValueError as error:
        raise ValueError(f"to_html(live=True): {error}") from error
    return {"module": base64.b64encode(module.content).decode("ascii")}
