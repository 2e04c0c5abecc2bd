"""Kernels compiled ahead of time, by ``unrolled build``: UNROLLED_KERNELS names their folder."""

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
from unrolled.engines.native.toolchain import cpu
from unrolled.engines.native.toolchain.compiler import FLAGS, Compiler, headers

VARIABLE = "UNROLLED_KERNELS"


@dataclass(frozen=True)
class Folder:
    """What a folder of kernels has for this machine.

    Attributes:
        path: the folder.
        arch: the instruction set that is taken, None where none fits.
        notes: those of its libraries, by their file names without an end.
        trouble: why it has nothing for this machine, in words.
    """

    path: Path
    arch: str | None
    notes: dict[str, dict[str, Any]]
    trouble: str = ""

    def find(self, source: str) -> tuple[Path, dict[str, Any]] | None:
        """The library of a source, and the note on it; None where there is none."""
        note = self.notes.get(f"{name_of(source)}.{self.arch}")
        if note is None:
            log.build.info("%s", self.lack())
            return None
        library = self.path / f"{name_of(source)}.{self.arch}.so"
        try:
            digest = hashlib.sha256(library.read_bytes()).hexdigest()
        except OSError as error:
            digest = str(error)
        if digest != note["sha256"]:
            log.announce(f"{library} is damaged: build the folder anew with unrolled build")
            return None
        log.build.info("shipped: %s", library)
        return library, note

    def lack(self) -> str:
        """Why a kernel is not taken from here, in words."""
        if self.trouble:
            return f"{VARIABLE}: {self.trouble}"
        made = sorted({_made(note) for note in self.notes.values()})
        here = _made(note_here())
        what = "has no kernel of this step"
        if made != [here]:
            what += f" (it was made with {'; '.join(made)}, and this is {here})"
        return f"{VARIABLE}: {self.path} {what}"


def folder(arch: str | None) -> Folder | None:
    """The folder that UNROLLED_KERNELS names, for one instruction set or the best that runs here.

    None where it names none. It warns once where there is nothing for this machine in it.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    found = _read(Path(os.path.abspath(os.path.expanduser(given))), arch)
    if found.trouble:
        log.announce(f"{VARIABLE}: {found.trouble}")
    return found


@functools.cache
def _read(path: Path, arch: str | None) -> Folder:
    trouble = _unsafe(path)
    if trouble:
        return Folder(path, None, {}, trouble)
    notes = {}
    for file in sorted(path.glob("*.json")):
        try:
            note = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(note, dict) and {"arch", "requires", "sha256", "system"} <= note.keys():
            notes[file.stem] = note
    if not notes:
        return Folder(path, None, {}, f"{path} holds no kernels; unrolled build makes them")
    here = {name: note for name, note in notes.items() if note["system"] == cpu.system()}
    if not here:
        systems = ", ".join(sorted({note["system"] for note in notes.values()}))
        return Folder(path, None, notes, f"the kernels of {path} are for {systems}")
    needs: dict[str, set[str]] = {}
    for note in here.values():
        needs.setdefault(note["arch"], set()).update(note["requires"])
    fitting = {name: found for name, found in needs.items() if not cpu.lacking(found)}
    if arch is None and fitting:
        return Folder(path, max(fitting, key=lambda name: len(fitting[name])), here)
    if arch in fitting:
        return Folder(path, arch, here)
    if arch is not None and arch not in needs:
        return Folder(path, None, here, f"{path} has kernels for {', '.join(sorted(needs))}, not {arch}")
    lacking = {name: cpu.lacking(sorted(found)) for name, found in needs.items()}
    words = "; ".join(f"{name} needs {', '.join(found)}" for name, found in sorted(lacking.items()))
    return Folder(path, None, here, f"this processor can't run the kernels of {path} ({words})")


def _unsafe(path: Path) -> str:
    """Why nothing is loaded from a folder that the user has named; empty where it may be."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path} can't be read ({error.strerror})"
    if not stat.S_ISDIR(mode):
        return f"{path} is no folder"
    if os.name == "posix" and any(file.stat().st_mode & stat.S_IWOTH for file in (path, *path.glob("*.so"))):
        return f"all users can write to {path} or to files in it: chmod -R o-w it"
    return ""


def note(compiler: Compiler, arch: str, requires: list[str]) -> dict[str, Any]:
    """What is to be known of a library."""
    return {**note_here(), "arch": arch, "requires": requires, "compiler": compiler.title}


def note_here() -> dict[str, Any]:
    """With what libraries are made here."""
    return {"unrolled": __version__, "torch": torch.__version__, "system": cpu.system()}


def _made(note: dict[str, Any]) -> str:
    return f"unrolled {note.get('unrolled')} and torch {note.get('torch')}"


def name_of(source: str) -> str:
    """The name of a shipped library: of what can change it, but for compiler and instruction set."""
    parts = (source, headers(), " ".join(FLAGS), cpu.system())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
