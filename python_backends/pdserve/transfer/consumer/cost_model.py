"""Which strategy is the quickest for a move, by what this link's moves have taken so far.

Every strategy has a cost of its own, linear in what it does:

    seconds = fixed + per_segment * segments + per_byte * bytes

For *direct* a segment is a descriptor; for *whole* it is a copy of the scatter, so that the
difference of the two `per_byte` is what staging and scattering cost. The coefficients are those
of least *relative* error over the probes on connecting and the moves seen since, of which older
ones count less; none is negative. That a link has become ten times slower is half believed after
fifty moves, and all but so after a hundred.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["whole", "direct"]

# What a move that was seen counts, when one more has been; and a probe, down to what it always
# counts: moves are much alike, and would alone leave a fit open. More, and the probes of a link
# that has become slower would never be outvoted: to foretell ten times what was seen is an error
# of 9, a tenth one of 0.9 only.
FADING = 0.95
KEPT = 0.01
# A cost that has foretold a move within this is left as it is: a fit takes 0.2 ms.
GOOD = 0.1
_RIDGE = 1e-9


class Seen(NamedTuple):
    """A move, and what it took."""

    segments: int
    nbytes: int
    seconds: float


class Cost(NamedTuple):
    """Seconds of a move by one strategy."""

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
    """Each move weighs 1 / seconds: what counts is the relative error."""
    made = NOTHING
    for move in seen:
        row = np.array([1.0, move.segments, move.nbytes]) / move.seconds
        made = made.plus(Sums(np.outer(row, row), row))
    return made


def fit(of: Sums) -> Cost:
    """The coefficients of least squared relative error that are not negative.

    The best of the fits by some of the coefficients, without those that have a negative one: one
    of them is the optimum of non-negative least squares.
    """
    scale = 1 / np.sqrt(np.maximum(of.squares.diagonal(), 1e-300))
    squares, products = of.squares * np.outer(scale, scale), of.products * scale
    best, least = np.zeros(3), 0.0
    for number in (1, 2, 3):
        for some in map(list, combinations(range(3), number)):
            found = np.zeros(3)
            # Of a diagonal of ones: so little more makes any of them solvable, and moves nothing.
            regular = squares[np.ix_(some, some)] + _RIDGE * np.eye(number)
            found[some] = np.linalg.solve(regular, products[some])
            loss = found @ squares @ found - 2 * products @ found
            if (found >= 0).all() and loss < least:
                best, least = found, loss
    return Cost(*(best * scale).tolist())


class Choice(NamedTuple):
    strategy: Strategy
    seconds: float
    """Expected."""


def choose(costs: dict[Strategy, Cost], segments: int, nbytes: int, staging_free: int) -> Choice:
    """The strategy that is expected to be the quickest; *whole* only while it finds staging."""
    able: list[Strategy] = ["whole", "direct"] if staging_free else ["direct"]
    return min(
        (Choice(name, costs[name].seconds(segments, nbytes)) for name in able),
        key=lambda choice: choice.seconds,
    )


class CostModel:
    """Estimates what moves over one link take.

    It begins with the probes, and never quite forgets them."""

    def __init__(self, probes: dict[Strategy, list[Seen]]) -> None:
        self._probes = {name: sums(seen) for name, seen in probes.items()}
        self._weights = dict.fromkeys(probes, 1.0)
        self._since = dict.fromkeys(probes, NOTHING)
        self.costs = {name: fit(probed) for name, probed in self._probes.items()}

    def choose(self, segments: int, nbytes: int, staging_free: int) -> Choice:
        return choose(self.costs, segments, nbytes, staging_free)

    def probed(self, segments: int, nbytes: int, staging_free: int) -> Choice:
        """What the choice was before any move had been seen."""
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
