"""The tables of a store in a SQLite database, and transactions on them; all calls block.

In WAL mode readers do not wait for a writer, and see the last committed state. Every writer begins
its transaction with the database's only write lock, so revisions follow each other without gaps.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pdserve.control.store.errors import Compacted, LeaseLost, Refused, StoreError, StoreUnreachable
from pdserve.control.store.file.liveness import LivenessLock, is_dead, sweep
from pdserve.control.store.protocol import Compare, Delete, Entry, KeyChange, Listing, Put

BUSY_S = 2.0
"""Seconds that a writer waits for another one."""
READER_S = 0.25
"""Seconds that a reader waits for a writer, before it reads what there is."""
HISTORY = 1000
"""Revisions whose changes are kept at least; up to twice as many are."""
SCHEMA = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS state (revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
INSERT INTO state SELECT 1, 1 WHERE NOT EXISTS (SELECT * FROM state);
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL, lease INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leased ON entries (lease) WHERE lease != 0;
CREATE TABLE IF NOT EXISTS changes (
    revision INTEGER NOT NULL, key TEXT NOT NULL, kind TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (revision, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (id INTEGER PRIMARY KEY AUTOINCREMENT, holder TEXT NOT NULL);
"""
_UNDER = "key >= :prefix AND key < :prefix || char(1114111)"


