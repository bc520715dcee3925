"""What is asked, and when: made before a run, so that every policy gets the very same."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

from msgspec import Struct

# As perf/profiles/prefill_100us.yaml has them.
PROMPT_TOKEN_S = 1e-4
OUTPUT_TOKEN_S = 1e-2


class Ask(Struct, frozen=True):
    """One request to come."""

    due: float
    """Seconds from the beginning; later if the one before in its chain has not ended."""
    tokens: int
    limit_s: float
    """A later first token is worth nothing."""
    seed: int
    """Of its prompt."""
    scenario: str = "default"
    prefix: int | None = None
    """Its first `shared` tokens are those of this prefix of its scenario; None: nobody else's."""
    shared: int = 0
    outputs: int = 4
    """Tokens of its answer."""

    @property
    def prefill_s(self) -> float:
        """With its prefix in the cache."""
        return (self.tokens - self.shared) * PROMPT_TOKEN_S

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return (self.outputs - 1) * OUTPUT_TOKEN_S


Chain = Sequence[Ask]
"""Asked one after the other, each when the one before has ended, however that was."""

Limit = Callable[[int], float]
"""Prompt tokens to seconds."""


class Limits(Struct, frozen=True):
    """`factor` times the TTFT that a prompt has while nothing else is asked."""

    added_s: float
    """By this an unloaded server's TTFT is longer than the prefill."""
    factor: float = 3.0
    least_s: float = 0.0

    def __call__(self, tokens: int) -> float:
        return max(self.factor * (tokens * PROMPT_TOKEN_S + self.added_s), self.least_s)


class Tide(Struct, frozen=True):
    """Traffic of a scenario that rises and falls."""

    scenario: str
    rate: float
    """Requests a second, over whole periods."""
    depth: float
    """How far the rate goes up and down, of itself."""
    period_s: float
    phase: float
    """Of a period; at 0.25 it begins at its highest."""
    tokens: tuple[int, int]
    """Of a prompt: least and most."""
    hits: float = 0.0
    """Share of requests that begin with one of `prefixes`, each of `shared` tokens."""
    prefixes: int = 1
    shared: int = 0

    def at(self, seconds: float) -> float:
        """Requests a second at a moment."""
        turn = 2 * math.pi * (seconds / self.period_s + self.phase)
        return self.rate * (1 + self.depth * math.sin(turn))


def capacity(lengths: Sequence[int], prefills: int) -> float:
    """Requests a second that so many prefills can compute."""
    return prefills / (statistics.fmean(lengths) * PROMPT_TOKEN_S)


def poisson(rng: random.Random, rate: float, lengths: Sequence[int], limit: Limit) -> list[Chain]:
    """A request for each length, independent of each other, at `rate` a second."""
    due, chains = 0.0, list[Chain]()
    for tokens in lengths:
        due += rng.expovariate(rate)
        chains.append([Ask(due, tokens, limit(tokens), rng.getrandbits(32))])
    return chains


def closed(
    rng: random.Random, users: int, tokens: tuple[int, int], outputs: int, limit: Limit, each: int
) -> list[Chain]:
    """Users who ask again as soon as they have been answered or refused.

    Args:
        tokens: of a prompt: least and most.
        each: as often as this at most.
    """

    def ask() -> Ask:
        length = rng.randint(*tokens)
        return Ask(0.0, length, limit(length), rng.getrandbits(32), outputs=outputs)

    return [[ask() for _ in range(each)] for _ in range(users)]


def tidal(rng: random.Random, tides: Sequence[Tide], seconds: float, limit: Limit) -> list[Chain]:
    """The requests of all scenarios in the order of their arrival."""
    asks = [ask for tide in tides for ask in _of(rng, tide, seconds, limit)]
    return [[ask] for ask in sorted(asks, key=lambda ask: ask.due)]


def _of(rng: random.Random, tide: Tide, seconds: float, limit: Limit) -> list[Ask]:
    """A Poisson process at the highest rate, thinned out to the rate of each moment."""
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
