"""Tests for the window of a group's load: what cannot be right is left out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pdserve.control.cluster import Counters, Line, Load
from pdserve.control.window import WINDOW_S, Window, observation, take
from pdserve.control.work import Work

QUIET = Line(0.0, 0.0, 0.0, 0.0)


def sample(at: float, *, p: float | None = None, d: float | None = None, **line: float) -> Load:
    """Return a sample of a prefill and a decode; each value is what the role has completed."""
    instances = {
        name: None if done is None else Counters(1, Work(done, done, 2 * done), leased=1.0)
        for name, done in (("p", p), ("d", d))
    }
    return Load(at, instances, {"gateway": replace(QUIET, **line)})


def grown(*samples: Load, cold: tuple[str, ...] = (), keep: bool = True) -> Window:
    window = Window()
    for one in samples:
        window = take(window, one, {"p": "prefill", "d": "decode"}, cold, keep)
    return window


def test_work_is_what_was_done_between_two_samples() -> None:
    window = grown(sample(0, p=10, d=5), sample(5, p=16, d=9, routed=20, waiting=3))
    seen = observation(window, 1, 1, 8, 10.0)
    assert seen.prefill_work == Work(6, 6, 12)
    assert seen.decode_work == Work(4, 4, 8)
    assert (seen.waiting, seen.leased) == (3, 1)
    assert window.arrivals == 4
    assert not window.unknown


def test_the_same_sample_counts_once() -> None:
    first, second = sample(0, p=1, d=1), sample(5, p=2, d=2)
    assert grown(first, second) == grown(first, second, second, first)


def test_it_ends_after_its_time() -> None:
    window = grown(*(sample(at, p=at, d=at) for at in range(0, 300, 5)))
    assert window.seconds == WINDOW_S
    assert window.ticks[0].at == 300 - WINDOW_S


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 3.0])
def test_an_increase_that_cannot_be_is_left_out(wrong: float) -> None:
    """3 is less than before: the counter was reset."""
    window = grown(sample(0, p=10, d=10), sample(5, p=wrong, d=20))
    assert window.ticks[0].prefill == Work()
    assert window.ticks[0].decode == Work(10, 10, 20)


def test_another_assignment_begins_anew() -> None:
    later = sample(5, p=20, d=20)
    moved = Load(5, {**later.instances, "p": Counters(2, Work(20, 20, 40))}, later.gateways)
    assert grown(sample(0, p=10, d=10), moved).ticks[0].prefill == Work()


def test_a_cold_instance_and_a_time_of_change_tell_nothing() -> None:
    samples = sample(0, p=10, d=10), sample(5, p=20, d=20)
    assert grown(*samples, cold=("p",)).ticks[0].prefill == Work()
    assert not grown(*samples, keep=False).ticks


def test_who_did_not_answer_is_unknown() -> None:
    assert grown(sample(0, p=1, d=1), sample(5, d=1)).unknown == ("p",)
    silent = replace(sample(5, p=2, d=2), gateways={"gateway": None})
    assert grown(sample(0, p=1, d=1), silent).unknown == ("gateway",)
    strange = sample(5, p=2, d=2, waiting=math.nan)
    assert grown(sample(0, p=1, d=1), strange).unknown == ("gateway",)


def test_a_gateway_whose_oldest_request_does_not_age_stands_still() -> None:
    waits = {"waiting": 4.0, "oldest_s": 3.0}
    assert grown(sample(0, p=1, d=1, **waits), sample(5, p=2, d=2, **waits)).unknown == ("gateway",)
    idle = grown(sample(0, p=1, d=1), sample(5, p=2, d=2))
    assert not idle.unknown, "an idle one has the same numbers all the time"


def test_after_a_pause_longer_than_the_window_it_begins_again() -> None:
    window = grown(sample(0, p=1, d=1), sample(5, p=2, d=2), sample(70, p=9, d=9))
    assert not window.ticks


def test_noise_is_that_of_the_rates() -> None:
    """Two ticks of 8 and two of 12 completions in the same time: 20 % of scatter, by 4 ticks."""
    done = [0.0, 8.0, 20.0, 28.0, 40.0]
    samples = [
        Load(
            5.0 * n,
            {
                "p": Counters(1, Work(completed=total, busy_s=5.0 * n, slot_s=1.0)),
                "d": Counters(1, Work(completed=10.0 * n, busy_s=5.0 * n, slot_s=5.0 * n)),
            },
            {},
        )
        for n, total in enumerate(done)
    ]
    seen = observation(grown(*samples), 1, 1, 8, 10.0)
    assert seen.noise == pytest.approx(0.2 / math.sqrt(3))
    assert observation(grown(*samples[:3]), 1, 1, 8, 10.0).noise == math.inf
