"""KV hand-off through shared memory, between this process (the holder) and a real second one."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import DeploymentError, HandleError, Unavailable
from pdserve.kvcache.arena import Arena, Range, State
from pdserve.kvcache.handle import KVHandle
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.paged import BlockPool
from pdserve.kvcache.prefix import PrefixIndex
from pdserve.transfer import region as regions
from pdserve.transfer.shm import Leases, Pull, SharedRegion, ShmReceiver, scatter

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "tiny"
LAYOUT = KVLayout(3, 2, 8, "float32")
TOKENS = 50
BOUND = 5.0
"""Seconds that a holder waits for a receiver whose lease has ended."""

# Pulls each handle that it reads; stays in the middle of the pull until it reads one more line.
CHILD = f"""
import hashlib, sys, time
import msgspec, numpy as np
from pdserve.errors import HandleError
from pdserve.kvcache.handle import KVHandle
from pdserve.kvcache.layout import KVLayout
from pdserve.transfer.shm import ShmReceiver, scatter

layout = KVLayout{tuple(getattr(LAYOUT, name) for name in LAYOUT.__struct_fields__)}
receiver = ShmReceiver({MODEL!r}, layout)
while line := sys.stdin.readline():
    handle = msgspec.msgpack.decode(bytes.fromhex(line), type=KVHandle)
    pool = np.zeros(layout.shape(handle.tokens), np.uint8)
    try:
        with receiver.pull(handle, time.monotonic()) as source:
            print("pulling", flush=True)
            sys.stdin.readline()
            scatter(source, pool, [(0, handle.tokens)])
        print(hashlib.sha256(pool).hexdigest(), flush=True)
    except HandleError as error:
        print("refused:", error, flush=True)
"""


class Child:
    """A receiver in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def say(self, line: str = "") -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def begin(self, handle: KVHandle) -> str:
        """'pulling', or why not."""
        return self.say(msgspec.msgpack.encode(handle).hex())

    def end(self) -> str:
        """The digest of what was copied, or why it is not valid."""
        return self.say()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Holder:
    """What a prefill does with its arena, region and leases."""

    def __init__(self, name: str) -> None:
        self.epoch = secrets.token_bytes(8)
        self.index = PrefixIndex(4)
        self.arena = Arena(1 << 20, 4, self.index.remove)
        self.region = SharedRegion.create(name, 1 << 20, 4, self.epoch)
        self.leases = Leases(self.region)
        self.slots: dict[Range, int] = {}

    def offer(self, expires: float | None = None) -> tuple[Range, KVHandle]:
        """A range of random bytes, leased."""
        expires = time.monotonic() + 60 if expires is None else expires
        held = self.arena.allocate(LAYOUT.nbytes(TOKENS))
        assert held is not None
        self.view(held)[:] = np.frombuffer(secrets.token_bytes(held.nbytes), np.uint8)
        slot, nonce = self.leases.grant(expires)
        self.arena.lease(held, expires)
        self.slots[held] = slot
        return held, KVHandle(
            fingerprint=MODEL,
            layout=LAYOUT,
            tokens=TOKENS,
            region=self.region.name,
            offset=held.offset,
            lease=slot,
            nonce=nonce,
            epoch=self.epoch,
            expires=expires,
        )

    def view(self, held: Range) -> np.ndarray:
        return self.region.data[held.offset : held.offset + held.nbytes]

    def digest(self, held: Range) -> str:
        return hashlib.sha256(self.view(held)).hexdigest()

    def end(self, held: Range, now: float) -> None:
        """Transferred, cancelled, rejected or expired: all the same."""
        if self.leases.revoke(self.slots[held]) is Pull.PULLING:
            self.arena.quarantine(held, now + BOUND)
        else:
            self.settle(held)

    def settle(self, held: Range) -> None:
        self.arena.cache(held)
        self.leases.free(self.slots.pop(held))

    def tick(self, now: float) -> None:
        """Sweep, whatever the load."""
        for held, slot in list(self.slots.items()):
            done = self.leases.state(slot) is Pull.DONE
            if held.state is State.LEASED and (done or held.until <= now):
                self.end(held, now)
            elif held.state is State.QUARANTINED and (done or held.until <= now):
                self.settle(held)

    def close(self) -> None:
        self.region.unlink()
        self.region.close()


