"""A store in memory, with which the real ones are compared; it is simple and not fast."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from pdserve.control.store.errors import Compacted, LeaseLost
from pdserve.control.store.keys import check_prefix, check_transaction
from pdserve.control.store.protocol import (
    Compare,
    Delete,
    Entry,
    KeyChange,
    Lease,
    Listing,
    Put,
)


class Model:
    """The state that all clients share."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 1
        self.entries: dict[str, Entry] = {}
        self.changes: list[KeyChange] = []
        self.leases: set[int] = set()
        self.granted = 0
        self.changed = asyncio.Event()

    def write(self, operations: Sequence[Put | Delete]) -> int:
        """Do operations as one transaction."""
        for one in operations:
            if isinstance(one, Put) and one.lease and one.lease not in self.leases:
                raise LeaseLost(f"lease {one.lease}")
        new = self.revision + 1
        for one in sorted(operations, key=lambda one: one.key):
            before = self.entries.pop(one.key, None)
            if isinstance(one, Put):
                created = before.create_revision if before else new
                self.entries[one.key] = Entry(one.key, one.value, created, new, one.lease)
                self.changes.append(KeyChange("PUT", one.key, new, one.value))
            elif before:
                self.changes.append(KeyChange("DELETE", one.key, new))
        if self.changes and self.changes[-1].revision == new:
            self.revision = new
        return self.revision

    def end(self, lease: int) -> None:
        """End a lease."""
        self.leases.discard(lease)
        self.write([Delete(key) for key, entry in self.entries.items() if entry.lease == lease])

    def compact(self, revision: int) -> None:
        """Forget changes."""
        self.compacted = max(self.compacted, revision)
        self.changes = [one for one in self.changes if one.revision > revision]


class ModelStore:
    """Implements `Store` on a model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._leases: set[int] = set()

    async def list_prefix(self, prefix: str) -> Listing:
        check_prefix(prefix)
        found = [one for key, one in sorted(self.model.entries.items()) if key.startswith(prefix)]
        return Listing(self.model.revision, tuple(found))

    async def watch_prefix(self, prefix: str, revision: int) -> AsyncIterator[KeyChange]:
        check_prefix(prefix)
        model = self.model
        while True:
            if revision <= model.compacted:
                raise Compacted(f"revision {revision}")
            for change in [one for one in model.changes if one.revision >= revision]:
                if change.key.startswith(prefix):
                    yield change
            revision = model.revision + 1
            await model.changed.wait()

    async def transact(
        self, compare: Sequence[Compare], operations: Sequence[Put | Delete]
    ) -> int | None:
        check_transaction(compare, operations)
        for one in compare:
            entry = self.model.entries.get(one.key)
            absent = None if one.field == "value" else 0
            if (getattr(entry, one.field) if entry else absent) != one.equals:
                return None
        revision = self.model.write(operations)
        self._notify()
        return revision

    async def grant(self, ttl_s: float) -> Lease:
        self.model.granted += 1
        self.model.leases.add(self.model.granted)
        self._leases.add(self.model.granted)
        return Lease(self.model.granted, ttl_s)

    async def keep_alive(self, lease: int) -> None:
        if lease not in self.model.leases:
            raise LeaseLost(f"lease {lease}")

    async def revoke(self, lease: int) -> None:
        self.model.end(lease)
        self._notify()

    async def close(self) -> None:
        for lease in self._leases & self.model.leases:
            await self.revoke(lease)

    def _notify(self) -> None:
        self.model.changed.set()
        self.model.changed = asyncio.Event()
