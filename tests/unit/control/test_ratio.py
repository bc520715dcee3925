"""Tests for the ratio of prefills and decodes, against equation (1) and a known engine."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.control.ratio import (
    CALM_GAIN,
    COMPLETIONS,
    LEAST,
    Observation,
    advise,
    best,
    throughput,
)
from pdserve.control.work import Work, decode_rate, prefill_rate

if TYPE_CHECKING:
    from collections.abc import Callable

# An engine whose step takes longer with a larger batch: 20 ms and 1 ms for each answer.
STEP_S, STEP_S_EACH = 0.020, 0.001
ANSWER_TOKENS = 100
SLOTS = 32
PREFILL_S = 0.25


def step_s(batch: float) -> float:
    return STEP_S + STEP_S_EACH * batch


FULL_RATE = SLOTS / (ANSWER_TOKENS * step_s(SLOTS))
"""Answers per second of that engine with a full batch."""


def decoding(*batches: float, of: Callable[[float], float] = step_s) -> Work:
    """Return what a decode does in 5 s with each of these batches."""
    work = Work()
    for batch in batches:
        steps = 5.0 / of(batch)
        work += Work(
            completed=steps * batch / ANSWER_TOKENS,
            busy_s=5.0,
            slot_s=5.0 * batch,
            steps=steps,
            sequences=steps * batch,
            sequences_squared=steps * batch**2,
            sequence_s=5.0 * batch,
        )
    return work


def prefilling(share: float, seconds: float = 60.0) -> Work:
    """Return what a prefill does that computes for a share of the time."""
    return Work(share * seconds / PREFILL_S, share * seconds, 1.5 * share * seconds)


def observation(prefills: int, decodes: int, batches: list[float], share: float) -> Observation:
    return Observation(
        prefills=prefills,
        decodes=decodes,
        decode_slots=SLOTS,
        prefill_work=sum([prefilling(share)] * prefills, Work()),
        decode_work=sum([decoding(*batches)] * decodes, Work()),
        waiting=0.0,
        leased=0.0,
        oldest_s=0.0,
        limit_s=10.0,
    )


def test_the_papers_example() -> None:
    """Section 2.1, figure 12a: 0.6 and 0.7 requests per second make 7:6."""
    assert best(6, 7, 0.6, 0.7) == 7
    assert best(2, 11, 0.6, 0.7) == 7
    assert best(6, 6, 0.6, 0.7) == 6


@given(
    prefills=st.integers(1, 20),
    decodes=st.integers(1, 20),
    rates=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
)
def test_no_other_ratio_is_better(prefills: int, decodes: int, rates: tuple[float, float]) -> None:
    every = prefills + decodes
    found = best(prefills, decodes, *rates)
    if every < 2 * LEAST:
        assert found == prefills
        return
    assert LEAST <= found <= every - LEAST
    reached = throughput(found, every - found, *rates)
    for other in range(LEAST, every - LEAST + 1):
        there = throughput(other, every - other, *rates)
        assert there <= reached
        if there == reached:
            assert abs(found - prefills) <= abs(other - prefills), "among equals it moves the least"


def test_the_rate_of_a_full_batch_is_known_at_40_percent_load() -> None:
    """The time of a step grows with the batch, so the rate of a part-full batch is too high."""
    rng = random.Random(1)
    work = decoding(*(rng.uniform(0.1, 0.7) * SLOTS for _ in range(24)))
    assert decode_rate(work, SLOTS) == pytest.approx(FULL_RATE)
    assert SLOTS / (work.slot_s / work.completed) > 1.3 * FULL_RATE, "uncorrected it would be this"


def test_batches_that_are_all_equal_tell_nothing_of_larger_ones() -> None:
    expected = SLOTS / (ANSWER_TOKENS * step_s(10))
    assert decode_rate(decoding(10, 10, 10), SLOTS) == pytest.approx(expected)


def test_a_step_is_not_believed_to_become_shorter_with_a_larger_batch() -> None:
    work = decoding(5, 10, 15, 20, of=lambda batch: 0.05 - 0.001 * batch)
    mean_s = work.busy_s / work.steps
    seen_s = work.sequence_s / work.sequences
    held_s = work.slot_s / work.completed
    assert decode_rate(work, SLOTS) == pytest.approx(SLOTS / (held_s * mean_s / seen_s))


def test_engines_that_do_not_tell_their_steps_are_not_corrected() -> None:
    assert decode_rate(Work(100.0, 50.0, 400.0), SLOTS) == SLOTS / 4


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_the_rate_of_a_prefill_does_not_depend_on_its_load(share: float) -> None:
    assert prefill_rate(prefilling(share)) == pytest.approx(1 / PREFILL_S)


def test_without_work_no_rate_is_known() -> None:
    assert prefill_rate(Work()) is decode_rate(Work(), SLOTS) is None
    assert prefill_rate(Work(busy_s=1.0)) is decode_rate(Work(slot_s=1.0), SLOTS) is None


def test_advice_at_40_percent_load() -> None:
    """Prefills are four times as fast as needed; the full batch decides, not the present one."""
    rng = random.Random(3)
    batches = [rng.uniform(0.1, 0.7) * SLOTS for _ in range(12)]
    advice = advise(observation(8, 4, batches, 0.4))
    best_now = best(8, 4, 1 / PREFILL_S, FULL_RATE)
    assert (advice.prefills, advice.decodes) == (best_now, 12 - best_now)
    assert advice.prefills < 8
    assert advice.gain == pytest.approx(
        throughput(best_now, 12 - best_now, 1 / PREFILL_S, FULL_RATE)
        / throughput(8, 4, 1 / PREFILL_S, FULL_RATE)
        - 1,
        rel=0.02,
    )


def seen(**changes: Any) -> Observation:
    return replace(observation(8, 4, [4.0, 8.0, 16.0, 24.0], 0.4), **changes)


def test_few_completions_are_no_reason() -> None:
    few = Work(4.0, 1.0, 1.0)
    for role in ("prefill", "decode"):
        advice = advise(seen(**{f"{role}_work": few}))
        assert (advice.prefills, advice.decodes) == (8, 4)
        assert f"the {role}s have completed 4 requests of {COMPLETIONS}" in advice.reason


def test_who_waits_must_not_speak_against_it() -> None:
    assert advise(seen()).prefills < 8
    assert advise(seen(leased=3.0)).prefills < 8
    assert advise(seen(waiting=7.0, leased=3.0)).prefills < 8, (
        "as many are on their way at any time"
    )
    assert advise(seen(waiting=12.0, leased=13.0)).prefills < 8, "more wait for a decode"
    held = advise(seen(waiting=12.0, leased=3.0))
    assert held.prefills == 8
    assert held.reason == "12.0 requests wait for a prefill, 3.0 for a decode"


def test_a_small_gain_is_worth_a_change_only_if_requests_wait_long() -> None:
    """13 instances at 6:7 would gain 3.4 % by 7:6 with these rates."""
    prefills, decodes = Work(120.0, 120.0 / 0.62), Work(120.0, 120.0, 120.0 / 0.65)
    calm = replace(
        observation(6, 7, [1.0], 1.0),
        prefill_work=prefills,
        decode_work=decodes,
        decode_slots=1,
    )
    gain = throughput(7, 6, 0.62, 0.65) / throughput(6, 7, 0.62, 0.65) - 1
    assert 0.03 < gain < CALM_GAIN
    assert advise(calm).reason == f"7:6 would gain {gain:.1%}, of 8% needed"
    pressed = advise(replace(calm, oldest_s=6.0))
    assert (pressed.prefills, pressed.decodes) == (7, 6)
    assert advise(replace(calm, oldest_s=4.0)).prefills == 6


def test_the_best_ratio_is_kept() -> None:
    advice = advise(replace(seen(), prefills=7, decodes=5))
    assert (advice.prefills, advice.decodes) == (7, 5)
    assert advice.reason == "no other ratio has a higher throughput"
