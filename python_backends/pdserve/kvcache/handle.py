"""The KV hand-off handle, version 1: where a prompt's KV cache lies, and until when it may be read.

It is the only thing about a KV cache that travels in a message; the bytes stay where they are
until the decode pulls them (`pdserve.transfer`).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdserve.errors import HandleError
from pdserve.kvcache.layout import KVLayout

NONCE_BYTES = 16
EPOCH_BYTES = 8

# \Z, because $ would let a trailing newline through.
REGION = r"^pdserve-[a-z0-9-]{1,56}\Z"


class KVHandle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt's KV cache in another process of this host. Encoded: well under 1 KiB.

    Whatever breaks a field's constraint is refused when the handle is decoded.
    """

    version: Literal[1] = 1
    """First, so that a handle of another version is refused for its version."""
    fingerprint: Annotated[str, Meta(pattern=r"^[!-~]{1,128}\Z")]
    """Of the model whose KV cache this is: printable ASCII."""
    layout: KVLayout
    tokens: Annotated[int, Meta(ge=1, le=1 << 24)]
    region: Annotated[str, Meta(pattern=REGION)]
    """Name of a shared memory region, never a path."""
    offset: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    """Bytes from the start of the region's data."""
    lease: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    """Slot in the region's lease table."""
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    """Random; the lease is good while its slot holds the same."""
    epoch: Annotated[bytes, Meta(min_length=EPOCH_BYTES, max_length=EPOCH_BYTES)]
    """Random; of the life of the process that holds the region."""
    expires: Annotated[float, Meta(ge=0, le=1e12)]
    """Seconds on CLOCK_MONOTONIC, which all processes of a host share."""

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache."""
        return self.layout.nbytes(self.tokens)

    def check(self, fingerprint: str, layout: KVLayout, now: float) -> None:
        """Make sure that a process with this model may still read the KV cache.

        Raises:
            HandleError: of another model, in another layout, or expired.
        """
        if self.fingerprint != fingerprint:
            raise HandleError(
                f"KV handle is of model {self.fingerprint!r}; this instance has {fingerprint!r}"
            )
        if self.layout != layout:
            raise HandleError(f"KV handle is in {self.layout}; this instance has {layout}")
        # Written so that a NaN counts as expired.
        if not now < self.expires:
            raise HandleError(f"KV handle expired {now - self.expires:.3f} s ago")
