"""Texts in the kernel cache, such as captured steps. Each file begins with the checksum of its text."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from unrolled.engines import log
from unrolled.engines.native.toolchain import cache, eviction, prebuilt

VARIABLE = "UNROLLED_CAPTURES"
"""Set to 0 to store and read no texts."""

_used: dict[str, None] = {}  # names of the texts that this process has read or stored


class KeptFiles:
    """The texts in this user's kernel cache and in the folder of prebuilt kernels, by name."""

    def read(self, name: str) -> str | None:
        """Return a text, or None if it isn't there, is damaged or may have been written by another user."""
        folder = _folder()
        path = None if folder is None else _path(folder, name)
        text = None if path is None else _read(path)
        if path is not None and text is not None:
            eviction.record_use(path)
        elif (shipped := prebuilt.usable_path()) is not None:
            text = _read(_path(shipped, name), private=False)
        if text is not None:
            _used[name] = None
        return text

    def write(self, name: str, text: str) -> None:
        """Store a text in the cache. Nothing happens if the cache can't be written to."""
        folder = _folder()
        if folder is None:
            return
        path = _path(folder, name)
        try:
            _write(path, text, mode=0o600)
        except OSError as error:
            log.build.info("%s can't be written (%s)", path, error.strerror)
            return
        log.build.info("stored: %s", path)
        _used[name] = None
        eviction.enforce_limit(folder, keep=path)


def enabled_store() -> KeptFiles | None:
    """Return the texts, or None if they are turned off."""
    return None if os.environ.get(VARIABLE, "").strip() == "0" else KeptFiles()


def copy_used(folder: Path) -> None:
    """Copy the texts that this process has used to a folder of prebuilt kernels.

    Raises:
        OSError: If the folder can't be written to.
    """
    for name in list(_used):
        text = KeptFiles().read(name)
        if text is not None:
            _write(_path(folder, name), text, mode=0o644)


def _read(path: Path, private: bool = True) -> str | None:
    """Return the text of a file, or None if there is none or it is damaged.

    Args:
        path: The file.
        private: Whether to refuse a file that another user may have written.
    """
    try:
        content = cache.read_private(path) if private else path.read_bytes()
    except OSError:
        return None
    checksum, _, content = content.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        log.build.info("damaged: %s", path)
        return None
    log.build.info("hit: %s", path)
    return content.decode(errors="replace")


def _write(path: Path, text: str, mode: int) -> None:
    content = text.encode()
    with cache.build_folder(path.parent) as folder:
        new = folder / path.name
        new.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        new.chmod(mode)
        new.replace(path)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}{cache.KEPT_SUFFIX}"


def _folder() -> Path | None:
    """Return this user's kernel cache, or None if it can't be used."""
    folder = cache.user_folder()
    return None if folder is None or cache.why_unsafe(folder) is not None else folder
