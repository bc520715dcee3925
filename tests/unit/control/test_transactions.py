"""Tests for transactions: every step goes on, has a way back, and can be taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pdserve.control.memory import Memory
from pdserve.control.moves import GRACE_S
from pdserve.control.records import PINS, Phase, Pin
from pdserve.control.transaction import Step
from tests.unit.control.fleets import GROUP, Fleet

if TYPE_CHECKING:
    from collections.abc import Callable

DRAIN_S, SWITCH_S = 30.0, 20.0


def switching() -> Fleet:
    """Return a group of 4:4 in which two decodes are about to become prefills."""
    fleet = Fleet(4, 4, drain_s=DRAIN_S, switch_s=SWITCH_S)
    fleet.store[PINS + GROUP] = Pin(6, 2)
    for name in ("d0", "d2"):
        fleet.observe(name, used=3)
    fleet.decide()
    return fleet


def test_who_holds_least_gives_and_no_more_than_a_quarter_at_once() -> None:
    fleet = switching()
    assert fleet.steps() == {"d1": Step.DRAIN, "d3": Step.DRAIN}
    assert fleet.desired("d1").state == fleet.desired("d3").state == "draining"
    assert fleet.desired("d1").assignment.number == 1
    larger = Fleet(2, 11)
    larger.store[PINS + GROUP] = Pin(11, 2)
    larger.decide()
    assert len(larger.steps()) == 4


def test_a_role_is_given_only_when_the_old_one_is_empty() -> None:
    fleet = switching()
    fleet.observe("d1", phase=Phase.DRAINING, used=1)
    assert not fleet.decide(1).writes
    fleet.observe("d1", phase=Phase.DRAINED, used=0)
    fleet.decide(1)
    assert fleet.steps() == {"d1": Step.CHANGE, "d3": Step.DRAIN}
    given = fleet.desired("d1")
    assert (given.state, given.assignment.role, given.assignment.number) == (
        "serving",
        "prefill",
        2,
    )
    fleet.obey("d1", "d3")
    fleet.decide(1)
    fleet.obey("d3")
    fleet.decide(1)
    assert not fleet.busy
    assert fleet.roles() == (6, 2)


def test_it_is_verified_that_the_switch_has_happened() -> None:
    """llm-d: a switch that did nothing also returns fast; dynamo#13238: the wrong role."""
    fleet = switching()
    fleet.obey()
    fleet.decide(1)
    old = fleet.desired("d1").assignment
    fleet.obey("d3")
    fleet.observe("d1", phase=Phase.SERVING)
    fleet.decide(1)
    assert fleet.steps()["d1"] is Step.CHANGE
    fleet.decide(SWITCH_S + 1)
    assert fleet.steps()["d1"] is Step.RETURN
    returned = fleet.desired("d1")
    assert returned.assignment.role == "decode"
    assert returned.assignment.number > old.number, "the number of a change is never used again"
    fleet.obey("d1")
    fleet.decide(1)
    assert not fleet.busy
    assert fleet.roles() == (5, 3)


def half_done() -> Fleet:
    """Return the same, when one of them has changed."""
    fleet = switching()
    for _ in range(2):
        fleet.obey("d3")
        fleet.decide(1)
    assert fleet.steps() == {"d1": Step.DRAIN, "d3": Step.DONE}
    return fleet


def drain_takes_too_long(fleet: Fleet) -> None:
    fleet.observe("d1", phase=Phase.DRAINING, used=1)
    fleet.decide(DRAIN_S + GRACE_S + 1)
    assert fleet.steps()["d1"] is Step.RESUME
    assert fleet.desired("d1").assignment.number == 1, "it never gave up its assignment"
    assert fleet.desired("d1").state == "serving"


def role_cannot_be_loaded(fleet: Fleet) -> None:
    fleet.obey("d1")
    fleet.decide(1)
    assert fleet.steps()["d1"] is Step.CHANGE
    fleet.observe("d1", state="failed", reason="no memory")
    fleet.decide(1)
    assert fleet.steps()["d1"] is Step.RETURN


def role_is_never_taken(fleet: Fleet) -> None:
    fleet.obey("d1")
    fleet.decide(1)
    fleet.decide(SWITCH_S + 1)
    assert fleet.steps()["d1"] is Step.RETURN


WAYS_BACK = [drain_takes_too_long, role_cannot_be_loaded, role_is_never_taken]


