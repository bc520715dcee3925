"""What is known of a prefix, also while its store cannot be reached."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

from pdserve.control.store.errors import StoreError
from pdserve.control.store.keys import check_prefix
from pdserve.control.store.protocol import KeyChange, Store
from pdserve.control.store.waiting import within

_log = logging.getLogger(__name__)

RETRY_S = 0.3
"""Pause after any error before the prefix is listed again, in seconds."""
RELIST_S = 45.0
"""Seconds after which the prefix is listed again although the watch has reported no error: it is
not told of a store that is stopped."""
MAX_VALUE = 256 << 10
"""Bytes of a value that is decoded; a larger one is invalid."""
MAX_KEYS = 16_384
"""Values that a view keeps; those of further keys are invalid."""

T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """The changes that a view has learned at once."""

    put: frozenset[str] = frozenset()
    """Keys with a new value."""
    deleted: frozenset[str] = frozenset()
    """Keys that the view still has, and the store has no more."""


class View(Generic[T]):
    """The last known values under a prefix.

    A value stays until another one is put in its place, or `forget` is called. That the store
    deleted its key is only reported: a store that was stopped for longer than the leases deletes
    all their keys as it goes on, though their holders are well. The caller asks those first.

    Args:
        decode: makes a value of a key and its bytes. If it raises, they are invalid, and the last
            valid value stays.
        told: called after each change of the view or of `deleted`.

    Attributes:
        deleted: keys that the view still has, and the store has no more.
        invalid: why the bytes of these keys are not used.
        known: set once the prefix has been listed.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        decode: Callable[[str, bytes], T],
        told: Callable[[Difference], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._prefix = check_prefix(prefix)
        self._decode = decode
        self._told = told
        self._values: dict[str, T] = {}
        self._stored: dict[str, int] = {}  # hashes: revisions start anew with a store made anew
        self._heard: float | None = None
        self.deleted: set[str] = set()
        self.invalid: dict[str, str] = {}
        self.known = asyncio.Event()

    @property
    def values(self) -> Mapping[str, T]:
        """The last valid value of each key, those of deleted keys included."""
        return MappingProxyType(self._values)

    @property
    def age_s(self) -> float:
        """Seconds since the store has last answered; infinite before it has."""
        now = asyncio.get_running_loop().time()
        return float("inf") if self._heard is None else now - self._heard

    def forget(self, key: str) -> None:
        """Drop a key that the store has deleted; one that exists again stays."""
        if key in self.deleted:
            self.deleted.discard(key)
            self._values.pop(key, None)

    async def run(self) -> None:
        """Follow the store until cancelled; its errors are logged, and change nothing here."""
        said = ""
        while True:
            try:
                await self._follow()
                said = ""
            except StoreError as error:
                if said != (said := str(error)):
                    _log.warning("prefix %r: %s", self._prefix, said)
                await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        """List, then watch; returns when it is time to list again."""
        listing = await self._store.list_prefix(self._prefix)
        self._hear()
        now = {entry.key: entry.value for entry in listing.entries}
        self._apply(now, frozenset(self._stored.keys() - now.keys()))
        self.known.set()
        clock = asyncio.get_running_loop()
        until = clock.time() + RELIST_S
        changes = self._store.watch_prefix(self._prefix, listing.revision + 1)
        async with aclosing(changes):  # type: ignore[type-var]
            while (rest := until - clock.time()) > 0:
                try:
                    self._change(await within(anext(changes), rest))
                except asyncio.TimeoutError:
                    return
                self._hear()

    def _hear(self) -> None:
        self._heard = asyncio.get_running_loop().time()

    def _change(self, change: KeyChange) -> None:
        if change.kind == "PUT":
            self._apply({change.key: change.value}, frozenset())
        else:
            self._apply({}, frozenset(self._stored.keys() & {change.key}))

    def _apply(self, put: Mapping[str, bytes], deleted: frozenset[str]) -> None:
        """Take over values that differ from those known, and what was deleted."""
        for key in deleted:
            del self._stored[key]
            self.invalid.pop(key, None)
        gone = deleted & self._values.keys()
        self.deleted |= gone
        taken = frozenset(key for key, value in put.items() if self._take(key, value))
        if taken or gone:
            self._told(Difference(taken, gone))

    def _take(self, key: str, value: bytes) -> bool:
        """Use a value, unless it is known already or invalid; returns whether it is used."""
        if self._stored.get(key) == (digest := hash(value)):
            return False
        self._stored[key] = digest
        self.deleted.discard(key)
        if reason := self._decoded(key, value):
            self.invalid[key] = reason
            _log.warning("key %r is not used: %s", key, reason)
            return False
        self.invalid.pop(key, None)
        return True

    def _decoded(self, key: str, value: bytes) -> str:
        """Keep a value; returns why that is not possible, or nothing."""
        if key not in self._values and len(self._values) >= MAX_KEYS:
            return f"there are {MAX_KEYS} keys already"
        if len(value) > MAX_VALUE:
            return f"it has {len(value)} bytes, and at most {MAX_VALUE} are allowed"
        try:
            self._values[key] = self._decode(key, value)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]
        return ""
