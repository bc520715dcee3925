"""What a decode says of its links, and of each KV cache that has come over one."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Word = Annotated[str, Meta(max_length=256)]
Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]


class LinkReport(Struct, frozen=True, array_like=True):
    """How a holder is reached."""

    transport: Word
    detail: Word
    """What it runs over: the transport that UCX picked, the device; empty if there is no choice."""
    latency_s: Annotated[float, Meta(ge=0, le=1e9)]
    """Of looking at one lease slot."""
    bytes_per_s: Annotated[float, Meta(gt=0, le=1e18)]
    """Of a contiguous pull, scatter included, as measured when the link was made."""
    refused: Annotated[dict[Word, Annotated[str, Meta(max_length=1 << 16)]], Meta(max_length=16)]
    """Why each better transport is not used."""
    fallback: bool
    """It is a network without RDMA."""


class TransferReport(Struct, frozen=True, array_like=True):
    """How a KV cache has come into a decode's pool."""

    nbytes: Annotated[int, Meta(ge=0, le=1 << 62)]
    """That were moved: the missing tail where the pool had a prefix."""
    transport: Word
    strategy: Word
    ms: Finite
    exposed_ms: Finite
    """Of that, what came after the last plane had been computed."""
    expected_ms: Finite
    """What was expected of `exposed_ms` when the strategy was chosen."""
    token: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)]
    """The first token, as the holder's words tell it."""
    cached: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] = 0
    """Tokens of the prompt that the pool had, where the decode has computed the others itself."""


NO_TRANSFER = TransferReport(0, "", "", 0.0, 0.0, 0.0, -1)
