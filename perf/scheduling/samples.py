"""The requests as a client saw them, and the shares computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct

from perf.answers import Percentiles
from perf.scheduling.workload import Ask

# Texts of the errors of a gateway: for a request that a prefill has computed in vain, for one that
# it had just offered to a prefill, and for all that it ends for lack of time.
LATE = "no first token"
UNANSWERED = "no answer of"
UNAVAILABLE = "UNAVAILABLE"


class Sample(Struct):
    """One request. Times are seconds from the beginning of its run."""

    ask: Ask
    due: float
    """Time at which it was to be sent; waiting begins here, even if the client was late."""
    first: float | None = None
    """Time at which its first token came."""
    ended: float = 0.0
    error: str = ""
    gateway: int = 0
    prefill: str = ""
    prefill_s: float = 0.0
    """Seconds of the forward; 0 if the server has not reported them."""
    way_s: float = 0.0
    """Seconds to the server and back: its first token is this much later here than by the server's
    stats."""

    @property
    def ends_by(self) -> float:
        """Return the time at which its first token is due."""
        return self.due + self.ask.limit_s

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def good(self) -> bool:
        """Tell whether it was answered to its end, and begun within its limit."""
        return not self.error and self.first is not None and self.first <= self.ends_by

    @property
    def refused(self) -> bool:
        """Tell whether no prefill has accepted it, as far as is known."""
        return bool(self.error) and LATE not in self.error

    @property
    def forward(self) -> tuple[float, float] | None:
        """Return when a prefill computed it, as seen by the client; None: never.

        An error after its prefill comes at the end of the prefill. An error during an offer leaves
        open whether the prefill accepted it; if so, it computes from then on.
        """
        if self.first is not None:
            return self.first - self.prefill_s, self.first
        if UNANSWERED in self.error:
            return self.ended, self.ended + self.ask.prefill_s
        return None if self.refused else (self.ended - self.ask.prefill_s, self.ended)


def good(samples: Sequence[Sample]) -> float:
    """Return the share within the limit; refused and failed requests are not within it."""
    return statistics.fmean(sample.good for sample in samples)


def kept(samples: Sequence[Sample]) -> float:
    """Return the share within the limit of the requests that a prefill has accepted."""
    taken = [sample for sample in samples if not sample.refused]
    return good(taken) if taken else 1.0


def ttft_ms(samples: Sequence[Sample]) -> Percentiles | None:
    """Return the percentiles of TTFT of the requests with a first token."""
    values = [sample.ttft for sample in samples if sample.ttft is not None]
    if not values:
        return None
    return Percentiles(*(np.percentile(values, (50, 90, 99)) * 1e3).round(1).tolist())


def idle_s(samples: Sequence[Sample], prefills: int) -> list[float]:
    """Return for each refused request the longest time for which a prefill was idle while it
    waited.

    A prefill is idle between two forwards, also while the previous KV cache is being transferred.
    The times of its forwards are those that the client sees, all late by a message's way.
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
    """Yield the periods in which fewer forwards ran than there are prefills."""
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
