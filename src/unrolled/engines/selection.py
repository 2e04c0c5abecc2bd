"""The engine that is selected in this thread."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType

_ENGINES = ("auto", "native", "reference")
_current: ContextVar[str] = ContextVar("engine", default="auto")


class engine:  # noqa: N801  # used as a function, and in a with statement
    """Select the engine that runs cells, from this call on or inside a ``with`` statement.

    ::

        unrolled.engine("reference")          # from here on, in this thread
        with unrolled.engine("native"):       # in this block
            output, state = layer(x)

    Args:
        name: ``"auto"`` (default) runs compiled loops where possible and falls back to the reference engine.
            ``"native"`` always runs compiled loops, and raises an error for a call that they don't support.
            ``"reference"`` runs the step as written in Python, one time step after another.

    Raises:
        ValueError: If ``name`` is not one of these.
    """

    def __init__(self, name: str) -> None:
        if name not in _ENGINES:
            raise ValueError(f"the engine should be {', '.join(map(repr, _ENGINES))}, got {name!r}")
        self._previous = _current.get()
        _current.set(name)

    def __enter__(self) -> engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.set(self._previous)


def current_engine() -> str:
    """Return the selected engine: ``"auto"``, ``"native"`` or ``"reference"``."""
    return _current.get()
