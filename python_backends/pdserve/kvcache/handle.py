"""The KV handle, version 4: identifies a KV cache, its model, and until when it may be pulled.

It is the only part of a KV cache that travels with a request; the bytes stay where they are until
the decode pulls them (`pdserve.transfer`), and how the holder's memory is reached is sent once,
when the two connect (`pdserve.transfer.endpoint`). Sealed, it is 16 bytes of a keyed MAC and the
message: only a process with the deployment's key can make or alter one.
"""

from __future__ import annotations

import hashlib
from hmac import compare_digest
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from pdserve.control.assignment import Number
from pdserve.errors import HandleError
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding

NONCE_BYTES = 16
EPOCH_BYTES = 8
KEY_BYTES = 32
_MAC_BYTES = 16

Fingerprint = Annotated[str, Meta(pattern=r"^[!-~]{1,128}\Z")]
"""Fingerprint of the model that the KV cache belongs to (weights, shape, positions): printable
ASCII."""
Epoch = Annotated[bytes, Meta(min_length=EPOCH_BYTES, max_length=EPOCH_BYTES)]
"""Random bytes that name one process of one holder."""
T = TypeVar("T", bound=msgspec.Struct)


class KVHandle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt's KV cache in another process. Sealed, it has under 300 bytes.

    A handle with a field that violates its constraint is refused when it is opened.
    """

    version: Literal[4] = 4
    """The first field, so that a handle of another version is refused for its version."""
    fingerprint: Fingerprint
    layout: KVLayout
    sharding: Sharding = Sharding()
    """Layout of the KV cache over the holder's ranks."""
    tokens: Annotated[int, Meta(ge=1, le=1 << 24)]
    epoch: Epoch
    number: Number
    """Number of the holder's assignment."""
    offset: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    """Bytes from the start of the holder's data."""
    lease: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    """Slot in the holder's lease table."""
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    """Random bytes; the lease is valid while its slot holds the same."""
    expires: Annotated[float, Meta(ge=0, le=1e12)]
    """Seconds on CLOCK_MONOTONIC, which all processes of the holder's host share."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of the KV cache at its holder."""
        return self.sharding.nbytes(self.layout, self.tokens)

    def check(self, fingerprint: str, layout: KVLayout, sharding: Sharding) -> None:
        """Check that the KV cache is of this model, in the agreed layout.

        Raises:
            HandleError: it is of another model, or in another layout.
        """
        if self.fingerprint != fingerprint:
            raise HandleError(
                f"KV handle is of model {self.fingerprint!r}; this instance has {fingerprint!r}"
            )
        if self.layout != layout:
            raise HandleError(f"KV handle is in {self.layout}; this instance has {layout}")
        if self.sharding != sharding:
            raise HandleError(f"KV handle has {self.sharding}; this instance expects {sharding}")


def seal(message: msgspec.Struct, key: bytes) -> bytes:
    """Return the message, preceded by its MAC under the deployment's key of KEY_BYTES."""
    body = msgspec.msgpack.encode(message)
    return _mac(body, key, type(message)) + body


def unseal(data: bytes, kind: type[T], key: bytes) -> T:
    """Return the message, after its MAC has been verified.

    Raises:
        HandleError: it is cut short, altered, made under another key, malformed, or of another
            version.
    """
    mac, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
    if not compare_digest(mac, _mac(body, key, kind)):
        raise HandleError(
            f"{kind.__name__} of {len(data)} bytes is not of this deployment: its MAC is wrong"
        )
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HandleError(f"{kind.__name__} of {len(data)} bytes is malformed: {error}") from error


def _mac(body: bytes, key: bytes, kind: type[msgspec.Struct]) -> bytes:
    # The kind of message is included, so that one message cannot pass for another.
    person = kind.__name__.encode()[: hashlib.blake2b.PERSON_SIZE]
    return hashlib.blake2b(body, digest_size=_MAC_BYTES, key=key, person=person).digest()
