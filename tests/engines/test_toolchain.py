"""Kernels compiled on the user's machine: compilers, the cache and its troubles, folders to ship."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import unrolled
from helpers import processes
from helpers.layer_pairs import NEEDS_SYSTEMS_COMPILER
from unrolled.cli import main
from unrolled.engines import log
from unrolled.engines.native.toolchain import build, cache, compiler, cpu, prebuilt

ANSWER = 'extern "C" int answer() { return 42; }\n'
OTHER = 'extern "C" int answer() { return 43; }\n'
ASK = """
import sys
from unrolled.engines.native.toolchain import build, cache
from unrolled.engines.native.toolchain.compiler import NoCompilerError
try:
    print(build.load({source!r}).answer())
except NoCompilerError as error:
    print("refused:", error)
"""
BOTH_ENGINES = """
import torch, unrolled as ur
torch.manual_seed(1)
for layer in (LAYERS,):
    x, found = torch.randn(6, 3, layer.input_size), []
    for engine in ("CHOSEN", "reference"):
        with ur.engine(engine):
            output, _ = layer(x)
            found.append([output.detach(), *torch.autograd.grad(output.square().sum(), layer.parameters())])
    print(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found)) < 1e-5)
"""


def both_engines(engine: str, layers: str = "ur.LSTM(5, 19)") -> str:
    """A program that compares an engine with the reference: it prints True for each layer."""
    return BOTH_ENGINES.replace("CHOSEN", engine).replace("LAYERS", layers)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a test, not yet made; nothing else of the environment decides."""
    for name in ("CXX", "UNROLLED_KERNELS", "UNROLLED_ARCH", "UNROLLED_LOG"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "kernels"
    monkeypatch.setenv(cache.VARIABLE, str(place))
    return place


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged since the last time."""
    caplog.set_level("INFO", "unrolled.build")

    def since() -> list[str]:
        messages = caplog.messages[:]
        caplog.clear()
        return messages

    return since


def answer(source: str = ANSWER, arch: str = "native") -> int:
    """Find or compile a library in the cache, and call it."""

    def call(library: Path, _: object) -> int:
        with tempfile.TemporaryDirectory() as at:  # for the system knows a library that it has by its name
            return int(ctypes.CDLL(shutil.copy(library, at)).answer())

    return build.obtain(source, arch, call)


def place(source: str = ANSWER, arch: str = "native") -> Path:
    return build.obtain(source, arch, lambda library, _: library)


def python(
    code: str, *, prefix: tuple[str, ...] = (), timeout: float = 100, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; None takes a variable away."""
    given = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    code = textwrap.dedent(code)
    if not prefix:
        return processes.run("-c", code, env=given, timeout=timeout)
    line = [*prefix, sys.executable, "-c", code]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=given)


def counting_compiler(at: Path, before: str = "", version: str = "") -> tuple[str, Callable[[], int]]:
    """A C++ compiler that notes how often it compiles; the real one does the work."""
    calls, script = at / "calls", at / "c++ of mine"
    script.write_text(
        f"""#!/bin/sh
case "$*" in
*-shared*) echo >> "{calls}"; {before or ":"};;
*--version) {version or ":"};;
esac
exec {shutil.which("c++")} "$@"
"""
    )
    script.chmod(0o755)
    return f"'{script}'", lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


# --- the cache ---


@NEEDS_SYSTEMS_COMPILER
def test_a_library_is_compiled_once_and_taken_from_the_cache_then(folder: Path, told: Any) -> None:
    assert answer() == 42
    assert any(line.startswith("miss: ") for line in told())
    (library,) = folder.glob("*.so")
    made = library.stat().st_mtime_ns
    assert answer() == 42
    (line,) = told()
    assert line.startswith(f"hit: {library} (")
    assert library.stat().st_mtime_ns == made
    assert answer(OTHER) == 43
    assert len(list(folder.glob("*.so"))) == 2


