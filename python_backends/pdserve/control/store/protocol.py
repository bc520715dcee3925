"""What every store can do: etcd's model, as far as the control plane needs it.

A store is opened for one deployment, and its keys are relative to that deployment. Each
transaction that changes something raises the store's *revision* by 1. An entry has the revision
that created it and the one that changed it last; a key that is deleted and put again is created
anew. A *lease* belongs to whoever keeps it alive, and its keys are deleted when it ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """A key that exists."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0
    """The lease that it is deleted with; 0: none."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries under a prefix, in the order of their keys, as they were at a revision."""

    revision: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A key was put or deleted."""

    kind: Literal["PUT", "DELETE"]
    key: str
    revision: int
    value: bytes = b""
    """Empty if it was deleted."""


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction: this field of an entry equals this value.

    Both revisions of a key that does not exist are 0; it equals no value.
    """

    key: str
    field: Literal["create_revision", "mod_revision", "value"]
    equals: int | bytes


@dataclass(frozen=True, slots=True)
class Put:
    """Sets a key; a lease that it had before has no effect on it any more."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes a key, if there is one."""

    key: str


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as it was granted."""

    id: int
    ttl_s: float
    """Seconds for which it lasts without being kept alive; may be longer than was asked for."""


class Store(Protocol):
    """Every call ends within a bound of its implementation.

    A prefix is empty or ends with a slash (`keys.check_prefix`). All methods raise
    `StoreUnreachable` and `Refused`.
    """

    async def list_prefix(self, prefix: str) -> Listing:
        """Return all entries under a prefix, and the revision to watch from: this one + 1."""
        ...

    def watch_prefix(self, prefix: str, revision: int) -> AsyncIterator[KeyChange]:
        """Yield each change under a prefix, in order, from this revision on.

        It does not end by itself. After any error list again, and take the difference: a watch
        may have missed what happened until then.

        Raises:
            Compacted: the changes from this revision on are not kept any more.
        """
        ...

    async def transact(
        self, compare: Sequence[Compare], operations: Sequence[Put | Delete]
    ) -> int | None:
        """Do all the operations if every condition holds, else none.

        Returns:
            The store's revision afterwards; None: a condition does not hold.

        Raises:
            LeaseLost: the lease of a put does not exist; nothing was done.
            Refused: more than `keys.MAX_OPERATIONS`, or two on the same key; nothing was done.
        """
        ...

    async def grant(self, ttl_s: float) -> Lease:
        """Return a new lease, which lasts as long as `keep_alive` is called within its time."""
        ...

    async def keep_alive(self, lease: int) -> None:
        """Let the lease last for its time from now on.

        Raises:
            LeaseLost: it has ended. Grant another one, and put its keys again.
        """
        ...

    async def revoke(self, lease: int) -> None:
        """End the lease and delete its keys; it is no error if it has ended already."""
        ...

    async def close(self) -> None:
        """Give up the connection; leases end as if the process had."""
        ...


async def put(store: Store, key: str, value: bytes, lease: int = 0) -> int:
    """Set a key, whatever it was before; returns the revision."""
    revision = await store.transact((), (Put(key, value, lease),))
    assert revision is not None
    return revision