@pytest.fixture
def name() -> Iterator[str]:
    name = f"pdserve-test-{secrets.token_hex(6)}"
    yield name
    left = list(regions.SHM.glob(f"{name}*"))
    for path in left:
        path.unlink()
    assert not left, "left in /dev/shm"


@pytest.fixture
def holder(name: str) -> Iterator[Holder]:
    holder = Holder(name)
    yield holder
    holder.close()


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.kill()


@pytest.fixture
def receiver() -> ShmReceiver:
    return ShmReceiver(MODEL, LAYOUT)


def change(handle: KVHandle, **fields: object) -> KVHandle:
    return msgspec.structs.replace(handle, **fields)


def copy(receiver: ShmReceiver, handle: KVHandle, now: float | None = None) -> bytes:
    with receiver.pull(handle, time.monotonic() if now is None else now) as source:
        return source.tobytes()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Between two processes.


def test_contents_are_equal_and_the_lease_ends(holder: Holder, child: Child) -> None:
    for _ in range(6):  # more than there are slots or ranges
        held, handle = holder.offer()
        assert holder.leases.state(handle.lease) is Pull.IDLE
        assert child.begin(handle) == "pulling"
        assert holder.leases.state(handle.lease) is Pull.PULLING
        assert child.end() == holder.digest(held)
        holder.tick(time.monotonic())
        assert held.state is State.CACHED
        assert len(holder.leases) == 0


def test_a_used_handle_is_refused(holder: Holder, child: Child, receiver: ShmReceiver) -> None:
    _, handle = holder.offer()
    assert child.begin(handle) == "pulling"
    with pytest.raises(HandleError, match="was used before"):
        copy(receiver, handle)
    child.end()
    assert "was used before" in child.begin(handle)


def test_a_lease_that_ends_in_mid_pull_is_noticed(holder: Holder, child: Child) -> None:
    """vllm#21570: freed on a timeout and used again; the decode read another's KV cache.

    TensorRT-LLM#12540, #14565: what is being read is not given to anybody.
    """
    held, handle = holder.offer()
    assert child.begin(handle) == "pulling"
    now = time.monotonic()
    holder.end(held, now)
    assert held.state is State.QUARANTINED
    assert holder.arena.allocate(1 << 20) is None
    assert child.end().startswith("refused: lease ended during the transfer")
    holder.tick(now)
    assert held.state is State.CACHED
    assert holder.arena.allocate(1 << 20) is not None


def test_a_receiver_killed_in_mid_pull_holds_its_range_for_a_bound(
    holder: Holder, child: Child
) -> None:
    """vllm#46283 from the other side: a peer that has gone silent does not hold memory forever."""
    held, handle = holder.offer()
    assert child.begin(handle) == "pulling"
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    now = handle.expires
    holder.tick(now)
    assert held.state is State.QUARANTINED
    holder.tick(now + BOUND - 0.1)
    assert held.state is State.QUARANTINED
    holder.tick(now + BOUND)
    assert held.state is State.CACHED
    assert len(holder.leases) == 0


def test_handles_of_a_former_life_are_refused(name: str, child: Child) -> None:
    first = Holder(name)
    _, used = first.offer()
    _, old = first.offer()
    assert child.begin(used) == "pulling"
    child.end()
    first.region.unlink()  # as whoever cleans up after a crash; the child still has it mapped
    assert "No such file" in child.begin(old)
    second = Holder(name)
    held, fresh = second.offer()
    assert "earlier life" in child.begin(old)
    assert child.begin(fresh) == "pulling"
    assert child.end() == second.digest(held)
    first.close()
    assert (regions.SHM / name).exists(), "removed the region of its successor"
    second.close()


