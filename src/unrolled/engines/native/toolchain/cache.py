"""The cache of compiled kernels: a folder that only its user can write to, with metadata for each library.

Loading a library runs its code. A library that another user may have written is therefore never loaded.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Not imported late: a fork during the import would run filelock's own fork hooks, which wait for the import.
from filelock import FileLock, Timeout

from unrolled.engines import log
from unrolled.engines.fork_safety import delay_forks

VARIABLE = "UNROLLED_CACHE"
SUFFIX = ".dll" if sys.platform == "win32" else ".so"
KEPT_SUFFIX = ".capture"  # of texts, see kept_files.py

_LOCK_TIMEOUT = 120  # seconds to wait while another process compiles the same library
_STALE_AFTER = 24 * 3600  # seconds until a build folder that a killed process left is removed
_BUILD_PREFIX = "build-"
_CONSEQUENCE = f"Kernels are recompiled in every process. Set {VARIABLE} to use another folder."
_USER_IDS, _OVERFLOW_ID = Path("/proc/self/uid_map"), Path("/proc/sys/kernel/overflowuid")

_failures: dict[Path, object] = {}  # folders that couldn't be used
_not_executable: set[Path] = set()  # folders from which no library can be loaded


def user_folder() -> Path | None:
    """Return this user's cache: UNROLLED_CACHE if set, else a folder in the system's cache directory.

    Returns:
        The folder, which may not exist yet, or None if the user has no home directory.
    """
    configured = os.environ.get(VARIABLE)
    if configured:
        return Path(os.path.abspath(os.path.expanduser(configured)))
    with delay_forks():  # imported late, to keep `import unrolled` fast
        import platformdirs
    try:
        folder = Path(platformdirs.user_cache_dir("unrolled"), "kernels")
    except RuntimeError:  # without a home; before platformdirs 4.4, the folder is named ~ instead
        return None
    return folder if folder.is_absolute() else None


def folders() -> Iterator[Path]:
    """Yield the folders for kernels: the user's cache, then a temporary folder of this process.

    If the user's cache can't be used, warn once and skip it.
    """
    cache = user_folder()
    if cache is None:
        log.announce(f"There is no home directory for the kernel cache. {_CONSEQUENCE}")
    else:
        problem = why_unsafe(cache)
        if problem is None:
            if cache not in _not_executable:
                yield cache
        else:
            log.announce(f"{problem}. {_CONSEQUENCE}")
    yield _temporary_folder()


def report_failure(folder: Path, error: OSError) -> None:
    """Warn once that the user's cache can't be used; for any other folder, only log it."""
    reason = error.strerror or str(error)
    token = object()
    if folder == user_folder() and _failures.setdefault(folder, token) is token:
        log.announce(f"The kernel cache {folder} can't be used ({reason}). {_CONSEQUENCE}")
    else:
        log.build.info("%s can't be used (%s)", folder, reason)


def loading_failed(library: Path, error: OSError) -> OSError:
    """Return an error for :func:`report_failure` if an intact library can't be loaded from its folder.

    If the folder is on a disk that is mounted with the option noexec, it isn't used again.
    """
    reason = str(error).removeprefix(f"{library}: ")
    if "failed to map segment" in reason:
        _not_executable.add(library.parent)
        reason = f"libraries can't be loaded from it: {reason}"
    return OSError(reason)


def why_unsafe(folder: Path) -> str | None:
    """Create a folder if needed, and return why libraries can't be loaded from it, or None if they can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        resolved = folder.resolve()
        status = resolved.stat()
        parents = {parent: parent.stat() for parent in (*resolved.parents, *folder.parents)}
    except OSError as error:
        return f"The kernel cache {folder} can't be used ({error.strerror})"
    if not hasattr(os, "geteuid"):  # Windows: only the user can write to their own folders
        return None
    folder = resolved
    if status.st_uid not in (0, os.geteuid()):
        return f"The kernel cache {folder} belongs to another user (uid {status.st_uid})"
    if status.st_mode & 0o022:
        return (
            f"Other users can write to the kernel cache {folder} (mode {stat.S_IMODE(status.st_mode):o}; "
            f"empty it, then run chmod 700)"
        )
    for parent, parent_status in parents.items():
        if parent_status.st_uid not in (0, os.geteuid(), _unmapped_user()):
            return (
                f"Another user can replace the kernel cache {folder}, because {parent} belongs to them "
                f"(uid {parent_status.st_uid})"
            )
        if parent_status.st_mode & stat.S_IWOTH and not parent_status.st_mode & stat.S_ISVTX:
            return (
                f"Other users can replace the kernel cache {folder}, because all users can write to {parent}"
            )
    return None


