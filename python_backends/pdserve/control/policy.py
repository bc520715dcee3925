"""What the operator allows the controller to do, and the constants of its decisions.

Times are in seconds. Each constant has its reason in docs/control-plane.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one group."""

    least_prefill: int = 2
    """With one of a role, a failure stops the group. A group with fewer keeps what it has."""
    least_decode: int = 2
    most: int | None = None
    """Largest number of instances that it has with those lent to it; None: no limit."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of each day, or of some days of the week, in UTC.

    It may pass midnight: it belongs to the day on which it begins.
    """

    start_s: float
    """Seconds after midnight at which it begins."""
    end_s: float
    days: frozenset[int] = frozenset(range(7))
    """Days on which it begins; 0 is Monday."""

    def holds(self, now: float) -> bool:
        """Tell whether a time, in seconds since 1970, is inside."""
        day, second = divmod(now, DAY_S)
        weekday = (int(day) + 3) % 7  # 1970-01-01 was a Thursday
        if self.start_s <= self.end_s:
            return weekday in self.days and self.start_s <= second < self.end_s
        return (weekday in self.days and second >= self.start_s) or (
            (weekday - 1) % 7 in self.days and second < self.end_s
        )


@dataclass(frozen=True, slots=True)
class Tide:
    """Instances that are elsewhere for a part of the day, or while their group is not needed."""

    group: str
    to: str
    """The pool they go to: the name of a group, whose scenario they then serve, or any other name;
    in a pool that is no group they are not loaded."""
    windows: tuple[Window, ...] = ()
    """When they are out."""
    prefills: int | None = None
    """How many prefills go; None: the whole group goes."""
    decodes: int | None = None
    volume: bool = False
    """The whole group goes out whenever the other groups of its scenario suffice, by equation (2)
    of the paper, and comes back when they do not. ``windows`` then has no effect."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How the controller decides."""

    ratio: Literal["never", "advise", "act"] = "act"
    """``advise``: the change is an event, and nothing is written."""
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    """The bounds of groups, by name; a group that is not named has those of ``Bounds()``."""
    tides: tuple[Tide, ...] = ()
    budget: int | None = None
    """Largest number of instances that are loaded at once in the whole deployment; None: any."""
    drain_s: float = 60.0
    """Time within which an instance that drains holds nothing any more."""
    switch_s: float = 30.0
    """Time for another assignment in a process that runs."""
    load_s: float = 300.0
    """Time for an instance to be loaded, or to be unloaded."""
    lost_s: float = 10.0
    """An instance whose agent is gone is lost once no probe has been answered for this time."""

    def bounds_of(self, group: str) -> Bounds:
        return self.bounds.get(group, Bounds())
