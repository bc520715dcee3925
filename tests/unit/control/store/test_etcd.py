"""Test the store in etcd against what a real etcd does when it is stopped, killed or compacted.

The numbers are those of the traps that a client of etcd from Python falls into:

1. an etcd that was stopped for longer than the leases deletes all their keys when it goes on;
2. a watch does not notice a stopped etcd;
3. keeping a lost lease alive raises no error, but returns a time of 0;
4. nothing has a time limit by default;
5. a leader's lease has to be kept alive;
6. a cluster has several endpoints, TLS and users;
7. a stream may end without an error;
10. a lease lasts 2 s at least, and a transaction has at most 128 operations.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from unittest import mock

import pytest

from pdserve.control.store import view as view_module
from pdserve.control.store.election import Candidate
from pdserve.control.store.errors import Compacted, LeaseLost, Refused, StoreUnreachable
from pdserve.control.store.keys import MAX_OPERATIONS
from pdserve.control.store.leased import LeasedKeys
from pdserve.control.store.protocol import Delete, Put, Store, put
from pdserve.control.store.view import View
from tests.unit.control.store.etcd_server import EtcdServer, free_port, in_loop, needs_etcd
from tests.unit.control.store.processes import running

pytestmark = needs_etcd

TTL_S = 2.0


@asynccontextmanager
async def opened(*servers: EtcdServer | str, name: str = "test", call_s: float = 5.0):
    """Open the store of a deployment in a cluster."""
    from pdserve.control.store.etcd.client import EtcdAddress
    from pdserve.control.store.etcd.store import EtcdStore

    endpoints = tuple(one if isinstance(one, str) else one.endpoint for one in servers)
    store = EtcdStore(EtcdAddress(endpoints), name, call_s)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def at_work(*works: Awaitable[None]):
    """Run something until the block ends."""
    tasks = [asyncio.ensure_future(one) for one in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], object], limit_s: float = 15.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.02)


async def connected(store: Store) -> None:
    """Wait until a store whose calls have little time is connected."""
    for _ in range(30):
        with suppress(StoreUnreachable):
            await store.list_prefix("")
            return


def text(_: str, value: bytes) -> str:
    return value.decode()


@in_loop
async def test_1_2_a_view_survives_an_etcd_that_was_stopped(etcd: EtcdServer) -> None:
    """All leases are lost at once; holders put their keys again, and the view never lacks one."""
    async with opened(etcd, call_s=1.0) as holder, opened(etcd, call_s=1.0) as watcher:
        leased = LeasedKeys(holder, TTL_S)
        for number in range(5):
            leased.set(f"nodes/{number}", b"well")
        view = View(watcher, "nodes/", text)
        with mock.patch.object(view_module, "RELIST_S", 0.5):
            async with at_work(view.run()):
                async with at_work(leased.run()):
                    await until(lambda: len(view.values) == 5)
                    etcd.send(signal.SIGSTOP)
                    await until(lambda: view.age_s > TTL_S + 1)  # 2: listing again notices it
                    assert len(view.values) == 5
                etcd.send(signal.SIGCONT)
                await until(lambda: len(view.deleted) == 5)  # 1
                assert len(view.values) == 5
                async with at_work(leased.run()):
                    await until(lambda: not view.deleted)
                    assert [*view.values.values()] == ["well"] * 5


@in_loop
async def test_3_keys_are_put_again_under_another_lease(shared_etcd: EtcdServer) -> None:
    async with opened(shared_etcd, name="again") as store:
        leased = LeasedKeys(store, TTL_S)
        leased.set("a", b"1")
        view = View(store, "", text)
        async with at_work(leased.run(), view.run()):
            await until(lambda: view.values)
            (first,) = (await store.list_prefix("")).entries
            await store.revoke(first.lease)
            await until(lambda: view.deleted)
            await until(lambda: not view.deleted)
            leased.set("b", b"2")
            await until(lambda: view.values == {"a": "1", "b": "2"})
            again, _ = (await store.list_prefix("")).entries
            assert again.lease != first.lease


@in_loop
async def test_3_a_lost_lease_is_reported(shared_etcd: EtcdServer) -> None:
    async with opened(shared_etcd, name="lost") as store:
        lease = await store.grant(TTL_S)
        await store.keep_alive(lease.id)
        await store.revoke(lease.id)
        with pytest.raises(LeaseLost, match=rf"lease {lease.id:x} has ended"):
            await store.keep_alive(lease.id)
        with pytest.raises(LeaseLost):
            await put(store, "a", b"", lease.id)
        assert not (await store.list_prefix("")).entries
        await store.revoke(lease.id)


@in_loop
async def test_4_every_call_ends_when_etcd_is_stopped(etcd: EtcdServer) -> None:
    """Those on an open connection, and those that have to connect."""
    async with opened(etcd, call_s=0.5) as store:
        await connected(store)
        lease = await store.grant(TTL_S)
        etcd.send(signal.SIGSTOP)

        async def watch() -> None:
            async with aclosing(store.watch_prefix("", 1)) as changes:
                await anext(changes)

        works: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("listing 'a/'", lambda: store.list_prefix("a/")),
            ("key 'a'", lambda: put(store, "a", b"")),
            ("granting", lambda: store.grant(TTL_S)),
            ("keeping", lambda: store.keep_alive(lease.id)),
            ("revoking", lambda: store.revoke(lease.id)),
            ("watching ''", watch),
        ]
        for what, work in works:
            begin = time.monotonic()
            with pytest.raises(StoreUnreachable, match=f"{what}.*{etcd.endpoint}"):
                await work()
            assert time.monotonic() - begin < 2.0
        etcd.send(signal.SIGCONT)
        await connected(store)


@in_loop
async def test_2_a_watch_ends_with_its_connection(etcd: EtcdServer) -> None:
    """It is not told of a stopped server, so another call that gets no answer ends it."""
    async with opened(etcd, call_s=0.5) as store, aclosing(store.watch_prefix("", 1)) as changes:
        await connected(store)
        await put(store, "a", b"")
        assert (await anext(changes)).key == "a"
        etcd.send(signal.SIGSTOP)
        with pytest.raises(StoreUnreachable):
            await store.list_prefix("")
        with pytest.raises(StoreUnreachable, match="given up"):
            await asyncio.wait_for(anext(changes), 1.0)


@in_loop
async def test_5_a_leader_stays_beyond_its_lease(shared_etcd: EtcdServer) -> None:
    async with opened(shared_etcd, name="five") as store:
        leadership = await Candidate(store, "first", TTL_S).attempt()
        assert leadership is not None
        async with at_work(leadership.run()):
            await asyncio.sleep(TTL_S + 0.8)
            assert await Candidate(store, "second", TTL_S).attempt() is None
            assert not leadership.lost.is_set()
        await until_elected(Candidate(store, "second", TTL_S))
        async with at_work(leadership.run()):
            await asyncio.wait_for(leadership.lost.wait(), 1.0)


async def until_elected(candidate: Candidate) -> None:
    await asyncio.wait_for(candidate.lead(), 10.0)


@in_loop
async def test_a_leader_that_was_stopped_writes_nothing(shared_etcd: EtcdServer) -> None:
    """A process that goes on after its lease believes that it leads; the store does not."""
    async with opened(shared_etcd) as store:
        with running("etcd", shared_etcd.endpoint, "lead") as process:
            assert process.says() == "leads"
            assert process.write("before") == "written"
            process.process.send_signal(signal.SIGSTOP)
            successor = await asyncio.wait_for(Candidate(store, "successor", TTL_S).lead(), 10.0)
            process.process.send_signal(signal.SIGCONT)
            assert process.write("too late") == "Fenced"
        generation = await successor.generation()
        assert generation == 1
        assert await successor.write(generation, [Put("desired", b"after")]) == 2
        values = {one.key: one.value for one in (await store.list_prefix("")).entries}
        assert values["desired"] == b"after"
        await successor.resign()


@in_loop
async def test_6_dead_and_stopped_endpoints_are_passed_over(etcd: EtcdServer) -> None:
    """The first endpoint refuses, the second never answers."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        dead, mute = f"127.0.0.1:{free_port()}", f"127.0.0.1:{silent.getsockname()[1]}"
        async with opened(dead, mute, etcd) as store:
            assert await put(store, "a", b"1")
            etcd.kill()
            with pytest.raises(StoreUnreachable):
                await store.list_prefix("")
            etcd.start()
            (entry,) = (await store.list_prefix("")).entries
            assert entry.value == b"1"


