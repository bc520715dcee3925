"""Test the store in SQLite: processes that end, disks that are full, files that others hold."""

from __future__ import annotations

import asyncio
import fcntl
import resource
import signal
import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest

from pdserve.control.store.election import LEADER, Candidate
from pdserve.control.store.errors import Compacted, Fenced, Refused, StoreUnreachable
from pdserve.control.store.file import database as database_module
from pdserve.control.store.file.liveness import LivenessLock, is_dead
from pdserve.control.store.file.store import POLL_S, FileStore
from pdserve.control.store.protocol import Compare, Delete, Put, put
from pdserve.control.store.view import View
from tests.unit.control.store.processes import running
from tests.unit.inprocess import real

WAIT_S = 10.0


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[FileStore]:
    """Open the store of a test."""
    store = await FileStore.opened(folder / "store")
    try:
        yield store
    finally:
        await store.close()


async def keys(store: FileStore) -> list[str]:
    return [entry.key for entry in (await store.list_prefix("")).entries]


@real
async def test_a_killed_process_loses_its_lease_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with running("file", str(tmp_path / "store"), "hold") as process:
            assert process.says() == "holds"
            assert await keys(store) == ["held"]
            revision = (await store.list_prefix("")).revision
            async with aclosing(store.watch_prefix("", revision + 1)) as changes:
                process.process.kill()
                change = await asyncio.wait_for(anext(changes), WAIT_S)
        assert (change.kind, change.key) == ("DELETE", "held")
        assert not [*(tmp_path / "store" / "holders").iterdir()][1:], "only this process's is left"


def test_many_may_ask_at_once_whether_a_process_is_dead(tmp_path: Path) -> None:
    """One that asks must not look like the process itself."""
    (tmp_path / "dead").touch()
    with (tmp_path / "dead").open() as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        assert is_dead(tmp_path, "dead")
    assert is_dead(tmp_path, "dead"), "its file is removed"
    living = LivenessLock(tmp_path)
    assert not is_dead(tmp_path, living.name)
    living.close()
    assert is_dead(tmp_path, living.name)


@real
async def test_a_stopped_process_keeps_its_lease(tmp_path: Path) -> None:
    """Whatever its time: no clock decides."""
    async with opened(tmp_path) as store:
        with running("file", str(tmp_path / "store"), "hold") as process:
            assert process.says() == "holds"
            process.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(2.5)
            assert await keys(store) == ["held"]
            process.process.kill()
            process.process.wait()
            assert await keys(store) == []


@real
async def test_a_killed_leader_is_followed_by_another(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with running("file", str(tmp_path / "store"), "lead") as process:
            assert process.says() == "leads"
            assert process.write("first") == "written"
            assert await Candidate(store, "second").attempt() is None
            process.process.kill()
            process.process.wait()
            leadership = await Candidate(store, "second").attempt()
        assert leadership is not None
        assert await leadership.write(1, [Put("desired", b"second")]) == 2


@real
async def test_a_leader_whose_leadership_was_taken_away_writes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with running("file", str(tmp_path / "store"), "lead") as process:
            assert process.says() == "leads"
            process.process.send_signal(signal.SIGSTOP)
            await store.transact((), [Delete(LEADER)])
            successor = await Candidate(store, "successor").attempt()
            assert successor is not None
            process.process.send_signal(signal.SIGCONT)
            assert process.write("too late") == "Fenced"
        assert "desired" not in await keys(store)


@real
async def test_no_file_can_be_read_by_others(tmp_path: Path) -> None:
    with mock.patch("os.umask"):
        async with opened(tmp_path) as store:
            await put(store, "a", b"")
            await store.grant(1)
            modes = {
                path.name: stat.S_IMODE(path.stat().st_mode)
                for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]
            }
    assert len(modes) >= 6
    folders = {"store", "holders"}
    assert {modes.pop(name) for name in folders} == {0o700}
    assert {*modes.values()} == {0o600}


async def fill(store: FileStore) -> None:
    for number in range(10):
        await put(store, f"large/{number}", bytes(100_000))


@real
async def test_a_full_disk_stops_writing_and_not_reading(tmp_path: Path) -> None:
    """A limit on the size of this process's files has the same effect as a full disk."""
    async with opened(tmp_path) as store, opened(tmp_path) as reader:
        await put(store, "a", b"before")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            with pytest.raises(Refused, match=r"store\.sqlite: "):
                await fill(store)
            with pytest.raises(Refused, match=r"store\.sqlite: "):
                await put(reader, "large/x", bytes(200_000))
            listing = await reader.list_prefix("")
            assert listing.entries[0].value == b"before"
            async with aclosing(reader.watch_prefix("", 2)) as changes:
                assert (await anext(changes)).value == b"before"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert await put(store, "large/x", bytes(200_000)) == listing.revision + 1


