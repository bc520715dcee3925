"""The times that a client measured of each request, and statistics over many.

Per request: *TTFT* is the time from sending it to its first response; *E2E* that to its last; *ITL*
is the time between the two, divided by the tokens after the first: (last - first) / (tokens - 1).
It is per token, not per response: a response carries every token that is ready, and not how many,
so that the first response of a loaded server may hold a second token and ITL be a little low. *gap*
is the time between two responses, in which a reader sees no new text. Answers of one response have
neither ITL nor gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec import Struct


@dataclass(slots=True)
class Answer:
    """The times of one request, in seconds of any clock."""

    sent: float
    responses: list[float] = field(default_factory=list)
    tokens: int = 0
    """Number of tokens, from the server's stats."""

    @property
    def ttft(self) -> float:
        return self.responses[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.responses[-1] - self.sent

    @property
    def itl(self) -> list[float]:
        """Return one value, or none."""
        if len(self.responses) < 2 or self.tokens < 2:
            return []
        return [(self.responses[-1] - self.responses[0]) / (self.tokens - 1)]

    @property
    def gaps(self) -> list[float]:
        times = self.responses
        return [after - before for before, after in itertools.pairwise(times)]


class Percentiles(Struct):
    """Percentiles in milliseconds."""

    p50: float
    p90: float
    p99: float


class Summary(Struct):
    """Statistics over many answers."""

    requests: int
    requests_per_s: float
    tokens_per_s: float
    responses_per_s: float
    ttft_ms: Percentiles
    e2e_ms: Percentiles
    itl_ms: Percentiles | None
    gap_ms: Percentiles | None


def summarize(answers: Sequence[Answer]) -> Summary:
    """Summarize answers; rates are over the time from the first request to the last response."""
    begin = min(answer.sent for answer in answers)
    seconds = max(answer.responses[-1] for answer in answers) - begin
    return Summary(
        requests=len(answers),
        requests_per_s=round(len(answers) / seconds, 2),
        tokens_per_s=round(sum(answer.tokens for answer in answers) / seconds, 1),
        responses_per_s=round(sum(len(answer.responses) for answer in answers) / seconds, 1),
        ttft_ms=_some(answer.ttft for answer in answers),
        e2e_ms=_some(answer.e2e for answer in answers),
        itl_ms=_percentiles(itl for answer in answers for itl in answer.itl),
        gap_ms=_percentiles(gap for answer in answers for gap in answer.gaps),
    )


def _percentiles(seconds: Iterable[float]) -> Percentiles | None:
    values = list(seconds)
    return _some(values) if values else None


def _some(seconds: Iterable[float]) -> Percentiles:
    values = np.percentile(list(seconds), (50, 90, 99)) * 1e3
    return Percentiles(*values.round(3).tolist())
