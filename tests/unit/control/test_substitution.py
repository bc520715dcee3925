"""Tests for the replacement of lost members: one instance is touched, and none twice."""

from __future__ import annotations

import pytest

from pdserve.control.records import Phase
from pdserve.control.transaction import Kind, Step
from tests.unit.control.fleets import GROUP, Fleet

LOST_S, LOAD_S = 10.0, 100.0


def fleet_of(prefills: int, decodes: int, **more: int) -> Fleet:
    return Fleet(prefills, decodes, lost_s=LOST_S, load_s=LOAD_S, **more)


def break_down(fleet: Fleet, name: str, seconds: float = 3.0) -> None:
    """Let an agent report that it could not repair an instance, after some time of trying."""
    fleet.observe(name, state="failed", phase=Phase.UNASSIGNED, reason="exit status 1")
    fleet.facts[name] = {"failed_since": fleet.now}
    fleet.now += seconds


def test_a_loaded_spare_takes_the_place_and_nobody_else_is_touched() -> None:
    fleet = fleet_of(4, 4, spares=1, absent=1)
    others = {f"{kind}{n}" for kind in "pd" for n in range(4)} - {"d1"}
    before = {name: fleet.desired(name) for name in others}
    break_down(fleet, "d1")
    fleet.decide()
    assert fleet.transaction().kind is Kind.SUBSTITUTE
    assert fleet.steps() == {"s0": Step.CHANGE}
    assert fleet.desired("d1").state == "draining", "no gateway uses it any more"
    given = fleet.desired("s0").assignment
    assert (given.role, given.group, given.number) == ("decode", GROUP, 2)
    fleet.obey("s0")
    fleet.decide(1.5)
    assert not fleet.busy
    assert fleet.roles() == (4, 4)
    assert {name: fleet.desired(name) for name in others} == before
    spare = fleet.desired("d1")
    assert (spare.assignment.role, spare.assignment.group) == ("none", "")
    assert (spare.assignment.number, spare.state) == (2, "serving")
    end = fleet.events[-1].numbers
    assert (end["detect_s"], end["decide_s"], end["start_s"], end["join_s"]) == (3, 0, 0, 1.5)


def test_one_that_comes_back_is_the_next_spare() -> None:
    fleet = fleet_of(4, 4, spares=1)
    break_down(fleet, "d1")
    fleet.decide()
    fleet.obey("s0")
    fleet.decide(1)
    fleet.obey("d1")
    fleet.facts.clear()
    fleet.decide(1)
    break_down(fleet, "p0")
    fleet.decide()
    assert fleet.steps() == {"d1": Step.CHANGE}
    assert fleet.desired("d1").assignment.role == "prefill"


def test_without_a_loaded_one_an_idle_host_starts_one() -> None:
    fleet = fleet_of(4, 4, absent=1)
    break_down(fleet, "p2")
    fleet.decide()
    assert fleet.steps() == {"a0": Step.START}
    fleet.observe("a0", state="loading")
    fleet.decide(40)
    assert fleet.steps() == {"a0": Step.START}
    fleet.observe("a0", state="ready")
    fleet.decide(20)
    assert fleet.steps() == {"a0": Step.CHANGE}
    fleet.obey("a0")
    fleet.decide(1)
    assert fleet.roles() == (4, 4)
    assert fleet.events[-1].numbers["start_s"] == 60
    assert fleet.desired("p2").state == "absent", "as many are loaded as before"


def test_an_agent_that_is_gone_is_no_loss_of_its_instances() -> None:
    """An etcd that was stopped deletes every lease the moment it goes on."""
    fleet = fleet_of(4, 4, spares=1)
    for name in fleet.seen:
        fleet.facts[name] = {"agent": False}
    for _ in range(60):
        assert not fleet.decide(5).writes


@pytest.mark.parametrize(("silent_s", "is_lost"), [(LOST_S - 1, False), (LOST_S, True)])
def test_it_is_lost_if_nobody_reaches_it_either(silent_s: float, is_lost: bool) -> None:
    fleet = fleet_of(4, 4, spares=1)
    fleet.facts["d1"] = {"agent": False, "silent_since": fleet.now}
    fleet.decide(silent_s)
    assert fleet.busy is is_lost
    if is_lost:
        [lost] = [one for one in fleet.events if one.what == "lost"]
        assert lost.numbers == {"detect_s": LOST_S}


def test_probes_that_fail_while_the_agent_lives_are_no_loss() -> None:
    fleet = fleet_of(4, 4, spares=1)
    fleet.facts["d1"] = {"silent_since": fleet.now}
    fleet.decide(10 * LOST_S)
    assert not fleet.busy


