"""A decode's reports of its links, and of each KV cache that has come over one."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Word = Annotated[str, Meta(max_length=256)]
Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]


class LinkReport(Struct, frozen=True, array_like=True):
    """How a holder is reached."""

    transport: Word
    detail: Word
    """Underlying transport that UCX has picked, or the device; empty if there is no choice."""
    latency_s: Annotated[float, Meta(ge=0, le=1e9)]
    """Seconds of reading one lease slot."""
    bytes_per_s: Annotated[float, Meta(gt=0, le=1e18)]
    """Rate of a contiguous pull, scatter included, as measured when the link was made."""
    refused: Annotated[dict[Word, Annotated[str, Meta(max_length=1 << 16)]], Meta(max_length=16)]
    """Reason for each better transport that is not used."""
    fallback: bool
    """True if it is a network without RDMA."""


class TransferReport(Struct, frozen=True, array_like=True):
    """How a KV cache has come into a decode's pool."""

    nbytes: Annotated[int, Meta(ge=0, le=1 << 62)]
    """Number of bytes that were moved: only the missing tail if the pool had a prefix."""
    transport: Word
    strategy: Word
    ms: Finite
    exposed_ms: Finite
    """Part of `ms` after the last plane had been computed."""
    expected_ms: Finite
    """Expected `exposed_ms` when the strategy was chosen."""
    token: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)]
    """The first token, from the holder's words."""
    cached: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] = 0
    """Number of cached prompt tokens, if the decode has computed the others itself."""


NO_TRANSFER = TransferReport(0, "", "", 0.0, 0.0, 0.0, -1)