class Database:
    """One connection to the database of a deployment, and this process's sign of life.

    It is used by one thread at a time.

    Args:
        folder: on a local disk; made if it is missing, with mode 0700. Its files have mode 0600.

    Raises:
        Refused: there is no database and none can be made, or it is not one of this version.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store.sqlite"
        self._holders = folder / "holders"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._holders.mkdir(mode=0o700, exist_ok=True)
            # SQLite gives its other files the mode of this one
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.path.chmod(0o600)
            sweep(self._holders)
            self._holder = LivenessLock(self._holders)
        except OSError as error:
            raise Refused(f"store {folder}: {error}") from error
        self._connection = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            with self._errors():
                self._open()
        except StoreError:
            self.close()
            raise

    def _open(self) -> None:
        run = self._connection.execute
        if (version := run("PRAGMA user_version").fetchone()[0]) not in (0, SCHEMA):
            raise Refused(f"store {self.path} has version {version}; this program reads {SCHEMA}")
        if version == 0:
            run("PRAGMA journal_mode = WAL")
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;"
            )
        run("PRAGMA synchronous = FULL")  # a commit outlives a loss of power

    def close(self) -> None:
        """End the leases of this connection, then the connection."""
        self._holder.close()
        with suppress(sqlite3.Error, StoreError):
            self.reap(BUSY_S)
        self._connection.close()

    def revisions(self) -> tuple[int, int]:
        """Return the revision of the state, and the last one whose changes are not kept."""
        with self._errors():
            revision, compacted = self._connection.execute("SELECT * FROM state").fetchone()
        return revision, compacted

    def entries(self, prefix: str) -> Listing:
        """Return what is under a prefix."""
        with self._errors(), self._transaction("DEFERRED"):
            revision, _ = self.revisions()
            rows = self._connection.execute(
                f"SELECT * FROM entries WHERE {_UNDER} ORDER BY key",  # noqa: S608 - a constant
                {"prefix": prefix},
            )
            return Listing(revision, tuple(Entry(*row) for row in rows))

    def changes(self, prefix: str, start: int) -> tuple[list[KeyChange], int]:
        """Return the changes under a prefix from a revision on, and the next one to ask for.

        Raises:
            Compacted: they are not kept; or the revision is of another database, which was here.
        """
        with self._errors(), self._transaction("DEFERRED"):
            revision, compacted = self.revisions()
            if start <= compacted or start > revision + 1:
                raise Compacted(
                    f"store {self.path}: no changes from revision {start} on; it has those from "
                    f"{compacted + 1} to {revision}"
                )
            rows = self._connection.execute(
                f"SELECT kind, key, revision, value FROM changes "  # noqa: S608 - a constant
                f"WHERE revision >= :start AND {_UNDER} ORDER BY revision, key",
                {"prefix": prefix, "start": start},
            )
            return [KeyChange(*row) for row in rows], revision + 1

    def transact(
        self, compare: Sequence[Compare], operations: Sequence[Put | Delete]
    ) -> int | None:
        """Do a transaction that has been checked; returns as `Store.transact`."""
        with self._errors(), self._transaction("IMMEDIATE"):
            if not all(self._holds(one) for one in compare):
                return None
            return self._write(operations)

    def grant(self) -> int:
        """Return a new lease of this process."""
        with self._errors(), self._transaction("IMMEDIATE"):
            run = self._connection.execute
            lease = run("INSERT INTO leases (holder) VALUES (?)", (self._holder.name,)).lastrowid
            assert lease is not None
            return lease

    def check_lease(self, lease: int) -> None:
        """Raises LeaseLost: there is no such lease."""
        with self._errors():
            run = self._connection.execute
            if not run("SELECT * FROM leases WHERE id = ?", (lease,)).fetchone():
                raise LeaseLost(f"store {self.path}: lease {lease} has ended")

    def revoke(self, lease: int) -> None:
        """Delete a lease and its keys."""
        with self._errors(), self._transaction("IMMEDIATE"):
            self._end(lease)

    def reap(self, wait_s: float = READER_S) -> None:
        """End the leases of dead processes.

        Args:
            wait_s: how long to wait for another writer, which often does the same.
        """
        with self._errors():
            run = self._connection.execute
            names = [name for (name,) in run("SELECT DISTINCT holder FROM leases")]
            if not (dead := [name for name in names if is_dead(self._holders, name)]):
                return
            run(f"PRAGMA busy_timeout = {round(wait_s * 1000)}")
            try:
                with self._transaction("IMMEDIATE"):
                    for name in dead:
                        rows = run("SELECT id FROM leases WHERE holder = ?", (name,)).fetchall()
                        for (lease,) in rows:
                            self._end(lease)
            finally:
                run(f"PRAGMA busy_timeout = {round(BUSY_S * 1000)}")

    def compact(self, revision: int) -> None:
        """Forget the changes up to a revision."""
        with self._errors(), self._transaction("IMMEDIATE"):
            self._compact(revision)

    def _compact(self, revision: int) -> None:
        self._connection.execute("DELETE FROM changes WHERE revision <= ?", (revision,))
        self._connection.execute("UPDATE state SET compacted = max(compacted, ?)", (revision,))

    def _end(self, lease: int) -> None:
        run = self._connection.execute
        rows = run("SELECT key FROM entries WHERE lease = ?", (lease,)).fetchall()
        self._write([Delete(key) for (key,) in rows])
        run("DELETE FROM leases WHERE id = ?", (lease,))

    def _holds(self, condition: Compare) -> bool:
        field = condition.field
        row = self._connection.execute(
            f"SELECT {field} FROM entries WHERE key = ?",  # noqa: S608 - one of three names
            (condition.key,),
        ).fetchone()
        absent = None if field == "value" else 0
        return bool((row[0] if row else absent) == condition.equals)

    def _write(self, operations: Sequence[Put | Delete]) -> int:
        revision, compacted = self.revisions()
        before, revision = revision, revision + 1
        changed = [one for one in operations if self._apply(one, revision)]
        if not changed:
            return before
        self._connection.execute("UPDATE state SET revision = ?", (revision,))
        if revision - compacted > 2 * HISTORY:
            self._compact(revision - HISTORY)
        return revision

    def _apply(self, operation: Put | Delete, revision: int) -> bool:
        run = self._connection.execute
        key = operation.key
        value = b""
        if isinstance(operation, Put):
            kind, value = "PUT", operation.value
            if operation.lease:
                self.check_lease(operation.lease)
            run(
                "INSERT INTO entries VALUES (:key, :value, :now, :now, :lease) "
                "ON CONFLICT (key) DO UPDATE "
                "SET value = :value, mod_revision = :now, lease = :lease",
                {"key": key, "value": value, "now": revision, "lease": operation.lease},
            )
        elif run("DELETE FROM entries WHERE key = ?", (key,)).rowcount:
            kind = "DELETE"
        else:
            return False
        run("INSERT INTO changes VALUES (?, ?, ?, ?)", (revision, key, kind, value))
        return True

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        self._connection.execute(f"BEGIN {kind}")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what SQLite raises as an error of a store."""
        try:
            yield
        except sqlite3.OperationalError as error:
            busy = "locked" in str(error) or "busy" in str(error)
            raise (StoreUnreachable if busy else Refused)(f"store {self.path}: {error}") from error
        except sqlite3.Error as error:
            raise Refused(f"store {self.path}: {error}") from error