@real
async def test_a_database_that_another_holds_can_be_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put(store, "a", b"")
        with running("file", str(tmp_path / "store"), "hold") as process:
            assert process.says() == "holds"
            other = sqlite3.connect(tmp_path / "store" / "store.sqlite", isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            process.process.kill()
            process.process.wait()
            begin = time.monotonic()
            assert await keys(store) == ["a", "held"], "the last view: the end is not yet written"
            assert time.monotonic() - begin < database_module.BUSY_S, "a reader waits for no writer"
            with pytest.raises(StoreUnreachable, match="database is locked"):
                await put(store, "b", b"")
            other.execute("ROLLBACK")
            other.close()
            assert await keys(store) == ["a"]


@real
async def test_history_is_bounded(tmp_path: Path) -> None:
    with mock.patch.object(database_module, "HISTORY", 5):
        async with opened(tmp_path) as store:
            for number in range(40):
                revision = await put(store, "a", str(number).encode())
            with pytest.raises(Compacted, match="no changes from revision 2 on"):
                await anext(store.watch_prefix("", 2))
            async with aclosing(store.watch_prefix("", revision - 4)) as changes:
                assert (await anext(changes)).value == b"35"
    rows = sqlite3.connect(tmp_path / "store" / "store.sqlite").execute(
        "SELECT count(*) FROM changes"
    )
    assert rows.fetchone()[0] <= 11


@real
async def test_a_watch_of_a_database_made_anew_ends(tmp_path: Path) -> None:
    """Its revisions have begun again, and would never reach those of before."""
    async with opened(tmp_path) as store:
        with pytest.raises(Compacted):
            await anext(store.watch_prefix("", 1000))


@real
async def test_a_view_sees_changes_of_others_soon(tmp_path: Path) -> None:
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        view = View(store, "x/", lambda _, value: value)
        work = asyncio.ensure_future(view.run())
        await asyncio.wait_for(view.known.wait(), WAIT_S)
        await put(other, "x/1", b"1")
        clock = asyncio.get_running_loop()
        begin = clock.time()
        while not view.values:
            assert clock.time() < begin + WAIT_S
            await asyncio.sleep(POLL_S / 10)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


@real
async def test_what_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "store.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(Refused, match=r"store\.sqlite: file is not a database"):
        await FileStore.opened(folder)
    (folder / "store.sqlite").unlink()
    connection = sqlite3.connect(folder / "store.sqlite")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(Refused, match="has version 7; this program reads 1"):
        await FileStore.opened(folder)
    with pytest.raises(Refused, match="Not a directory"):
        await FileStore.opened(folder / "store.sqlite" / "x")


@real
async def test_values_outlive_every_process(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        revision = await put(store, "a", b"\0\xff")
    async with opened(tmp_path) as store:
        (entry,) = (await store.list_prefix("")).entries
        assert (entry.value, entry.mod_revision) == (b"\0\xff", revision)


@real
async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        pass
    with pytest.raises(StoreUnreachable, match="it has been closed"):
        await store.list_prefix("")


@real
async def test_two_writers_of_the_same_generation(tmp_path: Path) -> None:
    """Of decisions that were made at once only one is written."""
    async with opened(tmp_path) as store:
        leadership = await Candidate(store, "a").attempt()
        assert leadership is not None
        outcomes = await asyncio.gather(
            *(leadership.write(0, [Put("desired", bytes((one,)))]) for one in range(5)),
            return_exceptions=True,
        )
        assert [one for one in outcomes if one == 1] == [1]
        assert len([one for one in outcomes if isinstance(one, Fenced)]) == 4
        assert await store.transact([Compare("desired", "value", b"\0")], []) is not None


@real
async def test_a_view_that_is_cancelled_ends(tmp_path: Path) -> None:
    """Also if the store answers at that very moment."""
    async with opened(tmp_path) as store:
        for number in range(30):
            view = View(store, "a/", lambda _, value: value)
            following = asyncio.create_task(view.run())
            await view.known.wait()
            await asyncio.sleep(POLL_S * (0.9 + 0.01 * number))  # it looks again about now
            following.cancel()
            assert (await asyncio.wait([following], timeout=2))[0]
            assert following.cancelled()