def test_a_restart_in_mid_pull_is_harmless(name: str, child: Child) -> None:
    first = Holder(name)
    held, handle = first.offer()
    digest = first.digest(held)
    assert child.begin(handle) == "pulling"
    first.close()
    second = Holder(name)
    second.region.data[:] = 0
    assert child.end() == digest
    second.close()


def test_a_late_receiver_does_not_disturb_the_slot_s_next_lease(
    holder: Holder, child: Child, receiver: ShmReceiver
) -> None:
    """vllm#46289: late signals are ignored."""
    held, handle = holder.offer()
    assert child.begin(handle) == "pulling"
    holder.end(held, 0.0)
    holder.tick(BOUND)
    for _ in range(holder.region.slots):  # until the slot comes round
        held, fresh = holder.offer()
        if fresh.lease == handle.lease:
            break
        holder.end(held, 0.0)
    assert fresh.lease == handle.lease
    assert holder.leases.state(fresh.lease) is Pull.IDLE
    with receiver.pull(fresh, time.monotonic()) as source:
        assert child.end().startswith("refused: lease ended")
        assert holder.leases.state(fresh.lease) is Pull.PULLING
        assert hashlib.sha256(source).hexdigest() == holder.digest(held)
    assert holder.leases.state(fresh.lease) is Pull.DONE


def test_a_region_outlives_its_killed_holder_and_can_be_cleaned_up(name: str) -> None:
    script = (
        "import os, signal\n"
        "from pdserve.transfer.shm import SharedRegion\n"
        f"SharedRegion.create({name!r}, 4096, 1, bytes(8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == -9
    with pytest.raises(DeploymentError, match="File exists"):
        Holder(name)
    (regions.SHM / name).unlink()
    Holder(name).close()


# What ends a lease without a transfer.


def test_a_rejected_request_gives_its_range_back_at_once(holder: Holder) -> None:
    """vllm#41269: decode rejected, prefill held the KV cache for 480 s."""
    held, handle = holder.offer()
    holder.end(held, 0.0)
    assert held.state is State.CACHED
    with pytest.raises(HandleError, match="has ended"):
        copy(ShmReceiver(MODEL, LAYOUT), handle)


def test_an_abort_wins_over_a_prefill_that_has_just_finished(
    holder: Holder, receiver: ShmReceiver
) -> None:
    """vllm#29906: the handle is under way when the request is cancelled."""
    held, handle = holder.offer()
    holder.end(held, 0.0)
    with pytest.raises(HandleError, match="has ended"):
        copy(receiver, handle)
    assert holder.arena.counts()[State.LEASED] == (0, 0)


def test_leases_expire_without_any_new_work(holder: Holder) -> None:
    """TensorRT-LLM#12313: and then there is room again, for all of the arena."""
    for _ in range(4):
        holder.offer(expires=10.0)
    assert holder.arena.allocate(1) is None
    holder.tick(10.0)
    assert len(holder.leases) == 0
    assert holder.arena.allocate(1 << 20) is not None


def test_an_error_of_the_receiver_reaches_the_holder(holder: Holder, receiver: ShmReceiver) -> None:
    """TensorRT-LLM#12542: one side threw, the other waited forever."""
    held, handle = holder.offer()
    with pytest.raises(ZeroDivisionError), receiver.pull(handle, time.monotonic()):
        _ = 1 / 0
    assert holder.leases.state(handle.lease) is Pull.DONE
    holder.tick(time.monotonic())
    assert held.state is State.CACHED


def test_a_decode_s_blocks_come_back_when_a_pull_fails(
    holder: Holder, receiver: ShmReceiver
) -> None:
    """vllm#46283: blocks of an aborted load were never reclaimed."""
    pool = BlockPool(8, 16)
    table = pool.allocate(TOKENS)
    assert table is not None
    memory = np.zeros(LAYOUT.shape(8 * 16), np.uint8)
    held, handle = holder.offer()

    def load() -> None:
        with receiver.pull(handle, time.monotonic()) as source:
            scatter(source, memory, table.rows(TOKENS))
            holder.end(held, 0.0)

    with pytest.raises(HandleError, match="during the transfer"):
        load()
    pool.free(table)
    assert pool.used_blocks == 0


# Handles that are not good.


def test_expired(holder: Holder, receiver: ShmReceiver) -> None:
    _, handle = holder.offer(expires=10.0)
    with pytest.raises(HandleError, match="KV handle expired"):
        copy(receiver, handle, now=10.0)
    with pytest.raises(HandleError, match=r"lease . of .* has expired"):
        copy(receiver, change(handle, expires=99.0), now=10.0)
    assert copy(receiver, handle, now=9.9)


@pytest.mark.parametrize("nonce", [bytes(16), b"x" * 16])
def test_forged_nonce(holder: Holder, receiver: ShmReceiver, nonce: bytes) -> None:
    _, handle = holder.offer()
    for lease in range(4):  # those that are free, too: their nonce is zero
        with pytest.raises(HandleError, match="has ended, or is another's"):
            copy(receiver, change(handle, nonce=nonce, lease=lease))
    assert copy(receiver, handle)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": "other"}, "of model 'other'"),
        ({"layout": KVLayout(3, 2, 8, "float16")}, "float16"),
        ({"lease": 4}, "slot 4; .* has 4"),
        ({"offset": (1 << 20) - 1}, "ends at byte"),
        ({"tokens": 1 << 24}, "ends at byte"),
        ({"epoch": bytes(8)}, "earlier life"),
        ({"region": "pdserve-there-is-none"}, "No such file"),
    ],
)
def test_what_does_not_match_is_named(
    holder: Holder, receiver: ShmReceiver, fields: dict[str, object], message: str
) -> None:
    _, handle = holder.offer()
    with pytest.raises(HandleError, match=message):
        copy(receiver, change(handle, **fields))
    assert copy(receiver, handle), "a refused handle has used the lease"


