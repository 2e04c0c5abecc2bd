"""Threads and processes that compile at the same time, and the lock of the kernel cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import processes
from helpers.layer_pairs import NEEDS_COMPILER, NEEDS_SYSTEM_COMPILER
from helpers.toolchain import PRINT_ANSWER, SOURCE, call_library, counting_compiler, library_path, run_python
from unrolled.engines.native.toolchain import cache

pytestmark = pytest.mark.usefixtures("cache_folder")


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


@pytest.mark.slow
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
@NEEDS_COMPILER
@NEEDS_SYSTEM_COMPILER
def test_forward_and_backward_are_compiled_at_the_same_time(tmp_path: Path) -> None:
    """Each of the two compilations waits until the other one has begun."""
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    wait = f"while [ $(wc -l < {begun}) -lt 2 ]; do sleep 0.05; done"
    compiler, count = counting_compiler(tmp_path, f"if [ -e {gate} ]; then echo >> {begun}; {wait}; fi")
    code = f"""
    import pathlib, torch, unrolled as ur
    layer, x = ur.GRU(3, 4), torch.randn(2, 1, 3)
    with torch.no_grad():
        layer(x)  # compiles the forward loop for inference, and what all loops share
    pathlib.Path({str(gate)!r}).touch()
    layer(x)
    """
    variables = {"CXX": compiler, "UNROLLED_CACHE": str(tmp_path / "kernels")}
    done = run_python(code, timeout=300, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert count() == 5


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
