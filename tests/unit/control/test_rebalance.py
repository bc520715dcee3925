"""Tests for changes of a ratio: when there is one, and when it holds still."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pdserve.control.cluster import Line
from pdserve.control.decide import TICK_S
from pdserve.control.memory import Memory
from pdserve.control.policy import Bounds
from pdserve.control.records import PINS, Phase, Pin
from pdserve.control.window import WINDOW_S
from tests.unit.control.fleets import GROUP, Fleet

if TYPE_CHECKING:
    from collections.abc import Callable

PREFILL_RATE, DECODE_RATE = 6.0, 7.0
LONG_S = 20 * 60.0


def settled(fleet: Fleet, prefill_rate: float = PREFILL_RATE) -> tuple[int, int]:
    fleet.live(LONG_S, prefill_rate, DECODE_RATE)
    assert not fleet.busy
    return fleet.roles()


@pytest.mark.parametrize(("prefills", "decodes"), [(3, 10), (6, 7), (11, 2)])
def test_the_papers_example(prefills: int, decodes: int) -> None:
    """Figure 12a: rates of 0.6 to 0.7 make 7:6 of 13, and 6:6 of 12."""
    assert settled(Fleet(prefills, decodes)) == (7, 6)


@pytest.mark.parametrize(("prefills", "decodes"), [(3, 9), (10, 2)])
def test_the_papers_example_with_12(prefills: int, decodes: int) -> None:
    """7:5 is as good within 3 %: from there a calm group does not move."""
    assert settled(Fleet(prefills, decodes)) in ((6, 6), (7, 5))


def test_after_a_change_nothing_more_is_asked_for() -> None:
    """dynamo#9294: 2 to 1 and back under a load that does not change."""
    fleet = Fleet(4, 8)
    settled(fleet)
    begun = [one for one in fleet.events if one.what == "begin"]
    assert [one.numbers["target_prefills"] for one in begun] == [6]
    assert "begin" not in fleet.live(4 * LONG_S, PREFILL_RATE, DECODE_RATE)


def test_every_change_tells_its_inputs() -> None:
    fleet = Fleet(4, 8)
    fleet.live(WINDOW_S + 3 * TICK_S, PREFILL_RATE, DECODE_RATE)
    [begun] = [one for one in fleet.events if one.what == "begin"]
    assert begun.text == "ratio: 4:8 to 6:6: 50% more requests per second"
    assert begun.numbers["prefill_rate"] == pytest.approx(PREFILL_RATE)
    assert begun.numbers["decode_rate"] == pytest.approx(DECODE_RATE)
    assert begun.numbers["gain"] == pytest.approx(0.5)
    assert {"noise", "waiting", "leased", "oldest_s"} <= begun.numbers.keys()


def first_change(fleet: Fleet, seconds: float = LONG_S) -> float | None:
    """Return after how many seconds a transaction begins; None: not in this time."""
    began = fleet.now
    for _ in range(int(seconds / TICK_S)):
        if "begin" in fleet.live(TICK_S, PREFILL_RATE, DECODE_RATE):
            return fleet.now - began
    return None


@pytest.mark.parametrize(("oldest_s", "ticks"), [(4.0, 2), (6.0, 1)])
def test_a_calm_group_is_asked_twice_and_one_under_pressure_once(
    oldest_s: float, ticks: int
) -> None:
    """The oldest request has waited for less, or for more, than half of its limit."""
    fleet = Fleet(6, 6)
    fleet.live(2 * WINDOW_S, PREFILL_RATE, 0.95 * PREFILL_RATE)
    assert not fleet.busy
    asked = 0
    while not any(one.what == "begin" for one in fleet.events):
        oldest_s += 0.01  # a page that is the same twice stands still
        fleet.line = Line(8.0, 0.0, oldest_s, 0.0)
        fleet.live(TICK_S, PREFILL_RATE, 2 * PREFILL_RATE)
        asked += fleet.memory.of(GROUP).wished > 0 or fleet.busy or fleet.roles() != (6, 6)
    assert asked == ticks


def test_a_new_controller_waits_for_a_window_of_its_own() -> None:
    fleet = Fleet(4, 8)
    assert first_change(fleet) is not None
    other = Fleet(4, 8)
    other.live(0.7 * WINDOW_S, PREFILL_RATE, DECODE_RATE)
    other.memory = Memory()
    after = first_change(other)
    assert after is not None
    assert after >= 0.75 * WINDOW_S


