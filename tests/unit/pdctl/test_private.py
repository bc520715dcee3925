"""Tests for files, folders and shared memory that only one user can access."""

from __future__ import annotations

import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl import private
from pdserve.triton import stub


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_are_the_users_alone(tmp_path: Path) -> None:
    private.folder(tmp_path / "run")
    private.write(tmp_path / "run" / "new", b"text")

    assert mode(tmp_path / "run") == 0o700
    assert mode(tmp_path / "run" / "new") == 0o600
    assert (tmp_path / "run" / "new").read_bytes() == b"text"


def test_what_an_older_version_has_left_is_narrowed(tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "run" / "log"
    folder.mkdir()
    file.write_text("of the last start")
    assert (mode(folder), mode(file)) == (0o777, 0o666)

    private.folder(folder)
    private.write(file, b"new")

    assert (mode(folder), mode(file)) == (0o700, 0o600)
    assert file.read_bytes() == b"new"


def test_a_tree_whose_links_are_left_alone(tmp_path: Path) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    outside.write_text("somebody else's")
    (tree / "1").mkdir(parents=True)
    (tree / "1" / "model.py").write_text("code")
    (tree / "link").symlink_to(outside)

    private.tree(tree)

    assert {mode(tree), mode(tree / "1")} == {0o700}
    assert mode(tree / "1" / "model.py") == 0o600
    assert mode(outside) == 0o666


def test_a_model_narrows_the_shared_memory_that_it_has_mapped_and_no_other() -> None:
    """Triton's regions are narrowed before the model is READY, by the model itself."""
    names = [stub.SHM / f"pdserve-test-{secrets.token_hex(6)}" for _ in range(2)]
    try:
        for name in names:
            name.write_bytes(bytes(4096))
            name.chmod(0o644)
        with names[0].open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            stub.prepare()
        assert [mode(name) for name in names] == [0o600, 0o644]
    finally:
        for name in names:
            name.unlink()