@NEEDS_SYSTEMS_COMPILER
def test_all_that_can_change_a_library_is_in_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [place().name]

    def changed(what: str, **arguments: str) -> None:
        names.append(place(**arguments).name)
        assert len(set(names)) == len(names), what

    changed("the source", source=OTHER)
    changed("the instruction set", arch="x86-64-v3" if "x86" in cpu.system() else "armv8-a")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "c++ -DA_FLAG")
        changed("the flags of CXX")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", counting_compiler(tmp_path)[0])
        changed("another compiler")
    (tmp_path / "newer").mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", counting_compiler(tmp_path / "newer", version="echo 99.0")[0])
        changed("another version of it")
    with monkeypatch.context() as patch:
        patch.setenv("CPLUS_INCLUDE_PATH", str(tmp_path))
        changed("where headers are looked for")
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "identity", lambda: "another processor, another C library")
        changed("the machine")
    for name, value in (("FLAGS", (*compiler.FLAGS, "-DB_FLAG")), ("headers", lambda: "other headers")):
        with monkeypatch.context() as patch:
            patch.setattr(build if name == "headers" else compiler, name, value)
            changed(name)
    compiler.headers.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(unrolled, "__version__", "99.0")
        changed("the version of the package")
    compiler.headers.cache_clear()
    assert place().name == names[0]


def test_the_machines_processor_is_part_of_the_name() -> None:
    """A home folder may be shared by machines: each has its own libraries for native."""
    identity = cpu.identity()
    told = Path("/proc/cpuinfo")
    if told.exists():
        flags = next(line for line in told.read_text().splitlines() if line.startswith(("flags", "Features")))
        assert flags.partition(":")[2].strip() in identity
    assert cpu.system() in identity


@NEEDS_SYSTEMS_COMPILER
def test_the_cache_is_private_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    made = (folder / next(folder.glob("*.so"))).stat().st_mtime_ns
    assert answer() == 42
    assert next(folder.glob("*.so")).stat().st_mtime_ns == made


def planted(folder: Path) -> Path:
    """Another library in the place of one that was compiled, with a note that fits to it."""
    bad, good = place(OTHER), place()
    shutil.copyfile(bad, good)
    note = json.loads(cache.note_of(good).read_text())
    note["sha256"] = hashlib.sha256(good.read_bytes()).hexdigest()
    cache.note_of(good).write_text(json.dumps(note))
    assert answer() == 43  # it would be taken
    return good


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@NEEDS_SYSTEMS_COMPILER
def test_a_folder_that_others_can_write_to_is_not_used(folder: Path, mode: int) -> None:
    planted(folder)
    folder.chmod(mode)
    log._announced.clear()
    with pytest.warns(
        UserWarning, match=f"others can write to the kernel cache {folder} .mode {mode:o}; .*chmod"
    ):
        assert answer() == 42
    assert answer() == 42  # told once
    folder.chmod(0o700)
    assert answer() == 43


@pytest.mark.parametrize("of", ["library", "note"])
@NEEDS_SYSTEMS_COMPILER
def test_a_file_that_others_can_write_to_is_built_anew(folder: Path, of: str) -> None:
    library = planted(folder)
    (library if of == "library" else cache.note_of(library)).chmod(0o666)
    assert answer() == 42