def read_metadata(library: Path) -> dict[str, Any] | None:
    """Return the metadata of a library, or None if it is missing, damaged or writable by other users."""
    try:
        metadata = json.loads(read_private(metadata_path(library)))
        digest = hashlib.sha256(read_private(library)).hexdigest()
    except (OSError, ValueError, RecursionError):
        return None
    return metadata if is_complete(metadata) and metadata["sha256"] == digest else None


def is_complete(metadata: Any) -> bool:
    """Return whether the content of a metadata file has all keys that loading a library needs."""
    if not isinstance(metadata, dict):
        return False
    texts = [metadata.get(key) for key in ("arch", "sha256", "system")]
    requires = metadata.get("requires")
    return isinstance(requires, list) and all(isinstance(text, str) for text in (*texts, *requires))


def metadata_path(library: Path) -> Path:
    """Return the path of a library's metadata."""
    return library.with_name(library.name.removesuffix(SUFFIX) + ".json")


def read_private(path: Path) -> bytes:
    """Return the content of a regular file that no other user can write to.

    Raises:
        PermissionError: If it is another kind of file, or another user may have written it.
    """
    with path.open("rb") as file:
        check_private(path, file.fileno())
        return file.read()


def check_private(path: Path, descriptor: int | None = None) -> None:
    """Check that no other user may have written a file.

    Args:
        path: The file.
        descriptor: A descriptor of the file if it is open.

    Raises:
        PermissionError: If another user may have written it, or it isn't a regular file.
        OSError: If there is no such file.
    """
    status = path.stat() if descriptor is None else os.fstat(descriptor)
    shared = hasattr(os, "geteuid") and (status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022)
    if shared or not stat.S_ISREG(status.st_mode):
        raise PermissionError(f"{path} may have been written by another user")


def publish(built: Path, metadata: dict[str, Any], library: Path, mode: int = 0o600) -> None:
    """Move a library and its metadata to their final paths, each in one atomic step.

    Args:
        built: The library, in a separate folder on the same file system.
        metadata: Its metadata. The digest is added here.
        library: Its final path.
        mode: File mode of both files.

    Raises:
        OSError: If the library is empty or can't be moved.
    """
    content = built.read_bytes()
    if not content:
        raise OSError(f"{built} is empty")
    metadata_file = built.with_suffix(".json")
    digest = hashlib.sha256(content).hexdigest()
    metadata_file.write_text(json.dumps({**metadata, "sha256": digest}, indent=1))
    for source, target in ((built, library), (metadata_file, metadata_path(library))):
        source.chmod(mode)
        source.replace(target)


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Create an empty folder inside another one, and remove it at the end.

    Folders that killed processes left more than a day ago are removed, too.
    """
    _remove_stale(folder, _BUILD_PREFIX)
    new_folder = Path(tempfile.mkdtemp(dir=folder, prefix=_BUILD_PREFIX))
    try:
        yield new_folder
    finally:
        shutil.rmtree(new_folder, ignore_errors=True)


@contextmanager
def compile_lock(library: Path) -> Iterator[None]:
    """Hold the lock that keeps other processes from compiling the same library.

    The system releases the lock of a process that dies. After 120 s this stops waiting and continues without
    the lock. The library is then compiled twice, which does no harm.
    """
    lock = FileLock(library.with_suffix(".lock"), timeout=_LOCK_TIMEOUT, mode=0o600)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        log.build.info("%s is compiled without a lock (%s)", library.name, error)
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


def size(folder: Path) -> tuple[int, int]:
    """Return the number of libraries in a folder, and the size of all its files in bytes."""
    libraries = count = 0
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:  # another process has removed it
            continue
        if stat.S_ISREG(status.st_mode):
            libraries, count = libraries + (path.suffix == SUFFIX), count + status.st_size
    return libraries, count


def _remove_stale(folder: Path, prefix: str) -> None:
    """Remove folders with a prefix that haven't changed for a day."""
    for path in folder.glob(f"{prefix}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # another process has removed it
            continue


def _unmapped_user() -> int | None:
    """Return the user id by which Linux shows the users outside of this process's user namespace, if any.

    In a sandbox, the root folder often belongs to such a user: root of the machine.
    """
    try:
        maps_all = _USER_IDS.read_text().split() == ["0", "0", "4294967295"]
        return None if maps_all else int(_OVERFLOW_ID.read_text())
    except (OSError, ValueError):
        return None


@functools.cache
def _temporary_folder() -> Path:
    """Create a folder for this process and its forked children, removed when this process ends."""
    if sys.platform == "win32":  # which doesn't remove libraries that the ending process has loaded
        _remove_stale(Path(tempfile.gettempdir()), "unrolled-")
    folder, process = Path(tempfile.mkdtemp(prefix="unrolled-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == process else None)
    return folder
