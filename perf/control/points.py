"""The results of a run, as numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from perf.answers import Percentiles
from perf.control.traffic import SETTLE_S, TPOT_LIMIT_S, WINDOW_S, Traffic
from perf.scheduling.samples import UNAVAILABLE, Sample, ttft_ms

CONTROLLER = "controller"
"""The setting in which the controller chooses the ratio; the others are fixed ratios."""
BIN_S = WINDOW_S / 4
"""Time for which a share of good requests is given."""
SERVED = 0.9
"""Share of good requests from which on a bin is within the SLO."""


class Change(Struct):
    """A change of the ratio."""

    at_s: float
    """Seconds after the time that is not counted, by the client's clock."""
    ratio: str
    """The ratio that it leads to."""
    took_s: float | None = None
    """Seconds until all its instances had their new role; None: the run ended before."""


class Used(Struct):
    """CPU time in a run, as a number of cores."""

    servers: float
    client: float
    machine: float
    """The cores that all processes used, those of others included."""


class Point(Struct):
    """The results of one traffic under one setting. Shares are of 1."""

    traffic: str
    setting: str
    repeat: int
    requests: int
    good: float
    """Share of all requests within both limits."""
    good_per_s: float
    expired: float
    """Share without an answer, for lack of time."""
    late: float
    """Share answered, but beyond one of the limits."""
    failed: int
    """Number of errors other than for lack of time."""
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    bins: list[float]
    """Share of good requests among those that were sent in each `BIN_S` seconds."""
    changes: list[Change]
    events: list[str]
    """The events of the controller."""
    used: Used


def tpot_s(sample: Sample) -> float | None:
    """Return the seconds per token after the first; None: it has no answer."""
    if sample.error or sample.first is None:
        return None
    return (sample.ended - sample.first) / (sample.ask.outputs - 1)


def good(sample: Sample) -> bool:
    """Tell whether a request was answered within its limits of TTFT and TPOT."""
    tpot = tpot_s(sample)
    return sample.good and tpot is not None and tpot <= TPOT_LIMIT_S


def expired(sample: Sample) -> bool:
    """Tell whether a gateway ended a request for lack of time: it names the limit."""
    return sample.error.startswith(UNAVAILABLE) and "limit" in sample.error


def point(
    traffic: Traffic,
    setting: str,
    repeat: int,
    samples: Sequence[Sample],
    changes: Sequence[Change],
    events: Sequence[str],
    used: Used,
) -> Point:
    """Compute the point of a run."""
    counted = [sample for sample in samples if sample.due >= SETTLE_S]
    failed = sum(bool(one.error) and not expired(one) for one in samples)
    return Point(
        traffic.name,
        setting,
        repeat,
        len(counted),
        round(statistics.fmean(map(good, counted)), 4),
        round(sum(map(good, counted)) / traffic.seconds, 2),
        round(statistics.fmean(map(expired, counted)), 4),
        round(statistics.fmean(not one.error and not good(one) for one in counted), 4),
        failed,
        ttft_ms(counted),
        _tpot_ms(counted),
        bins(counted, traffic.seconds),
        list(changes),
        list(events),
        used,
    )


def _tpot_ms(samples: Sequence[Sample]) -> Percentiles | None:
    values = [tpot for sample in samples if (tpot := tpot_s(sample)) is not None]
    if not values:
        return None
    return Percentiles(*(np.percentile(values, (50, 90, 99)) * 1e3).round(1).tolist())


def bins(samples: Sequence[Sample], seconds: float) -> list[float]:
    """Return the share of good requests by when they were sent; a bin without any has 1."""
    found: list[list[bool]] = [[] for _ in range(max(1, int(seconds / BIN_S + 1e-9)))]
    for sample in samples:
        place = int((sample.due - SETTLE_S) / BIN_S)
        found[min(place, len(found) - 1)].append(good(sample))
    return [round(statistics.fmean(some), 4) if some else 1.0 for some in found]


def back_s(shares: Sequence[float], since_s: float) -> float:
    """Return the seconds from a moment until every later bin is within the SLO."""
    bad = [place for place, share in enumerate(shares) if share < SERVED]
    end = (bad[-1] + 1) * BIN_S if bad else 0.0
    return max(0.0, end - since_s)
