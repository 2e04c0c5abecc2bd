"""The cache of compiled kernels: hits, file names and damaged files."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import OTHER_SOURCE, call_library, counting_compiler, library_path
from unrolled.engines.native.toolchain import cache, compiler, cpp_files, cpu

pytestmark = pytest.mark.usefixtures("cache_folder")


@NEEDS_SYSTEM_COMPILER
def test_a_library_is_compiled_once_and_then_loaded_from_the_cache(
    cache_folder: Path, build_log: Any
) -> None:
    assert call_library() == 42
    assert any(line.startswith("miss: ") for line in build_log())
    (library,) = cache_folder.glob("*.so")
    modified = library.stat().st_mtime_ns
    assert call_library() == 42
    (line,) = build_log()
    assert line.startswith(f"hit: {library} (")
    assert library.stat().st_mtime_ns == modified
    assert call_library(OTHER_SOURCE) == 43
    assert len(list(cache_folder.glob("*.so"))) == 2


@NEEDS_SYSTEM_COMPILER
def test_the_name_of_a_library_depends_on_everything_that_affects_it(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [library_path().name]

    def assert_new_name(reason: str, **arguments: str) -> None:
        names.append(library_path(**arguments).name)
        assert len(set(names)) == len(names), reason

    assert_new_name("the source", source=OTHER_SOURCE)
    assert_new_name("the instruction set", arch="x86-64-v3" if "x86" in cpu.system() else "armv8-a")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "c++ -DA_FLAG")
        assert_new_name("the flags of CXX")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", counting_compiler(tmp_path)[0])
        assert_new_name("another compiler")
    (tmp_path / "newer").mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", counting_compiler(tmp_path / "newer", version="echo 99.0")[0])
        assert_new_name("another version of the compiler")
    with monkeypatch.context() as patch:
        patch.setenv("CPLUS_INCLUDE_PATH", str(tmp_path))
        assert_new_name("the include path")
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "identity", lambda: "another processor, another C library")
        assert_new_name("the machine")
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-DB_FLAG"))
        assert_new_name("the flags")
    for name, value in (("read", lambda name: f"another {name}"), ("__version__", "99.0")):
        cpp_files.digest.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(cpp_files, name, value)
            assert_new_name(name)
    cpp_files.digest.cache_clear()
    assert library_path().name == names[0]


def test_the_name_of_a_library_depends_on_the_processor() -> None:
    """Machines that share a home directory have their own libraries for native."""
    identity = cpu.identity()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        assert cpu._features_elsewhere() == ""
        lines = cpuinfo.read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
        assert flags.partition(":")[2].strip() in identity
    assert cpu.system() in identity


def test_the_name_of_a_library_depends_on_the_processor_on_macos_and_windows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "sysctl"
    script.write_text("#!/bin/sh\necho hw.optional.arm.FEAT_BF16: 1; echo $*")
    script.chmod(0o755)
    monkeypatch.setattr(cpu, "_SYSCTL", (str(script), *cpu._SYSCTL[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert cpu._features_elsewhere() == "hw.optional.arm.FEAT_BF16: 1\nhw.optional machdep.cpu\n"
        script.unlink()
        assert cpu._features_elsewhere() == ""

    class Kernel32:
        def IsProcessorFeaturePresent(self, number: int) -> int:
            return int(number in (10, 40))

    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=Kernel32()), raising=False)
    assert cpu._features_elsewhere() == "10 40"


@pytest.mark.parametrize(
    "damage",
    [
        *("empty", "text", "truncated", "no metadata", "invalid metadata", "list", "nested", "folder"),
        *("without requires", "without arch", "without system", "wrong requires"),
    ],
)
@NEEDS_SYSTEM_COMPILER
def test_a_damaged_library_is_rebuilt(damage: str) -> None:
    library = library_path()
    metadata = cache.metadata_path(library)
    if damage == "folder":
        library.unlink()
        library.mkdir()
        with pytest.warns(UserWarning, match="can't be used"):
            assert call_library() == 42
        return
    damaged = {"empty": b"", "text": b"not a library", "truncated": library.read_bytes()[:4000]}
    if damage in damaged:
        library.write_bytes(damaged[damage])
    elif damage == "no metadata":
        metadata.unlink()
    elif damage.startswith(("without", "wrong")):
        kind, key = damage.split()
        content = json.loads(metadata.read_text())
        content.pop(key) if kind == "without" else content.update({key: 5})
        metadata.write_text(json.dumps(content))
    else:
        metadata.write_text({"invalid metadata": "{", "list": "[]", "nested": "[" * 100_000}[damage])
    assert call_library() == 42
    assert cache.read_metadata(library) is not None
