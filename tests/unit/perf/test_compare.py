"""Tests for the comparison of two checkouts: the interval of its ratios."""

from __future__ import annotations

import pytest
from perf.compare import MIN_ROUNDS, Compared, rank


# The ranks, counted from 1, at which both tails of the binomial distribution hold at most 2.5 %:
@pytest.mark.parametrize(("count", "first"), [(MIN_ROUNDS, 1), (10, 2), (20, 6), (30, 10)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count: int, first: int) -> None:
    assert rank(count) == first - 1


def test_a_ratio_is_of_one_round_and_its_interval_omits_the_outliers() -> None:
    there = [float(1 + number) for number in range(10)]
    here = [2 * value for value in there]
    here[3], here[7] = 100 * there[3], there[7] / 100
    compared = Compared("CPU", here, there)
    assert compared.ratios[0] == pytest.approx(0.01)
    assert compared.ratios[-1] == pytest.approx(100)
    assert compared.interval == (2, 2)
