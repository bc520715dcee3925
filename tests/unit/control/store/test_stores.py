"""Test that every store does what the model does, whatever several clients do to it.

One machine runs against the model itself, SQLite and a real etcd. Clients list, watch, lease,
compare and write, stand for election and write as leaders; holders of leases are killed, and
histories compacted. Each step is done to the model too, and must have the same outcome.
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pdserve.control.store.election import Candidate, Leadership
from pdserve.control.store.errors import Compacted, StoreError
from pdserve.control.store.file.store import FileStore
from pdserve.control.store.protocol import Compare, Delete, Entry, KeyChange, Put, Store, put
from tests.unit.control.store.etcd_server import EtcdServer, loop
from tests.unit.control.store.model import Model, ModelStore

CLIENTS = 3
KEYS = "a", "b", "b/1", "b/2", "b/2/x", "c/d/e"
PREFIXES = "", "a/", "b/", "c/", "c/d/"
WAIT_S = 10.0
TTL_S = 3600.0

clients = st.integers(0, CLIENTS - 1)
keys = st.sampled_from(KEYS)
values = st.sampled_from((b"", b"1", b"\0\xff"))

HOLDER = """
import sys, time
from pathlib import Path
from pdserve.control.store.file.database import Database
from pdserve.control.store.protocol import Put
database = Database(Path(sys.argv[1]))
lease = database.grant()
database.transact((), [Put(sys.argv[2], b"held", lease)])
print(lease, flush=True)
time.sleep(600)
"""


class Models:
    """The model itself, as if it were a real store."""

    closing_ends_leases = True

    def __init__(self, _: Path) -> None:
        self._model = Model()

    async def client(self) -> Store:
        return ModelStore(self._model)

    async def compact(self, revision: int) -> None:
        self._model.compact(revision)

    async def hold_and_die(self, key: str) -> int:
        store = ModelStore(self._model)
        lease = await store.grant(TTL_S)
        await put(store, key, b"held", lease.id)
        await store.close()
        return lease.id


class Files(Models):
    """SQLite."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "store"

    async def client(self) -> Store:
        return await FileStore.opened(self._folder)

    async def compact(self, revision: int) -> None:
        store = await FileStore.opened(self._folder)
        await store.compact(revision)
        await store.close()

    async def hold_and_die(self, key: str) -> int:
        return await asyncio.to_thread(self._kill_a_holder, key)

    def _kill_a_holder(self, key: str) -> int:
        """Have a process hold a lease, and kill it."""
        command = [sys.executable, "-c", HOLDER, str(self._folder), key]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lease = int(process.stdout.readline())
            process.kill()
        return lease


class Etcds(Models):
    """An etcd that all examples share, with a prefix for each."""

    closing_ends_leases = False
    expires = False
    """Whether a killed holder's lease expires, which takes seconds; else it is revoked."""
    _numbers = itertools.count()

    def __init__(self, server: EtcdServer) -> None:
        from pdserve.control.store.etcd.client import EtcdAddress
        from pdserve.control.store.etcd.store import EtcdStore

        name = f"stateful-{next(self._numbers)}"
        self._make: Callable[[], EtcdStore] = lambda: EtcdStore(
            EtcdAddress((server.endpoint,)), name
        )

    async def client(self) -> Store:
        return self._make()

    async def compact(self, revision: int) -> None:
        store = self._make()
        await store._client.compact(revision)
        await store.close()

    async def hold_and_die(self, key: str) -> int:
        store = self._make()
        lease = await store.grant(1)
        revision = await put(store, key, b"held", lease.id)
        if self.expires:
            watch = store.watch_prefix("", revision + 1)
            await asyncio.wait_for(anext(watch), WAIT_S)
            await watch.aclose()
        else:
            await store.revoke(lease.id)
        await store.close()
        return lease.id


