from __future__ import annotations

import pytest

import unrolled as ur
from unrolled.cli.example import INPUT, WEIGHTS


@pytest.fixture
def walkthrough() -> ur.Trace:
    """A trace of the published walk-through: an RNN with two inputs and three units, over four steps."""
    layer = ur.RNN(2, 3)
    layer.load_state_dict(WEIGHTS)
    return ur.trace(layer, INPUT)
