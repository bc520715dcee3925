"""The store in a file, without blocking the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pdserve import pools
from pdserve.control.store.errors import StoreError, StoreUnreachable
from pdserve.control.store.file.database import BUSY_S, Database
from pdserve.control.store.keys import check_prefix, check_transaction
from pdserve.control.store.protocol import Compare, Delete, KeyChange, Lease, Listing, Put
from pdserve.control.store.waiting import within

_log = logging.getLogger(__name__)

POLL_S = 0.1
"""Interval at which a watch looks for changes and for dead processes, in seconds."""
CALL_S = 5.0
"""Seconds that a call may take, waiting for others of this process included."""

T = TypeVar("T")


class FileStore:
    """A `Store` for processes of one host; `opened` makes it.

    A lease ends when the process that holds it does, or closes its store, and not by any time.
    """

    def __init__(self, folder: Path) -> None:
        self._pool = pools.started(1, "store")
        self._folder = folder
        self._database: Database
        self._said = ""

    @classmethod
    async def opened(cls, folder: Path) -> FileStore:
        """Return the store in a folder, which is made if it is missing.

        Raises:
            StoreError: it cannot be opened, or is not one of this version.
            DeploymentError: its thread cannot be started.
        """
        store = cls(folder)
        try:
            store._database = await store._call(lambda: Database(folder))
        except BaseException:
            store._pool.shutdown(wait=False)
            raise
        return store

    async def list_prefix(self, prefix: str) -> Listing:
        """See `Store.list_prefix`; it answers also while nothing can be written."""
        check_prefix(prefix)

        def work() -> Listing:
            self._reap()
            return self._database.entries(prefix)

        return await self._call(work)

    async def watch_prefix(self, prefix: str, revision: int) -> AsyncIterator[KeyChange]:
        """See `Store.watch_prefix`; a change is seen `POLL_S` later."""
        check_prefix(prefix)
        seen = 0

        def work() -> tuple[list[KeyChange], int]:
            self._reap()
            if seen and seen == self._database.revisions()[0] + 1:
                return [], seen
            return self._database.changes(prefix, seen or revision)

        while True:
            changes, seen = await self._call(work)
            for change in changes:
                yield change
            await asyncio.sleep(POLL_S)

    async def transact(
        self, compare: Sequence[Compare], operations: Sequence[Put | Delete]
    ) -> int | None:
        """See `Store.transact`."""
        check_transaction(compare, operations)

        def work() -> int | None:
            self._database.reap(BUSY_S)
            return self._database.transact(compare, operations)

        return await self._call(work)

    async def grant(self, ttl_s: float) -> Lease:
        """See `Store.grant`; the time only says how often to call `keep_alive`."""
        return Lease(await self._call(self._database.grant), ttl_s)

    async def keep_alive(self, lease: int) -> None:
        """See `Store.keep_alive`."""
        await self._call(lambda: self._database.check_lease(lease))

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""
        await self._call(lambda: self._database.revoke(lease))

    async def compact(self, revision: int) -> None:
        """Forget the changes up to a revision."""
        await self._call(lambda: self._database.compact(revision))

    async def close(self) -> None:
        """See `Store.close`."""
        try:
            await self._call(self._database.close)
        except StoreUnreachable as error:
            _log.warning("%s", error)
        finally:
            self._pool.shutdown(wait=False)

    def _reap(self) -> None:
        """End the leases of dead processes, unless nothing can be written: reading goes on."""
        try:
            self._database.reap()
        except StoreError as error:
            if self._said != (said := str(error)):
                _log.warning("leases of ended processes are not ended: %s", said)
            self._said = said

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RuntimeError as error:  # how a pool says that it has been shut down
            raise StoreUnreachable(f"store {self._folder}: it has been closed") from error
        try:
            return await within(future, CALL_S)
        except asyncio.TimeoutError:
            raise StoreUnreachable(f"store {self._folder}: no answer within {CALL_S} s") from None