@in_loop
async def test_7_a_view_finds_what_its_watch_was_not_told(shared_etcd: EtcdServer) -> None:
    """A watch that has ended without a word is imitated by one that waits for ever."""
    async with opened(shared_etcd, name="seven") as store:

        class Deaf(type(store)):
            async def watch_prefix(self, prefix: str, revision: int):
                await asyncio.Event().wait()
                yield

        store.__class__ = Deaf
        view = View(store, "", text)
        with mock.patch.object(view_module, "RELIST_S", 0.3):
            async with at_work(view.run()):
                await until(view.known.is_set)
                await put(store, "a", b"1")
                await until(lambda: view.values == {"a": "1"})
                await store.transact((), [Delete("a")])
                await until(lambda: view.deleted == {"a"})
    assert 30 <= view_module.RELIST_S <= 60


@in_loop
async def test_7_the_end_of_a_watch_is_an_error(etcd: EtcdServer) -> None:
    async with opened(etcd) as store, aclosing(store.watch_prefix("", 1)) as changes:
        await put(store, "a", b"")
        await anext(changes)
        etcd.send(signal.SIGTERM)
        with pytest.raises(StoreUnreachable):
            await asyncio.wait_for(anext(changes), 10.0)


@in_loop
async def test_a_view_follows_an_etcd_that_is_killed(etcd: EtcdServer) -> None:
    """It keeps what it knows, and goes on when etcd is there again, also after a compaction."""
    async with opened(etcd) as store, opened(etcd) as watcher:
        view = View(watcher, "x/", text)
        await put(store, "x/1", b"1")
        async with at_work(view.run()):
            await until(lambda: view.values == {"x/1": "1"})
            etcd.kill()
            await asyncio.sleep(0.5)
            assert view.values == {"x/1": "1"}
            etcd.start()
            await put(store, "x/2", b"2")
            revision = await store.transact((), [Delete("x/1")])
            await store._client.compact(revision)
            await until(lambda: view.values == {"x/1": "1", "x/2": "2"})
            await until(lambda: view.deleted == {"x/1"})


