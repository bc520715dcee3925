"""What the controller tells of each decision."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from pdserve.control.records import Label, Text

What = Literal[
    "advice",  # a change that ``advise`` does not make
    "begin",  # a transaction has begun
    "step",  # a move of a transaction went on to another step
    "end",  # a transaction is over
    "hold",  # why a group's ratio is not changed; only when the reason has changed
    "lost",  # a member was declared lost
    "drain",  # an operator drains a member
    "found",  # a member serves again that was lost or drained
    "short",  # what should happen cannot: no spare, the budget
    "file",  # what the deployment's file adds, or has no more, was taken up
    "volume",  # equation (2) says that a group is, or is not, needed
]


class Event(Struct, frozen=True, forbid_unknown_fields=True):
    """One decision, with what it was made from; its key is ``events/NUMBER``."""

    at: Annotated[float, Meta(ge=0)]
    """Seconds since 1970."""
    what: What
    group: Label
    text: Text
    instances: tuple[Label, ...] = ()
    numbers: dict[str, float] = {}
    """The inputs, and what follows from them; times are in seconds, gains are parts of 1."""
