"""Texts in the kernel cache, such as captured steps. Each file begins with the checksum of its text."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from unrolled.engines import log
from unrolled.engines.native.toolchain import cache, eviction

VARIABLE = "UNROLLED_CAPTURES"
"""Set to 0 to store and read no texts."""


class KeptFiles:
    """The texts in this user's kernel cache, by name."""

    def read(self, name: str) -> str | None:
        """Return a text, or None if it isn't there, is damaged or may have been written by another user."""
        path = _path(name)
        if path is None:
            return None
        try:
            checksum, _, content = cache.read_private(path).partition(b"\n")
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest().encode() != checksum:
            log.build.info("damaged: %s", path)
            return None
        log.build.info("hit: %s", path)
        eviction.record_use(path)
        return content.decode(errors="replace")

    def write(self, name: str, text: str) -> None:
        """Store a text. Nothing happens if the cache can't be written to."""
        path = _path(name)
        if path is None:
            return
        content = text.encode()
        try:
            with cache.build_folder(path.parent) as folder:
                new = folder / path.name
                new.touch(0o600)
                new.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                new.replace(path)
        except OSError as error:
            log.build.info("%s can't be written (%s)", path, error.strerror)
            return
        log.build.info("stored: %s", path)
        eviction.enforce_limit(path.parent, keep=path)


STORE = KeptFiles()


def _path(name: str) -> Path | None:
    """Return the path of a text, or None if the cache can't be used."""
    folder = None if os.environ.get(VARIABLE, "").strip() == "0" else _folder()
    return None if folder is None else folder / f"{name}{cache.KEPT_SUFFIX}"


def _folder() -> Path | None:
    """Return this user's kernel cache, or None if it can't be used."""
    folder = cache.user_folder()
    return None if folder is None or cache.why_unsafe(folder) is not None else folder
