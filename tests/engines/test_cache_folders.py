"""The folder of the kernel cache: any name, full and read-only disks, no execution, no home directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import (
    OTHER_SOURCE,
    PRINT_ANSWER,
    SOURCE,
    call_library,
    compare_engines,
    mount_namespace,
    run_python,
)
from unrolled.engines.native.toolchain import build, cache

pytestmark = pytest.mark.usefixtures("cache_folder")


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
