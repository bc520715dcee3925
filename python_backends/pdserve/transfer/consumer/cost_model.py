"""A cost model of moves over one link, from the moves seen so far, to choose the fastest strategy.

Every strategy has its own cost, linear in the work:

    seconds = fixed + per_segment * segments + per_byte * bytes

For *direct* a segment is a descriptor; for *whole* it is a copy of the scatter, so that the
difference of the two `per_byte` is the cost of staging and scattering. The coefficients minimize
the *relative* error over the probes on connecting and the moves seen since, of which older ones
count less; none is negative. If a link becomes ten times slower, the estimate has adapted by half
after fifty moves, and almost fully after a hundred.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["whole", "direct"]

# Factors by which the weight of a seen move is reduced with each further move, and the least weight
# of a probe: moves are much alike, and would alone leave a fit undetermined. With a larger least
# weight, the probes of a link that has become slower would never be outvoted: to predict ten times
# of what was seen is an error of 9, a tenth an error of only 0.9.
FADING = 0.95
KEPT = 0.01
# A cost that has predicted a move within this relative error is kept: a fit takes 0.2 ms.
GOOD = 0.1
_RIDGE = 1e-9


class Seen(NamedTuple):
    """A move that was measured."""

    segments: int
    nbytes: int
    seconds: float


class Cost(NamedTuple):
    """Coefficients of the seconds of a move by one strategy."""

    fixed: float
    per_segment: float
    per_byte: float

    def seconds(self, segments: int, nbytes: int) -> float:
        return self.fixed + self.per_segment * segments + self.per_byte * nbytes


class Sums(NamedTuple):
    """The normal equations of a fit: float64 [3, 3] and [3]."""

    squares: NDArray[np.float64]
    products: NDArray[np.float64]

    def plus(self, other: Sums) -> Sums:
        return Sums(self.squares + other.squares, self.products + other.products)

    def times(self, weight: float) -> Sums:
        return Sums(self.squares * weight, self.products * weight)


NOTHING = Sums(np.zeros((3, 3)), np.zeros(3))


def sums(seen: Iterable[Seen]) -> Sums:
    """Return the sums over moves, each weighted by 1 / seconds: the relative error counts."""
    made = NOTHING
    for move in seen:
        row = np.array([1.0, move.segments, move.nbytes]) / move.seconds
        made = made.plus(Sums(np.outer(row, row), row))
    return made


def fit(of: Sums) -> Cost:
    """Return the non-negative coefficients with the least squared relative error.

    They are the best of the fits by a subset of the coefficients in which none is negative: one of
    these is the optimum of non-negative least squares.
    """
    scale = 1 / np.sqrt(np.maximum(of.squares.diagonal(), 1e-300))
    squares, products = of.squares * np.outer(scale, scale), of.products * scale
    best, least = np.zeros(3), 0.0
    for number in (1, 2, 3):
        for some in map(list, combinations(range(3), number)):
            found = np.zeros(3)
            # Added to a diagonal of ones, so small a term makes every system solvable, and changes
            # nothing.
            regular = squares[np.ix_(some, some)] + _RIDGE * np.eye(number)
            found[some] = np.linalg.solve(regular, products[some])
            loss = found @ squares @ found - 2 * products @ found
            if (found >= 0).all() and loss < least:
                best, least = found, loss
    return Cost(*(best * scale).tolist())


class Choice(NamedTuple):
    strategy: Strategy
    seconds: float
    """Expected seconds of the move."""


def choose(costs: dict[Strategy, Cost], segments: int, nbytes: int, staging_free: int) -> Choice:
    """Return the strategy that is expected to be the fastest.

    *whole* only while staging is free.
    """
    able: list[Strategy] = ["whole", "direct"] if staging_free else ["direct"]
    return min(
        (Choice(name, costs[name].seconds(segments, nbytes)) for name in able),
        key=lambda choice: choice.seconds,
    )


class CostModel:
    """Estimates the duration of moves over one link.

    It begins with the probes, which always keep a small weight."""

    def __init__(self, probes: dict[Strategy, list[Seen]]) -> None:
        self._probes = {name: sums(seen) for name, seen in probes.items()}
        self._weights = dict.fromkeys(probes, 1.0)
        self._since = dict.fromkeys(probes, NOTHING)
        self.costs = {name: fit(probed) for name, probed in self._probes.items()}

    def choose(self, segments: int, nbytes: int, staging_free: int) -> Choice:
        return choose(self.costs, segments, nbytes, staging_free)

    def probed(self, segments: int, nbytes: int, staging_free: int) -> Choice:
        """Return the choice by the probes only, as before any move had been seen."""
        costs = {name: fit(sums) for name, sums in self._probes.items()}
        return choose(costs, segments, nbytes, staging_free)

    def saw(self, strategy: Strategy, seen: Seen) -> None:
        """Learn from a move."""
        since = self._since[strategy].times(FADING).plus(sums([seen]))
        weight = max(self._weights[strategy] * FADING, KEPT)
        self._since[strategy], self._weights[strategy] = since, weight
        foretold = self.costs[strategy].seconds(seen.segments, seen.nbytes)
        if abs(foretold - seen.seconds) > GOOD * seen.seconds:
            self.costs[strategy] = fit(self._probes[strategy].times(weight).plus(since))