def test_a_region_that_loses_its_epoch_in_mid_pull(holder: Holder, receiver: ShmReceiver) -> None:
    _, handle = holder.offer()
    path = regions.SHM / holder.region.name
    with (
        pytest.raises(HandleError, match="during the transfer"),
        receiver.pull(handle, time.monotonic()),
    ):
        path.open("r+b").write(path.read_bytes()[:16] + bytes(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no KV region: 0 bytes"),
        (b"x" * 8192, "begins with b'xxxxxxxx'"),
        (b"PDSERVKV" + b"\2\0\0\0" + bytes(8180), "has version 2; this is version 1"),
        (b"PDSERVKV\1\0\0\0\4\0\0\0" + bytes(8) + b"\xff" * 8 + bytes(4096), "cut short"),
        (b"PDSERVKV\1\0\0\0" + b"\xff" * 4 + bytes(4096), "cut short"),
    ],
)
def test_files_that_are_no_regions(
    name: str, holder: Holder, receiver: ShmReceiver, content: bytes, message: str
) -> None:
    _, handle = holder.offer()
    path = regions.SHM / f"{name}-other"
    path.write_bytes(content)
    try:
        with pytest.raises(HandleError, match=message):
            copy(receiver, change(handle, region=path.name))
    finally:
        path.unlink()


def test_a_link_is_not_followed(holder: Holder, name: str, receiver: ShmReceiver) -> None:
    _, handle = holder.offer()
    link = regions.SHM / f"{name}-link"
    link.symlink_to(regions.SHM / name)
    try:
        with pytest.raises(HandleError, match="Too many levels of symbolic links"):
            copy(receiver, change(handle, region=link.name))
    finally:
        link.unlink()


