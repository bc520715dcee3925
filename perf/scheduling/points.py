"""What a run has shown, in numbers."""

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
"""A prefill that computes nothing for so long does not just hand over."""


class Point(Struct):
    """One load under one policy. Shares are of 1."""

    part: str
    level: int
    layout: str
    policy: str
    requests: int
    good: float
    """Within their limit, of all."""
    good_per_s: float
    kept: float
    """Within their limit, of those that a prefill has taken."""
    failed: int
    """Errors of another kind than that there was no time."""
    ttft_ms: Percentiles | None
    short_ttft_ms: Percentiles | None
    """Of short prompts."""
    scenarios: dict[str, float]
    """Within their limit, by scenario."""
    worst_gateway: float
    """Its share within the limit, by the mean of all."""
    spread: float
    """T_p of a prefill: 90th by 10th percentile, the mean over the prefills."""
    idle_ms: float
    """The longest time for which a prefill computed nothing while somebody waited in vain."""
    idle: int
    """Refused while a prefill computed nothing for longer than `IDLE_S`."""
    offers: float | None = None
    """For each request; None: nobody makes any."""
    rejections: float | None = None
    """For each accepted offer."""


def point(
    load: Load, layout: str, policy: str, samples: Sequence[Sample], offers: Offers | None
) -> Point:
    """Args: offers: made and rejected in this run."""
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
    """How unlike the forwards of a prefill are: 1 is all alike."""
    times = defaultdict[str, list[float]](list)
    for sample in samples:
        if sample.prefill_s:
            times[sample.prefill].append(sample.prefill_s)
    if not times:
        return 1.0
    ratios = (np.percentile(some, 90) / np.percentile(some, 10) for some in times.values())
    return statistics.fmean(map(float, ratios))


def crossing(levels: Sequence[tuple[float, float]], share: float) -> float | None:
    """The level at which a falling share first is this, between two that were measured."""
    for (low, before), (high, after) in itertools.pairwise(levels):
        if before >= share > after:
            return low + (high - low) * (before - share) / (before - after)
    return None


def between(levels: Sequence[tuple[float, float]], level: float) -> float:
    """The share at a level, between two that were measured."""
    xs, ys = zip(*levels, strict=True)
    return float(np.interp(level, xs, ys))
