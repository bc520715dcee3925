"""The result of an ideal scheduler without overhead for the same requests: one queue for all
prefills.

A request leaves the queue when its prefill could no longer end within its limit, which is checked
before a prefill, never during one. Every prefix is in every cache.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from perf.scheduling.samples import UNAVAILABLE, Sample
from perf.scheduling.workload import Ask, Chain

# Order of events at the same moment.
_FREE, _ARRIVE, _GIVE_UP = range(3)


def ideal(
    chains: Sequence[Chain], prefills: int, until: float = math.inf, *, by_limit: bool = False
) -> list[Sample]:
    """Serve all requests, in the order of arrival.

    Args:
        prefills: number of prefills, each of which computes one prompt at a time.
        until: no request arrives from then on (seconds from the beginning).
        by_limit: the request whose limit ends first is first in the queue; otherwise, the one that
            arrived first.
    """
    return _Ideal(prefills, until, by_limit).run(chains)


class _Ideal:
    def __init__(self, prefills: int, until: float, by_limit: bool) -> None:
        self._idle = prefills
        self._until = until
        self._by_limit = by_limit
        self._now = 0.0
        self._count = itertools.count()
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._line: dict[int, tuple[Sample, Iterator[Ask]]] = {}
        self._samples: list[Sample] = []

    def run(self, chains: Sequence[Chain]) -> list[Sample]:
        for chain in chains:
            self._next(iter(chain), 0.0)
        while self._events:
            self._now, _, _, happen = heapq.heappop(self._events)
            happen()
            while self._idle and self._line:
                self._start()
        return self._samples

    def _at(self, when: float, kind: int, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, kind, next(self._count), happen))

    def _next(self, chain: Iterator[Ask], ended: float) -> None:
        ask = next(chain, None)
        if ask is not None and (due := max(ended, ask.due)) < self._until:
            self._at(due, _ARRIVE, lambda: self._arrive(Sample(ask, due), chain))

    def _arrive(self, sample: Sample, chain: Iterator[Ask]) -> None:
        number = len(self._samples)
        self._samples.append(sample)
        self._line[number] = sample, chain
        latest = sample.ends_by - sample.ask.prefill_s
        self._at(latest, _GIVE_UP, lambda: self._give_up(number))

    def _give_up(self, number: int) -> None:
        if number in self._line:
            sample, chain = self._line.pop(number)
            sample.error, sample.ended = f"{UNAVAILABLE}: left the line", self._now
            self._next(chain, self._now)

    def _start(self) -> None:
        line = self._line
        first = next(iter(line))
        if self._by_limit:
            first = min(line, key=lambda number: line[number][0].ends_by)
        sample, chain = line.pop(first)
        sample.prefill_s = sample.ask.prefill_s
        sample.first = self._now + sample.prefill_s
        sample.ended = sample.first + sample.ask.decode_s
        self._idle -= 1
        self._at(sample.first, _FREE, self._free)
        self._next(chain, sample.ended)

    def _free(self) -> None:
        self._idle += 1
