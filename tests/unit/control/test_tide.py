"""Tests for instances and groups that go out with the tide and come back."""

from __future__ import annotations

import pytest

from pdserve.control.assignment import Assignment
from pdserve.control.cluster import Line, Load
from pdserve.control.decide import TICK_S
from pdserve.control.policy import DAY_S, Bounds, Tide, Window
from pdserve.control.records import (
    DESIRED_GROUPS,
    DESIRED_INSTANCES,
    LENT,
    PINS,
    DesiredGroup,
    DesiredInstance,
    ObservedInstance,
    Pin,
)
from pdserve.control.transaction import Kind, Step
from pdserve.control.volume import OUT_S
from tests.unit.control.fleets import GROUP, NOON, Fleet

NIGHT = Window(22 * 3600.0, 6 * 3600.0)
TEN_HOURS = 10 * 3600.0
"""From noon until it is night; and from then until it is day again."""


def night(fleet: Fleet) -> None:
    fleet.now = NOON + TEN_HOURS


def day(fleet: Fleet) -> None:
    fleet.now = NOON + 2 * TEN_HOURS


def finish(fleet: Fleet, seconds: float = 60.0) -> None:
    """Let every instance do what is desired until nothing changes."""
    for _ in range(int(seconds)):
        fleet.decide(1)
        fleet.obey()
    assert not any(key.startswith("transactions/") for key in fleet.store)


def second_group(fleet: Fleet, name: str, prefills: int, decodes: int, scenario: str) -> None:
    fleet.store[DESIRED_GROUPS + name] = DesiredGroup(scenario, 2.0)
    for kind, role, count in (("p", "prefill", prefills), ("d", "decode", decodes)):
        for n in range(count):
            one = f"{name}_{kind}{n}"
            given = Assignment(1, "prefill" if role == "prefill" else "decode", name)
            fleet.store[DESIRED_INSTANCES + one] = DesiredInstance(given)
            fleet.seen[one] = ObservedInstance("host", "server", "", "flexible", "ready")
            fleet.obey(one)


@pytest.mark.parametrize(
    ("window", "at", "inside"),
    [
        (Window(3600, 7200), 3600, True),
        (Window(3600, 7200), 7200, False),
        (NIGHT, 23 * 3600, True),
        (NIGHT, 5 * 3600, True),
        (NIGHT, 6 * 3600, False),
        (Window(0, DAY_S, frozenset({3})), 100, True),  # 1970 began on a Thursday
        (Window(0, DAY_S, frozenset({4})), 100, False),
        (Window(22 * 3600, 6 * 3600, frozenset({3})), DAY_S + 3600, True),  # it began yesterday
        (Window(22 * 3600, 6 * 3600, frozenset({4})), DAY_S + 3600, False),
    ],
)
def test_windows(window: Window, at: float, inside: bool) -> None:
    assert window.holds(at) is inside


def test_instances_go_to_a_pool_at_night_and_come_back() -> None:
    fleet = Fleet(4, 4, tides=(Tide(GROUP, "training", (NIGHT,), prefills=1, decodes=2),))
    fleet.observe("d0", used=5)
    assert not fleet.decide().writes
    night(fleet)
    fleet.decide()
    assert fleet.transaction().kind is Kind.OUT
    assert fleet.steps() == {"p0": Step.DRAIN, "d1": Step.DRAIN, "d2": Step.DRAIN}
    finish(fleet)
    assert fleet.roles() == (3, 2)
    assert fleet.desired("p0") == DesiredInstance(Assignment(2, "none"), "absent")
    assert LENT + "p0" in fleet.store
    fleet.observe("p3", state="failed")
    fleet.decide(1)
    assert fleet.desired("p0").state == "absent", "what is lent is no spare"
    fleet.obey()
    day(fleet)
    finish(fleet)
    assert fleet.roles() == (4, 4)
    assert not any(key.startswith(LENT) for key in fleet.store)


