"""The optional packages for ONNX models."""

from __future__ import annotations

import importlib
from typing import Any


def import_package(name: str, needed_by: str) -> Any:
    """Import a package of the extra ``onnx``.

    Args:
        name: Name of the package: ``"onnx"`` or ``"onnxscript"``.
        needed_by: What needs it, for the error message.

    Raises:
        ImportError: If the package isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"{needed_by} needs {name}: pip install 'unrolled[onnx]'") from error