@in_loop
async def test_no_deletion_is_lost_by_compaction(shared_etcd: EtcdServer) -> None:
    """etcd 3.5.1 would accept a watch from a compacted deletion on, and leave it out."""
    async with opened(shared_etcd, name="compaction") as store:
        await put(store, "a", b"")
        revision = await store.transact((), [Delete("a")])
        assert revision
        await store._client.compact(revision)
        with pytest.raises(Compacted, match=f"compacted up to {revision}"):
            await anext(store.watch_prefix("", revision))
        await put(store, "a", b"")
        async with aclosing(store.watch_prefix("", revision + 1)) as changes:
            assert (await anext(changes)).kind == "PUT"


@in_loop
async def test_10_bounds_of_leases_and_transactions(shared_etcd: EtcdServer) -> None:
    async with opened(shared_etcd, name="ten") as store:
        assert (await store.grant(1)).ttl_s >= 2
        assert (await store.grant(3.2)).ttl_s == 4
        puts = [Put(f"a/{number}", b"") for number in range(MAX_OPERATIONS + 1)]
        with pytest.raises(Refused, match="129 operations in a transaction; at most 128"):
            await store.transact((), puts)
        assert not (await store.list_prefix("")).entries
        assert await store.transact((), puts[:MAX_OPERATIONS])
        assert len((await store.list_prefix("a/")).entries) == MAX_OPERATIONS


@in_loop
async def test_deployments_do_not_see_each_other(shared_etcd: EtcdServer) -> None:
    async with opened(shared_etcd, name="one") as one, opened(shared_etcd, name="one.more") as more:
        await put(one, "a", b"1")
        await put(more, "a", b"2")
        (entry,) = (await one.list_prefix("")).entries
        assert (entry.key, entry.value) == ("a", b"1")
        with pytest.raises(Refused, match="slash"):
            async with opened(shared_etcd, name="one/more"):
                pass


@in_loop
async def test_keys_that_others_wrote_are_left_out(shared_etcd: EtcdServer) -> None:
    async with opened(shared_etcd, name="strange") as store:
        revision = (await store.list_prefix("")).revision
        await store._client.put(b"/pdserve/strange/../a", b"")
        await store._client.put(b"/pdserve/strange/\xff", b"")
        await put(store, "b", b"")
        assert [one.key for one in (await store.list_prefix("")).entries] == ["b"]
        async with aclosing(store.watch_prefix("", revision + 1)) as changes:
            assert (await anext(changes)).key == "b"


@in_loop
async def test_a_candidate_finds_out_that_its_lost_attempt_was_taken(
    shared_etcd: EtcdServer,
) -> None:
    """The answer to the transaction is lost, so the next attempt asks whose lease leads."""
    async with opened(shared_etcd, name="unsure") as store:
        candidate = Candidate(store, "unsure", TTL_S)
        transact = store.transact

        async def unsure(*arguments: object) -> None:
            await transact(*arguments)
            raise StoreUnreachable("no answer")

        with mock.patch.object(store, "transact", unsure), pytest.raises(StoreUnreachable):
            await candidate.attempt()
        leadership = await candidate.attempt()
        assert leadership is not None
        assert await leadership.write(0, []) == 1
