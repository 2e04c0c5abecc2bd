"""The size limit of the kernel cache. The least recently used files are deleted first."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from unrolled.engines import log
from unrolled.engines.native.toolchain.cache import KEPT_SUFFIX, SUFFIX, metadata_path

VARIABLE = "UNROLLED_CACHE_SIZE"
PRECOMPILED_SUFFIX = ".h.gch"  # of precompiled headers, see precompiled.py

_DEFAULT = "1G"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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

    The least recently used files are deleted first.

    A process that has loaded a deleted library can go on using it: the system deletes the file when it ends.
    On Windows, which doesn't, a library in use isn't deleted.

    Args:
        folder: The folder.
        keep: One that isn't deleted.
    """
    limit = size_limit()
    if not limit:
        return
    entries = []  # last use, size and path of each of them
    for path in (
        path for suffix in (SUFFIX, KEPT_SUFFIX, PRECOMPILED_SUFFIX) for path in folder.glob(f"*{suffix}")
    ):
        statuses = []
        for file in _files(path)[:2]:
            with contextlib.suppress(OSError):  # another process has deleted it
                statuses.append(file.stat())
        if statuses:
            entries.append((statuses[-1].st_mtime_ns, sum(status.st_size for status in statuses), path))
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
