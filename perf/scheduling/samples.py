"""What a client saw of its requests, and what is made of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct

from perf.answers import Percentiles
from perf.scheduling.workload import Ask

# How a gateway ends what a prefill has computed in vain, what it had just offered to one, and all
# that it ends for want of time.
LATE = "no first token"
UNANSWERED = "no answer of"
UNAVAILABLE = "UNAVAILABLE"


class Sample(Struct):
    """One request. Times are seconds from the beginning of its run."""

    ask: Ask
    due: float
    """When it was to be sent; waiting begins here, were the client late or not."""
    first: float | None = None
    """When its first token came."""
    ended: float = 0.0
    error: str = ""
    gateway: int = 0
    prefill: str = ""
    prefill_s: float = 0.0
    """Of the forward; nothing where the server has not said."""
    way_s: float = 0.0
    """To the server and back: by this its first token is later here than the server says."""

    @property
    def ends_by(self) -> float:
        """When its first token is due."""
        return self.due + self.ask.limit_s

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def good(self) -> bool:
        """Answered to its end, and begun within its limit."""
        return not self.error and self.first is not None and self.first <= self.ends_by

    @property
    def refused(self) -> bool:
        """No prefill has taken it, as far as is known."""
        return bool(self.error) and LATE not in self.error

    @property
    def forward(self) -> tuple[float, float] | None:
        """When a prefill computed it, seen from the client; None: never.

        An error after its prefill comes at the end of that. One in the middle of an offer leaves
        open whether the prefill took it; if so, it computes from then on.
        """
        if self.first is not None:
            return self.first - self.prefill_s, self.first
        if UNANSWERED in self.error:
            return self.ended, self.ended + self.ask.prefill_s
        return None if self.refused else (self.ended - self.ask.prefill_s, self.ended)


def good(samples: Sequence[Sample]) -> float:
    """Share within the limit; what was refused or failed is not."""
    return statistics.fmean(sample.good for sample in samples)


def kept(samples: Sequence[Sample]) -> float:
    """Of those that a prefill has taken, the share within the limit."""
    taken = [sample for sample in samples if not sample.refused]
    return good(taken) if taken else 1.0


def ttft_ms(samples: Sequence[Sample]) -> Percentiles | None:
    """Of those that have a first token."""
    values = [sample.ttft for sample in samples if sample.ttft is not None]
    if not values:
        return None
    return Percentiles(*(np.percentile(values, (50, 90, 99)) * 1e3).round(1).tolist())


def idle_s(samples: Sequence[Sample], prefills: int) -> list[float]:
    """For each refused request: the longest time for which a prefill was idle while it waited.

    A prefill is idle between two forwards, also while the KV cache of the one before is on its
    way. Its forwards are where the client sees them: all of them a message's way late.
    """
    spells = list(_spells(samples, prefills))
    return [
        max(
            (min(end, one.ended) - max(begin, one.due) for begin, end in spells),
            default=0.0,
        )
        for one in samples
        if one.refused
    ]


def _spells(samples: Sequence[Sample], prefills: int) -> Iterator[tuple[float, float]]:
    """From when to when fewer forwards ran than there are prefills."""
    steps = sorted(
        step
        for sample in samples
        if (forward := sample.forward) is not None
        for step in ((forward[0], 1), (forward[1], -1))
    )
    running, since = 0, float("-inf")
    for when, change in steps:
        if running < prefills <= running + change:
            yield since, when
        elif running >= prefills > running + change:
            since = when
        running += change
    yield since, float("inf")
