"""A KV cache that is split by heads, where prefill and decode have different tensor parallelism.

A prefill of n ranks keeps n ranges, rank i's heads in the i-th. If the decode has more ranks than
that, each range is split further, into *slices*, so that the part of one decode rank is contiguous,
too. A *part* is one slice of one rank: uint8 [planes, tokens, bytes of its heads], and the parts of
a KV cache are stored one after another, in the order of ranks and slices:

    n = 2, m = 4, 8 heads       prefill rank 0            prefill rank 1
                                part 0      part 1        part 2      part 3
                                heads 0, 1  heads 2, 3    heads 4, 5  heads 6, 7
                                decode 0    decode 1      decode 2    decode 3

With more ranks than heads, several ranks hold the same head, as tensor-parallel attention does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import msgspec

from pdserve.errors import DeploymentError
from pdserve.kvcache.layout import Count, KVLayout


class Sharding(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """How a KV cache is split at its holder: into `ranks` ranges of `slices` parts each."""

    ranks: Count = 1
    slices: Count = 1

    @cached_property
    def parts(self) -> int:
        return self.ranks * self.slices

    def heads(self, part: int, kv_heads: int) -> tuple[int, int]:
        """Return the first head of a part, and the number of its heads."""
        count = max(kv_heads // self.parts, 1)
        return part * kv_heads // self.parts, count

    def row_bytes(self, layout: KVLayout) -> int:
        """Return the bytes of one token of one plane in one part."""
        return layout.row_bytes // layout.kv_heads * max(layout.kv_heads // self.parts, 1)

    def nbytes(self, layout: KVLayout, tokens: int) -> int:
        """Return the bytes of all parts together: more than the cache's if heads are held twice."""
        return self.parts * layout.planes * tokens * self.row_bytes(layout)


def columns(sharding: Sharding, layout: KVLayout, part: int) -> slice:
    """Return the position of a part's bytes in a row of all heads."""
    head_bytes = layout.row_bytes // layout.kv_heads
    first, heads = sharding.heads(part, layout.kv_heads)
    return slice(first * head_bytes, (first + heads) * head_bytes)


@dataclass(frozen=True, slots=True)
class Route:
    """One part, and the heads that a decode rank takes from it."""

    part: int
    first_head: int
    """Number of the first head in the model."""
    heads: int


def sharding_for(prefill_ranks: int, decode_ranks: int, kv_heads: int) -> Sharding:
    """Return how a prefill of n ranks lays out KV caches for a decode of m ranks.

    Raises:
        DeploymentError: the two cannot be paired; the message says what could.
    """
    n, m = prefill_ranks, decode_ranks
    if n % m and m % n:
        raise DeploymentError(
            f"prefill tensor_parallel {n} and decode tensor_parallel {m}: one must be a multiple "
            "of the other, so that every rank's heads are whole ranges of the other's"
        )
    for role, ranks in (("prefill", n), ("decode", m)):
        if kv_heads % ranks and ranks % kv_heads:
            raise DeploymentError(
                f"{role} tensor_parallel {ranks}: {kv_heads} KV heads cannot be shared out evenly; "
                f"allowed are divisors and multiples of {kv_heads}"
            )
    return Sharding(n, max(m // n, 1))


def routes(sharding: Sharding, decode_ranks: int, kv_heads: int, rank: int) -> list[Route]:
    """Return the parts that decode rank `rank` pulls: each of its heads once, in order."""
    count = max(kv_heads // decode_ranks, 1)
    first = rank * kv_heads // decode_ranks
    wanted = []
    have = first
    # Of several holders of one head, the nearest to the rank's own position is chosen: so replicas
    # share the load, and with equal parallelism rank i pulls from rank i.
    ordered = sorted(
        range(sharding.parts), key=lambda p: abs(p * decode_ranks - rank * sharding.parts)
    )
    while have < first + count:
        part = next(p for p in ordered if sharding.heads(p, kv_heads)[0] == have)
        heads = sharding.heads(part, kv_heads)[1]
        wanted.append(Route(part, have, heads))
        have += heads
    return wanted
