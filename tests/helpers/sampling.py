"""Parameters of which `make test` runs a sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sample(values: Iterable[Any], fast: Collection[Any] | None = None) -> list[Any]:
    """Return parameters for `pytest.mark.parametrize`, of which all but a few are marked as slow.

    Args:
        values: The parameters.
        fast: Those that aren't slow. None: the first one.
    """
    values = list(values)
    fast = values[:1] if fast is None else fast
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
