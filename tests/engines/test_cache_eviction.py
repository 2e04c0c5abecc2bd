"""The size limit of the kernel cache: libraries that were unused for longest are deleted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import processes
from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import PRINT_ANSWER, call_library, library_path, run_python
from unrolled.engines.native.toolchain import cache, eviction

pytestmark = pytest.mark.usefixtures("cache_folder")


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


@pytest.mark.slow
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


def test_a_file_that_another_process_deletes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0.so", "2.so"):
        (tmp_path / name).write_bytes(bytes(100))

    class Deleted(type(tmp_path)):  # type: ignore[misc]
        """A path of a file that is deleted right after somebody has asked whether it exists."""

        def exists(self, **_: bool) -> bool:
            return True

    deleted = Deleted(tmp_path / "0.json")
    monkeypatch.setenv(eviction.VARIABLE, "250")
    monkeypatch.setattr(eviction, "_files", lambda path: [path, deleted])
    eviction.enforce_limit(tmp_path, keep=tmp_path / "0.so")
    assert {path.name for path in tmp_path.iterdir()} == {"0.so", "2.so"}


def test_a_folder_is_not_measured_after_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps are small, and there may be thousands of them."""
    now = 0.0
    monkeypatch.setattr(eviction.time, "monotonic", lambda: now)
    monkeypatch.setenv(eviction.VARIABLE, "10500")
    measured = []
    glob = Path.glob

    def counted(folder: Path, pattern: str) -> Iterator[Path]:
        measured.append(pattern)
        return glob(folder, pattern)

    monkeypatch.setattr(Path, "glob", counted)

    def write(name: str, age: int) -> None:
        path = tmp_path / f"{name}{cache.KEPT_SUFFIX}"
        path.write_bytes(bytes(1000))
        os.utime(path, (1e9 - age, 1e9 - age))
        eviction.enforce_limit(tmp_path, keep=path)

    for number in range(10):
        write(f"own{number}", 10 - number)
    assert len(measured) == 3  # once for each kind of file
    write("own10", 0)  # one more than the limit allows
    assert not (tmp_path / f"own0{cache.KEPT_SUFFIX}").exists()
    assert len([*tmp_path.iterdir()]) == 10
    for number in range(5):  # by another process
        (tmp_path / f"other{number}{cache.KEPT_SUFFIX}").write_bytes(bytes(1000))
    now = 61.0
    write("own11", 0)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 10_000


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