@NEEDS_SYSTEMS_COMPILER
def test_a_folder_that_all_can_replace_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    folder = open_to_all / "kernels"
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    open_to_all.chmod(0o777)
    with pytest.warns(
        UserWarning, match=f"others can replace the kernel cache {folder}, for all may write to"
    ):
        assert answer() == 42
    assert not list(folder.glob("*.so"))
    open_to_all.chmod(0o1777)  # as /tmp has it: only its owner can rename a folder
    assert answer() == 42
    assert list(folder.glob("*.so"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@NEEDS_SYSTEMS_COMPILER
def test_what_belongs_to_another_user_is_not_used(folder: Path) -> None:
    library = planted(folder)
    os.chown(library, 54321, -1)
    assert answer() == 42
    planted(folder)
    os.chown(folder, 54321, -1)
    log._announced.clear()
    with pytest.warns(UserWarning, match=r"belongs to another user \(uid 54321\)"):
        assert answer() == 42


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no note", "wrong note", "list", "folder"])
@NEEDS_SYSTEMS_COMPILER
def test_what_is_damaged_is_rebuilt(folder: Path, damage: str) -> None:
    library = place()
    note = cache.note_of(library)
    if damage == "folder":
        library.unlink()
        library.mkdir()
        with pytest.warns(UserWarning, match="can't be used"):
            assert answer() == 42
        return
    if damage in ("empty", "text", "cut"):
        library.write_bytes({"empty": b"", "text": b"no library", "cut": library.read_bytes()[:4000]}[damage])
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text("{" if damage == "wrong note" else "[]")
    assert answer() == 42
    assert cache.read(library) is not None


@NEEDS_SYSTEMS_COMPILER
def test_many_processes_compile_a_library_once(folder: Path, tmp_path: Path) -> None:
    cxx, calls = counting_compiler(tmp_path, before="sleep 2")  # so that they meet
    code = ASK.format(source=ANSWER)
    running = [processes.start("-c", code, env={**os.environ, "CXX": cxx}) for _ in range(4)]
    assert [process.communicate()[0] for process in running] == ["42\n"] * 4
    assert calls() == 1
    assert len(list(folder.glob("*.so"))) == 1
    assert not list(folder.glob("build-*"))


@NEEDS_SYSTEMS_COMPILER
def test_threads_compile_a_library_once(tmp_path: Path) -> None:
    cxx, calls = counting_compiler(tmp_path, before="sleep 1")
    code = f"""
    import threading
    from unrolled.engines.native.toolchain import build
    build.start({ANSWER!r})
    found = []
    def work(): found.append(build.load({ANSWER!r}).answer())
    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(found, build.asked() == [{ANSWER!r}])
    """
    done = python(code, CXX=cxx)
    assert done.stdout == "[42, 42, 42, 42, 42] True\n", done.stderr
    assert calls() == 1


@NEEDS_SYSTEMS_COMPILER
def test_a_forked_child_compiles_what_its_parents_thread_was_compiling(tmp_path: Path) -> None:
    cxx, _ = counting_compiler(tmp_path, before="sleep 2")
    code = f"""
    import os, time
    from unrolled.engines.native.toolchain import build
    build.start({ANSWER!r})
    time.sleep(0.5)
    child = os.fork()
    answer = build.load({ANSWER!r}).answer()
    if child == 0:
        os._exit(answer)
    print(answer, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = python(code, CXX=cxx, PYTHONWARNINGS="ignore")
    assert done.stdout == "42 42\n", done.stderr


@NEEDS_SYSTEMS_COMPILER
def test_the_lock_of_a_killed_process_is_free(folder: Path) -> None:
    library = place()
    library.unlink()
    hold = f"""
from pathlib import Path
from unrolled.engines.native.toolchain import cache
with cache.alone(Path({str(library)!r})):
    print(1, flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", hold], **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    began = time.monotonic()
    assert answer() == 42
    assert time.monotonic() - began < 5


@NEEDS_SYSTEMS_COMPILER
def test_a_lock_that_is_held_on_is_waited_for_in_vain_at_most(
    folder: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.setattr(cache, "_PATIENCE", 0.2)
    library = place()
    library.unlink()
    told()
    with cache.alone(library):
        assert answer() == 42
    assert any("is compiled without a lock" in line for line in told())


@NEEDS_SYSTEMS_COMPILER
def test_what_killed_processes_left_is_removed_in_time(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    old, new = folder / "build-old", folder / "build-new"
    for made in (old, new):
        made.mkdir()
        (made / "loop.cpp").write_text("")
    os.utime(old, (0, 0))
    assert answer() == 42
    assert not old.exists()
    assert new.exists()  # perhaps of a compiler at work


@pytest.mark.parametrize("name", ["with a space", "größe-核", 'it\'s "quoted" $HOME'])
@NEEDS_SYSTEMS_COMPILER
def test_any_name_of_a_folder(tmp_path: Path, name: str) -> None:
    done = python(ASK.format(source=ANSWER), UNROLLED_CACHE=str(tmp_path / name), LC_ALL="C")
    assert (done.stdout, done.stderr) == ("42\n", "")
    assert len(list((tmp_path / name).glob("*.so"))) == 1


def in_namespace(command: str, **ids: int) -> tuple[str, ...]:
    """A command before Python, with mounts of its own; skips where the system gives none."""
    users = [f"--map-{name}={number}" for name, number in ids.items()] or ["-r"]
    prefix = ("unshare", "-m", "-U", *users, "sh", "-c", f'{command} && exec "$@"', "sh")
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except OSError:
        pytest.skip("there is no unshare here")
    if done.returncode != 0:
        pytest.skip(f"no mounts of one's own here: {done.stderr}")
    return prefix


@pytest.mark.parametrize("state", ["full", "read-only", "not to run from"])
@NEEDS_SYSTEMS_COMPILER
def test_a_disk_that_is_full_or_read_only_is_survived(folder: Path, tmp_path: Path, state: str) -> None:
    folder.mkdir(mode=0o700)
    mount = {
        "full": f"mount -t tmpfs -o size=16k,mode=700 none {folder} && echo > {folder}/in-the-way",
        "read-only": f"mount -t tmpfs -o ro,mode=700 none {folder}",
        "not to run from": f"mount -t tmpfs -o noexec,mode=700 none {folder}",
    }[state]
    done = python(ASK.format(source=ANSWER), prefix=in_namespace(mount), TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert done.stderr.count("UserWarning:") == 1
    assert f"the kernel cache {folder} can't be used" in done.stderr
    assert not list(tmp_path.glob("unrolled-*"))  # what served in its place is gone with the process


@NEEDS_SYSTEMS_COMPILER
def test_a_read_only_cache_that_has_the_kernels_serves(folder: Path) -> None:
    assert answer() == 42
    mount = in_namespace(f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}")
    done = python(ASK.format(source=ANSWER), prefix=mount, PATH=os.environ["PATH"])
    assert (done.stdout, done.stderr) == ("42\n", "")


@NEEDS_SYSTEMS_COMPILER
def test_where_nothing_can_be_written_the_reference_serves(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    tiny = "mount -t tmpfs -o size=16k,mode=700 none"
    prefix = in_namespace(f"{tiny} {folder} && {tiny} {tmp}")
    done = python(both_engines("auto"), prefix=prefix, TMPDIR=str(tmp))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "layers run on the reference engine, step by step: no folder for compiled kernels" in done.stderr
    assert done.stderr.count("No space left on device") >= 2


@pytest.mark.parametrize("home", [None, "", "/dev/null/home"])
@NEEDS_SYSTEMS_COMPILER
def test_without_a_home_kernels_are_compiled_all_the_same(tmp_path: Path, home: str | None) -> None:
    """The user has no entry among the system's users either."""
    prefix = in_namespace("true", user=54321, group=54321)
    environment = {"HOME": home, "UNROLLED_CACHE": None, "XDG_CACHE_HOME": None, "TMPDIR": str(tmp_path)}
    code = f"import os; os.chdir({str(tmp_path)!r})\n{ASK.format(source=ANSWER)}"
    done = python(code, prefix=prefix, **environment)
    assert done.stdout == "42\n", done.stderr
    assert done.stderr.count("UserWarning:") == 1
    assert "kernels are compiled anew in every process; UNROLLED_CACHE chooses another folder" in done.stderr
    assert not list(tmp_path.iterdir())  # nothing in a folder named ~


# --- compilers and instruction sets ---


def test_without_a_compiler_the_reference_serves(folder: Path) -> None:
    layers = "ur.LSTM(5, 19), ur.GRU(3, 8, 2, bidirectional=True)"
    done = python(both_engines("auto", layers), PATH="")
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr
    assert done.stderr.count("UserWarning:") == 1, done.stderr
    assert "recurrent layers run on the reference engine, step by step: there is no C++" in done.stderr
    assert "install one, or the ziglang package, which holds one (pip install ziglang)" in done.stderr


def test_what_cannot_be_compiled_keeps_nothing_of_a_call(folder: Path) -> None:
    """Why it can't is kept, but not the frames that told it, with the tensors in them."""
    code = """
    import gc, weakref, torch, unrolled as ur
    gc.disable()
    class Branching(ur.Cell):
        state = ("h",)
        def step(self, x, h):
            return h + x if h.sum() > -1 else x
    for layer in (ur.GRU(4, 4), ur.Recurrent(Branching, 4, 4)):
        for training in (False, True):
            for _ in range(3):
                x = torch.randn(2, 3, 4, requires_grad=training)
                output = layer(x)[0]
                held = weakref.ref(x), weakref.ref(output)
                del x, output
                print([reference() is None for reference in held])
    """
    for path in ("", None):
        given = {} if path is None else {"PATH": path}
        done = python(code, PYTHONWARNINGS="ignore", **given)
        assert done.stdout == "[True, True]\n" * 12, done.stderr


def test_without_a_compiler_frozen_layers_run_on_the_reference_too(folder: Path) -> None:
    code = """
    import torch, unrolled as ur
    layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad(), ur.engine("auto"), ur.frozen(layer):
        output, _ = layer(x)
    print(torch.equal(output, layer(x)[0]))
    """
    done = python(code, PATH="")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert done.stderr.count("UserWarning:") == 1


def test_a_compiler_that_cannot_be_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no-such-compiler", "/dev/null"):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(build.NoCompilerError, match=f"CXX is '{name}', which can't be run"):
            answer()


@NEEDS_SYSTEMS_COMPILER
def test_what_a_compiler_refuses_is_told_in_its_words(folder: Path) -> None:
    with pytest.raises(build.NoCompilerError, match="can't compile a loop for native: .*error: .*nonsense"):
        answer("nonsense;\n")
    assert not list(folder.glob("*.so"))
    assert not list(folder.glob("build-*"))


@NEEDS_SYSTEMS_COMPILER
def test_the_next_compiler_is_tried_where_the_first_fails(tmp_path: Path, told: Any) -> None:
    pytest.importorskip("ziglang")
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "error: no headers" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    done = python(ASK.format(source=ANSWER), PATH=str(tmp_path), UNROLLED_LOG="build")
    assert done.stdout == "42\n", done.stderr
    assert "can't compile a loop for native: error: no headers" in done.stderr
    assert "ziglang" in done.stderr


@NEEDS_SYSTEMS_COMPILER
def test_the_compiler_of_the_ziglang_package(folder: Path) -> None:
    """It has no home, no path, and the cache alone to write to."""
    pytest.importorskip("ziglang")
    code = "from unrolled.engines.native.toolchain import build\nprint(build.load(build.PROBE).lanes())"
    native = python(code, UNROLLED_CACHE=str(folder.with_name("system")))
    zig = python(code, PATH="", HOME="", UNROLLED_LOG="build")
    assert zig.stdout == native.stdout, zig.stderr
    assert "-m ziglang c++" in zig.stderr
    assert (folder / "zig").is_dir()
    wide = python(code, PATH="", UNROLLED_ARCH="x86-64-v3")
    assert wide.stdout == "8\n" or "x86" not in cpu.system(), wide.stderr


X86 = pytest.mark.skipif("x86" not in cpu.system(), reason="names of x86 instruction sets")


@X86
@pytest.mark.parametrize(
    ("arch", "lanes"),
    [
        ("x86-64", 4),
        pytest.param("x86-64-v2", 4, marks=pytest.mark.exhaustive),
        ("x86-64-v3", 8),
        ("x86-64-v4", 16),
    ],
)
@NEEDS_SYSTEMS_COMPILER
def test_an_instruction_set_can_be_chosen(folder: Path, arch: str, lanes: int) -> None:
    code = both_engines("native")
    code += "from unrolled.engines.native.toolchain import build\nprint(build.load(build.PROBE).lanes())"
    done = python(code, UNROLLED_ARCH=arch)
    if lanes == 16 and "avx512f" not in (cpu.features() or ()):
        assert "use avx512bw" in done.stderr
        assert "which this processor doesn't have" in done.stderr
        return
    assert (done.returncode, done.stdout) == (0, f"True\n{lanes}\n"), done.stderr
    notes = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    assert {note["arch"] for note in notes} == {arch}


@X86
@NEEDS_SYSTEMS_COMPILER
def test_instructions_that_the_processor_lacks_are_refused(folder: Path) -> None:
    """Never by an illegal instruction: what a library may use is known before it is loaded."""
    arch = next(
        (name for name, needs in (("sapphirerapids", "amx_tile"), ("bdver2", "fma4"))
         if needs not in (cpu.features() or ())),
        None,
    )  # fmt: skip
    assert arch is not None  # no processor has both
    done = python(ASK.format(source=ANSWER), UNROLLED_ARCH=arch)
    assert "refused: kernels for" in done.stdout
    assert "which this processor doesn't have" in done.stdout
    again = python(ASK.format(source=ANSWER), UNROLLED_ARCH=arch, UNROLLED_LOG="build")
    assert again.stdout == done.stdout
    assert "hit: " in again.stderr


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("no-such-set", "refused: c++ can't compile a loop for no-such-set"),
        ("native -o /tmp/x", "refused: UNROLLED_ARCH should name an instruction set, such as x86-64-v3, got"),
    ],
)
@NEEDS_SYSTEMS_COMPILER
def test_an_unknown_instruction_set_is_refused(arch: str, message: str) -> None:
    assert message in python(ASK.format(source=ANSWER), UNROLLED_ARCH=arch).stdout


@NEEDS_SYSTEMS_COMPILER
def test_what_a_compiler_may_use_is_known_by_linuxs_names() -> None:
    macros = (
        "#define __AVX2__ 1\n#define __BMI__ 1\n#define __LZCNT__ 1\n#define __AVX512F 1\n#define __SHA__ 1\n"
    )
    assert cpu.required(macros) == ["abm", "avx2", "bmi1"]
    assert cpu.vectors(["avx", "avx2", "fma"]) == ("avx",)
    if cpu.features() is not None:
        assert cpu.lacking(["no_such_feature", *sorted(cpu.known())]) == ["no_such_feature"]
        found = next(compiler.compilers())
        needs = found.requires("native", Path(os.environ[cache.VARIABLE]).parent)
        assert cpu.lacking(needs) == []
        assert needs


@NEEDS_SYSTEMS_COMPILER
def test_libraries_with_vectors_of_two_widths_do_not_meet(folder: Path) -> None:
    """A loop and the products that it calls pass vectors to one another."""
    if cpu.vectors(cpu.known()) == ():
        pytest.skip("this processor has vectors of one width")
    first, code = place(ANSWER), ASK.format(source=OTHER)
    note = json.loads(cache.note_of(first).read_text())
    note["requires"] = []
    cache.note_of(first).write_text(json.dumps(note))
    done = python(f"from unrolled.engines.native.toolchain import build\nbuild.load({ANSWER!r})\n{code}")
    assert "refused: kernels with the smallest vectors are in use already" in done.stdout, done.stderr
    assert "UNROLLED_ARCH sets all" in done.stdout


# --- shipped folders ---


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``unrolled build`` makes of a file with an LSTM and a GRU, for two instruction sets."""
    at = tmp_path_factory.mktemp("ship")
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": nn.GRU(4, 5, 2, bidirectional=True)})
    safetensors.torch.save_file(model.state_dict(), at / "w.safetensors")
    archs = ["--arch", "x86-64,x86-64-v3"] if "x86" in cpu.system() else []
    line = ["-m", "unrolled", "build", at / "w.safetensors", "--out", at / "kernels", *archs]
    done = processes.run(*line, env={**os.environ, cache.VARIABLE: str(at / "cache")})
    assert (done.returncode, done.stderr) == (0, "")
    assert "a: LSTM(2, 3), float32: inference and training\n" in done.stdout
    assert "b: GRU(10, 5), float32: inference and training\n" in done.stdout
    assert f"UNROLLED_KERNELS={at / 'kernels'}" in done.stdout
    return at / "kernels"


@NEEDS_SYSTEMS_COMPILER
def test_a_shipped_folder_serves_where_there_is_no_compiler(folder: Path, kernels: Path) -> None:
    code = both_engines("native", "ur.LSTM(5, 19), ur.GRU(3, 8, 2, bidirectional=True)")
    without = python(code, PATH="")
    assert "can't run on the native engine: there is no C++ compiler" in without.stderr
    before = {file: file.stat().st_mtime_ns for file in kernels.iterdir()}
    done = python(code, PATH="", UNROLLED_KERNELS=str(kernels), UNROLLED_CACHE="/dev/null/nowhere")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", "")
    assert {file: file.stat().st_mtime_ns for file in kernels.iterdir()} == before  # read only
    assert not folder.exists()


@NEEDS_SYSTEMS_COMPILER
def test_what_a_program_uses_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    program = tmp_path / "score.py"
    program.write_text(
        "import sys, torch, unrolled as ur\n"
        "assert sys.argv[1:] == ['--rows', 'of one']\n"
        "layer, x = ur.LSTM(2, 3, zoneout=0.1).eval(), torch.randn(4, 1, 2)\n"
        "with ur.engine('native'), torch.no_grad():\n"
        "    layer(x, resets=torch.rand(4, 1) < 0.5, all_states=True)\n"
    )
    called = ["--rows", "of one"]
    line = ["-m", "unrolled", "build", "--program", f"{program} --rows 'of one'", "--out"]
    made = processes.run(*line, tmp_path / "kernels")
    assert made.returncode == 0, made.stderr
    assert f"{program}: what it uses\n" in made.stdout
    without = {**os.environ, "PATH": "", "UNROLLED_CACHE": "/dev/null/nowhere"}
    assert processes.run(program, *called, env=without).returncode == 1
    without["UNROLLED_KERNELS"] = str(tmp_path / "kernels")
    done = processes.run(program, *called, env=without)
    assert (done.returncode, done.stderr) == (0, "")
    program.write_text("pass")
    monkeypatch.setattr(build, "asked", list)
    assert main.main(["build", "--program", str(program), "--out", str(tmp_path / "other")]) == 2
    assert "score.py used no kernel" in capsys.readouterr().err


@X86
@NEEDS_SYSTEMS_COMPILER
def test_the_best_instruction_set_of_a_folder_is_taken(kernels: Path) -> None:
    code = "from unrolled.engines.native.toolchain import build\nprint(build.arch(), build.load(build.PROBE).lanes())"
    best = "x86-64-v3 8\n" if "avx2" in cpu.known() else "x86-64 4\n"
    assert python(code, PATH="", UNROLLED_KERNELS=str(kernels)).stdout == best
    chosen = python(code, PATH="", UNROLLED_KERNELS=str(kernels), UNROLLED_ARCH="x86-64")
    assert chosen.stdout == "x86-64 4\n"


@X86
@NEEDS_SYSTEMS_COMPILER
def test_what_a_folder_lacks_is_compiled_for_its_instruction_set(folder: Path, kernels: Path) -> None:
    done = python(both_engines("native", "ur.LSTM(5, 19), ur.RNN(3, 8)"), UNROLLED_KERNELS=str(kernels))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", "")
    notes = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    assert len(notes) == 2  # the loops of its RNN, forward and backward
    assert {note["arch"] for note in notes} == {"x86-64-v3" if "avx2" in cpu.known() else "x86-64"}


@NEEDS_SYSTEMS_COMPILER
def test_what_is_wrong_with_a_folder_is_told(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(name: str, **changes: Any) -> Path:
        made = Path(shutil.copytree(kernels, tmp_path / name))
        for file in made.glob("*.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return made

    loose = copied("loose")
    loose.chmod(0o777)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for made, words in (
        (tmp_path / "none", "none can't be read (No such file or directory)"),
        (tmp_path / "file", "file is no folder"),
        (tmp_path / "empty", "empty holds no kernels; unrolled build makes them"),
        (copied("other system", system="vms alpha"), "other system are for vms alpha"),
        (copied("too new", requires=["amx_of_tomorrow"]), "needs amx_of_tomorrow"),
        (loose, "all users can write to"),
    ):
        monkeypatch.setenv(prebuilt.VARIABLE, str(made))
        with pytest.warns(UserWarning, match=f"UNROLLED_KERNELS: .*{re.escape(words)}"):
            found = prebuilt.folder(None)
        assert found is not None
        assert found.arch is None
        assert found.find(ANSWER) is None
        assert words in found.lack()


@pytest.mark.parametrize("state", ["damaged", "of another version", "of another C library"])
@NEEDS_SYSTEMS_COMPILER
def test_why_a_folder_does_not_serve_is_told(kernels: Path, tmp_path: Path, state: str) -> None:
    made = Path(shutil.copytree(kernels, tmp_path / "ship"))
    for file in made.iterdir():
        note = cache.note_of(file) if file.suffix == ".so" else None
        if state == "damaged" and note:
            file.write_bytes(b"no library")
        elif state == "of another C library" and note:
            file.write_bytes(b"nothing that this system can load")
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            note.write_text(json.dumps({**json.loads(note.read_text()), "sha256": digest}))
        elif state == "of another version":
            if not note:
                changes = {"unrolled": "0.0.9", "torch": "2.0.0"}
                file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
            file.rename(file.with_name(f"x{file.name[1:]}"))
    code = "import torch, unrolled as ur; ur.engine('auto'); ur.LSTM(2, 3)(torch.zeros(1, 2))"
    done = python(code, PATH="", UNROLLED_KERNELS=str(made))
    assert done.returncode == 0
    assert "layers run on the reference engine, step by step: there is no C++ compiler" in done.stderr
    words = {
        "damaged": "is damaged: build the folder anew with unrolled build",
        "of another version": "it was made with unrolled 0.0.9 and torch 2.0.0, and this is unrolled",
        "of another C library": "can't be loaded: ",
    }
    assert words[state] in done.stderr
    assert "UNROLLED_KERNELS" in done.stderr


@NEEDS_SYSTEMS_COMPILER
@pytest.mark.exhaustive
def test_a_cell_of_ones_own_is_shipped(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import torch, unrolled as ur
        class Leaky(ur.Cell):
            weight = ur.Param("hidden", "input")
            rate: float = 0.5
            def step(self, x, h):
                new = torch.tanh(torch.nn.functional.linear(x, self.weight))
                return (1 - self.rate) * h + self.rate * new
        class Sorting(ur.Cell):
            def step(self, x, h):
                return torch.sort(h + x, -1)[0]
        """)
    )
    out = tmp_path / "ship"
    arguments = ["build", "--cell", f"{tmp_path}/mine.py:Leaky", "--sizes", "7,11", "--dtype", "float64"]
    assert main.main([*arguments, "--out", str(out)]) == 0
    assert "Leaky(7, 11), float64: inference and training" in capsys.readouterr().out
    code = f"""
    import sys, torch, unrolled as ur
    sys.path.insert(0, {str(tmp_path)!r})
    from mine import Leaky
    with ur.engine("native"):
        layer = ur.Recurrent(Leaky, 3, 4, dtype=torch.float64)
        print(layer(torch.ones(2, 3, dtype=torch.float64))[0].sum().backward())
    """
    done = python(code, PATH="", UNROLLED_KERNELS=str(out))
    assert (done.stdout, done.stderr) == ("None\n", "")
    arguments = ["build", "--cell", f"{tmp_path}/mine.py:Sorting", "--out", str(out)]
    assert main.main([*arguments, "--sizes", "5,5"]) == 2
    assert "Sorting(5, 5), float32 can't be compiled: aten.sort" in capsys.readouterr().err
    assert main.main(arguments) == 2
    assert "Sorting(16, 32), float32 can't be compiled: its step can't be captured" in capsys.readouterr().err


@NEEDS_SYSTEMS_COMPILER
def test_bad_usage_of_build_gets_one_line(tmp_path: Path, capsys: Any) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "linear.pt")
    (tmp_path / "file").write_text("")
    for name, text in (("fails", "raise KeyError('x')"), ("ends", "import sys; sys.exit('no data')")):
        (tmp_path / f"{name}.py").write_text(text)
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (["build", "--cell", "lstm"], "the following arguments are required: --out"),
        (["build", *out], "nothing to build: give WEIGHTS, --cell or --program"),
        (["build", "--program", str(tmp_path / "fails.py"), *out], "fails.py failed: KeyError: 'x'"),
        (["build", "--program", str(tmp_path / "ends.py"), *out], "ends.py ended with no data"),
        (["build", "--program", str(tmp_path / "none.py"), *out], "none.py"),
        (["build", "--cell", "lstm", "--sizes", "3", *out], "expected INPUT,HIDDEN such as 16,32, got '3'"),
        (
            ["build", "--cell", "lstm", "--sizes", "0,3", *out],
            "expected INPUT,HIDDEN such as 16,32, got '0,3'",
        ),
        (["build", "--cell", "lstm", "--dtype", "int8", *out], "invalid choice: 'int8'"),
        (["build", "--cell", "lstm", "--arch", "v3 -x", *out], "--arch should name an instruction set"),
        (
            ["build", "--cell", "lstm", "--inference", "--arch", "nothing", *out],
            "can't compile a loop for nothing",
        ),
        (["build", str(tmp_path / "linear.pt"), *out], "no recurrent layer among its keys"),
        (["build", "--cell", "lstm", "--inference", "--out", str(tmp_path / "file")], "file: File exists"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert main.main(arguments) == 2, arguments
        _, error = capsys.readouterr()
        assert message in error
        assert error.startswith("unrolled: ")
        assert error.count("\n") == 1
