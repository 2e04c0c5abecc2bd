"""The size limit of the kernel cache. The least recently used files are deleted first."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from unrolled.engines import log
from unrolled.engines.native.toolchain.cache import KEPT_SUFFIX, SUFFIX, metadata_path

VARIABLE = "UNROLLED_CACHE_SIZE"
PRECOMPILED_SUFFIX = ".h.gch"  # of precompiled headers, see precompiled.py

_DEFAULT = "1G"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS_BETWEEN_MEASUREMENTS = 60.0


@dataclass(frozen=True)
class _Measurement:
    """The size of a folder.

    Attributes:
        size: The size in bytes.
        time: When it was measured, in seconds.
        written: Bytes that this process has written to the folder since.
    """

    size: int
    time: float
    written: int = 0


_measured: dict[Path, _Measurement] = {}


def size_limit() -> int:
    """Return the size limit in bytes from UNROLLED_CACHE_SIZE; 0 means no limit."""
    configured = os.environ.get(VARIABLE, "").strip() or _DEFAULT
    match = _match(configured)
    if match is None:
        log.announce(
            f"{VARIABLE} should be a number of bytes, such as 500M or 2G, or 0 for no limit, got "
            f"{configured!r}. The limit is {_DEFAULT}"
        )
        match = _match(_DEFAULT)
        assert match is not None
    return int(float(match[1]) * _UNITS[match[2].upper()])


def record_use(path: Path) -> None:
    """Store that a library or a text is used now, as the time of its metadata file or of the text."""
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(path if path.suffix == KEPT_SUFFIX else metadata_path(path))


def enforce_limit(folder: Path, keep: Path) -> None:
    """Delete libraries, texts and precompiled headers until a folder is within the limit.

    The least recently used files are deleted first. A folder is measured once a minute and whenever the files
    that this process has written to it since may exceed the limit.

    A process that has loaded a deleted library can go on using it: the system deletes the file when it ends.
    On Windows, which doesn't, a library in use isn't deleted.

    Args:
        folder: The folder.
        keep: The file that was written last. It isn't deleted.
    """
    limit = size_limit()
    if not limit:
        return
    measured = _measured.get(folder)
    if measured is not None and time.monotonic() - measured.time < _SECONDS_BETWEEN_MEASUREMENTS:
        written = measured.written + sum(status.st_size for status in _statuses(keep))
        if measured.size + written <= limit:
            _measured[folder] = replace(measured, written=written)
            return
    _measured[folder] = _Measurement(_delete(folder, keep, limit), time.monotonic())


def _delete(folder: Path, keep: Path, limit: int) -> int:
    """Delete files until a folder is within the limit. Return its size in bytes."""
    paths = (
        path for suffix in (SUFFIX, KEPT_SUFFIX, PRECOMPILED_SUFFIX) for path in folder.glob(f"*{suffix}")
    )
    entries = [  # last use, size and path of each of them
        (statuses[-1].st_mtime_ns, sum(status.st_size for status in statuses), path)
        for path in paths
        if (statuses := _statuses(path))
    ]
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            break
        if path == keep:
            continue
        try:
            for file in _files(path):
                file.unlink(missing_ok=True)
        except OSError as error:
            log.build.info("%s can't be deleted (%s)", path, error.strerror)
            continue
        total -= size
        log.build.info("deleted: %s (the cache is limited to %d bytes)", path, limit)
    return total


def _statuses(path: Path) -> list[os.stat_result]:
    """Return the statuses of a file and of the file with the time of its last use, without those deleted."""
    statuses = []
    for file in _files(path)[:2]:
        with contextlib.suppress(OSError):  # another process has deleted it
            statuses.append(file.stat())
    return statuses


def _files(path: Path) -> list[Path]:
    """Return the files to delete together. The second one, if it exists, has the time of the last use."""
    if path.suffix == KEPT_SUFFIX:
        return [path]
    if path.name.endswith(PRECOMPILED_SUFFIX):
        header = path.with_suffix("")
        return [header, path, header.with_suffix(".lock")]
    return [path, metadata_path(path), path.with_suffix(".lock")]


def _match(text: str) -> re.Match[str] | None:
    return re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
