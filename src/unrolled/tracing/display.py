"""Access to the diagram, the plots and the page of a trace, whose packages import this one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from unrolled.engines.fork_safety import delay_forks

_loaders: dict[str, Callable[[], ModuleType]] = {}


def register(kind: str, load: Callable[[], ModuleType]) -> None:
    """Set how the package for one kind of display is imported. Called once, by ``unrolled/__init__.py``.

    Args:
        kind: ``"diagram"``, ``"plot"`` or ``"page"``.
        load: Imports the package and returns it.
    """
    _loaders[kind] = load


def package(kind: str) -> Any:
    """Import the package for one kind of display.

    Args:
        kind: ``"diagram"``, ``"plot"`` or ``"page"``.

    Returns:
        The package.
    """
    with delay_forks():
        return _loaders[kind]()
