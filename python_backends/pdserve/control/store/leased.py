"""Keys that exist as long as this process does, whatever happens to the store."""

from __future__ import annotations

import asyncio
import logging

from pdserve.control.store.election import kept_alive
from pdserve.control.store.errors import StoreError
from pdserve.control.store.protocol import Put, Store

_log = logging.getLogger(__name__)

RETRY_S = 0.3
"""Pause before a lease is granted again, in seconds."""
BATCH = 100
"""Keys that are put in a transaction."""


class LeasedKeys:
    """Keys under one lease, which are put again under another when it is lost.

    Args:
        ttl_s: seconds after which others see the keys deleted when this process has ended; a store
            may make it longer.
    """

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._values: dict[str, bytes] = {}
        self._put: dict[str, bytes] = {}
        self._changed = asyncio.Event()

    def set(self, key: str, value: bytes) -> None:
        """Have the key put as soon as the store can be reached, and kept; `run` does it."""
        self._values[key] = value
        self._changed.set()

    @property
    def written(self) -> bool:
        """Tell whether the store has taken all the keys, as far as is known."""
        return self._put == self._values

    async def run(self) -> None:
        """Put the keys and keep them, until it is cancelled; each step has the store's bounds."""
        while True:
            try:
                lease = await self._store.grant(self._ttl_s)
                await self._under(lease.id, lease.ttl_s)
            except StoreError as error:
                _log.warning("leased keys are not stored: %s", error)
            await asyncio.sleep(RETRY_S)

    async def _under(self, lease: int, ttl_s: float) -> None:
        """Hold the keys under this lease; returns when it is lost."""
        self._put.clear()
        alive = asyncio.ensure_future(kept_alive(self._store, lease, ttl_s))
        alive.add_done_callback(lambda _: self._changed.set())
        try:
            while not alive.done():
                self._changed.clear()
                await self._write(lease)
                if not alive.done():
                    await self._changed.wait()
        finally:
            alive.cancel()

    async def _write(self, lease: int) -> None:
        new = [item for item in self._values.items() if self._put.get(item[0]) != item[1]]
        for start in range(0, len(new), BATCH):
            some = new[start : start + BATCH]
            await self._store.transact((), [Put(key, value, lease) for key, value in some])
            self._put.update(some)
