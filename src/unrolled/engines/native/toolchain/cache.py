"""Where compiled kernels lie: a folder that only its user can write to, each library beside a note on it.

To load a library is to run code, so one that somebody else may have written is not looked at.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from unrolled.engines import log

VARIABLE = "UNROLLED_CACHE"

_PATIENCE = 120  # seconds, for another process that compiles the same library; then both do
_LEFT_BEHIND = 24 * 3600  # seconds, after which what a killed process was building is removed
_BUILDING = "build-"


def chosen() -> Path | None:
    """The folder of this user's kernels: that of UNROLLED_CACHE, else the system's place for caches.

    None where the user has no home.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return Path(os.path.abspath(os.path.expanduser(given)))
    try:
        found = Path(platformdirs.user_cache_dir("unrolled"), "kernels")
    except RuntimeError:  # or, before platformdirs 4.4, a folder named ~
        return None
    return found if found.is_absolute() else None


def folders() -> Iterator[Path]:
    """Where to look for kernels and to put them: the user's folder, then one for this process alone.

    It warns once where the first can't serve.
    """
    first = chosen()
    if first is None:
        log.announce(f"there is no home for a cache of compiled kernels: {_instead()}")
    else:
        trouble = refusal(first)
        if trouble is None:
            yield first
        else:
            log.announce(f"{trouble}: {_instead()}")
    yield _temporary()


def unusable(folder: Path, error: OSError) -> None:
    """Tell once that a folder is given up, and why."""
    words = error.strerror or str(error)
    if folder == chosen():
        log.announce(f"the kernel cache {folder} can't be used ({words}): {_instead()}")
    else:
        log.build.info("%s can't be used (%s)", folder, words)


def refusal(folder: Path) -> str | None:
    """Why a folder is not safe to load from or can't be made, in words; None where it is safe."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        status = folder.stat()
        above = [(parent, parent.stat()) for parent in folder.parents]
    except OSError as error:
        return f"the kernel cache {folder} can't be used ({error.strerror})"
    if os.name != "posix":
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"the kernel cache {folder} belongs to another user (uid {status.st_uid})"
    if status.st_mode & 0o022:
        return (
            f"others can write to the kernel cache {folder} (mode {stat.S_IMODE(status.st_mode):o}; "
            f"empty it and chmod 700 it)"
        )
    for parent, found in above:
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            return f"others can replace the kernel cache {folder}, for all may write to {parent}"
    return None


def read(library: Path) -> dict[str, Any] | None:
    """The note on a library that is whole and this user's own; None where there is no such library."""
    try:
        note = json.loads(_own(note_of(library)))
        if hashlib.sha256(_own(library)).hexdigest() == note["sha256"]:
            return dict(note)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def note_of(library: Path) -> Path:
    """Where the note on a library stands."""
    return library.with_name(library.name.removesuffix(".so") + ".json")


def publish(built: Path, note: dict[str, Any], library: Path, mode: int = 0o600) -> None:
    """Put a library and its note in their places, each in one step.

    Args:
        built: the library, in a folder of its own on the same disk.
        note: what is to be known of it; its digest is added.
        library: its place.
        mode: who may read it.
    """
    content = built.read_bytes()
    if not content:
        raise OSError(f"{built} is empty")
    beside = built.with_suffix(".json")
    beside.write_text(json.dumps({**note, "sha256": hashlib.sha256(content).hexdigest()}, indent=1))
    for path, place in ((beside, note_of(library)), (built, library)):
        path.chmod(mode)
        path.replace(place)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """An empty folder inside this one, removed in the end; and what killed processes have left, too."""
    for path in folder.glob(f"{_BUILDING}*"):
        try:
            if time.time() - path.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # another process has removed it
            continue
    made = Path(tempfile.mkdtemp(dir=folder, prefix=_BUILDING))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def alone(library: Path) -> Iterator[None]:
    """While no other process compiles this library.

    The system takes the lock from a process that dies. One that is held on is waited for, in the end in
    vain: then the library is compiled twice, which does no harm.
    """
    lock = FileLock(library.with_suffix(".lock"), timeout=_PATIENCE, mode=0o600)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError) as error:  # or the file system has no locks
        log.build.info("%s is compiled without a lock (%s)", library.name, error)
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


def size(folder: Path) -> tuple[int, int]:
    """How many libraries a folder holds, and the bytes of all its files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.suffix == ".so" for path in files), sum(path.stat().st_size for path in files)


def _own(path: Path) -> bytes:
    """The content of a file that nobody else can have written."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        loose = os.name == "posix" and (status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022)
        if loose or not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{path} may have been written by others")
        return file.read()


def _instead() -> str:
    return f"kernels are compiled anew in every process; {VARIABLE} chooses another folder"


@functools.cache
def _temporary() -> Path:
    """A folder of this process and those that it forks, removed when it ends."""
    folder, process = Path(tempfile.mkdtemp(prefix="unrolled-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == process else None)
    return folder