def test_the_least_of_each_role_stays() -> None:
    fleet = Fleet(3, 4, tides=(Tide(GROUP, "training", (NIGHT,), prefills=3, decodes=9),))
    night(fleet)
    finish(fleet)
    assert fleet.roles() == (2, 2)


def test_nobody_goes_while_a_member_does_not_serve() -> None:
    fleet = Fleet(4, 4, tides=(Tide(GROUP, "training", (NIGHT,), decodes=1),))
    fleet.observe("p0", state="loading")
    night(fleet)
    assert not fleet.decide().writes


def test_a_whole_group_is_hidden_then_drained_and_published_when_it_is_back() -> None:
    """Section 3.3 of the paper: the map entry first, then the instances; and backwards."""
    fleet = Fleet(2, 2, tides=(Tide(GROUP, "training", (NIGHT,)),))
    second_group(fleet, "other", 2, 2, "chat")
    fleet.store[DESIRED_GROUPS + GROUP] = DesiredGroup("chat", 3.0)
    fleet.line = Line(2.0, 0.0, 1.0, 0.0)
    night(fleet)
    fleet.decide()
    assert fleet.store[DESIRED_GROUPS + GROUP] == DesiredGroup("chat", 0.0)
    assert set(fleet.steps().values()) == {Step.UNPUBLISH}
    fleet.decide(1)
    assert set(fleet.steps().values()) == {Step.UNPUBLISH}, "requests still wait for it"
    fleet.line = Line(0.0, 0.0, 0.0, 0.0)
    fleet.decide(1)
    assert set(fleet.steps().values()) == {Step.DRAIN}
    finish(fleet)
    assert fleet.roles() == (0, 0)
    assert fleet.store[DESIRED_GROUPS + GROUP] == DesiredGroup("chat", 0.0)
    day(fleet)
    fleet.decide()
    assert set(fleet.steps().values()) == {Step.START}
    assert fleet.store[DESIRED_GROUPS + GROUP] == DesiredGroup("chat", 0.0), "not before it serves"
    finish(fleet)
    assert fleet.roles() == (2, 2)
    assert fleet.store[DESIRED_GROUPS + GROUP] == DesiredGroup("chat", 3.0)
    assert fleet.roles("other") == (2, 2)


def test_what_waits_for_a_group_that_leaves_has_a_time_limit() -> None:
    fleet = Fleet(2, 2, tides=(Tide(GROUP, "training", (NIGHT,)),))
    night(fleet)
    fleet.line = Line(2.0, 0.0, 1.0, 0.0)
    fleet.decide()
    fleet.decide(31)
    assert set(fleet.steps().values()) == {Step.DRAIN}


def test_instances_are_lent_to_another_scenario_and_both_groups_are_left_alone() -> None:
    fleet = Fleet(4, 4, tides=(Tide(GROUP, "batch", (NIGHT,), prefills=1, decodes=1),))
    second_group(fleet, "batch", 2, 2, "batch")
    fleet.store[PINS + "batch"] = Pin(3, 1)
    for name in fleet.seen:
        if name.startswith("batch"):
            fleet.observe(name, kind="prefill")
    night(fleet)
    fleet.decide()
    assert fleet.transaction().other == "batch"
    assert "transactions/batch" not in fleet.store
    finish(fleet)
    assert fleet.roles() == (3, 3)
    assert fleet.roles("batch") == (3, 3)
    lent = fleet.desired("p0").assignment
    assert (lent.role, lent.group) == ("prefill", "batch")
    day(fleet)
    fleet.decide()
    assert set(fleet.steps().values()) == {Step.DRAIN}, "they serve there, and are drained there"
    finish(fleet)
    assert fleet.roles() == (4, 4)
    assert fleet.roles("batch") == (2, 2)


def test_a_group_takes_no_more_than_its_bound() -> None:
    fleet = Fleet(
        4,
        4,
        tides=(Tide(GROUP, "batch", (NIGHT,), decodes=2),),
        bounds={"batch": Bounds(most=5)},
    )
    second_group(fleet, "batch", 2, 2, "batch")
    night(fleet)
    finish(fleet)
    assert sum(fleet.roles("batch")) == 5


