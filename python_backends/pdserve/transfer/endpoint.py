"""The description of a holder that receivers need before they pull from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdserve.control.assignment import Number
from pdserve.kvcache.handle import Epoch, Fingerprint
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding


@dataclass(frozen=True, slots=True)
class Terms:
    """The properties that sender and receiver must agree on before any byte is moved."""

    fingerprint: str
    layout: KVLayout
    key: bytes
    """The deployment's key, of KEY_BYTES; see `pdserve.transfer.key`."""
    sharding: Sharding
    """Layout of the KV cache over the prefill's ranks."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A holder's description. Sealed like a handle (`pdserve.kvcache.handle.seal`)."""

    version: Literal[3] = 3
    name: Annotated[str, Meta(max_length=128)]
    """Name of the holder's instance."""
    host: Annotated[str, Meta(max_length=128)]
    """`host_id` of the holder's host."""
    epoch: Epoch
    number: Number
    """Number of the holder's assignment."""
    fingerprint: Fingerprint
    layout: KVLayout
    slots: Annotated[int, Meta(ge=1, le=1 << 20)]
    """Number of slots of its lease table."""
    data_bytes: Annotated[int, Meta(ge=0)]
    ways: dict[str, bytes]
    """How the holder is reached, by the transport's name; the bytes are the transport's own
    message."""


@lru_cache
def host_id() -> str:
    """Return an id of this boot of this machine, equal in two processes that share a clock."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
