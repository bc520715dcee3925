"""One leader at a time, and writes that only the leader of now can make.

A leader cannot know that it still is one: it may have been stopped for longer than its lease. So
the store decides at each write, in the transaction that writes (`Leadership.write`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from pdserve.control.store.errors import Fenced, LeaseLost, StoreError
from pdserve.control.store.protocol import Compare, Delete, Entry, Put, Store
from pdserve.control.store.waiting import within

_log = logging.getLogger(__name__)

TTL_S = 10.0
"""Seconds without a sign of life after which another one may lead."""
KEEP_ALIVES = 3
"""Times that a lease is kept alive within its time."""
LOOK_S = 1.0
"""Interval at which a candidate looks whether there is a leader, in seconds."""

CONTROL = "control/"
LEADER = f"{CONTROL}leader"
GENERATION = f"{CONTROL}generation"


class Candidate:
    """Somebody who would lead.

    Args:
        name: identifies this candidate in the leader's key, for people to read.
        ttl_s: see `TTL_S`.
    """

    def __init__(self, store: Store, name: str, ttl_s: float = TTL_S) -> None:
        self._store = store
        self._name = name.encode()
        self._ttl_s = ttl_s
        self._lease = 0
        self._granted_s = ttl_s

    async def lead(self) -> Leadership:
        """Return when elected, however long that takes; each attempt has the store's bounds.

        While the store cannot be reached it is tried again and again.
        """
        said = ""
        try:
            while True:
                try:
                    if leadership := await self.attempt():
                        return leadership
                    said = ""
                except StoreError as error:
                    if said != (said := str(error)):
                        _log.warning("no election: %s", said)
                await asyncio.sleep(LOOK_S)
        finally:
            await self._withdraw()

    async def attempt(self) -> Leadership | None:
        """Become the leader if there is none.

        After an error it is unknown whether the store took the last attempt; the next one finds
        out, by the lease of the leader's key.

        Raises:
            StoreError: the store cannot be reached, or refuses.
        """
        leader = (await _entries(self._store)).get(LEADER)
        if leader is None:
            await self._withdraw()
            lease = await self._store.grant(self._ttl_s)
            self._lease, self._granted_s = lease.id, lease.ttl_s
            free = Compare(LEADER, "create_revision", 0)
            await self._store.transact((free,), (Put(LEADER, self._name, self._lease),))
            leader = (await _entries(self._store)).get(LEADER)
        if self._lease and leader is not None and leader.lease == self._lease:
            self._lease = 0
            return Leadership(self._store, leader.create_revision, leader.lease, self._granted_s)
        await self._withdraw()
        return None

    async def _withdraw(self) -> None:
        """Give back the lease of an attempt that has not led to anything."""
        if self._lease:
            with suppress(StoreError):
                await self._store.revoke(self._lease)
                self._lease = 0


class Leadership:
    """The time for which a candidate leads.

    Attributes:
        revision: that created the leader's key; each later leadership has a larger one.
        lost: set as soon as it is known that it has ended, at the latest when its lease has not
            been kept alive for its time. Writes do not depend on it.
    """

    def __init__(self, store: Store, revision: int, lease: int, ttl_s: float) -> None:
        self.revision = revision
        self.lost = asyncio.Event()
        self._store = store
        self._lease = lease
        self._ttl_s = ttl_s

    async def run(self) -> None:
        """Keep the lease alive; returns when the leadership is lost."""
        await kept_alive(self._store, self._lease, self._ttl_s)
        self.lost.set()

    async def resign(self) -> None:
        """Let another one lead.

        Raises:
            StoreError: as for `Store.revoke`; the lease then ends after its time.
        """
        self.lost.set()
        await self._store.revoke(self._lease)

    async def generation(self) -> int:
        """Return the generation of the desired state that is stored; 0: there is none."""
        return _number((await _entries(self._store)).get(GENERATION))

    async def write(self, generation: int, operations: Sequence[Put | Delete]) -> int:
        """Write desired state that was decided upon knowing a generation.

        Args:
            generation: of the desired state that the decision is based on.
            operations: at most `keys.MAX_OPERATIONS` - 1, none on `LEADER` or `GENERATION`.

        Returns:
            The new generation.

        Raises:
            Fenced: somebody else leads, or has written since; nothing was written.
            StoreUnreachable: it may have been written; `generation` tells.
        """
        if generation:
            known = Compare(GENERATION, "value", str(generation).encode())
        else:
            known = Compare(GENERATION, "create_revision", 0)
        raised = Put(GENERATION, str(generation + 1).encode())
        leading = Compare(LEADER, "create_revision", self.revision)
        if await self._store.transact((leading, known), (*operations, raised)) is not None:
            return generation + 1
        entries = await _entries(self._store)
        leader = entries.get(LEADER)
        if leader is None or leader.create_revision != self.revision:
            self.lost.set()
            who = f"{leader.value.decode(errors='replace')!r} leads" if leader else "nobody leads"
            raise Fenced(f"the leader elected at revision {self.revision} leads no more: {who}")
        stored = _number(entries.get(GENERATION))
        raise Fenced(f"generation {generation} was decided upon, but {stored} is stored")


async def kept_alive(store: Store, lease: int, ttl_s: float) -> None:
    """Keep a lease alive; returns when it has ended, or may have since nothing is heard of it."""
    clock = asyncio.get_running_loop()
    until = clock.time() + ttl_s
    while (now := clock.time()) < until:
        with suppress(asyncio.TimeoutError):
            try:
                await within(store.keep_alive(lease), until - now)
                until = now + ttl_s
            except LeaseLost as error:
                _log.warning("%s", error)
                return
            except StoreError as error:
                _log.warning("lease %x is not kept alive: %s", lease, error)
        await asyncio.sleep(min(ttl_s / KEEP_ALIVES, max(0.0, until - clock.time())))


async def _entries(store: Store) -> dict[str, Entry]:
    listing = await store.list_prefix(CONTROL)
    return {entry.key: entry for entry in listing.entries}


def _number(entry: Entry | None) -> int:
    if entry is None:
        return 0
    try:
        return int(entry.value)
    except ValueError:
        raise Fenced(f"key {entry.key!r} holds no generation: {entry.value[:40]!r}") from None
