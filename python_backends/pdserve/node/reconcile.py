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
    """What is done next."""

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
    """Have every decode close its link to the memory of this prefill."""
    ASSIGN = "assign"
    UNLOAD = "unload"
    REMOVE = "remove"
    """Take its model out of the repository."""


class Duty(Enum):
    """What the watchdog has to do for an instance.

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
    """What an agent knows of one of its instances."""

    presence: Presence
    kind: Kind
    assignment: Assignment | None = None
    """As the present process has said; None: it has not been asked since the last action."""
    phase: Phase = Phase.UNASSIGNED
    unlinked: bool = False
    """No decode has a link to its memory any more, or it has no such memory."""
    silent: bool = False
    """It has been asked, and has not answered for long."""


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
        return _NOTHING
    if desired.state == "absent":
        return Next(_leave(seen))
    if reason := _impossible(desired.assignment, seen.kind):
        return Next(Action.NOTHING, reason)
    if seen.presence is Presence.BUSY:
        return Next(Action.WAIT)
    if seen.presence is not Presence.LOADED:
        return Next(Action.LOAD)
    if seen.assignment is None:
        return Next(Action.INSPECT)
    has, wanted = seen.assignment, desired.assignment
    if has.number < wanted.number:
        return Next(_change(seen))
    if has != wanted:
        return Next(Action.NOTHING, f"it has assignment {has}, and {wanted} is out of date")
    return Next(_stay(desired, seen.phase))


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


def _leave(seen: Seen) -> Action:
    if seen.presence is Presence.ABSENT:
        return Action.NOTHING
    if seen.presence is Presence.UNLOADED:
        return Action.REMOVE
    if seen.presence is Presence.BUSY or seen.silent:
        return Action.UNLOAD  # it holds nothing that could be waited for
    return Action.INSPECT if seen.assignment is None else _emptied(seen, Action.UNLOAD)


def _change(seen: Seen) -> Action:
    return _emptied(seen, Action.ASSIGN)


def _emptied(seen: Seen, then: Action) -> Action:
    """Return the next step to where nobody has anything there any more, and then this one."""
    if seen.phase is Phase.SERVING:
        return Action.DRAIN
    if seen.phase is Phase.DRAINING:
        return Action.WAIT
    return then if seen.unlinked or seen.phase is Phase.UNASSIGNED else Action.UNLINK


def _stay(desired: DesiredInstance, phase: Phase) -> Action:
    if desired.state == "draining":
        if phase is Phase.SERVING:
            return Action.DRAIN
        return Action.WAIT if phase is Phase.DRAINING else Action.NOTHING
    if phase in (Phase.DRAINING, Phase.DRAINED):
        return Action.RESUME
    return Action.NOTHING