@settings(deadline=None)
@given(st.data())
def test_flipped_bits_never_crash_a_receiver(data: st.DataObject) -> None:
    holder = Holder(f"pdserve-test-{secrets.token_hex(6)}")
    try:
        _, handle = holder.offer()
        encoded = bytearray(msgspec.msgpack.encode(handle))
        bits = st.integers(0, len(encoded) * 8 - 1)
        for bit in data.draw(st.lists(bits, min_size=1, max_size=3)):
            encoded[bit // 8] ^= 1 << bit % 8
        try:
            flipped = msgspec.msgpack.decode(bytes(encoded), type=KVHandle)
            copy(ShmReceiver(MODEL, LAYOUT), flipped)
        except (HandleError, msgspec.MsgspecError, UnicodeDecodeError):
            pass
    finally:
        holder.close()


# The region itself.


def test_source_is_read_only(holder: Holder, receiver: ShmReceiver) -> None:
    _, handle = holder.offer()
    with receiver.pull(handle, time.monotonic()) as source:
        assert source.shape == LAYOUT.shape(TOKENS)
        with pytest.raises(ValueError, match="read-only"):
            source[0] = 0


def test_closing_is_safe_twice_and_with_views_alive(name: str) -> None:
    region = SharedRegion.create(name, 1 << 16, 2, bytes(8))
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


def test_mapped_regions_are_bounded_and_leak_nothing(name: str) -> None:
    receiver = ShmReceiver(MODEL, LAYOUT, mappings=2)
    holders = [Holder(f"{name}-{index}") for index in range(4)]
    before = descriptors()
    for _ in range(3):
        for holder in holders:
            held, handle = holder.offer()
            assert hashlib.sha256(copy(receiver, handle)).hexdigest() == holder.digest(held)
            holder.end(held, 0.0)
    assert descriptors() <= before + 2 * 2  # a mapping keeps a descriptor
    receiver.close()
    assert descriptors() == before
    for holder in holders:
        holder.close()


def test_memory_is_private_to_the_user(holder: Holder) -> None:
    assert (regions.SHM / holder.region.name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("bad", ["other", "pdserve-", "pdserve-a/b", "pdserve-A", "../pdserve-a"])
def test_region_names(bad: str) -> None:
    with pytest.raises(DeploymentError, match=re.escape(repr(bad))):
        SharedRegion.create(bad, 4096, 1, bytes(8))


def check_full(name: str) -> None:
    with pytest.raises(DeploymentError, match=r"16\.0 MiB wanted, .* MiB available"):
        SharedRegion.create(name, 16 << 20, 4, bytes(8))
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
        SharedRegion.create(name, 4 << 20, 4, bytes(8)).unlink()
    finally:
        gc.collect()
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_slots_run_out_and_come_back(holder: Holder) -> None:
    slots = [holder.leases.grant(1.0)[0] for _ in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    with pytest.raises(Unavailable, match="all 4 lease slots"):
        holder.leases.grant(1.0)
    holder.leases.free(slots[2])
    assert holder.leases.grant(1.0)[0] == slots[2]
    assert len(holder.leases) == 4


# Into the pool.


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_scatter_fills_the_runs_in_order_and_nothing_else(
    pieces: list[tuple[int, int]], draw: object
) -> None:
    runs, end = [], 0
    for rows, gap in pieces:
        runs.append((end + gap, rows))
        end += gap + rows
    draw.shuffle(runs)  # type: ignore[attr-defined]
    tokens = sum(rows for _, rows in runs)
    source = np.random.default_rng(tokens).integers(1, 256, LAYOUT.shape(tokens), np.uint8)
    pool = np.zeros(LAYOUT.shape(end + 1), np.uint8)
    scatter(source, pool, runs)
    rows = [row for first, count in runs for row in range(first, first + count)]
    assert (pool[:, rows] == source).all()
    assert not np.delete(pool, rows, axis=1).any()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 3)], "do not have 4 rows"),
        ([(0, 5)], "do not have 4 rows"),
        ([(5, 4)], "not inside the pool's 8 rows"),
        ([(0, 3), (8, 1)], "not inside"),
        ([(-1, 4)], "not inside"),
        ([(0, 5), (6, -1)], "not inside"),
    ],
)
def test_scatter_refuses_runs_that_do_not_fit(runs: list[tuple[int, int]], message: str) -> None:
    source = np.zeros(LAYOUT.shape(4), np.uint8)
    with pytest.raises(ValueError, match=message):
        scatter(source, np.zeros(LAYOUT.shape(8), np.uint8), runs)
