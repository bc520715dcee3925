"""Tests for what an agent does next with an instance: from every state it becomes as desired."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.control.assignment import Assignment, Role
from pdserve.control.records import DesiredInstance, Phase
from pdserve.node.reconcile import Action, Duty, Kind, Presence, Seen, duty, next_action

ROLES: tuple[Role, ...] = get_args(Role)
STATES = ("serving", "draining", "absent")
MOST_ACTIONS = 20

numbers = st.integers(1, 4)
assignments = st.builds(
    Assignment, numbers, st.sampled_from(ROLES), st.sampled_from(["", "a", "b"])
)
desires = st.builds(DesiredInstance, assignments, st.sampled_from(STATES))
kinds = st.sampled_from(get_args(Kind))


@dataclass
class Instance:
    """An instance as `pdserve.instances.assigned` has it, and what an agent knows of it."""

    kind: Kind
    presence: Presence
    assignment: Assignment
    """Kept on disk, too."""
    phase: Phase
    held: int = 0
    links: int = 0
    known: bool = False
    late: bool = False

    @property
    def seen(self) -> Seen:
        presence = self.presence
        if presence is not Presence.LOADED or not self.known:
            return Seen(presence, self.kind)
        return Seen(presence, self.kind, self.assignment, self.phase, self.links == 0, self.late)

    def serving(self) -> Phase:
        return Phase.UNASSIGNED if self.assignment.role == "none" else Phase.SERVING

    def do(self, action: Action, desired: DesiredInstance) -> None:
        """Do it as the executor does, which has to find it allowed."""
        known, self.known = self.known, False
        loaded = self.presence is Presence.LOADED
        if loaded and action is Action.WAIT and self.phase is Phase.UNASSIGNED:
            self.late = True
            return
        if action is Action.INSPECT:
            assert not known
            self.known = True
        elif action is Action.UNLINK:
            assert self.phase is Phase.DRAINED
            self.links, self.known = 0, known
        elif action is Action.ASSIGN:
            self.assign(desired.assignment)
        elif action in (Action.DRAIN, Action.WAIT, Action.RESUME):
            self.drain(action)
        else:
            self.move(action)

    def assign(self, wanted: Assignment) -> None:
        assert self.phase in (Phase.DRAINED, Phase.UNASSIGNED)
        assert self.held == 0
        if wanted.role != self.assignment.role:
            assert self.links == 0, "a decode could still read the memory that is given back"
        assert wanted.number > self.assignment.number
        self.assignment = wanted
        self.phase = self.serving()

    def drain(self, action: Action) -> None:
        if self.presence is Presence.BUSY:
            assert action is Action.WAIT
            self.load()
        elif action is Action.RESUME:
            assert self.phase in (Phase.DRAINING, Phase.DRAINED)
            self.phase = Phase.SERVING
        else:
            assert self.phase is (Phase.SERVING if action is Action.DRAIN else Phase.DRAINING)
            self.held -= action is Action.WAIT
            self.phase = Phase.DRAINING if self.held else Phase.DRAINED

    def move(self, action: Action) -> None:
        if action is Action.LOAD:
            assert self.presence in (Presence.ABSENT, Presence.UNLOADED)
            self.load()
        elif action is Action.UNLOAD:
            if self.presence is not Presence.BUSY:
                assert self.phase in (Phase.DRAINED, Phase.UNASSIGNED)
                assert self.held == 0
                assert self.links == 0 or self.phase is Phase.UNASSIGNED
            self.presence = Presence.UNLOADED
        else:
            assert action is Action.REMOVE
            assert self.presence is Presence.UNLOADED
            self.presence = Presence.ABSENT

    def load(self) -> None:
        self.presence, self.phase, self.late = Presence.LOADED, self.serving(), False
        self.held, self.links = 0, 0


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    kind: Kind = draw(kinds)
    assignment = draw(assignments)
    if kind != "flexible":
        assignment = Assignment(assignment.number, kind, assignment.group)
    held = 0
    if assignment.role == "none" or draw(st.integers(0, 4)) == 0:  # its memory was not to be had
        phase = Phase.UNASSIGNED
    else:
        phase = draw(st.sampled_from([Phase.SERVING, Phase.DRAINING, Phase.DRAINED]))
        if phase is not Phase.DRAINED:
            held = draw(st.integers(phase is Phase.DRAINING, 3))
    presence = draw(st.sampled_from(Presence))
    links = draw(st.integers(0, 2)) if assignment.role == "prefill" else 0
    links *= phase is not Phase.UNASSIGNED
    known = draw(st.booleans())
    return Instance(kind, presence, assignment, phase, held, links, known)


def settle(desired: DesiredInstance, one: Instance) -> str:
    """Do what is said until nothing is; return why it is not as desired."""
    for _ in range(MOST_ACTIONS):
        found = next_action(desired, one.seen)
        if found.action is Action.NOTHING:
            return found.reason
        one.do(found.action, desired)
    raise AssertionError("it does not settle")


def as_desired(desired: DesiredInstance, one: Instance) -> bool:
    if desired.state == "absent":
        return one.presence is Presence.ABSENT
    phase = Phase.DRAINED if desired.state == "draining" else Phase.SERVING
    if desired.assignment.role == "none":
        phase = Phase.UNASSIGNED
    return (one.presence, one.assignment, one.phase) == (Presence.LOADED, desired.assignment, phase)


@given(desires, instances())
def test_from_every_state_it_becomes_as_desired(desired: DesiredInstance, one: Instance) -> None:
    """Or it is said why not, and then it serves or is what it was."""
    has = one.assignment
    reason = settle(desired, one)
    possible = one.kind in ("flexible", desired.assignment.role)
    newer = has.number < desired.assignment.number
    if desired.state == "absent" or (possible and (newer or has == desired.assignment)):
        assert reason == ""
        assert as_desired(desired, one)
        assert next_action(desired, one.seen).action is Action.NOTHING
    else:
        assert reason
        assert one.assignment == has


@given(desires, instances(), st.integers(0, 6), desires)
def test_another_wish_in_the_middle(
    first: DesiredInstance, one: Instance, actions: int, second: DesiredInstance
) -> None:
    """Also one whose agent was killed then: it knows nothing of what had been done."""
    for _ in range(actions):
        found = next_action(first, one.seen)
        if found.action is Action.NOTHING:
            break
        one.do(found.action, first)
    one.known = False
    has = one.assignment
    wanted = replace_number(second, max(has.number, second.assignment.number) + 1)
    if one.kind in ("flexible", wanted.assignment.role) or wanted.state == "absent":
        assert settle(wanted, one) == ""
        assert as_desired(wanted, one)


def replace_number(desired: DesiredInstance, number: int) -> DesiredInstance:
    was = desired.assignment
    return DesiredInstance(Assignment(number, was.role, was.group), desired.state)


EVERY = [
    Seen(presence, kind, assignment, phase, unlinked, late)
    for presence, kind, assignment, phase, unlinked, late in itertools.product(
        Presence,
        get_args(Kind),
        [None, *(Assignment(2, role, "a") for role in ROLES)],
        Phase,
        (False, True),
        (False, True),
    )
]


def test_nothing_is_done_to_what_is_as_desired_or_not_spoken_of() -> None:
    for seen in EVERY:
        assert next_action(None, seen).action in (Action.NOTHING, Action.INSPECT)
        assert duty(None, seen) is Duty.REPAIRED
        if seen.assignment is None or seen.presence is not Presence.LOADED:
            continue
        if seen.phase is Phase.SERVING:
            wanted = DesiredInstance(seen.assignment)
            assert next_action(wanted, seen).action is Action.NOTHING
        if seen.phase is Phase.DRAINED:
            wanted = DesiredInstance(seen.assignment, "draining")
            assert next_action(wanted, seen).action is Action.NOTHING


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_is_never_done(state: str, number: int) -> None:
    """Whatever is known: these would lose requests, or hand memory to nobody."""
    for seen, role in itertools.product(EVERY, ROLES):
        desired = DesiredInstance(Assignment(number, role, "b"), state)  # type: ignore[arg-type]
        action = next_action(desired, seen).action
        told = seen.presence is Presence.LOADED and seen.assignment is not None
        if action in (Action.DRAIN, Action.RESUME, Action.UNLINK, Action.ASSIGN):
            assert told
        if action is Action.ASSIGN:
            assert seen.phase in (Phase.DRAINED, Phase.UNASSIGNED)
            assert seen.assignment is not None
            keeps = seen.assignment.role == role
            assert keeps or seen.unlinked or seen.phase is Phase.UNASSIGNED
            assert seen.kind in ("flexible", role)
            assert seen.assignment.number < number
        if action is Action.UNLOAD and told:
            assert seen.phase in (Phase.DRAINED, Phase.UNASSIGNED)
        elif action is Action.UNLOAD:
            assert state == "absent"
            assert seen.presence is Presence.BUSY or seen.late
        if action is Action.REMOVE:
            assert (state, seen.presence) == ("absent", Presence.UNLOADED)
        if action is Action.LOAD:
            assert state != "absent"
            assert seen.presence in (Presence.ABSENT, Presence.UNLOADED)
        if state == "absent":
            assert action not in (Action.LOAD, Action.ASSIGN, Action.RESUME)


def test_what_drains_is_not_repaired_and_what_is_absent_is_not_missed() -> None:
    for seen in EVERY:
        here = seen.presence in (Presence.LOADED, Presence.BUSY)
        assignment = Assignment(2, "prefill")
        for state in STATES:
            found = duty(DesiredInstance(assignment, state), seen)  # type: ignore[arg-type]
            if not here:
                assert found is Duty.ABSENT
            else:
                assert found is (Duty.REPAIRED if state == "serving" else Duty.DRAINING)
