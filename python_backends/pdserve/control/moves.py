"""Where a move goes next, by what is known of its instance."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from pdserve.control.assignment import Role
from pdserve.control.cluster import Member
from pdserve.control.loss import loss
from pdserve.control.policy import Policy
from pdserve.control.records import DesiredInstance
from pdserve.control.transaction import Move, Step

UNPUBLISH_S = 30.0
"""Time within which what waits for a group that leaves has gone."""
GRACE_S = 15.0
"""Time beyond the bound of a drain, which the agent keeps itself, to report its end."""


@dataclass(frozen=True, slots=True)
class Around:
    """The circumstances of a move, on which its next step depends besides its instance."""

    now: float
    policy: Policy
    hidden: bool
    """Nothing waits for the group any more."""
    recall: str = ""
    """Why members that drain should serve again; empty: they should not."""


@dataclass(frozen=True, slots=True)
class Next:
    """A step, and what is desired of the instance from then on; None: what it was."""

    step: Step
    desired: DesiredInstance | None = None
    reason: str = ""


def again(was: DesiredInstance, member: Member) -> DesiredInstance:
    """Return an earlier desired state under a number that the instance has never had."""
    return replace(was, assignment=replace(was.assignment, number=member.number + 1))


def draining(wanted: DesiredInstance) -> DesiredInstance:
    """Return the desired state of the same assignment, drained."""
    return replace(wanted, state="draining")


def begin(member: Member, to: DesiredInstance, now: float) -> Move:
    """Return the move of an instance from what is desired of it to something else."""
    assert member.desired is not None
    was = member.desired
    step = Step.DRAIN
    if was.state == "absent":
        step = Step.START
    elif was.assignment.role == "none":
        step = Step.CHANGE
    return Move(member.name, was, to, step, now)


def turn(member: Member, role: Role, now: float) -> Move:
    """Return the move by which a member takes the other role."""
    assert member.desired is not None
    assignment = replace(member.desired.assignment, role=role, number=member.number + 1)
    return begin(member, DesiredInstance(assignment), now)


def first(move: Move) -> DesiredInstance | None:
    """Return what is desired of an instance when its move begins; None: what it was."""
    if move.step is Step.UNPUBLISH:
        return None
    return draining(move.was) if move.step is Step.DRAIN else move.to


def following(move: Move, member: Member | None, around: Around) -> Next | None:
    """Return the step that follows; None: what the move waits for has not come yet."""
    if member is None:
        return Next(Step.ABANDONED, reason="nothing is known of it any more")
    why = loss(member, around.now, around.policy)
    if why is not None and move.step in (Step.START, Step.CHANGE):
        # It keeps its old place: a member is missed there, a spare is one again when it is back.
        step = Step.RETURN if member.agent else Step.ABANDONED
        return Next(step, again(move.was, member), why.reason)
    if why is not None:
        return Next(Step.ABANDONED, reason=why.reason)
    return _STEPS[move.step](move, member, around)


def limit_s(move: Move, policy: Policy) -> float:
    """Return the time within which what a step waits for has to come."""
    if move.step is Step.UNPUBLISH:
        return UNPUBLISH_S
    if move.step is Step.DRAIN:
        return policy.drain_s + GRACE_S
    loads = "absent" in (move.was.state, move.to.state)
    return policy.load_s if loads else policy.switch_s


def _late(move: Move, around: Around) -> str:
    """Return that the step's time is over; empty: it is not."""
    limit = limit_s(move, around.policy)
    return (
        f"{move.step.value} took more than {limit:g} s" if (around.now - move.since > limit) else ""
    )


def _unpublish(move: Move, _: Member, around: Around) -> Next | None:
    if around.hidden or _late(move, around):
        return Next(Step.DRAIN, draining(move.was))
    return None


def _drain(move: Move, member: Member, around: Around) -> Next | None:
    if member.says(draining(move.was)):
        return Next(Step.CHANGE, move.to)
    if reason := around.recall or _late(move, around):
        return Next(Step.RESUME, move.was, reason)
    return None


def _start(move: Move, member: Member, around: Around) -> Next | None:
    seen = member.observed
    if seen is not None and member.agent and seen.state == "ready":
        return Next(Step.CHANGE)
    return _return(move, member, around)


def _change(move: Move, member: Member, around: Around) -> Next | None:
    if member.says(move.to):
        return Next(Step.DONE)
    return _return(move, member, around)


def _return(move: Move, member: Member, around: Around) -> Next | None:
    reason = _late(move, around)
    return Next(Step.RETURN, again(move.was, member), reason) if reason else None


def _back(move: Move, member: Member, around: Around) -> Next | None:
    if member.desired is not None and member.says(member.desired):
        return Next(Step.BACK)
    if reason := _late(move, around):
        return Next(Step.ABANDONED, reason=reason)
    return None


_STEPS = {
    Step.UNPUBLISH: _unpublish,
    Step.DRAIN: _drain,
    Step.START: _start,
    Step.CHANGE: _change,
    Step.RESUME: _back,
    Step.RETURN: _back,
}
