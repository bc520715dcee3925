"""Metrics, counted in process and handed to Triton's metric API in one go.

Each call into that API is a round trip between processes, so nothing is sent
when it happens: ``drain`` gives what changed since the last time. A histogram
is kept as the three series that Prometheus stores of one (bucket, sum, count);
the API would take one call per observation.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge"]
Labels = tuple[tuple[str, str], ...]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BOUNDS = (*map(str, SECONDS), "+Inf")

COUNTERS = {
    "pdserve_requests_total": "Requests ended, by how",
    "pdserve_good_requests_total": "Requests answered within the limits of their scenario",
    "pdserve_routed_total": "Requests sent to a group",
    "pdserve_unknown_scenarios_total": "Requests with a label that no scenario has",
    "pdserve_reloads_total": "Deployments that have changed under a gateway",
    "pdserve_forward_attempts": "Offers of a request to a prefill",
    "pdserve_prefill_rejections_total": "Offers that a busy prefill refused",
    "pdserve_decode_rejections_total": "Offers that a full decode refused",
    "pdserve_retries_total": "Calls to an instance that failed and were tried elsewhere",
    "pdserve_unsealed_messages_total": "Messages to an instance that were not of its deployment",
    "pdserve_steps_total": "Forwards of a prefill, steps of a decode",
    "pdserve_kv_transfers_total": "KV caches moved from a prefill to a decode",
    "pdserve_kv_events_total": "Changes of an engine's own pool of KV blocks, by type",
    "pdserve_kv_transfer_bytes_total": "KV cache bytes moved from a prefill to a decode",
}
GAUGES = {
    "pdserve_open_requests": "Requests in flight in this gateway",
    "pdserve_slots": "Slots of an instance",
    "pdserve_watches": "Gateways that wait for something of an instance to become free",
    "pdserve_kv_leases": "KV caches that a prefill holds, by state",
    "pdserve_kv_blocks": "Blocks of a KV pool, by state",
    "pdserve_kv_pairs": "Pairs of a prefill and a decode, by whether they have met",
    "pdserve_kv_link_bytes_per_second": "Rate of a decode's pulls from a prefill, as probed",
    "pdserve_kv_link_fallback": "1 where a decode reaches a prefill by a network without RDMA",
    "pdserve_kv_link_latency_seconds": "Time in which a decode reads a word of a prefill's memory",
}
HISTOGRAMS = {
    "pdserve_ttft_seconds": "Arrival to first token",
    "pdserve_tpot_seconds": "Time per output token after the first",
    "pdserve_e2e_seconds": "Arrival to last token",
    "pdserve_kv_transfer_seconds": "Pulling one KV cache",
    "pdserve_local_prefill_seconds": "Computing one prompt in a decode",
    "pdserve_kv_transfer_exposed_seconds": "Of that, what came after the last layer was computed",
}


_OWNERS = ("instance", "decode")
"""Labels that name who sets a gauge."""
_SERIES = re.compile(r"^(pdserve_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Change(NamedTuple):
    """A series' step (counter) or new value (gauge)."""

    kind: Kind
    name: str
    help: str
    labels: Labels
    value: float


class _Histogram:
    """Values counted since the last time: by the least of the BOUNDS that they are under."""

    def __init__(self) -> None:
        self.values = [0] * len(BOUNDS)
        self.sum = 0.0


class Registry:
    """What one process has counted since it last told Triton."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Labels], float] = {}
        self._histograms = defaultdict[tuple[str, Labels], _Histogram](_Histogram)
        self._levels: dict[tuple[str, Labels], float] = {}
        self._published: dict[tuple[str, Labels], float] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Count ``value`` more in a counter."""
        key = (name, tuple(labels.items()))
        self._counts[key] = self._counts.get(key, 0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge is ``value`` now."""
        self._levels[name, tuple(labels.items())] = value

    def retire(self, page: str, instance: str) -> None:
        """Gauges that a former life of an instance has left on a page of metrics are 0.

        Triton keeps what a stub that has died has set last, and this one may never set the same:
        it may reach others by another way, or not at all.
        """
        for name, text, value in _SERIES.findall(page):
            labels = dict(_LABEL.findall(text))
            if name in GAUGES and float(value) and instance in map(labels.get, _OWNERS):
                self.set(name, 0, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """One more value in a histogram."""
        histogram = self._histograms[name, tuple(labels.items())]
        histogram.values[bisect_left(SECONDS, value)] += 1
        histogram.sum += value

    def drain(self) -> Iterator[Change]:
        """What has changed since the last call."""
        counts, self._counts = self._counts, {}
        histograms, self._histograms = self._histograms, defaultdict(_Histogram)
        for (name, labels), histogram in histograms.items():
            below = list(accumulate(histogram.values))
            counts[f"{name}_count", labels] = below[-1]
            counts[f"{name}_sum", labels] = histogram.sum
            # The page may be read between two steps: no bucket is ever ahead of a higher one.
            for bound, values in zip(reversed(BOUNDS), reversed(below), strict=True):
                if values:
                    counts[f"{name}_bucket", (*labels, ("le", bound))] = values
        for (name, labels), value in counts.items():
            yield Change("counter", name, _help(name), labels, value)
        for key, value in self._levels.items():
            if self._published.get(key) != value:
                self._published[key] = value
                yield Change("gauge", key[0], GAUGES[key[0]], key[1], value)


def _help(name: str) -> str:
    return COUNTERS.get(name) or HISTOGRAMS[name.rpartition("_")[0]]
