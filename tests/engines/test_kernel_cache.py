"""The cache of compiled kernels: hits, file names, permissions, damage, concurrency, unusable disks."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import processes
from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import (
    OTHER_SOURCE,
    PRINT_ANSWER,
    SOURCE,
    call_library,
    compare_engines,
    counting_compiler,
    library_path,
    mount_namespace,
    run_python,
)
from unrolled.engines import log
from unrolled.engines.native.toolchain import build, cache, compiler, cpp_files, cpu, eviction

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


@NEEDS_SYSTEM_COMPILER
def test_the_cache_is_private_with_any_umask(cache_folder: Path) -> None:
    original = os.umask(0)
    try:
        assert call_library() == 42
    finally:
        os.umask(original)
    assert stat.S_IMODE(cache_folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in cache_folder.iterdir()} == {0o600}
    modified = next(cache_folder.glob("*.so")).stat().st_mtime_ns
    assert call_library() == 42
    assert next(cache_folder.glob("*.so")).stat().st_mtime_ns == modified


def plant_library() -> Path:
    """Replace a compiled library by another one, with matching metadata, and return its path."""
    planted, library = library_path(OTHER_SOURCE), library_path()
    shutil.copyfile(planted, library)
    metadata = json.loads(cache.metadata_path(library).read_text())
    metadata["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    cache.metadata_path(library).write_text(json.dumps(metadata))
    assert call_library() == 43  # in a private folder it is loaded
    return library


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@NEEDS_SYSTEM_COMPILER
def test_a_folder_that_other_users_can_write_to_is_not_used(cache_folder: Path, mode: int) -> None:
    plant_library()
    cache_folder.chmod(mode)
    log._announced.clear()
    message = f"Other users can write to the kernel cache {cache_folder} .mode {mode:o}; .*chmod"
    with pytest.warns(UserWarning, match=message):
        assert call_library() == 42
    assert call_library() == 42  # only one warning
    cache_folder.chmod(0o700)
    assert call_library() == 43


@pytest.mark.parametrize("file", ["library", "metadata"])
@NEEDS_SYSTEM_COMPILER
def test_a_file_that_other_users_can_write_to_is_rebuilt(file: str) -> None:
    library = plant_library()
    (library if file == "library" else cache.metadata_path(library)).chmod(0o666)
    assert call_library() == 42


@NEEDS_SYSTEM_COMPILER
def test_a_folder_that_other_users_can_replace_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "open"
    parent.mkdir()
    cache_folder = parent / "kernels"
    monkeypatch.setenv(cache.VARIABLE, str(cache_folder))
    parent.chmod(0o777)
    message = f"Other users can replace the kernel cache {cache_folder}, because all users can write to"
    with pytest.warns(UserWarning, match=message):
        assert call_library() == 42
    assert not list(cache_folder.glob("*.so"))
    parent.chmod(0o1777)  # sticky, like /tmp: only the owner can rename a folder in it
    assert call_library() == 42
    assert list(cache_folder.glob("*.so"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can change the owner of files"
)
@NEEDS_SYSTEM_COMPILER
def test_files_and_folders_of_another_user_are_not_used(cache_folder: Path) -> None:
    library = plant_library()
    os.chown(library, 54321, -1)
    assert call_library() == 42
    plant_library()
    os.chown(cache_folder, 54321, -1)
    log._announced.clear()
    with pytest.warns(UserWarning, match=r"belongs to another user \(uid 54321\)"):
        assert call_library() == 42


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


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_many_processes_compile_a_library_once(cache_folder: Path, tmp_path: Path) -> None:
    cxx, calls = counting_compiler(tmp_path, before="sleep 2")  # so that they overlap
    code = PRINT_ANSWER.format(source=SOURCE)
    running = [processes.start("-c", code, env={**os.environ, "CXX": cxx}) for _ in range(4)]
    assert [process.communicate()[0] for process in running] == ["42\n"] * 4
    assert calls() == 1
    assert len(list(cache_folder.glob("*.so"))) == 1
    assert not list(cache_folder.glob("build-*"))


@NEEDS_SYSTEM_COMPILER
def test_threads_compile_a_library_once(tmp_path: Path) -> None:
    cxx, calls = counting_compiler(tmp_path, before="sleep 1")
    code = f"""
    import threading
    from unrolled.engines.native.toolchain import build
    build.start({SOURCE!r})
    answers = []
    def work(): answers.append(build.load({SOURCE!r}).answer())
    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(answers, build.requested_sources() == [{SOURCE!r}])
    """
    done = run_python(code, CXX=cxx)
    assert done.stdout == "[42, 42, 42, 42, 42] True\n", done.stderr
    assert calls() == 1


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_a_forked_child_compiles_what_a_thread_of_its_parent_was_compiling(tmp_path: Path) -> None:
    cxx, _ = counting_compiler(tmp_path, before="sleep 2")
    code = f"""
    import os, time
    from unrolled.engines.native.toolchain import build
    build.start({SOURCE!r})
    time.sleep(0.5)
    child = os.fork()
    answer = build.load({SOURCE!r}).answer()
    if child == 0:
        os._exit(answer)
    print(answer, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = run_python(code, CXX=cxx, PYTHONWARNINGS="ignore")
    assert done.stdout == "42 42\n", done.stderr


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_the_lock_of_a_killed_process_is_released() -> None:
    library = library_path()
    library.unlink()
    hold_lock = f"""
from pathlib import Path
from unrolled.engines.native.toolchain import cache
with cache.compile_lock(Path({str(library)!r})):
    print(1, flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", hold_lock], **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    start = time.monotonic()
    assert call_library() == 42
    assert time.monotonic() - start < cache._LOCK_TIMEOUT / 2


@NEEDS_SYSTEM_COMPILER
def test_a_library_is_compiled_without_the_lock_after_a_timeout(
    monkeypatch: pytest.MonkeyPatch, build_log: Any
) -> None:
    monkeypatch.setattr(cache, "_LOCK_TIMEOUT", 0.2)
    library = library_path()
    library.unlink()
    build_log()
    with cache.compile_lock(library):
        assert call_library() == 42
    assert any("is compiled without a lock" in line for line in build_log())


@NEEDS_SYSTEM_COMPILER
def test_old_build_folders_of_killed_processes_are_removed(cache_folder: Path) -> None:
    cache_folder.mkdir(mode=0o700)
    old, new = cache_folder / "build-old", cache_folder / "build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "loop.cpp").write_text("")
    os.utime(old, (0, 0))
    assert call_library() == 42
    assert not old.exists()
    assert new.exists()  # another process may be using it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with a space", "größe-核", 'it\'s "quoted" $HOME'])
@NEEDS_SYSTEM_COMPILER
def test_the_folder_can_have_any_name(tmp_path: Path, name: str) -> None:
    done = run_python(PRINT_ANSWER.format(source=SOURCE), UNROLLED_CACHE=str(tmp_path / name), LC_ALL="C")
    assert (done.stdout, done.stderr) == ("42\n", "")
    assert len(list((tmp_path / name).glob("*.so"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("state", ["full", "read-only", "noexec"])
@NEEDS_SYSTEM_COMPILER
def test_an_unusable_disk_is_replaced_by_a_temporary_folder(
    cache_folder: Path, tmp_path: Path, state: str
) -> None:
    cache_folder.mkdir(mode=0o700)
    mount = {
        "full": f"mount -t tmpfs -o size=16k,mode=700 none {cache_folder} && echo > {cache_folder}/file",
        "read-only": f"mount -t tmpfs -o ro,mode=700 none {cache_folder}",
        "noexec": f"mount -t tmpfs -o noexec,mode=700 none {cache_folder}",
    }[state]
    done = run_python(PRINT_ANSWER.format(source=SOURCE), prefix=mount_namespace(mount), TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert done.stderr.count("UserWarning:") == 1
    assert f"The kernel cache {cache_folder} can't be used" in done.stderr
    assert not list(tmp_path.glob("unrolled-*"))  # the temporary folder is removed at the end


@pytest.mark.slow
@pytest.mark.parametrize("option", ["ro", "noexec"])
@NEEDS_SYSTEM_COMPILER
def test_an_unusable_disk_gives_one_warning_for_many_kernels(cache_folder: Path, option: str) -> None:
    cache_folder.mkdir(mode=0o700)
    prefix = mount_namespace(f"mount -t tmpfs -o {option},mode=700 none {cache_folder}")
    done = run_python(compare_engines("native", "ur.LSTM(5, 19), ur.GRU(3, 8)"), prefix=prefix)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr
    assert done.stderr.count("UserWarning:") == 1, done.stderr
    assert f"The kernel cache {cache_folder} can't be used" in done.stderr


@NEEDS_SYSTEM_COMPILER
def test_a_folder_without_execution_is_skipped_after_one_warning(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(library: Path, _: object) -> Path:
        if library.parent == cache_folder:
            raise OSError(f"{library}: failed to map segment from shared object")
        return library

    monkeypatch.setattr(cache, "_not_executable", set())
    monkeypatch.setattr(cache, "_failures", {})
    with pytest.warns(UserWarning, match="libraries can't be loaded from it") as warned:
        folders = [build.find_or_compile(source, "native", load).parent for source in (SOURCE, OTHER_SOURCE)]
    assert cache_folder not in folders
    assert len(list(cache_folder.glob("*.so"))) == 1  # the second one isn't compiled there
    (message,) = [str(item.message) for item in warned]
    assert f"The kernel cache {cache_folder} can't be used (libraries can't be loaded from it" in message
    assert ".so" not in message


@NEEDS_SYSTEM_COMPILER
def test_a_loaded_library_that_can_not_be_replaced_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, another process may have compiled and loaded it meanwhile."""
    library_path()
    published = cache.read_metadata
    results = iter([None, None])  # before and after the lock: not there yet
    monkeypatch.setattr(cache, "read_metadata", lambda library: next(results, published(library)))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(cache, "publish", refuse)
    assert call_library() == 42


def sized_source(number: int) -> str:
    return f'char data[200000] = {{1}};\nextern "C" int answer() {{ return {number} + data[1]; }}\n'


@NEEDS_SYSTEM_COMPILER
def test_libraries_that_were_unused_for_longest_are_deleted(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(eviction.VARIABLE, "550 kB")
    first, second = (library_path(sized_source(number)) for number in (1, 2))
    assert call_library(sized_source(1)) == 1  # now the second one is the oldest
    third = library_path(sized_source(3))
    assert {*cache_folder.glob("*.so")} == {first, third}
    assert not cache.metadata_path(second).exists()
    monkeypatch.setenv(eviction.VARIABLE, "1")
    fourth = library_path(sized_source(4))
    assert [*cache_folder.glob("*.so")] == [fourth]  # the newest one is kept
    assert call_library(sized_source(2)) == 2
    monkeypatch.setenv(eviction.VARIABLE, "0")
    assert call_library(sized_source(3)) == 3
    assert len([*cache_folder.glob("*.so")]) == 2


@NEEDS_SYSTEM_COMPILER
def test_a_loaded_library_works_after_its_deletion(cache_folder: Path) -> None:
    code = f"""
    from unrolled.engines.native.toolchain import build
    first = build.load({sized_source(1)!r})
    build.load({sized_source(2)!r})
    print(first.answer(), len([*__import__("pathlib").Path({str(cache_folder)!r}).glob("*.so")]))
    """
    assert run_python(code, UNROLLED_CACHE_SIZE="1").stdout == "1 1\n"


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_processes_can_delete_one_another_s_libraries() -> None:
    code = "\n".join(PRINT_ANSWER.format(source=sized_source(number)) for number in range(6))
    environment = {**os.environ, "UNROLLED_CACHE_SIZE": "1"}
    running = [processes.start("-c", code, env=environment) for _ in range(3)]
    assert [process.communicate() for process in running] == [("0\n1\n2\n3\n4\n5\n", "")] * 3


@pytest.mark.parametrize(
    ("text", "size"), [("", 2**30), ("1000", 1000), ("2k", 2048), ("1.5 MB", 3 * 2**19), ("2GiB", 2**31)]
)
def test_the_size_limit_can_have_a_unit(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(eviction.VARIABLE, text)
    assert eviction.size_limit() == size


def test_an_invalid_size_limit_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(eviction.VARIABLE, "much")
    with pytest.warns(UserWarning, match="UNROLLED_CACHE_SIZE should be a number of bytes.*got 'much'"):
        assert eviction.size_limit() == 2**30


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can change the owner of files"
)
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_parent_folder_of_another_user_is_not_used(tmp_path: Path, mode: int) -> None:
    """Its owner can rename the folders in it, even if others can't."""
    parent = tmp_path / "theirs"
    parent.mkdir()
    parent.chmod(mode)
    os.chown(parent, 54321, -1)
    reason = cache.why_unsafe(parent / "below" / "kernels")
    assert reason == (
        f"Another user can replace the kernel cache {parent}/below/kernels, because {parent} belongs to them "
        "(uid 54321)"
    )
    link = tmp_path / "link"
    (tmp_path / "mine").mkdir()
    (parent / "link").symlink_to(tmp_path / "mine")
    link.symlink_to(parent / "link")
    assert "belongs to them" in str(cache.why_unsafe(parent / "link" / "kernels"))
    os.chown(parent, 0, -1)
    assert cache.why_unsafe(parent / "below" / "kernels") is None


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_parent_folders_of_users_outside_of_a_sandbox_are_accepted(cache_folder: Path) -> None:
    """In a user namespace without them, the root folder belongs to nobody."""
    prefix = mount_namespace("true", user=1234, group=1234)
    code = "from unrolled.engines.native.toolchain import cache\nprint(cache._unmapped_user())"
    assert run_python(code, prefix=prefix).stdout == "65534\n"
    assert run_python(code).stdout == "None\n"


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_a_read_only_cache_that_has_the_kernels_is_used(cache_folder: Path) -> None:
    assert call_library() == 42
    bind = f"mount --bind {cache_folder} {cache_folder}"
    prefix = mount_namespace(f"{bind} && mount -o remount,ro,bind {cache_folder}")
    done = run_python(PRINT_ANSWER.format(source=SOURCE), prefix=prefix, PATH=os.environ["PATH"])
    assert (done.stdout, done.stderr) == ("42\n", "")


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_without_a_writable_folder_layers_fall_back_to_the_reference_engine(
    cache_folder: Path, tmp_path: Path
) -> None:
    cache_folder.mkdir(mode=0o700)
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    tiny = "mount -t tmpfs -o size=16k,mode=700 none"
    prefix = mount_namespace(f"{tiny} {cache_folder} && {tiny} {tmp}")
    done = run_python(compare_engines("auto"), prefix=prefix, TMPDIR=str(tmp))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "layers run on the reference engine, which is slower: no folder can be used" in done.stderr
    assert done.stderr.count("No space left on device") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "", "/dev/null/home"])
@NEEDS_SYSTEM_COMPILER
def test_without_a_home_directory_kernels_are_compiled_to_a_temporary_folder(
    tmp_path: Path, home: str | None
) -> None:
    """The user isn't listed in the system's user database either."""
    prefix = mount_namespace("true", user=54321, group=54321)
    environment = {"HOME": home, "UNROLLED_CACHE": None, "XDG_CACHE_HOME": None, "TMPDIR": str(tmp_path)}
    code = f"import os; os.chdir({str(tmp_path)!r})\n{PRINT_ANSWER.format(source=SOURCE)}"
    done = run_python(code, prefix=prefix, **environment)
    assert done.stdout == "42\n", done.stderr
    assert done.stderr.count("UserWarning:") == 1
    assert "Kernels are recompiled in every process. Set UNROLLED_CACHE to use another folder." in done.stderr
    assert not list(tmp_path.iterdir())  # no folder named ~
