"""Tests for the assignments that a gateway knows, and the groups that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
from pdserve.node.first_assignments import first_assignments

from pdserve import config
from pdserve.control.assignment import FIRST, Assignment
from pdserve.control.records import DesiredGroup, DesiredInstance, Phase
from pdserve.gateway.membership import Known, Membership, effective

SERVER = config.Server("local", prefill=("p0", "p1", "p2"), decode=("d0", "d1"))
AWAY = config.Server("away", prefill=("p3",), decode=("d2", "d3"), grpc_port=9)
CHAT = config.Scenario("chat", (config.Group("a", ("p0", "p1"), ("d0", "d2")),))
CODE = config.Scenario("code", (config.Group("b", ("p2", "p3"), ("d1", "d3")),))
TWO = config.Deployment(model="m", servers=(SERVER, AWAY), scenarios=(CHAT, CODE))
ONE = config.Deployment(model="m", servers=(SERVER,))


def groups(membership: Membership, deployment: config.Deployment = TWO) -> dict[str, Any]:
    """Return the members of each group, sorted."""
    now = effective(deployment, membership.known, membership.groups)
    for role in ("prefill", "decode"):
        for scenario in now.served:
            for group in scenario.groups:
                members = set(getattr(group, role))
                assert members <= now.instances(role).keys(), "an instance without a server"  # type: ignore[arg-type]
    return {
        group.name: (sorted(group.prefill), sorted(group.decode))
        for scenario in now.served
        for group in scenario.groups
    }


def told(name: str, number: int, role: Any, group: str, phase: Phase) -> Membership:
    membership = Membership()
    assert membership.told(name, Assignment(number, role, group), phase)
    return membership


def test_without_any_assignment_the_deployment_stays_as_it_is() -> None:
    membership = Membership()
    assert effective(TWO, membership.known, membership.groups) is TWO
    for name, assignment in first_assignments(TWO).items():
        membership.told(name, assignment, Phase.SERVING)
        membership.desired({name: DesiredInstance(assignment)}, {})
    assert effective(TWO, membership.known, membership.groups) is TWO
    assert list(membership.asked) == []
    assert set(membership.numbers.values()) == {FIRST}


def test_an_instance_moves_to_the_group_and_the_role_of_its_assignment() -> None:
    membership = told("p1", 2, "decode", "b", Phase.SERVING)
    assert groups(membership) == {
        "a": (["p0"], ["d0", "d2"]),
        "b": (["p2", "p3"], ["d1", "d3", "p1"]),
    }
    now = effective(TWO, membership.known, membership.groups)
    assert now.instances("decode")["p1"].name == "local"
    assert "p1" not in now.instances("prefill")


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.DRAINED, Phase.UNASSIGNED])
def test_who_does_not_serve_is_in_no_group_and_is_asked(phase: Phase) -> None:
    for number in (FIRST, 2):
        membership = told("p1", number, "prefill", "a", phase)
        assert groups(membership)["a"] == (["p0"], ["d0", "d2"])
        assert list(membership.asked) == ["p1"]
        assert membership.told("p1", Assignment(number, "prefill", "a"), Phase.SERVING)
        assert groups(membership)["a"] == (["p0", "p1"], ["d0", "d2"])
        assert list(membership.asked) == []


def test_a_spare_is_in_no_group() -> None:
    for group in ("", "unknown"):
        membership = told("d0", 3, "decode", group, Phase.SERVING)
        assert groups(membership)["a"] == (["p0", "p1"], ["d2"])
    membership = told("d0", 3, "none", "a", Phase.UNASSIGNED)
    assert groups(membership)["a"] == (["p0", "p1"], ["d2"])


def test_the_highest_number_counts_whoever_says_it() -> None:
    membership = Membership()
    new = Assignment(4, "decode", "b")
    assert membership.desired({"p1": DesiredInstance(new)}, {})
    moved = groups(membership)
    assert moved["b"] == (["p2", "p3"], ["d1", "d3", "p1"])
    # It has not got it yet: until it has, it is offered nothing, and is asked.
    assert membership.told("p1", Assignment(1, "prefill", "a"), Phase.DRAINED)
    assert groups(membership)["b"] == (["p2", "p3"], ["d1", "d3"])
    assert list(membership.asked) == ["p1"]
    assert membership.known["p1"].assignment == new
    assert membership.told("p1", new, Phase.SERVING)
    assert groups(membership) == moved
    # A store that has been restored from a copy is behind the instance itself.
    assert not membership.desired({"p1": DesiredInstance(Assignment(2, "prefill", "a"))}, {})
    assert groups(membership) == moved


def test_what_is_to_drain_is_in_no_group_and_is_not_asked() -> None:
    membership = Membership()
    first = Assignment(1, "prefill", "a")
    for state in ("draining", "absent"):
        membership.desired({"p1": DesiredInstance(first, state)}, {})  # type: ignore[arg-type]
        assert groups(membership)["a"] == (["p0"], ["d0", "d2"])
        membership.told("p1", first, Phase.SERVING)
        assert groups(membership)["a"] == (["p0"], ["d0", "d2"])
        assert list(membership.asked) == []
    membership.desired({"p1": DesiredInstance(first)}, {})
    assert groups(membership)["a"] == (["p0", "p1"], ["d0", "d2"])


def test_the_one_group_of_a_deployment_without_scenarios_changes_too() -> None:
    membership = told("p0", 2, "decode", "default", Phase.SERVING)
    assert groups(membership, ONE) == {"default": (["p1", "p2"], ["d0", "d1", "p0"])}
    now = effective(ONE, membership.known, membership.groups)
    assert [one.name for one in now.served] == ["default"]


def test_a_group_of_the_store_joins_its_scenario() -> None:
    membership = Membership()
    assert membership.desired(
        {"p1": DesiredInstance(Assignment(2, "prefill", "c"))},
        {"c": DesiredGroup("chat", 2.0), "a": DesiredGroup("chat", 0.5), "x": DesiredGroup("no")},
    )
    now = effective(TWO, membership.known, membership.groups)
    shares = {group.name: group.share for one in now.served for group in one.groups}
    assert shares == {"a": 0.5, "c": 2.0, "b": 1.0}
    assert groups(membership)["c"] == (["p1"], [])


def test_what_is_told_again_changes_nothing() -> None:
    membership = told("p1", 2, "decode", "b", Phase.SERVING)
    assert not membership.told("p1", Assignment(2, "decode", "b"), Phase.SERVING)
    assert membership.known == {"p1": Known(Assignment(2, "decode", "b"), phase=Phase.SERVING)}
    # An instance that nobody knows to have another assignment has said nothing new.
    fresh = Membership()
    record = {"p1": DesiredInstance(Assignment(1, "prefill", "a"))}
    fresh.desired(record, {})
    assert not fresh.desired(record, {})


def test_the_first_assignments_name_the_group_unless_several_have_the_instance() -> None:
    shared = config.Scenario(
        "both", (config.Group("a", ("p0",), ("d0",)), config.Group("b", ("p1",), ("d0",)))
    )
    deployment = config.Deployment(model="m", servers=(SERVER,), scenarios=(shared,))
    assert first_assignments(deployment) == {
        "p0": Assignment(1, "prefill", "a"),
        "p1": Assignment(1, "prefill", "b"),
        "p2": Assignment(1, "prefill", ""),
        "d0": Assignment(1, "decode", ""),
        "d1": Assignment(1, "decode", ""),
    }
