"""The KV hand-off handle, version 3: which KV cache, of which model, and until when.

It is the only thing about a KV cache that travels with a request; the bytes stay where they are
until the decode pulls them (`pdserve.transfer`), and the ways to the holder's memory are told
once, when the two connect (`pdserve.transfer.endpoint`). Sealed, it is 16 bytes of a keyed MAC
and the message: only who has the deployment's key can make or alter one.
"""

from __future__ import annotations

import hashlib
from hmac import compare_digest
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from pdserve.errors import HandleError
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding

NONCE_BYTES = 16
EPOCH_BYTES = 8
KEY_BYTES = 32
_MAC_BYTES = 16

Fingerprint = Annotated[str, Meta(pattern=r"^[!-~]{1,128}\Z")]
"""Of the model whose KV cache this is (weights, shape, positions): printable ASCII."""
Epoch = Annotated[bytes, Meta(min_length=EPOCH_BYTES, max_length=EPOCH_BYTES)]
"""Random; names one life of one holder."""
T = TypeVar("T", bound=msgspec.Struct)


class KVHandle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt's KV cache in another process. Sealed: under 300 bytes.

    Whatever breaks a field's constraint is refused when the handle is opened.
    """

    version: Literal[3] = 3
    """First, so that a handle of another version is refused for its version."""
    fingerprint: Fingerprint
    layout: KVLayout
    sharding: Sharding = Sharding()
    """How the holder's ranks lay it out."""
    tokens: Annotated[int, Meta(ge=1, le=1 << 24)]
    epoch: Epoch
    offset: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    """Bytes from the start of the holder's data."""
    lease: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    """Slot in the holder's lease table."""
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    """Random; the lease is good while its slot holds the same."""
    expires: Annotated[float, Meta(ge=0, le=1e12)]
    """Seconds on CLOCK_MONOTONIC, which all processes of the holder's host share."""

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache at its holder."""
        return self.sharding.nbytes(self.layout, self.tokens)

    def check(self, fingerprint: str, layout: KVLayout, sharding: Sharding) -> None:
        """Make sure that it is of this model, laid out as agreed.

        Raises:
            HandleError: of another model, or in another layout.
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
    """The message behind its MAC under the deployment's key of KEY_BYTES."""
    body = msgspec.msgpack.encode(message)
    return _mac(body, key, type(message)) + body


def unseal(data: bytes, kind: type[T], key: bytes) -> T:
    """The message, once its MAC has been found good.

    Raises:
        HandleError: cut short, altered or made under another key; malformed, or of another version.
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
    # The kind is part of it, so that one message cannot pass for another.
    person = kind.__name__.encode()[: hashlib.blake2b.PERSON_SIZE]
    return hashlib.blake2b(body, digest_size=_MAC_BYTES, key=key, person=person).digest()
