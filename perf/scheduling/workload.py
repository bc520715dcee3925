"""The requests and their times, made before a run, so that every policy gets the same ones."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

from msgspec import Struct

# Equal to those of perf/profiles/prefill_100us.yaml.
PROMPT_TOKEN_S = 1e-4
OUTPUT_TOKEN_S = 1e-2


class Ask(Struct, frozen=True):
    """One request to be sent."""

    due: float
    """Seconds from the beginning; later if the previous request of its chain has not ended."""
    tokens: int
    limit_s: float
    """Seconds after which a first token is useless."""
    seed: int
    """Seed of its prompt."""
    scenario: str = "default"
    prefix: int | None = None
    """Prefix of its scenario that its first `shared` tokens are taken from; None: it shares
    none."""
    shared: int = 0
    outputs: int = 4
    """Number of tokens of its answer."""

    @property
    def prefill_s(self) -> float:
        """Return the seconds of its prefill, with its prefix cached."""
        return (self.tokens - self.shared) * PROMPT_TOKEN_S

    @property
    def decode_s(self) -> float:
        """Return the seconds from the first token to the last."""
        return (self.outputs - 1) * OUTPUT_TOKEN_S


Chain = Sequence[Ask]
"""Requests that are sent one after another, each when the previous one has ended in any way."""

Limit = Callable[[int], float]
"""Returns the limit in seconds for a number of prompt tokens."""


class Limits(Struct, frozen=True):
    """Limits of `factor` times the TTFT of a prompt on an unloaded server."""

    added_s: float
    """Difference between an unloaded server's TTFT and the prefill's time."""
    factor: float = 3.0
    least_s: float = 0.0

    def __call__(self, tokens: int) -> float:
        return max(self.factor * (tokens * PROMPT_TOKEN_S + self.added_s), self.least_s)


class Tide(Struct, frozen=True):
    """Traffic of a scenario that rises and falls."""

    scenario: str
    rate: float
    """Requests per second, on average over whole periods."""
    depth: float
    """Amplitude of the rate, as a share of the rate."""
    period_s: float
    phase: float
    """Share of a period; at 0.25 it begins at its highest rate."""
    tokens: tuple[int, int]
    """Least and most tokens of a prompt."""
    hits: float = 0.0
    """Share of requests that begin with one of `prefixes`, each of `shared` tokens."""
    prefixes: int = 1
    shared: int = 0

    def at(self, seconds: float) -> float:
        """Return the requests per second at a moment."""
        turn = 2 * math.pi * (seconds / self.period_s + self.phase)
        return self.rate * (1 + self.depth * math.sin(turn))


def capacity(lengths: Sequence[int], prefills: int) -> float:
    """Return the requests per second that ``prefills`` prefills can compute."""
    return prefills / (statistics.fmean(lengths) * PROMPT_TOKEN_S)


def poisson(rng: random.Random, rate: float, lengths: Sequence[int], limit: Limit) -> list[Chain]:
    """Return one independent request for each length, at `rate` a second."""
    due, chains = 0.0, list[Chain]()
    for tokens in lengths:
        due += rng.expovariate(rate)
        chains.append([Ask(due, tokens, limit(tokens), rng.getrandbits(32))])
    return chains


def closed(
    rng: random.Random, users: int, tokens: tuple[int, int], outputs: int, limit: Limit, each: int
) -> list[Chain]:
    """Return the chains of users who send a request as soon as the last was answered or refused.

    Args:
        tokens: least and most tokens of a prompt.
        each: maximum number of requests of each user.
    """

    def ask() -> Ask:
        length = rng.randint(*tokens)
        return Ask(0.0, length, limit(length), rng.getrandbits(32), outputs=outputs)

    return [[ask() for _ in range(each)] for _ in range(users)]


def tidal(rng: random.Random, tides: Sequence[Tide], seconds: float, limit: Limit) -> list[Chain]:
    """Return the requests of all scenarios in the order of their arrival."""
    asks = [ask for tide in tides for ask in _of(rng, tide, seconds, limit)]
    return [[ask] for ask in sorted(asks, key=lambda ask: ask.due)]


def _of(rng: random.Random, tide: Tide, seconds: float, limit: Limit) -> list[Ask]:
    """Return a Poisson process at the highest rate, thinned out to the rate of each moment."""
    highest = tide.rate * (1 + tide.depth)
    asks, due = [], rng.expovariate(highest)
    while due < seconds:
        if rng.random() * highest < tide.at(due):
            tokens = rng.randint(*tide.tokens)
            hit = rng.random() < tide.hits
            asks.append(
                Ask(
                    due,
                    tokens,
                    limit(tokens),
                    rng.getrandbits(32),
                    tide.scenario,
                    rng.randrange(tide.prefixes) if hit else None,
                    tide.shared if hit else 0,
                )
            )
        due += rng.expovariate(highest)
    return asks
