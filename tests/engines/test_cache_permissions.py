"""The kernel cache is private: files and folders that other users can write to or replace aren't used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import OTHER_SOURCE, call_library, library_path, mount_namespace, run_python
from unrolled.engines import log
from unrolled.engines.native.toolchain import cache

pytestmark = pytest.mark.usefixtures("cache_folder")


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
