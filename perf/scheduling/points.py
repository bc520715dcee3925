"""The results of a run, as numbers."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct

from perf.answers import Percentiles
from perf.scheduling.loads import Load
from perf.scheduling.samples import UNAVAILABLE, Sample, good, idle_s, kept, ttft_ms
from perf.scheduling.servers import PREFILLS, Offers

IDLE_S = 0.025
"""Seconds of idleness above which a prefill is not only handing over."""


class Point(Struct):
    """The results of one load under one policy. Shares are of 1."""

    part: str
    level: int
    layout: str
    policy: str
    requests: int
    good: float
    """Share of all requests within their limit."""
    good_per_s: float
    kept: float
    """Share within their limit of the requests that a prefill has accepted."""
    failed: int
    """Number of errors other than for lack of time."""
    ttft_ms: Percentiles | None
    short_ttft_ms: Percentiles | None
    """TTFT of short prompts."""
    scenarios: dict[str, float]
    """Share within their limit, by scenario."""
    worst_gateway: float
    """Share within the limit at the worst gateway, divided by the mean of all."""
    spread: float
    """Ratio of the 90th to the 10th percentile of a prefill's forward times, mean over the
    prefills."""
    idle_ms: float
    """Longest time for which a prefill was idle while a request waited in vain."""
    idle: int
    """Number of requests refused while a prefill was idle for longer than `IDLE_S`."""
    offers: float | None = None
    """Number of offers per request; None: no offers are made."""
    rejections: float | None = None
    """Number of rejections per accepted offer."""


def point(
    load: Load, layout: str, policy: str, samples: Sequence[Sample], offers: Offers | None
) -> Point:
    """Compute the point of a run; ``offers`` are those made and rejected in it."""
    counted = [sample for sample in samples if sample.due >= load.settle_s]
    idle = idle_s(samples, PREFILLS)
    made = Point(
        load.part,
        load.level,
        layout,
        policy,
        len(counted),
        round(good(counted), 4),
        round(sum(sample.good for sample in counted) / (load.seconds - load.settle_s), 2),
        round(kept(counted), 4),
        sum(bool(one.error) and UNAVAILABLE not in one.error for one in counted),
        ttft_ms(counted),
        ttft_ms([sample for sample in counted if sample.ask.tokens <= load.short]),
        _by((sample.ask.scenario, sample) for sample in counted),
        round(_worst(_by((sample.gateway, sample) for sample in counted).values()), 4),
        round(spread(counted), 2),
        round(max(idle, default=0.0) * 1e3, 1),
        sum(one > IDLE_S for one in idle),
    )
    if offers is not None:
        made.offers = round(offers.made / len(samples), 3)
        made.rejections = round(offers.rejected / max(offers.made - offers.rejected, 1), 3)
    return made


def _by(samples: Iterable[tuple[str | int, Sample]]) -> dict[str, float]:
    parts = defaultdict[str, list[Sample]](list)
    for key, sample in samples:
        parts[str(key)].append(sample)
    return {key: round(good(some), 4) for key, some in sorted(parts.items())}


def _worst(shares: Iterable[float]) -> float:
    found = list(shares)
    return min(found) / statistics.fmean(found) if any(found) else 0.0


def spread(samples: Iterable[Sample]) -> float:
    """Return how much the forwards of a prefill differ: 1 means that all are alike."""
    times = defaultdict[str, list[float]](list)
    for sample in samples:
        if sample.prefill_s:
            times[sample.prefill].append(sample.prefill_s)
    if not times:
        return 1.0
    ratios = (np.percentile(some, 90) / np.percentile(some, 10) for some in times.values())
    return statistics.fmean(map(float, ratios))


def crossing(levels: Sequence[tuple[float, float]], share: float) -> float | None:
    """Return the level at which a falling share first has this value, interpolated."""
    for (low, before), (high, after) in itertools.pairwise(levels):
        if before >= share > after:
            return low + (high - low) * (before - share) / (before - after)
    return None


def between(levels: Sequence[tuple[float, float]], level: float) -> float:
    """Return the share at a level, interpolated between two measured levels."""
    xs, ys = zip(*levels, strict=True)
    return float(np.interp(level, xs, ys))
