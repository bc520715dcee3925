"""What a holder says of itself, once, to those who will pull from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdserve.kvcache.handle import Epoch, Fingerprint
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding


@dataclass(frozen=True, slots=True)
class Terms:
    """What sender and receiver must agree on before a byte is moved."""

    fingerprint: str
    layout: KVLayout
    key: bytes
    """Of KEY_BYTES; see `pdserve.transfer.key`."""
    sharding: Sharding
    """How the prefill lays a KV cache out."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sealed like a handle (`pdserve.kvcache.handle.seal`)."""

    version: Literal[2] = 2
    name: Annotated[str, Meta(max_length=128)]
    """Of the holder's instance."""
    host: Annotated[str, Meta(max_length=128)]
    """`host_id` where the holder runs."""
    epoch: Epoch
    fingerprint: Fingerprint
    layout: KVLayout
    slots: Annotated[int, Meta(ge=1, le=1 << 20)]
    """Of its lease table."""
    data_bytes: Annotated[int, Meta(ge=0)]
    ways: dict[str, bytes]
    """By transport's name; what each means is the transport's own."""


@lru_cache
def host_id() -> str:
    """Equal in two processes that share a clock: of this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
