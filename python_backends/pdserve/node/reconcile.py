"""What to do next with one instance, so that it becomes what is desired of it; pure.

It is asked again after each action, and whenever something has changed, so nothing is remembered
between two answers: an agent that was killed in the middle goes on where the instance is.

::

    ABSENT ───────┐                                    serving   ┌───────────────────┐
      ▲  REMOVE   │ LOAD        INSPECT                as desired│ RESUME            │
    UNLOADED ─────┴────► LOADED ───────► SERVING ────────────────┼─► DRAINING ──► DRAINED
      ▲                  (unknown)         ▲  ▲      DRAIN       │      WAIT      │   │ UNLINK
      │                                    │  └──────────────────┘                │   ▼
      │                                    └───────── ASSIGN ◄── UNASSIGNED ◄─────┴─ unlinked
      └────────────────────────────────────────────────────────────── UNLOAD ◄───────┘

An instance that has a higher number than is desired of it, or another assignment under the same
number, is left alone: whoever desires that is out of date, and sees it by what the agent reports.
A prefill that stays one keeps its memory, and its links with it. An instance that could not take
the memory of its role has none (UNASSIGNED), and is loaded again. An answer or an end that does not
come is ``late``, and is waited for no more where that harms nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from pdserve.control.assignment import Assignment
from pdserve.control.records import DesiredInstance, Phase

Kind = Literal["prefill", "decode", "flexible"]


class Presence(Enum):
    """Where the model of an instance is."""

    ABSENT = "absent"
    """Neither loaded, nor in the repository of its server."""
    UNLOADED = "unloaded"
    """In the repository, so that its server would load it when it starts."""
    LOADED = "loaded"
    """It has a process, which may not answer yet."""
    BUSY = "busy"
    """It is being repaired, or its server is."""


class Action(Enum):
    """The action that comes next."""

    NOTHING = "nothing"
    """It is as desired, or nothing is desired of it, or it cannot be so (see ``reason``)."""
    WAIT = "wait"
    """Something is going on that has an end."""
    LOAD = "load"
    INSPECT = "inspect"
    """Ask it what it is."""
    DRAIN = "drain"
    RESUME = "resume"
    UNLINK = "unlink"
    """Have every decode close its link to the memory of this prefill, which is about to go."""
    ASSIGN = "assign"
    UNLOAD = "unload"
    REMOVE = "remove"
    """Take its model out of the repository."""


class Duty(Enum):
    """The duty of the watchdog towards an instance.

    ::

        REPAIRED ◄──► DRAINING ──► ABSENT ──► REPAIRED
    """

    REPAIRED = "repaired"
    """It is probed, and repaired if it fails."""
    DRAINING = "draining"
    """It is not probed; if its process ends, those who wait for it are told, and no more."""
    ABSENT = "absent"
    """There is nothing to watch."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The knowledge of an agent of one of its instances."""

    presence: Presence
    kind: Kind
    assignment: Assignment | None = None
    """The answer of the present process; None: it has not been asked since the last action."""
    phase: Phase = Phase.UNASSIGNED
    unlinked: bool = False
    """No decode has a link to its memory any more, or it has no such memory."""
    late: bool = False
    """True if an answer or an end that was waited for has not come in its time."""


@dataclass(frozen=True, slots=True)
class Next:
    action: Action
    reason: str = ""
    """Why it cannot be what is desired."""


_NOTHING = Next(Action.NOTHING)


def next_action(desired: DesiredInstance | None, seen: Seen) -> Next:
    """Return what to do next with an instance.

    Args:
        desired: None: nothing is known to be desired of it, and it stays as it is.
    """
    if desired is None:
        return Next(Action.INSPECT) if _unknown(seen) else _NOTHING
    if desired.state == "absent":
        return Next(_leave(seen))
    if reason := _impossible(desired.assignment, seen.kind):
        return Next(Action.INSPECT) if _unknown(seen) else Next(Action.NOTHING, reason)
    if seen.presence is Presence.BUSY:
        return Next(Action.WAIT)
    if seen.presence is not Presence.LOADED:
        return Next(Action.LOAD)
    if seen.assignment is None:
        return Next(Action.INSPECT)
    has, wanted = seen.assignment, desired.assignment
    if has.number < wanted.number:
        links = has.role != wanted.role
        return Next(_emptied(seen, Action.ASSIGN, links=links))
    if has != wanted:
        return Next(Action.NOTHING, f"it has assignment {has}, and {wanted} is out of date")
    return Next(_stay(desired, seen))


def duty(desired: DesiredInstance | None, seen: Seen) -> Duty:
    """Return what the watchdog has to do for it meanwhile."""
    if desired is None:
        return Duty.REPAIRED
    if seen.presence in (Presence.ABSENT, Presence.UNLOADED):
        return Duty.ABSENT
    return Duty.REPAIRED if desired.state == "serving" else Duty.DRAINING


def _impossible(wanted: Assignment, kind: Kind) -> str:
    """Return why an instance of a fixed role cannot have this assignment; empty: it can."""
    if kind in ("flexible", wanted.role):
        return ""
    return f"its role is {kind} for ever, and cannot be {wanted.role}"


def _unknown(seen: Seen) -> bool:
    return seen.presence is Presence.LOADED and seen.assignment is None


def _leave(seen: Seen) -> Action:
    if seen.presence is Presence.ABSENT:
        return Action.NOTHING
    if seen.presence is Presence.UNLOADED:
        return Action.REMOVE
    if seen.presence is Presence.BUSY:
        return Action.UNLOAD  # it holds nothing that could be waited for
    if seen.assignment is None:
        return Action.UNLOAD if seen.late else Action.INSPECT
    # Its process ends, and so its memory is nobody else's: a link to it reads nothing.
    return _emptied(seen, Action.UNLOAD, links=not seen.late)


def _emptied(seen: Seen, then: Action, *, links: bool) -> Action:
    """Return the next step to where nobody has anything there any more, and then this one.

    Args:
        links: links to its memory count.
    """
    if seen.phase is Phase.SERVING:
        return Action.DRAIN
    if seen.phase is Phase.DRAINING:
        return Action.WAIT
    if seen.phase is Phase.DRAINED and links and not seen.unlinked:
        return Action.UNLINK
    return then


def _stay(desired: DesiredInstance, seen: Seen) -> Action:
    phase = seen.phase
    if phase is Phase.UNASSIGNED:
        if desired.assignment.role == "none":
            return Action.NOTHING
        return Action.UNLOAD if seen.late else Action.WAIT
    if desired.state == "draining":
        if phase is Phase.SERVING:
            return Action.DRAIN
        return Action.WAIT if phase is Phase.DRAINING else Action.NOTHING
    return Action.NOTHING if phase is Phase.SERVING else Action.RESUME
