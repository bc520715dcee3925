"""What can go wrong with a store; each message names the store, and the key or lease concerned."""

from __future__ import annotations

from pdserve.errors import PDServeError


class StoreError(PDServeError):
    """Base of all errors of a store."""

    code = "UNAVAILABLE"


class StoreUnreachable(StoreError):
    """The store did not answer in time; what was to be written may have been written."""


class Refused(StoreError):
    """The store does not do what was asked: nothing was written.

    For example a key is invalid, a transaction too large, the disk full, or a user may not do it.
    """


class Compacted(StoreError):
    """The changes since a revision are not kept any more: list again."""


class LeaseLost(StoreError):
    """The lease has ended, and the keys that were put with it are deleted."""


class Fenced(StoreError):
    """Another leader, or another generation: nothing was written."""