def test_nothing_changes_again_before_a_window_has_passed() -> None:
    fleet = Fleet(2, 14)
    first_change(fleet)
    fleet.live(3 * TICK_S, PREFILL_RATE, DECODE_RATE)
    assert not fleet.busy
    again = first_change(fleet)
    assert again is not None
    assert again >= WINDOW_S - 2 * TICK_S
    held = [one.text for one in fleet.events if one.what == "hold"]
    assert f"it was changed less than {WINDOW_S:g} s ago" in held


def kill(fleet: Fleet) -> None:
    fleet.observe("p0", state="loading", phase=Phase.UNASSIGNED)


def roll_out(fleet: Fleet) -> None:
    fleet.group["rollout"] = True


def lose_sight(fleet: Fleet) -> None:
    fleet.group["load"] = None


def drain(fleet: Fleet) -> None:
    fleet.facts["p0"] = {"drain": True}


def forbid(fleet: Fleet) -> None:
    fleet.policy = replace(fleet.policy, ratio="never")


def only_advise(fleet: Fleet) -> None:
    fleet.policy = replace(fleet.policy, ratio="advise")


def fix(fleet: Fleet) -> None:
    for name in fleet.seen:
        fleet.observe(name, kind="prefill" if name.startswith("p") else "decode")


def bound(fleet: Fleet) -> None:
    fleet.policy = replace(fleet.policy, bounds={GROUP: Bounds(least_decode=8)})


@pytest.mark.parametrize(
    ("disturb", "reason"),
    [
        (kill, "p0 does not serve"),
        (roll_out, "a rollout is under way"),
        (lose_sight, "there is no recent sample"),
        (drain, "p0 does not serve"),
        (forbid, "control.ratio is never"),
        (only_advise, "6:6: 50% more requests per second"),
        (fix, "no other ratio has a higher throughput"),
        (bound, "no other ratio has a higher throughput"),
    ],
)
def test_holds(disturb: Callable[[Fleet], None], reason: str) -> None:
    fleet = Fleet(4, 8)
    disturb(fleet)
    for _ in range(40):
        fleet.work(PREFILL_RATE, DECODE_RATE)
        fleet.decide(TICK_S)
    assert not fleet.busy
    told = [one.text for one in fleet.events if one.what in ("hold", "advice")]
    assert told.count(reason) == 1, "it is told once"


def test_a_gateway_that_does_not_answer_is_unknown_and_not_idle() -> None:
    fleet = Fleet(4, 8)
    fleet.line = Line(5.0, 0.0, 3.0, 100.0)
    assert first_change(fleet, 10 * WINDOW_S) is None, "its page stands still"
    assert "gateway did not answer, or stands still" in [one.text for one in fleet.events]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_counters_that_cannot_be_right_move_nothing(value: float) -> None:
    """NaN, a value that never was, and counters that stand still."""
    fleet = Fleet(4, 8)
    for _ in range(100):
        fleet.work(PREFILL_RATE, DECODE_RATE)
        fleet.counters = {
            name: one and replace(one, work=replace(one.work, completed=value))
            for name, one in fleet.counters.items()
        }
        fleet.decide(TICK_S)
    assert not fleet.busy
    assert any("have completed 0 requests" in one.text for one in fleet.events)


def test_a_counter_that_is_reset_is_left_out() -> None:
    fleet = Fleet(6, 6)
    fleet.live(WINDOW_S, PREFILL_RATE, DECODE_RATE)
    for _ in range(40):
        fleet.counters["p0"] = None
        fleet.live(3 * TICK_S, PREFILL_RATE, DECODE_RATE)
    assert not any(one.what == "begin" for one in fleet.events)


def test_an_idle_group_is_left_as_it_is() -> None:
    """dynamo#11624: no traffic at all is no reason to change anything."""
    fleet = Fleet(4, 8)
    fleet.live(LONG_S, 0.0, 0.0)
    assert fleet.roles() == (4, 8)
    assert fleet.events[-1].what == "hold"


def test_a_pin_holds_against_the_load_and_its_end_gives_the_ratio_back() -> None:
    fleet = Fleet(4, 8)
    fleet.store[PINS + GROUP] = Pin(2, 10)
    assert settled(fleet) == (2, 10)
    del fleet.store[PINS + GROUP]
    assert settled(fleet) == (6, 6)


def test_a_pin_that_cannot_be_is_told_and_reached_as_far_as_possible() -> None:
    fleet = Fleet(4, 8)
    fleet.store[PINS + GROUP] = Pin(1, 20)
    assert settled(fleet) == (2, 10)
    assert any("which its 12 members cannot have" in one.text for one in fleet.events)
    begun = [one for one in fleet.events if one.what == "begin"]
    assert len(begun) == 1, "once it is as near as possible, it holds still"


def test_a_group_of_four_has_no_freedom() -> None:
    assert settled(Fleet(2, 2), 1.0) == (2, 2)
