"""Tests for transport `shm`, and for the file in /dev/shm in which a holder keeps its memory."""

from __future__ import annotations

import errno
import gc
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import DeploymentError, HandleError
from pdserve.transfer.lease import region as regions
from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.protocol import Memory, TransferError, Unreachable
from pdserve.transfer.transports.shm import ShmTransport
from tests.unit.transfers import Puller, Sender

if TYPE_CHECKING:
    from collections.abc import Iterator

EPOCH = b"12345678"


@pytest.fixture
def name() -> Iterator[str]:
    name = f"pdserve-test-{secrets.token_hex(6)}"
    yield name
    left = list(regions.SHM.glob(f"{name}*"))
    for path in left:
        path.unlink()
    assert not left, "left in /dev/shm"


@pytest.fixture
def region(name: str) -> Iterator[SharedRegion]:
    region = SharedRegion.create(name, 1 << 16, 2, EPOCH)
    yield region
    region.unlink()
    region.close()


def way(region: str, epoch: bytes = EPOCH) -> bytes:
    return msgspec.msgpack.encode({"region": region, "epoch": epoch})


def offered(region: SharedRegion) -> bytes:
    data = Memory(region.data.ctypes.data, region.data.nbytes, region)
    return ShmTransport().offer(Memory.of(region.table), data)


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# ------------------------------------------------------------------------------------ the transport


def test_receiver_sees_the_holder_s_own_memory(region: SharedRegion) -> None:
    assert offered(region) == way(region.name)
    link = ShmTransport().open(offered(region))
    region.data[:] = np.arange(1 << 16).astype(np.uint8)
    assert (link.data == region.data).all()
    link.mark(1, 0x1234567890ABCDEF, 0.0)
    assert link.peek(1, 0.0) == region.peek(1)
    assert region.peek(1)[32:40] == (0x1234567890ABCDEF).to_bytes(8, "little")
    assert region.peek(0) == bytes(64)
    link.close()
    link.close()


def test_source_is_read_only(region: SharedRegion) -> None:
    link = ShmTransport().open(offered(region))
    with pytest.raises(ValueError, match="read-only"):
        link.data[0] = 0
    link.close()


def test_nothing_is_pulled_over_it(region: SharedRegion) -> None:
    link = ShmTransport().open(offered(region))
    with pytest.raises(TransferError, match="read `data`"):
        link.pull(np.array([[0, 0, 1]]), 0.0)
    link.close()


@pytest.mark.parametrize("slot", [-1, 2])
def test_invalid_slots(region: SharedRegion, slot: int) -> None:
    link = ShmTransport().open(offered(region))
    for touch in (lambda: link.peek(slot, 0.0), lambda: link.mark(slot, 0, 0.0)):
        with pytest.raises(HandleError, match=f"lease slot {slot} of a table that has 2"):
            touch()
    link.close()


def test_memory_that_is_not_shared_cannot_be_offered() -> None:
    memory = Memory.of(np.zeros(64, np.uint8))
    with pytest.raises(Unreachable, match="is not in shared memory"):
        ShmTransport().offer(memory, memory)


def test_a_region_of_another_life_is_told_apart(region: SharedRegion) -> None:
    """The error may reach a client, so it does not name the region."""
    with pytest.raises(Unreachable, match="region is of another life of its holder") as caught:
        ShmTransport().open(way(region.name, b"another!"))
    assert region.name not in str(caught.value)


@given(st.binary(max_size=64))
def test_a_way_of_random_bytes_is_unreachable(data: bytes) -> None:
    with pytest.raises(Unreachable, match="shm: "):
        ShmTransport().open(data)


@pytest.mark.parametrize("bad", ["../etc/passwd", "/etc/passwd", "pdserve-there-is-none", "."])
def test_a_way_to_what_is_no_region(bad: str) -> None:
    with pytest.raises(Unreachable, match="shm: "):
        ShmTransport().open(way(bad))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no KV region: 0 bytes"),
        (b"x" * 8192, "begins with b'xxxxxxxx'"),
        (b"PDSERVKV" + b"\1\0\0\0" + bytes(8180), "has version 1; this is version 2"),
        (b"PDSERVKV\2\0\0\0\4\0\0\0" + bytes(8) + b"\xff" * 8 + bytes(4096), "cut short"),
        (b"PDSERVKV\2\0\0\0" + b"\xff" * 4 + bytes(4096), "cut short"),
    ],
)
def test_files_that_are_no_regions(name: str, content: bytes, message: str) -> None:
    path = regions.SHM / name
    path.write_bytes(content)
    try:
        with pytest.raises(Unreachable, match=message) as caught:
            ShmTransport().open(way(name))
        assert name not in str(caught.value)
    finally:
        path.unlink()


