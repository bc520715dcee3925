"""What arrives: rates and mixes over time, drawn from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

STEP_S, STEP_EACH_S = 0.020, 0.001
"""Time of a decode's step: a constant, and a part for each sequence."""
DECODE_SLOTS = 16
PREFILL_SLOTS = 4


def step_s(batch: int) -> float:
    return STEP_S + STEP_EACH_S * batch


@dataclass(frozen=True)
class Mix:
    """Means of one kind of traffic."""

    prompt_s: float
    """Time in which a prefill computes a prompt."""
    tokens: float
    """Tokens of an answer."""

    @property
    def prefill_rate(self) -> float:
        return 1 / self.prompt_s

    @property
    def decode_rate(self) -> float:
        return DECODE_SLOTS / (self.tokens * step_s(DECODE_SLOTS))

    def best(self, instances: int) -> int:
        """Return the number of prefills with the highest throughput, at least 2 of each role."""
        return max(range(2, instances - 1), key=lambda n: self.throughput(n, instances))

    def throughput(self, prefills: int, instances: int) -> float:
        return min(prefills * self.prefill_rate, (instances - prefills) * self.decode_rate)


def mix(weight: float, scale: float = 1.0) -> Mix:
    """Return the mix between A (0; of 12 instances 8 should be prefills) and B (1; 4).

    Args:
        scale: work of a request, relative to that of the usual mixes.
    """
    decode_rate = 2.0 * 2.0**-weight / scale
    return Mix(2.0**-weight * scale, DECODE_SLOTS / (decode_rate * step_s(DECODE_SLOTS)))


@dataclass(frozen=True)
class Load:
    """The traffic of one test."""

    mix: Callable[[float], Mix]
    """By time in seconds."""
    load: Callable[[float], float]
    """Rate of requests, as a part of what the best ratio can serve with that mix."""
    seconds: float
    instances: int
    cv: float = 1.0
    """Coefficient of variation of the work of prompts and of answers."""
    rate: float | None = None
    """Requests per second, whatever the mix; None: by ``load``."""

    def rate_at(self, t: float) -> float:
        if self.rate is not None:
            return self.rate
        mixed = self.mix(t)
        return self.load(t) * mixed.throughput(mixed.best(self.instances), self.instances)


@dataclass(slots=True, eq=False)
class Request:
    """One request; times are in seconds."""

    arrived: float
    prompt_s: float
    tokens: float
    first: float = math.nan
    """Time of its first token; NaN: not yet."""
    done: float = math.nan
    left: float = field(default=0.0)
    """Tokens that it still needs."""


CUT = 5.0
"""No request has more work than so many times the mean of the distribution."""


def arrivals(load: Load, seed: int) -> Iterator[Request]:
    """Yield requests in the order of their arrival: a Poisson process by thinning, lognormal work.

    Rate and mix are constant for a second.
    """
    rng = random.Random(seed)
    sigma = math.sqrt(math.log(1 + load.cv**2))
    # The mean is that of the mix after the cut.
    shift = -(sigma**2) / 2 - math.log(_mean_below(CUT, sigma))
    mixes = [load.mix(second) for second in range(math.ceil(load.seconds))]
    rates = [load.rate_at(second) for second in range(math.ceil(load.seconds))]
    most = max(rates)
    t = 0.0
    while True:
        t += rng.expovariate(most)
        if t >= load.seconds:
            return
        second = int(t)
        if rng.random() * most > rates[second]:
            continue
        prompt_s, tokens = (min(CUT, rng.lognormvariate(shift, sigma)) for _ in range(2))
        tokens = max(1.0, tokens * mixes[second].tokens)
        yield Request(t, prompt_s * mixes[second].prompt_s, tokens, left=tokens)


def _mean_below(cut: float, sigma: float) -> float:
    """Return the mean of min(cut, X), where X is lognormal with mean 1."""
    if sigma == 0:
        return 1.0

    def phi(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    z = (math.log(cut) + sigma**2 / 2) / sigma
    return phi(z - sigma) + cut * (1 - phi(z))
