"""What a receiver says of its links and pulls."""

from __future__ import annotations

from msgspec import Struct


class Met(Struct, frozen=True, array_like=True):
    """How a holder is reached."""

    transport: str
    detail: str
    """What it runs over: the transport that UCX picked, the device; empty if there is no choice."""
    latency_s: float
    """Of looking at one lease slot."""
    bytes_per_s: float
    """Of a contiguous pull, scatter included, as measured when they met."""
    refused: dict[str, str]
    """Why each better transport is not used."""
    fallback: bool
    """It is a network without RDMA."""


class Pulled(Struct, frozen=True, array_like=True):
    """What became of a pull."""

    nbytes: int
    """That were moved: the missing tail where the pool had a prefix."""
    transport: str
    strategy: str
    ms: float
    exposed_ms: float
    """Of that, what came after the last plane had been computed."""
    expected_ms: float
    """What was expected of `exposed_ms` when the strategy was chosen."""
    token: int
    """The first token, as the holder's words tell it."""
    cached: int = 0
    """Tokens of the prompt that the pool had, where the decode has computed the others itself."""


NOTHING_PULLED = Pulled(0, "", "", 0.0, 0.0, 0.0, -1)
