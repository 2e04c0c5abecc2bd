"""The C++ files of this package: headers that every source can include, and sources of libraries."""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from pathlib import Path

from unrolled._version import __version__

INCLUDE = files("unrolled.engines.native") / "include"  # in a zipped application, not a folder


@functools.cache
def read(name: str) -> str:
    """Return the text of a file.

    Raises:
        RuntimeError: If an application was packaged without the file.
    """
    try:
        return (INCLUDE / name).read_text(encoding="utf-8")
    except OSError as error:
        raise _missing(error) from None


@functools.cache
def header_names() -> list[str]:
    """Return the names of all header files.

    Raises:
        RuntimeError: If an application was packaged without them.
    """
    try:
        return sorted(file.name for file in INCLUDE.iterdir() if file.name.endswith(".h"))
    except OSError as error:
        raise _missing(error) from None


@functools.cache
def digest() -> str:
    """Return a digest of the package version and of all header files that a source may include."""
    result = hashlib.sha256(__version__.encode())
    for name in header_names():
        result.update(f"{name}\0{read(name)}\0".encode())
    return result.hexdigest()


def include_folder(temporary: Path) -> Path:
    """Return a folder with the headers: a copy in a temporary folder if the package is in an archive."""
    if isinstance(INCLUDE, Path) and INCLUDE.is_dir():
        return INCLUDE
    copy = temporary / "include"
    copy.mkdir()
    for name in header_names():
        (copy / name).write_text(read(name), encoding="utf-8")
    return copy


def _missing(error: OSError) -> RuntimeError:
    return RuntimeError(
        f"the C++ files of unrolled can't be read ({error}). A packaged application must contain the data "
        "files of unrolled, for example with --collect-data unrolled of PyInstaller"
    )