def test_a_link_is_not_followed(region: SharedRegion, name: str) -> None:
    link = regions.SHM / f"{name}-link"
    link.symlink_to(regions.SHM / name)
    try:
        with pytest.raises(Unreachable, match="Too many levels of symbolic links"):
            ShmTransport().open(way(link.name))
    finally:
        link.unlink()


def test_mappings_are_bounded_and_leak_nothing() -> None:
    """There is one mapping of each holder at a time, however often it is restarted."""
    puller, before = Puller(), descriptors()
    for _ in range(3):
        lives = [Sender(instance=f"prefill_{index}") for index in range(2)]
        for sender in lives:
            puller.connect(sender)
            puller.connect(sender)
            puller.pull(sender.offer())
        # each end keeps one descriptor for each of its two mappings
        assert descriptors() <= before + 2 * (2 + 2)
        for sender in lives:
            sender.close()
    del lives, sender
    puller.close()
    assert descriptors() == before


# --------------------------------------------------------------------------------------- the region


def test_closing_is_safe_twice_and_with_views_alive(name: str) -> None:
    region = SharedRegion.create(name, 1 << 16, 2, EPOCH)
    view = region.data[100:200]
    view[:] = 7
    for _ in range(2):
        region.unlink()
        region.close()
    assert (view == 7).all()
    view[:] = 8
    mapped = f"/dev/shm/{name}"
    assert mapped in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert mapped not in Path("/proc/self/maps").read_text()


def test_memory_is_private_to_the_user(region: SharedRegion) -> None:
    assert (regions.SHM / region.name).stat().st_mode & 0o777 == 0o600


def test_a_region_without_data_has_its_table(name: str) -> None:
    """This is the case where the data are in a GPU's memory."""
    region = SharedRegion.create(name, 0, 2, EPOCH)
    assert (region.data.nbytes, region.table.nbytes) == (0, 128)
    assert SharedRegion.open(name).epoch == EPOCH
    region.unlink()
    region.close()


def test_a_region_outlives_its_killed_holder_and_can_be_cleaned_up(name: str) -> None:
    script = (
        "import os, signal\n"
        "from pdserve.transfer.lease.region import SharedRegion\n"
        f"SharedRegion.create({name!r}, 4096, 1, bytes(8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == -9
    with pytest.raises(DeploymentError, match="File exists"):
        SharedRegion.create(name, 4096, 1, EPOCH)
    (regions.SHM / name).unlink()
    region = SharedRegion.create(name, 4096, 1, EPOCH)
    region.unlink()
    region.close()


def test_a_region_does_not_remove_its_successor(name: str) -> None:
    first = SharedRegion.create(name, 4096, 1, EPOCH)
    (regions.SHM / name).unlink()  # like a process that cleans up after a crash
    assert not first.named()
    second = SharedRegion.create(name, 4096, 1, EPOCH)
    first.unlink()
    first.close()
    assert (regions.SHM / name).exists(), "the region of its successor was removed"
    assert second.named()
    second.unlink()
    second.close()
    assert not second.named()


@pytest.mark.parametrize("bad", ["other", "pdserve-", "pdserve-a/b", "pdserve-A", "../pdserve-a"])
def test_region_names(bad: str) -> None:
    with pytest.raises(DeploymentError, match=re.escape(repr(bad))):
        SharedRegion.create(bad, 4096, 1, EPOCH)


def check_full(name: str) -> None:
    with pytest.raises(DeploymentError, match=r"16\.0 MiB wanted, .* MiB available"):
        SharedRegion.create(name, 16 << 20, 4, EPOCH)
    assert not (regions.SHM / name).exists()


def test_a_full_file_system_is_one_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    check_full(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_really_full_file_system(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        monkeypatch.setattr(regions, "SHM", tmp_path)
        check_full(name)
        SharedRegion.create(name, 4 << 20, 4, EPOCH).unlink()
    finally:
        gc.collect()
        subprocess.run(["umount", str(tmp_path)], check=True)