class Watch:
    """A watch, what it should yield, and what it has yielded."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, store: Store, prefix: str, start: int, offset: int
    ) -> None:
        self.store = store
        self.prefix = prefix
        self.start = start
        self.seen: list[KeyChange] = []
        self._changes = store.watch_prefix(prefix, start + offset)
        self._offset = offset
        self.task = loop.create_task(self._follow())

    async def _follow(self) -> None:
        async for change in self._changes:
            self.seen.append(replace(change, revision=change.revision - self._offset))

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.store.close()

    def expected(self, log: list[KeyChange]) -> list[KeyChange]:
        return [c for c in log if c.revision >= self.start and c.key.startswith(self.prefix)]


class Machine(RuleBasedStateMachine):
    """Does the same to a store and to the model."""

    def __init__(self, loop: asyncio.AbstractEventLoop, make: Callable[[], Models]) -> None:
        super().__init__()
        self.loop = loop
        self.stores = make()
        self.model = Model()
        self.real: list[Store] = [self.run(self.stores.client()) for _ in range(CLIENTS)]
        self.modelled: list[Store] = [ModelStore(self.model) for _ in range(CLIENTS)]
        self.offset = self.run(self.real[0].list_prefix("")).revision - 1
        self.log: list[KeyChange] = []
        self.leases: dict[int, int] = {0: 0}  # of the model, and the real ones
        self.leaders: list[tuple[Leadership, Leadership]] = []
        self.watches: list[Watch] = []
        self.killed = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, WAIT_S))

    def both(self, real: Coroutine[Any, Any, Any], modelled: Coroutine[Any, Any, Any]) -> Any:
        """Run both, check that they have the same outcome, and return it."""
        expected = self.run(_outcome(modelled))
        outcome = self.run(_outcome(real))
        self.note()
        if isinstance(outcome, int) and isinstance(expected, int):
            outcome -= self.offset
        assert outcome == expected
        return expected

    def note(self) -> None:
        """Keep the model's new changes, which compaction may take from it."""
        last = self.log[-1].revision if self.log else 0
        self.log += [change for change in self.model.changes if change.revision > last]

    @rule(client=clients, prefix=st.sampled_from(PREFIXES))
    def list(self, client: int, prefix: str) -> None:
        listing = self.run(self.real[client].list_prefix(prefix))
        expected = self.run(self.modelled[client].list_prefix(prefix))
        assert listing.revision - self.offset == expected.revision
        assert [self.translated(entry) for entry in listing.entries] == [*expected.entries]

    def translated(self, entry: Entry) -> Entry:
        """Return a real entry with the revisions and lease of the model."""
        (lease,) = (mine for mine, real in self.leases.items() if real == entry.lease)
        return replace(
            entry,
            create_revision=entry.create_revision - self.offset,
            mod_revision=entry.mod_revision - self.offset,
            lease=lease,
        )

    @rule(
        client=clients,
        conditions=st.lists(st.tuples(keys, st.integers(0, 4)), max_size=2),
        operations=st.lists(
            st.tuples(keys, st.none() | st.tuples(values, st.integers(0, 3))),
            max_size=3,
            unique_by=lambda operation: operation[0],
        ),
    )
    def transact(self, client: int, conditions: Any, operations: Any) -> None:
        pairs = [self.condition(key, kind) for key, kind in conditions]
        leases = [*self.leases]
        mine: list[Put | Delete] = []
        theirs: list[Put | Delete] = []
        for key, what in operations:
            if what is None:
                mine.append(Delete(key))
                theirs.append(Delete(key))
            else:
                value, number = what
                lease = leases[-number] if 0 < number <= len(leases) else 0
                mine.append(Put(key, value, lease))
                theirs.append(Put(key, value, self.leases[lease]))
        self.both(
            self.real[client].transact([real for _, real in pairs], theirs),
            self.modelled[client].transact([model for model, _ in pairs], mine),
        )

    def condition(self, key: str, kind: int) -> tuple[Compare, Compare]:
        """Return a condition for the model and for the store; some hold, others do not."""
        entry = self.model.entries.get(key)
        if kind == 0:
            condition = Compare(key, "create_revision", 0)
            return condition, condition
        if kind == 1:
            condition = Compare(key, "value", entry.value if entry else b"1")
            return condition, condition
        field = "mod_revision" if kind == 2 else "create_revision"
        if entry is None:
            revision = 1
        else:
            revision = entry.mod_revision if kind in (2, 4) else entry.create_revision
        return Compare(key, field, revision), Compare(key, field, revision + self.offset)

    @rule(client=clients)
    def grant(self, client: int) -> None:
        real = self.run(self.real[client].grant(TTL_S))
        assert real.ttl_s == TTL_S
        self.leases[self.run(self.modelled[client].grant(TTL_S)).id] = real.id

    @precondition(lambda self: len(self.leases) > 1)
    @rule(client=clients, data=st.data(), end=st.booleans())
    def keep_alive_or_revoke(self, client: int, data: st.DataObject, end: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)[1:]))
        real, modelled = self.real[client], self.modelled[client]
        if end:
            self.both(real.revoke(self.leases[lease]), modelled.revoke(lease))
        else:
            self.both(real.keep_alive(self.leases[lease]), modelled.keep_alive(lease))

    @precondition(lambda self: self.killed < 1)
    @rule(key=keys, client=clients)
    def a_holder_is_killed(self, key: str, client: int) -> None:
        self.killed += 1
        real = self.run(self.stores.hold_and_die(key))
        dead = ModelStore(self.model)
        lease = self.run(dead.grant(TTL_S)).id
        self.leases[lease] = real
        self.run(put(dead, key, b"held", lease))
        self.note()
        self.run(dead.close())
        self.note()
        self.run(self.reaped(client))
        self.list(client, "")

    async def reaped(self, client: int) -> None:
        """Wait until the end of a holder is noticed; another client may be about to write it."""
        while (
            await self.real[client].list_prefix("")
        ).revision < self.model.revision + self.offset:
            await asyncio.sleep(0.01)

    @rule(client=clients)
    def reopen(self, client: int) -> None:
        closed = self.real[client]
        self.run(closed.close())
        self.real[client] = self.run(self.stores.client())
        if self.stores.closing_ends_leases:
            self.run(self.modelled[client].close())
            self.note()
        self.modelled[client] = ModelStore(self.model)
        self.leaders = [one for one in self.leaders if one[0]._store is not closed]

    @precondition(lambda self: len(self.watches) < 4)
    @rule(prefix=st.sampled_from(PREFIXES), back=st.integers(0, 10))
    def watch(self, prefix: str, back: int) -> None:
        start = max(2, self.model.revision + 1 - back)
        store = self.run(self.stores.client())
        watch = Watch(self.loop, store, prefix, start, self.offset)
        if start <= self.model.compacted:
            with pytest.raises(Compacted):
                self.run(_result(watch.task))
            self.run(watch.close())
        else:
            self.watches.append(watch)

    @rule(back=st.integers(0, 5))
    def compact(self, back: int) -> None:
        self.all_watches_have_seen_everything()
        revision = self.model.revision - back
        if revision > self.model.compacted:
            self.model.compact(revision)
            self.run(self.stores.compact(revision + self.offset))

    @rule(client=clients)
    def stand_for_election(self, client: int) -> None:
        real = self.run(Candidate(self.real[client], "somebody", TTL_S).attempt())
        modelled = self.run(Candidate(self.modelled[client], "somebody", TTL_S).attempt())
        self.note()
        if modelled is None:
            assert real is None
            return
        assert real.revision - self.offset == modelled.revision
        self.leases[modelled._lease] = real._lease
        self.leaders.append((real, modelled))

    @precondition(lambda self: self.leaders)
    @rule(data=st.data(), behind=st.integers(0, 1), key=keys)
    def write_as_leader(self, data: st.DataObject, behind: int, key: str) -> None:
        real, modelled = data.draw(st.sampled_from(self.leaders))
        generation = max(0, self.run(modelled.generation()) - behind)
        written = self.run(_outcome(modelled.write(generation, [Put(key, b"desired")])))
        assert self.run(_outcome(real.write(generation, [Put(key, b"desired")]))) == written
        self.note()

    @precondition(lambda self: self.leaders)
    @rule(data=st.data())
    def resign(self, data: st.DataObject) -> None:
        real, modelled = data.draw(st.sampled_from(self.leaders))
        self.both(real.resign(), modelled.resign())

    @rule()
    def all_watches_have_seen_everything(self) -> None:
        for watch in [*self.watches]:
            expected = watch.expected(self.log)

            async def enough(watch: Watch = watch, number: int = len(expected)) -> None:
                while len(watch.seen) < number and not watch.task.done():
                    await asyncio.sleep(0.01)

            self.run(enough())
            if watch.task.done():
                expected = expected[: len(watch.seen)]
            # etcd orders the changes of a transaction as it was written, SQLite by key
            assert sorted(watch.seen, key=lambda one: (one.revision, one.key)) == expected
            assert [one.revision for one in watch.seen] == [one.revision for one in expected]
            if watch.task.done():  # it was about to ask, or to ask again, when there was compaction
                assert isinstance(watch.task.exception(), Compacted)
                self.run(watch.close())
                self.watches.remove(watch)

    def teardown(self) -> None:
        try:
            self.all_watches_have_seen_everything()
            self.list(0, "")
        finally:
            for watch in self.watches:
                self.run(watch.close())
            for store in self.real:
                self.run(store.close())


