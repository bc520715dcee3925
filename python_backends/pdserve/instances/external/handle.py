"""The messages from an external prefill to a decode, sealed like every handle."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdserve.control.assignment import Number
from pdserve.kvcache.handle import Epoch, Fingerprint

MAX_LINK_BYTES = 1 << 20
PROMPT_BYTES = 16


class ExternalEndpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The description of a prefill, sent once to the decodes that will fetch from it."""

    version: Literal[3] = 3
    name: Annotated[str, Meta(max_length=128)]
    epoch: Epoch
    number: Number
    """Number of its assignment."""
    fingerprint: Fingerprint


class ExternalHandle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt's KV cache in another engine."""

    version: Literal[3] = 3
    epoch: Epoch
    """Epoch of the prefill."""
    number: Number
    """Number of the prefill's assignment."""
    prompt: Annotated[bytes, Meta(min_length=PROMPT_BYTES, max_length=PROMPT_BYTES)]
    """``digest`` of its token ids: the link is of no use to another prompt."""
    link: Annotated[bytes, Meta(max_length=MAX_LINK_BYTES)]
    """The engine's own message, opaque here."""


def digest(prompt: bytes) -> bytes:
    """Return the digest of token ids (little-endian int32)."""
    return hashlib.blake2b(prompt, digest_size=PROMPT_BYTES).digest()
