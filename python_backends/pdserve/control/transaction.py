"""A change of one group, as it stands in the store: any controller can go on with it.

Each instance that it moves goes through these steps by itself::

    UNPUBLISH ──► DRAIN ──► CHANGE ──► DONE         START is first if it is not loaded;
                    │         ▲  │                  UNPUBLISH if its whole group leaves.
                    │  START ─┘  │
                    │    │       │ its time is over, or it says that it failed
                    ▼    ▼       ▼
                 RESUME  └───► RETURN ──► BACK      RESUME: its old assignment, same number
                    └──────────────────► BACK       RETURN: what it was, under a higher number
            any step: it is lost, or a way back took too long ──► ABANDONED

Each step is stored in the same fenced write as the desired state that it is about, so the record
and what runs never contradict each other: another controller finds the step, and what it waits for.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from msgspec import Meta, Struct

from pdserve.control.records import DesiredInstance, Label, Text

Moment = Annotated[float, Meta(ge=0)]
"""Seconds since 1970, by the clock of the controller that wrote it."""


class Step(Enum):
    """The step of a move: what it waits for."""

    UNPUBLISH = "unpublish"
    """Gateways send nothing new to its group, and what waited there has gone."""
    DRAIN = "drain"
    """It holds neither slots nor leases any more."""
    START = "start"
    """Its model is loaded."""
    CHANGE = "change"
    """It says that it has its new assignment; or, on its way out, it is unloaded."""
    DONE = "done"
    RESUME = "resume"
    """It accepts requests again, under the assignment that it never gave up."""
    RETURN = "return"
    """It says that it is again what it was, under a higher number."""
    BACK = "back"
    """It is again what it was."""
    ABANDONED = "abandoned"
    """Its way back takes too long, or it is lost. Its agent makes it what is desired once it can; a
    member that is lost is replaced."""

    @property
    def forward(self) -> bool:
        """Tell whether it is on the way there, not back."""
        return self in (Step.UNPUBLISH, Step.DRAIN, Step.START, Step.CHANGE, Step.DONE)

    @property
    def over(self) -> bool:
        return self in (Step.DONE, Step.BACK, Step.ABANDONED)


class Kind(Enum):
    """Why a group changes."""

    RATIO = "ratio"
    """Members change their role."""
    PIN = "pin"
    """The same, to the ratio that an operator has set."""
    RESCUE = "rescue"
    """A role is empty and there is no spare: one of the other role takes it."""
    SUBSTITUTE = "substitute"
    """A spare takes the place of a lost member."""
    OUT = "out"
    """Instances, or the whole group, go to a pool."""
    IN = "in"
    """They come back."""


class Move(Struct, frozen=True, forbid_unknown_fields=True):
    """One instance on its way from one desired state to another."""

    instance: Label
    was: DesiredInstance
    to: DesiredInstance
    step: Step
    since: Moment
    """When its step began."""
    took: dict[str, float] = {}
    """Seconds of each step that is over, by its value."""
    reason: Text = ""
    """Why it went back, or was abandoned."""


class Transaction(Struct, frozen=True, forbid_unknown_fields=True):
    """The one change of a group; its key is ``transactions/GROUP``."""

    kind: Kind
    group: Label
    moves: tuple[Move, ...]
    began: Moment
    reason: Text
    other: Label = ""
    """Another group that it changes, too: the one that instances are lent to or from."""
    pool: Label = ""
    """For those that go out: where they go, be it a group or not."""
    lost: Label = ""
    """For a substitution: the member that is replaced."""
    failed: Moment = 0.0
    """For a substitution: when that one was first seen to fail."""
    declared: Moment = 0.0
    """For a substitution: when it was declared lost."""
    whole: bool = False
    """The whole group goes out or in: its share is 0 meanwhile."""
    share: Annotated[float, Meta(ge=0)] = 1.0
    """For a whole group: its share when it serves."""

    @property
    def over(self) -> bool:
        return all(move.step.over for move in self.moves)