def test_they_come_back_only_within_the_budget() -> None:
    fleet = Fleet(4, 4, tides=(Tide(GROUP, "training", (NIGHT,), prefills=1, decodes=1),), budget=7)
    night(fleet)
    finish(fleet)
    day(fleet)
    finish(fleet)
    assert fleet.roles() in ((4, 3), (3, 4))


def test_one_that_cannot_come_back_stays_lent_and_is_tried_again_later() -> None:
    fleet = Fleet(4, 4, tides=(Tide(GROUP, "training", (NIGHT,), prefills=1),), load_s=60.0)
    night(fleet)
    finish(fleet)
    day(fleet)
    fleet.decide()
    fleet.observe("p0", state="failed", reason="no memory")
    fleet.decide(1)
    assert fleet.desired("p0").state == "absent"
    fleet.obey()
    fleet.decide(1)
    assert not fleet.busy
    assert LENT + "p0" in fleet.store
    assert not fleet.decide(1).writes
    fleet.decide(400)
    finish(fleet)
    assert fleet.roles() == (4, 4)


def busy(fleet: Fleet, seconds: float, rate: float) -> None:
    """Let so many requests a second arrive at the scenario, shared by the groups that serve."""
    for _ in range(int(seconds / TICK_S)):
        serving = sum(one.share > 0 for one in fleet.cluster().groups.values())
        routed = fleet.line.routed + rate * TICK_S / serving
        fleet.line = Line(0.0, 0.0, 0.0, routed)
        fleet.work(10.0, 10.0)
        fleet.decide(TICK_S)
        fleet.obey()


def test_a_group_goes_when_the_others_suffice_and_comes_back_when_they_do_not() -> None:
    """Equation (2): each of the two groups can serve 40 requests a second."""
    fleet = Fleet(4, 4, tides=(Tide(GROUP, "training", volume=True),))
    second_group(fleet, "other", 4, 4, "chat")
    busy(fleet, 3 * OUT_S, rate=30.0)
    assert fleet.roles() == (4, 4), "the other one would be used by 75 %"
    busy(fleet, OUT_S - 60, rate=20.0)
    assert fleet.roles() == (4, 4), "not before this has lasted"
    busy(fleet, 240, rate=20.0)
    assert fleet.roles() == (0, 0)
    busy(fleet, 3 * OUT_S, rate=30.0)
    assert fleet.roles() == (0, 0), "75 % is no reason to come back"
    busy(fleet, 120, rate=38.0)
    assert fleet.roles() == (4, 4)
    told = [one for one in fleet.events if one.what == "volume"]
    assert [one.text for one in told] == [
        "the other groups of chat suffice",
        "the other groups of chat do not suffice",
    ]
    assert told[0].numbers["capacity"] == pytest.approx(40)
    assert told[1].numbers["arrivals"] == pytest.approx(35, abs=3)


def test_an_idle_group_goes_by_the_rates_that_were_known_last() -> None:
    """dynamo#11624: nothing was scaled down when there was no traffic at all."""
    fleet = Fleet(4, 4, tides=(Tide(GROUP, "training", volume=True),))
    second_group(fleet, "other", 4, 4, "chat")
    busy(fleet, 120, rate=35.0)
    for _ in range(int(2 * OUT_S / TICK_S)):
        fleet.decide(TICK_S)
        fleet.obey()
    assert fleet.roles() == (0, 0)


def test_a_load_that_is_unknown_moves_no_group() -> None:
    fleet = Fleet(2, 2, tides=(Tide(GROUP, "training", volume=True),))
    second_group(fleet, "other", 2, 2, "chat")
    fleet.group["load"] = Load(0.0, {}, {"gateway": None})
    for _ in range(int(2 * OUT_S / 5)):
        fleet.decide(5)
        fleet.group["load"] = Load(fleet.now, {}, {"gateway": None})
    assert fleet.roles() == (2, 2)
