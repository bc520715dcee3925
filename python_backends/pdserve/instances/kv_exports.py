"""KV caches on their way out of a prefill: their memory, their leases, and what stays cached."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.instances.held_prompt import HeldPrompt
from pdserve.kvcache.arena import Range, State
from pdserve.kvcache.prefix_index import PrefixIndex, shorten
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.transfer.producer.holder import Holder
from pdserve.transfer.producer.kv_range import KVRange
from pdserve.transfer.producer.lease_manager import LeasedRange, LeaseManager

# Maximum ranges whose lease ended while a decode was reading them; with more, nothing is accepted.
MAX_QUARANTINED = 16


class KVExports:
    """Keeps the KV caches of one prefill until decodes have taken them; used in its event loop.

    Times are ``loop.time()`` seconds, given by the caller; an event loop's clock is
    CLOCK_MONOTONIC, which leases and handles use, too.

    Args:
        holder: holder of the prefill's memory; closed with this object.
        planes: number of planes of a KV cache.
        lease_s: seconds for which a decode may begin to take one.
    """

    def __init__(self, holder: Holder, planes: int, lease_s: float) -> None:
        self.holder = holder
        self.prefixes = PrefixIndex[Range]()
        """Prompts whose KV caches are in the arena, by their prefixes."""
        self.leases = LeaseManager(holder, self.prefixes.remove)
        self._planes = planes
        self._lease_s = lease_s
        self._refused_with = -1
        """Available bytes of the arena when they were too few for a request; -1: more have become
        free since."""

    @property
    def capacity(self) -> int:
        """Return the bytes of the arena."""
        return self.leases.arena.capacity

    @property
    def clogged(self) -> bool:
        """Tell whether so many ranges are quarantined that no more may follow."""
        return len(self.leases.quarantined) >= MAX_QUARANTINED

    @property
    def open(self) -> int:
        """Return the number of KV caches that a decode may still read."""
        counts = self.leases.counts()
        states = State.LEASED, State.IN_TRANSFER, State.QUARANTINED
        return sum(counts[state][0] for state in states)

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of the KV cache of so many tokens."""
        return tokens * self.holder.token_bytes

    def allocate(self, tokens: int) -> tuple[LeasedRange, KVRange] | None:
        """Allocate the KV cache of so many tokens; None if there is no room now."""
        leased = self.leases.allocate(self.nbytes(tokens))
        if leased is None:
            self._refused_with = self._available()
            return None
        return leased, self.holder.kv_range(leased.range.offset, leased.range.nbytes)

    def lacks_room(self) -> bool:
        """Tell whether a KV cache had no room, and no bytes have become available since.

        Without a request's size it is unknown whether there is room for it, but then there is none.
        """
        if 0 <= self._refused_with < self._available():
            self._refused_with = -1
        return self._refused_with >= 0

    def _available(self) -> int:
        """Return the bytes of the arena that are free or can be evicted."""
        counts = self.leases.counts()
        return counts[State.FREE][1] + counts[State.CACHED][1]

    def pin(self, batch: Sequence[tuple[HeldPrompt, tuple[Range, int] | None]]) -> list[Range]:
        """Keep the cached prefixes of prompts for their forward; return their ranges."""
        sources = []
        for held, found in batch:
            if found is not None:
                source, held.job.cached = found
                held.job.prefix = self.holder.kv_range(source.offset, source.nbytes)
                self.leases.arena.pin(source)
                sources.append(source)
        return sources

    def unpin(self, sources: Sequence[Range]) -> None:
        """Allow cached prefixes to be evicted again."""
        for source in sources:
            self.leases.arena.unpin(source)
            self._refused_with = -1

    def open_early(self, held: HeldPrompt) -> bytes:
        """Let a decode follow the computation; return the handle."""
        until = held.deadline + self._lease_s
        handle = self.leases.grant(held.leased, len(held.job.tokens), until)

        def filled(planes: int) -> None:
            held.kv.publish(planes)
            self.leases.fill(held.leased, planes)

        held.job.filled = filled
        return handle

    def hand_over(self, held: HeldPrompt, token: int, now: float) -> tuple[bytes, bytes]:
        """Lease a complete KV cache to a decode that will pull it, or that follows already.

        Returns:
            The handle, empty if a decode follows, which has it; and the digests of the prompt's
            prefixes, which are cached from now on.
        """
        held.kv.publish(self._planes)
        tokens = held.job.tokens
        handle = self.leases.complete(
            held.leased, len(tokens), self._planes, token, now + self._lease_s
        )
        return handle, shorten(self.prefixes.add(held.leased.range, tokens, held.salt))

    def close(self) -> None:
        """Release the memory; receivers that have mapped it may still read leases."""
        self.holder.close()

    def show(self, metrics: Registry, name: str) -> None:
        """Set the metrics of ranges."""
        for state, (ranges, _) in self.leases.counts().items():
            if state is not State.FREE:
                metrics.set(catalogue.KV_LEASES, ranges, instance=name, state=state.value)