@pytest.mark.parametrize("fail", WAYS_BACK)
def test_every_step_has_a_way_back(fail: Callable[[Fleet], None]) -> None:
    """dynamo#13620, #12428: what cannot be done is undone, and never left half done."""
    fleet = half_done()
    fail(fleet)
    assert "took more than" in fleet.transaction().moves[0].reason or "no memory" in (
        fleet.transaction().moves[0].reason
    )
    fleet.obey()
    fleet.decide(1)
    assert not fleet.busy
    assert fleet.roles() == (5, 3), "the other one has changed"
    assert fleet.desired("d1").assignment.role == "decode"
    assert fleet.desired("d1").state == "serving"


def test_what_could_not_be_done_is_not_tried_again_at_once() -> None:
    """Others that are able to are asked first."""
    fleet = switching()
    for name in ("d1", "d3"):
        fleet.observe(name, phase=Phase.DRAINING, used=1)
    fleet.decide(DRAIN_S + GRACE_S + 1)
    assert set(fleet.steps().values()) == {Step.RESUME}
    fleet.obey()
    fleet.decide(1)
    assert not fleet.busy
    fleet.decide(1)
    assert set(fleet.steps()) == {"d0", "d2"}


@pytest.mark.parametrize("fail", WAYS_BACK)
def test_a_way_back_has_a_time_limit_too(fail: Callable[[Fleet], None]) -> None:
    fleet = half_done()
    fail(fleet)
    fleet.observe("d1", phase=Phase.DRAINED, state="ready")
    fleet.decide(SWITCH_S + 1)
    assert not fleet.busy
    end = fleet.events[-1]
    assert (end.what, end.numbers["abandoned"], end.numbers["done"]) == ("end", 1, 1)


def test_another_controller_goes_on_at_every_step() -> None:
    """A controller that is killed after any write leaves nothing that the next one cannot end."""
    for killed_after in range(8):
        fleet = switching()
        for turn in range(8):
            if turn == killed_after:
                fleet.memory = Memory()
            fleet.obey("d1") if turn % 2 else fleet.obey("d3")
            fleet.decide(1)
        assert not fleet.busy
        assert fleet.roles() == (6, 2)
        assert [one.what for one in fleet.events].count("end") == 1


def test_a_write_that_fails_is_decided_again() -> None:
    fleet = Fleet(4, 4)
    fleet.store[PINS + GROUP] = Pin(5, 3)
    store = dict(fleet.store)
    first = fleet.decide().writes
    fleet.store = store
    assert fleet.decide().writes == first


def test_what_is_stored_lies_ahead_by_another_clock() -> None:
    """The limits of a step begin when this controller sees it."""
    fleet = switching()
    fleet.now -= 3600
    fleet.observe("d1", phase=Phase.DRAINING)
    fleet.decide()
    assert fleet.transaction().moves[0].since == fleet.now
    fleet.decide(DRAIN_S + GRACE_S + 1)
    assert fleet.steps()["d1"] is Step.RESUME


def test_a_lost_member_recalls_those_that_drain() -> None:
    """The ratio was decided for another group; what has begun to change goes on."""
    fleet = switching()
    fleet.store[PINS + GROUP] = Pin(4, 4)
    fleet.obey("d3")
    fleet.decide(1)
    fleet.observe("p0", state="failed", reason="killed")
    fleet.decide(1)
    assert fleet.steps() == {"d1": Step.RESUME, "d3": Step.CHANGE}
    assert fleet.transaction().moves[0].reason == "p0 is lost"


def test_a_donor_that_is_lost_is_abandoned_and_replaced() -> None:
    fleet = Fleet(4, 4, spares=1)
    fleet.store[PINS + GROUP] = Pin(5, 3)
    fleet.decide()
    [donor] = fleet.steps()
    fleet.facts[donor] = {"agent": False, "silent_since": fleet.now}
    fleet.decide(5)
    assert fleet.busy, "an agent that is gone is no loss yet"
    fleet.decide(6)
    for _ in range(4):
        fleet.decide(1)
        fleet.obey("s0")
    fleet.decide(1)
    assert fleet.desired("s0").assignment.group == GROUP
    assert fleet.desired(donor).assignment.group == ""
    fleet.obey("s0")
    assert sum(fleet.roles()) == 8


def test_fixed_members_never_change() -> None:
    fleet = Fleet(4, 4)
    for name in ("d0", "d1", "d2"):
        fleet.observe(name, kind="decode")
    fleet.store[PINS + GROUP] = Pin(6, 2)
    fleet.decide()
    assert list(fleet.steps()) == ["d3"]
    fleet.obey()
    fleet.decide(1)
    fleet.obey()
    fleet.decide(1)
    fleet.decide(1)
    assert not fleet.busy
    assert fleet.roles() == (5, 3)
