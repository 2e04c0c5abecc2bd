"""The programs of a layer's steps, with which the page runs them for changed numbers, ready for JSON."""

from __future__ import annotations

from typing import Any

from unrolled.page.sampling import encode_values
from unrolled.tracing.step_graph import LayerProgram


def program_data(program: LayerProgram) -> dict[str, Any]:
    """Return the programs of a layer as ``evaluator.js`` takes them.

    Args:
        program: The programs.

    Returns:
        A dictionary with ``programs``, ``programOfStep``, ``constants``, ``draws`` and ``reason``.
    """
    return {
        "programs": program.programs,
        "programOfStep": program.program_of_step,
        "constants": [encode_values(tensor) for tensor in program.constants],
        "draws": None if program.draws is None else encode_values(program.draws),
        "reason": program.reason,
    }
