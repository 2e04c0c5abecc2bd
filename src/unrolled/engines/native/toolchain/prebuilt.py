"""Prebuilt kernels: a folder that ``unrolled build`` has filled and UNROLLED_KERNELS names."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unrolled._version import __version__
from unrolled.engines import log
from unrolled.engines.native.toolchain import cpp_files, cpu
from unrolled.engines.native.toolchain.cache import KEPT_SUFFIX, SUFFIX, is_complete
from unrolled.engines.native.toolchain.compiler import FLAGS, Compiler

VARIABLE = "UNROLLED_KERNELS"


@dataclass(frozen=True)
class Folder:
    """The part of a folder of prebuilt kernels that this machine can use.

    Attributes:
        path: The folder.
        arch: The instruction set that is used, or None if this machine can use none.
        metadata: Metadata of each library, by its file name without suffix.
        problem: Why this machine can't use the folder. Empty if it can.
    """

    path: Path
    arch: str | None
    metadata: dict[str, dict[str, Any]]
    problem: str = ""

    def find(self, source: str) -> tuple[Path, dict[str, Any]] | None:
        """Return the library of a source and its metadata, or None if there is no intact library."""
        metadata = self.metadata.get(f"{name_of(source)}.{self.arch}")
        if metadata is None:
            log.build.info("%s", self.why_missing())
            return None
        library = self.path / f"{name_of(source)}.{self.arch}{SUFFIX}"
        try:
            digest = hashlib.sha256(library.read_bytes()).hexdigest()
        except OSError as error:
            digest = str(error)
        if digest != metadata["sha256"]:
            log.announce(f"The prebuilt kernel {library} is damaged. Run unrolled build again.")
            return None
        log.build.info("prebuilt: %s", library)
        return library, metadata

    def why_missing(self) -> str:
        """Return why the folder has no kernel for a source, for a message."""
        if self.problem:
            return f"{VARIABLE}: {self.problem}"
        versions = sorted({_versions(metadata) for metadata in self.metadata.values()})
        current = _versions(current_environment())
        reason = "has no kernel for this step"
        if versions != [current]:
            reason += f" (it was built with {'; '.join(versions)}, but this is {current})"
        return f"{VARIABLE}: {self.path} {reason}"


def find_folder(arch: str | None) -> Folder | None:
    """Read the folder that UNROLLED_KERNELS names. If this machine can't use it, warn once.

    Args:
        arch: The instruction set. If None, the best one in the folder that this processor supports.

    Returns:
        The folder, or None if UNROLLED_KERNELS is not set.
    """
    configured = os.environ.get(VARIABLE)
    if not configured:
        return None
    folder = _read(Path(os.path.abspath(os.path.expanduser(configured))), arch)
    if folder.problem:
        log.announce(f"{VARIABLE}: {folder.problem}")
    return folder


def usable_path() -> Path | None:
    """Return the folder that UNROLLED_KERNELS names, if there is one that can be used, without a warning."""
    configured = os.environ.get(VARIABLE)
    if not configured:
        return None
    path = Path(os.path.abspath(os.path.expanduser(configured)))
    return None if _why_unusable(path) else path


@functools.cache
def _read(path: Path, arch: str | None) -> Folder:
    problem = _why_unusable(path)
    if problem:
        return Folder(path, None, {}, problem)
    all_metadata = {}
    for file in sorted(path.glob("*.json")):
        try:
            metadata = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if is_complete(metadata):
            all_metadata[file.stem] = metadata
    if not all_metadata:
        return Folder(path, None, {}, f"{path} contains no kernels. Create them with unrolled build")
    same_system = {
        name: metadata for name, metadata in all_metadata.items() if metadata["system"] == cpu.system()
    }
    if not same_system:
        systems = ", ".join(sorted({metadata["system"] for metadata in all_metadata.values()}))
        problem = f"the kernels in {path} are for {systems}, but this is {cpu.system()}"
        return Folder(path, None, all_metadata, problem)
    required: dict[str, set[str]] = {}
    for metadata in same_system.values():
        required.setdefault(metadata["arch"], set()).update(metadata["requires"])
    supported = {name: features for name, features in required.items() if not cpu.missing(features)}
    if arch is None and supported:
        return Folder(path, max(supported, key=lambda name: len(supported[name])), same_system)
    if arch in supported:
        return Folder(path, arch, same_system)
    if arch is not None and arch not in required:
        problem = f"{path} has kernels for {', '.join(sorted(required))}, not for {arch}"
        return Folder(path, None, same_system, problem)
    missing = {name: cpu.missing(sorted(features)) for name, features in required.items()}
    details = "; ".join(f"{name} needs {', '.join(features)}" for name, features in sorted(missing.items()))
    return Folder(path, None, same_system, f"this processor can't run the kernels in {path} ({details})")


def _why_unusable(path: Path) -> str:
    """Return why libraries can't be loaded from a folder that the user has named; empty if they can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path} can't be read ({error.strerror})"
    if not stat.S_ISDIR(mode):
        return f"{path} is not a folder"
    files = (path, *path.glob(f"*{SUFFIX}"), *path.glob(f"*{KEPT_SUFFIX}"))
    if os.name == "posix" and any(file.stat().st_mode & stat.S_IWOTH for file in files):
        return f"all users can write to {path} or to files in it. Run chmod -R o-w on it"
    return ""


def library_metadata(compiler: Compiler, arch: str, requires: list[str]) -> dict[str, Any]:
    """Return the metadata of a library, without its digest."""
    return {**current_environment(), "arch": arch, "requires": requires, "compiler": compiler.title}


def current_environment() -> dict[str, Any]:
    """Return the versions and the system that libraries are built with in this process."""
    return {"unrolled": __version__, "torch": torch.__version__, "system": cpu.system()}


def _versions(metadata: dict[str, Any]) -> str:
    return f"unrolled {metadata.get('unrolled')} and torch {metadata.get('torch')}"


def name_of(source: str) -> str:
    """Return the file name of a prebuilt library, without instruction set and suffix.

    It hashes everything that affects the library but the compiler and the instruction set.
    """
    parts = (source, cpp_files.digest(), " ".join(FLAGS), cpu.system())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
