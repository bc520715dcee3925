"""The words of a lease slot, by which a holder and a receiver agree on one KV cache.

A slot is a cache line; each word in it has one writer:

    offset  bytes  writer
    0       16     holder     nonce of the lease; zero: none
    16      8      holder     expires: float64, seconds on CLOCK_MONOTONIC of the holder's host
    24      4      holder     planes filled so far: uint32, of layers * 2
    28      4      holder     first token: int32; -1 until it is known
    32      8      receiver   its word: 48 bits of the nonce, an 8-bit beat, an 8-bit Pull

The receiver's word counts only while it carries the nonce of the slot's lease: so a slot is idle
again with its next nonce, and a late receiver's word about an earlier lease is ignored. It is one
aligned word, so that no network can tear it. A torn nonce matches no lease, which is safe. That a
plane's bytes are visible before the count that covers them relies on the store order of x86-64, and
elsewhere on the many instructions between two steps of an interpreter.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import IntEnum
from hmac import compare_digest
from struct import Struct

NONCE_BYTES = 16
SLOT_BYTES = 64
RECEIVER_WORD = 32
_HOLDER = Struct(f"<{NONCE_BYTES}sdIi")
_RECEIVER = Struct("<Q")
_TAG_BYTES = 6


class Pull(IntEnum):
    """State of the receiver of a lease."""

    IDLE = 0
    PULLING = 1
    DONE = 2


@dataclass(frozen=True, slots=True)
class Grant:
    """The holder's words."""

    nonce: bytes
    expires: float
    filled: int = 0
    token: int = -1

    def pack(self) -> bytes:
        return _HOLDER.pack(self.nonce, self.expires, self.filled, self.token)

    def is_of(self, nonce: bytes) -> bool:
        """Tell whether these words grant the lease of this nonce."""
        return compare_digest(self.nonce, nonce) and nonce != NO_NONCE


NO_NONCE = bytes(NONCE_BYTES)
NO_GRANT = Grant(NO_NONCE, 0.0)
HOLDER_BYTES = _HOLDER.size


def new_nonce() -> bytes:
    """Return a random nonce, never NO_NONCE in practice."""
    return secrets.token_bytes(NONCE_BYTES)


def grant(slot: bytes | memoryview) -> Grant:
    """Return the holder's words of a slot's bytes."""
    return Grant(*_HOLDER.unpack_from(slot))


def word(nonce: bytes, state: Pull, beat: int = 0) -> int:
    """Return a receiver's word about the lease of ``nonce``; ``beat`` counts modulo 256."""
    return int.from_bytes(nonce[:_TAG_BYTES], "big") << 16 | (beat & 0xFF) << 8 | state


def pulled(slot: bytes | memoryview, nonce: bytes) -> tuple[Pull, int]:
    """Return the state of the receiver of the lease of ``nonce``, and its beat."""
    found: int = _RECEIVER.unpack_from(slot, RECEIVER_WORD)[0]
    if found >> 16 != int.from_bytes(nonce[:_TAG_BYTES], "big"):
        return Pull.IDLE, 0
    state = found & 0xFF
    return (Pull(state) if state in Pull.__members__.values() else Pull.PULLING), found >> 8 & 0xFF


def pack_word(word: int) -> bytes:
    return _RECEIVER.pack(word)
