"""Tests for the deployment's secret: made once by the first process, readable by its user alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.config import Deployment, Transfer
from pdserve.errors import DeploymentError
from pdserve.kvcache.handle import KEY_BYTES
from pdserve.transfer import key


def test_it_is_made_where_it_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "kv.key"
    made = key.make(path)
    assert len(made) == KEY_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.load(path) == made
    assert key.make(path) == made
    assert key.make(tmp_path / "other.key") != made
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["kv.key", "other.key"]


def test_of_several_makers_one_wins(tmp_path: Path) -> None:
    """All servers of a deployment start at the same moment."""
    script = (
        "import sys; from pathlib import Path; from pdserve.transfer import key\n"
        "sys.stdin.read(1); print(key.make(Path(sys.argv[1])).hex())"
    )
    path = tmp_path / "kv.key"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(4)
    ]
    found = [maker.communicate("x", timeout=20)[0].strip() for maker in makers]
    assert set(found) == {path.read_bytes().hex()}
    assert list(tmp_path.iterdir()) == [path]


def test_a_loser_takes_the_winner_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has made it after this one looked, and before it could link its own."""
    path, theirs = tmp_path / "kv.key", os.urandom(KEY_BYTES)
    link = os.link

    def late(source: Path, target: Path) -> None:
        path.write_bytes(theirs)
        path.chmod(0o600)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert key.make(path) == theirs
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_one_that_others_may_read_is_refused(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kv.key"
    key.make(path)
    path.chmod(mode)
    monkeypatch.setattr(os, "getegid", lambda: 4711)
    monkeypatch.setattr(os, "getgroups", list)
    with pytest.raises(DeploymentError, match=r"kv\.key may be read by others; allowed: mode 06"):
        key.load(path)
    path.chmod(0o400)
    assert len(key.load(path)) == KEY_BYTES


@pytest.mark.parametrize("size", [0, KEY_BYTES - 1, KEY_BYTES + 1])
def test_one_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "kv.key"
    path.touch(0o600)
    path.write_bytes(bytes(size))
    with pytest.raises(DeploymentError, match=rf"kv\.key has {size} bytes; a key has 32"):
        key.load(path)


def test_one_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"key_file .*there/kv\.key: No such file"):
        key.make(tmp_path / "not" / "there" / "kv.key")
    with pytest.raises(DeploymentError, match="Is a directory"):
        key.load(tmp_path)


@pytest.mark.parametrize("mode", [0o440, 0o640, 0o400])
def test_one_that_our_own_group_may_read_is_a_secret_of_kubernetes(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fsGroup, its owner is root, and its group is one of the process's groups."""
    path = tmp_path / "kv.key"
    made = key.make(path)
    path.chmod(mode)
    group = path.stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: 4711)
    monkeypatch.setattr(os, "getgroups", lambda: [42, group])
    assert key.load(path) == made


@pytest.mark.parametrize("mode", [0o444, 0o660, 0o450, 0o441])
def test_nobody_else_may_read_it_nor_the_group_write_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "kv.key"
    key.make(path)
    path.chmod(mode)
    with pytest.raises(DeploymentError, match=f"may be read by others.*it has {mode:04o}"):
        key.load(path)


def test_reading_makes_none(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="No such file"):
        key.load(tmp_path / "kv.key")
    assert not list(tmp_path.iterdir())


def test_a_process_of_a_server_reads_its_servers_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes none where the copy is gone, since no other server would accept it."""
    file, copy = tmp_path / "kv.key", tmp_path / "copy"
    deployment = Deployment(model="m", servers=(), transfer=Transfer(key_file=str(file)))
    key.copy(b"c" * KEY_BYTES, copy)
    assert copy.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(key.VARIABLE, str(copy))
    assert key.of(deployment) == b"c" * KEY_BYTES
    copy.unlink()
    with pytest.raises(DeploymentError, match="copy: No such file"):
        key.of(deployment)
    assert not file.exists()
    monkeypatch.delenv(key.VARIABLE)
    assert key.of(deployment) == file.read_bytes()