def test_without_a_spare_it_keeps_its_place_and_serves_again_once_it_is_back() -> None:
    fleet = fleet_of(4, 4)
    break_down(fleet, "d1")
    for _ in range(5):
        fleet.decide(5)
    assert fleet.desired("d1").state == "draining"
    assert [one.what for one in fleet.events if one.instances == ("d1",)] == ["lost", "short"]
    fleet.facts.clear()
    fleet.observe("d1", state="ready", phase=Phase.SERVING)
    fleet.decide(1)
    assert fleet.desired("d1").state == "serving"
    assert fleet.desired("d1").assignment.number == 1
    fleet.obey()
    assert not fleet.decide(1).writes


def test_a_spare_that_cannot_be_had_is_given_back_and_another_one_taken() -> None:
    fleet = fleet_of(4, 4, spares=2)
    break_down(fleet, "d1")
    fleet.decide()
    fleet.decide(60)
    assert fleet.steps() == {"s0": Step.RETURN}
    fleet.obey("s0")
    fleet.decide(1)
    fleet.decide(1)
    assert fleet.steps() == {"s1": Step.CHANGE}
    assert fleet.desired("s0").assignment.group == ""
    fleet.obey()
    fleet.decide(1)
    assert fleet.roles() == (4, 4)


def test_a_spare_that_cannot_be_loaded_is_absent_again() -> None:
    fleet = fleet_of(4, 4, absent=1)
    break_down(fleet, "d1")
    fleet.decide()
    fleet.observe("a0", state="failed", reason="no such file")
    fleet.decide(5)
    assert fleet.steps() == {"a0": Step.RETURN}
    assert fleet.desired("a0").state == "absent"
    fleet.obey("a0")
    fleet.decide(1)
    assert not fleet.busy
    fleet.decide(5)
    assert not fleet.busy, "it is not tried again at once"


def test_the_budget_is_not_exceeded() -> None:
    """dynamo#12428: what is not seen to be gone is still there."""
    fleet = fleet_of(4, 4, absent=1)
    fleet.policy = type(fleet.policy)(budget=7, lost_s=LOST_S)
    break_down(fleet, "d1")
    fleet.decide()
    assert not fleet.busy
    assert any(one.what == "short" for one in fleet.events)
    within = fleet_of(4, 4, absent=1)
    within.policy = type(fleet.policy)(budget=8, lost_s=LOST_S)
    break_down(within, "d1")
    within.decide()
    assert within.busy


def test_fixed_spares_only_take_their_own_role() -> None:
    fleet = fleet_of(4, 4, spares=2)
    fleet.observe("s0", kind="prefill")
    break_down(fleet, "d1")
    fleet.decide()
    assert fleet.steps() == {"s1": Step.CHANGE}


def test_the_role_that_has_fewest_left_comes_first() -> None:
    fleet = fleet_of(4, 2, spares=1)
    for name in ("p0", "p1", "d1"):
        break_down(fleet, name)
    fleet.decide()
    assert fleet.desired("s0").assignment.role == "decode"


def test_a_role_that_is_empty_takes_one_of_the_other_and_fills_again() -> None:
    """dynamo#8965: all decodes were gone for a moment, and the outage lasted until a restart."""
    fleet = fleet_of(4, 2)
    break_down(fleet, "d0")
    break_down(fleet, "d1")
    fleet.decide()
    assert fleet.transaction().kind is Kind.RESCUE
    [giver] = fleet.steps()
    fleet.obey(giver)
    fleet.decide(1)
    fleet.obey(giver)
    fleet.decide(1)
    assert fleet.desired(giver).assignment.role == "decode"
    fleet.facts.clear()
    for name in ("d0", "d1"):
        fleet.observe(name, state="ready", phase=Phase.SERVING)
    fleet.decide(1)
    fleet.obey()
    assert fleet.roles() == (3, 3)
    assert all(fleet.desired(name).state == "serving" for name in ("d0", "d1"))


def test_an_operators_drain_takes_a_member_out_and_its_end_brings_it_back() -> None:
    fleet = fleet_of(4, 4, spares=1)
    fleet.facts["p1"] = {"drain": True}
    fleet.decide(1)
    assert fleet.desired("p1").state == "draining"
    fleet.obey("p1")
    assert not fleet.decide(1).writes, "it is not replaced, and not resumed"
    fleet.facts.clear()
    fleet.decide(1)
    assert fleet.desired("p1").state == "serving"


def test_a_spare_that_is_lost_while_it_joins_is_no_member() -> None:
    """Otherwise the group would have one too many once both are back."""
    fleet = fleet_of(4, 4, spares=1)
    break_down(fleet, "d1")
    fleet.decide()
    fleet.facts["s0"] = {"agent": False, "silent_since": fleet.now}
    fleet.decide(LOST_S)
    assert not fleet.busy
    assert fleet.desired("s0").assignment.group == ""
    fleet.facts.clear()
    fleet.obey()
    fleet.decide(1)
    assert fleet.roles() == (4, 4)
