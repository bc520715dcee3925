"""The traffic of a run: requests of two kinds at a constant rate, whose mix changes.

It is made before a run, so that every setting gets the same requests. The controller works with
another clock, which runs `SCALE` times as fast; times here are by that clock where their name says
`_scaled_s`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.control.window import WINDOW_S as WINDOW_SCALED_S
from perf.control import mixes
from perf.control.mixes import Kind
from perf.scheduling.workload import Ask, Chain

SCALE = 6.0
"""Seconds of the controller's clock in one second."""
WINDOW_S = WINDOW_SCALED_S / SCALE
"""The controller's window, in seconds."""
SETTLE_S = 2 * WINDOW_S
"""Seconds at the beginning that are not counted: the controller's first window fills."""
LOAD = 0.8
"""Rate of requests, as a part of what the best ratio serves of A, of B, or of half of each."""
TTFT_LIMIT_S = 1.0
TPOT_LIMIT_S = 0.05
"""1.6 times a step with a full batch."""
VARIATION = 0.5
"""Standard deviation of the numbers of tokens, as a part of their mean."""
LONGEST = 3.0
"""No prompt or answer has more tokens than so many times the mean."""

TIDE_SCALED_S = 20 * 60.0
"""Period of the tide."""
SQUARE_SCALED_S = 20.0
"""Period of the square wave: a third of the controller's window."""
STEP_SCALED_S = 2 * 60.0
"""When the step comes."""

Weight = Callable[[float], float]
"""Share of requests of kind B, by the seconds after what is not counted, negative before."""


@dataclass(frozen=True)
class Traffic:
    """The requests of one run.

    Args:
        seconds: how long requests arrive, after the time that is not counted.
        prefills: those of the fixed ratios that serve the same requests.
    """

    name: str
    weight: Weight
    seconds: float
    prefills: Sequence[int]

    @property
    def rate(self) -> float:
        """Return the requests per second."""
        return LOAD * mixes.capacity(mixes.best(0.5), 0.5)

    def chains(self, seed: int) -> list[Chain]:
        """Return its requests in the order of their arrival: a Poisson process."""
        rng = random.Random(f"{self.name} {seed}")
        chains: list[Chain] = []
        due = rng.expovariate(self.rate)
        while due < SETTLE_S + self.seconds:
            weight = self.weight(due - SETTLE_S)
            kind = mixes.B if rng.random() < weight else mixes.A
            chains.append([_ask(rng, kind, due)])
            due += rng.expovariate(self.rate)
        return chains


def _ask(rng: random.Random, kind: Kind, due: float) -> Ask:
    prompt = max(1, _tokens(rng, kind.prompt))
    answer = 1 + max(1, _tokens(rng, kind.answer - 1))
    return Ask(due, prompt, TTFT_LIMIT_S, rng.getrandbits(32), outputs=answer)


def _tokens(rng: random.Random, mean: float) -> int:
    """Draw a number of tokens from a lognormal distribution."""
    sigma = math.sqrt(math.log(1 + VARIATION**2))
    drawn = rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
    return round(min(drawn, LONGEST * mean))


def stationary(scaled_s: float, prefills: Sequence[int]) -> Traffic:
    """Return half of each kind all the time."""
    return Traffic("stationary", lambda _: 0.5, scaled_s / SCALE, prefills)


def tide(period_scaled_s: float, prefills: Sequence[int]) -> Traffic:
    """Return one turn from half of each kind to B, to A, and back, each pure for a while.

    The share of B follows a sine that is cut at 0 and 1; it is pure for a third of the time.
    """
    period = period_scaled_s / SCALE

    def weight(t: float) -> float:
        return min(1.0, max(0.0, 0.5 + math.sin(2 * math.pi * max(0.0, t) / period) / math.sqrt(3)))

    return Traffic("tide", weight, period, prefills)


def step(scaled_s: float) -> Traffic:
    """Return a change at once from half of each kind to B, whose best ratio has two prefills
    fewer."""
    at = STEP_SCALED_S / SCALE
    seconds = at + scaled_s / SCALE
    best = mixes.best(0.5), mixes.best(1.0)
    return Traffic("step", lambda t: 1.0 if t >= at else 0.5, seconds, best)


def square(scaled_s: float) -> Traffic:
    """Return A and B by turns, faster than the controller can follow."""
    period = SQUARE_SCALED_S / SCALE
    weight: Weight = lambda t: float(t % period >= period / 2)  # noqa: E731 - one line of a table
    return Traffic("square", weight, scaled_s / SCALE, (mixes.best(0.5),))
