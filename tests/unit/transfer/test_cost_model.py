"""Tests for the fitted cost of moves over a link, and for the choice of a strategy by it."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.transfer.consumer.cost_model import Choice, Cost, CostModel, Seen, choose, fit, sums
from pdserve.transfer.consumer.probe import Probe
from pdserve.transfer.consumer.staging import Staging
from tests.unit.memcpy import MemcpyLink

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pdserve.transfer.consumer.cost_model import Strategy

# (segments, bytes) of the probes: from one row to a MiB at once, and in many segments.
SHAPES = [
    (rows // run, rows << 10)
    for rows, run in ((1, 1), (16, 16), (256, 256), (256, 4), (1024, 1024), (1024, 64), (1024, 8))
]
# Measured on links of several kinds: seconds per move, per descriptor or copy, and per byte.
CMA = Cost(20e-6, 0.4e-6, 1 / 11e9)
TCP = Cost(80e-6, 2e-6, 1 / 2.5e9)
GIGABIT = Cost(300e-6, 3e-6, 1 / 0.117e9)
LINKS = {"cma": CMA, "tcp": TCP, "gigabit": GIGABIT}

coefficients = st.builds(Cost, st.floats(1e-6, 1e-2), st.floats(1e-8, 1e-4), st.floats(1e-11, 1e-7))
measured = st.builds(Seen, st.integers(1, 10_000), st.integers(1, 1 << 30), st.floats(1e-6, 10.0))


def seen(cost: Cost, shapes: Iterable[tuple[int, int]] = SHAPES) -> list[Seen]:
    """Return the samples that a link with these costs would give."""
    return [Seen(*shape, cost.seconds(*shape)) for shape in shapes]


def error(found: Cost, real: Cost, segments: int, nbytes: int) -> float:
    """Return the relative error of a predicted time."""
    wanted = real.seconds(segments, nbytes)
    return abs(found.seconds(segments, nbytes) - wanted) / wanted


# ------------------------------------------------------------------------------------------ the fit


@given(coefficients)
def test_a_fit_foretells_what_it_was_fitted_on(cost: Cost) -> None:
    """A coefficient whose term is dwarfed by another does not matter, and may be wrong."""
    found = fit(sums(seen(cost)))
    for shape in SHAPES:
        assert error(found, cost, *shape) < 0.03


@pytest.mark.parametrize("cost", LINKS.values(), ids=LINKS)
def test_a_fit_recovers_a_link_s_coefficients(cost: Cost) -> None:
    found = fit(sums(seen(cost)))
    for ours, real in zip(found, cost, strict=True):
        assert ours == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("cost", LINKS.values(), ids=LINKS)
def test_a_fit_foretells_moves_that_it_was_not_fitted_on(cost: Cost) -> None:
    """The move is a prompt of a large model: hundreds of MiB, or tens of thousands of segments."""
    found = fit(sums(seen(cost)))
    for segments, nbytes in ((1, 1 << 30), (64, 256 << 20), (20_000, 256 << 20), (4000, 1 << 20)):
        assert error(found, cost, segments, nbytes) < 0.1


@given(st.lists(measured, max_size=20))
def test_no_coefficient_is_negative(moves: list[Seen]) -> None:
    """All coefficients are finite, too, whatever was measured."""
    found = fit(sums(moves))
    assert all(0 <= value < np.inf for value in found)


@given(st.lists(measured, min_size=1, max_size=12))
def test_no_other_coefficients_fit_better(moves: list[Seen]) -> None:
    """The squared relative error is compared with that of nearby coefficients."""

    def loss(cost: Cost) -> float:
        return sum((cost.seconds(m.segments, m.nbytes) / m.seconds - 1) ** 2 for m in moves)

    found = fit(sums(moves))
    best = loss(found)
    for factors in ((1.1, 1, 1), (1, 1.1, 1), (1, 1, 1.1), (0.9, 1, 1), (1, 0.9, 1), (1, 1, 0.9)):
        other = Cost(*(a * b for a, b in zip(found, factors, strict=True)))
        assert best <= loss(other) * (1 + 1e-6) + 1e-9


def test_small_moves_count_as_much_as_large_ones() -> None:
    """The error is relative: 10 % of 20 us counts as much as 10 % of 200 ms."""
    shapes = [(1, 64 << 20), (1, 256 << 20)]
    moves = seen(CMA) + [
        Seen(*shape, CMA.seconds(*shape) * factor)
        for shape, factor in zip(shapes, (1.1, 0.9), strict=True)
    ]
    assert error(fit(sums(moves)), CMA, 1, 1024) < 0.05
    rows = np.array([[1.0, move.segments, move.nbytes] for move in moves])
    plain = np.linalg.lstsq(rows, np.array([move.seconds for move in moves]), rcond=None)[0]
    assert error(Cost(*plain.tolist()), CMA, 1, 1024) > 5


def test_noise_does_not_throw_a_fit_off() -> None:
    rng = random.Random(0)
    noisy = [
        Seen(m.segments, m.nbytes, m.seconds * rng.uniform(0.8, 1.25))
        for m in seen(TCP, SHAPES * 8)
    ]
    found = fit(sums(noisy))
    for segments, nbytes in (*SHAPES, (1000, 64 << 20)):
        assert error(found, TCP, segments, nbytes) < 0.15


def test_a_fit_of_nothing_costs_nothing() -> None:
    assert fit(sums([])) == Cost(0.0, 0.0, 0.0)


# --------------------------------------------------------------------------------------- the choice

# Staging costs a copy of the bytes; over a link, a descriptor costs more than a memory copy.
COSTS: dict[Strategy, Cost] = {
    "whole": Cost(25e-6, 0.1e-6, 1 / 6e9),
    "direct": Cost(25e-6, 1e-6, 1 / 11e9),
}


@given(st.integers(1, 100_000), st.integers(1, 1 << 30))
def test_the_quicker_one_is_chosen(segments: int, nbytes: int) -> None:
    strategy, seconds = choose(COSTS, segments, nbytes, staging_free=1)
    expected = {name: cost.seconds(segments, nbytes) for name, cost in COSTS.items()}
    assert seconds == expected[strategy] == min(expected.values())


def test_few_large_segments_go_direct_and_many_small_ones_do_not() -> None:
    assert choose(COSTS, 64, 256 << 20, 1).strategy == "direct"
    assert choose(COSTS, 40_000, 256 << 20, 1).strategy == "whole"


def test_whole_needs_staging() -> None:
    """Without a free buffer it would wait for another pull, which its cost does not include."""
    assert choose(COSTS, 40_000, 256 << 20, 1).strategy == "whole"
    assert choose(COSTS, 40_000, 256 << 20, 0) == Choice(
        "direct", COSTS["direct"].seconds(40_000, 256 << 20)
    )


# ------------------------------------------------------------------------- the cost model of a link


def cost_model(whole: Cost = COSTS["whole"], direct: Cost = COSTS["direct"]) -> CostModel:
    return CostModel({"whole": seen(whole), "direct": seen(direct)})


def test_a_tuner_begins_with_its_probes() -> None:
    made = cost_model()
    for segments, nbytes in ((64, 256 << 20), (40_000, 256 << 20), (1, 1000)):
        assert (
            made.choose(segments, nbytes, 1).strategy == choose(COSTS, segments, nbytes, 1).strategy
        )
        assert made.choose(segments, nbytes, 0).strategy == "direct"


def test_a_link_that_changes_is_learnt() -> None:
    """Its descriptors cost ten times as much: direct is chosen until that is learnt."""
    made, dearer = cost_model(), Cost(25e-6, 10e-6, 1 / 11e9)
    move = (2000, 64 << 20)
    assert made.choose(*move, 1).strategy == "direct"
    taken = 0
    while made.choose(*move, 1).strategy == "direct":
        made.saw("direct", Seen(*move, dearer.seconds(*move)))
        taken += 1
        assert taken < 20
    for _ in range(100):
        made.saw("direct", Seen(*move, dearer.seconds(*move)))
    assert error(made.costs["direct"], dearer, *move) < 0.1


def test_a_link_that_recovers_is_learnt() -> None:
    made, slow = cost_model(), Cost(25e-6, 10e-6, 1 / 1e9)
    move = (2000, 64 << 20)
    for _ in range(150):
        made.saw("direct", Seen(*move, slow.seconds(*move)))
    assert error(made.costs["direct"], slow, *move) < 0.2
    for _ in range(20):
        made.saw("direct", Seen(*move, COSTS["direct"].seconds(*move)))
    assert error(made.costs["direct"], COSTS["direct"], *move) < 0.1, "faster than it was unlearnt"


def test_what_one_strategy_has_shown_says_nothing_of_the_other() -> None:
    made = cost_model()
    before = made.costs["whole"]
    made.saw("direct", Seen(5, 1 << 20, 1.0))
    assert made.costs["whole"] == before
    assert made.costs["direct"] != cost_model().costs["direct"]


def test_probes_are_never_forgotten() -> None:
    """Moves of one shape do not determine a fit; the probes keep it bounded."""
    made = cost_model()
    for _ in range(1000):
        made.saw("direct", Seen(64, 256 << 20, COSTS["direct"].seconds(64, 256 << 20)))
    for shape in SHAPES:
        assert error(made.costs["direct"], COSTS["direct"], *shape) < 0.1


# --------------------------------------------------------------------------------------- the probes


def test_probes_tell_the_strategies_apart() -> None:
    """On a link whose spans take a millisecond each, segments determine the cost of direct."""
    link, staging = (
        MemcpyLink(None, np.zeros(1 << 20, np.uint8)),
        Staging(np.ones((2, 1 << 20), np.uint8)),
    )
    link.nap_s = 1e-3
    measured = Probe(staging).moves(link, 1 << 20)
    # The fourth shape has 64 segments; it takes so long that others add nothing about direct.
    # Beyond the seventh a shape is larger than the data.
    assert {name: len(moves) for name, moves in measured.items()} == {"whole": 7, "direct": 4}
    made = CostModel(measured)
    assert made.choose(1000, 1 << 20, 1).strategy == "whole"
    assert 0.5e-3 < made.costs["direct"].per_segment < 2e-3
    assert staging.free == staging.memory.nbytes


def test_latency_is_the_median_of_some_looks() -> None:
    class Slow(MemcpyLink):
        looks = 0

        def peek(self, slot: int, deadline: float) -> bytes:
            self.looks += 1
            time.sleep(0.2 if self.looks == 1 else 0.002)
            return bytes(64)

    link, staging = Slow(None, np.zeros(1, np.uint8)), Staging(np.ones((1, 1), np.uint8))
    assert 0.002 <= Probe(staging).latency(link) < 0.05