async def _result(task: asyncio.Task[None]) -> None:
    await task


async def _outcome(work: Coroutine[Any, Any, Any]) -> Any:
    """Return a result, or the kind of the error."""
    try:
        return await work
    except StoreError as error:
        return type(error)


def run(make: Callable[[], Models], examples: int) -> None:
    run_state_machine_as_test(
        lambda: Machine(loop(), make),
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking takes many minutes
            suppress_health_check=[*hypothesis.HealthCheck],
        ),
    )


def kinds() -> list[Any]:
    full = pytest.mark.full
    return [
        pytest.param("model", 10, id="model"),
        pytest.param("file", 5, id="file"),
        pytest.param("etcd", 8, id="etcd"),
        pytest.param("file", 300, id="file, long", marks=full),
        pytest.param("etcd", 200, id="etcd, long", marks=full),
        pytest.param("etcd, expiring", 20, id="etcd, leases expire", marks=full),
    ]


@pytest.mark.parametrize(("kind", "examples"), kinds())
def test_a_store_does_what_the_model_does(
    kind: str,
    examples: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind.startswith("etcd"):
        server = request.getfixturevalue("shared_etcd")
        stores = type("Expiring", (Etcds,), {"expires": kind.endswith("expiring")})
        run(lambda: stores(server), examples)
    else:
        numbers = itertools.count()
        kinds = Models if kind == "model" else Files
        run(lambda: kinds(_made(tmp_path / str(next(numbers)))), examples)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
