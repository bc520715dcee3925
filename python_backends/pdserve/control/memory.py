"""What a controller remembers between two decisions; nothing breaks if it is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.control.window import Window


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """The memory of one group."""

    window: Window = field(default_factory=Window)
    changed_at: float | None = None
    """When a transaction was last seen to change it; None: not yet."""
    direction: int = 0
    """Direction of its last change of ratio: 1: more prefills, -1: fewer, 0: none is known."""
    wish: int = 0
    """Direction that the last ticks have asked for."""
    wished: int = 0
    """Number of ticks in a row that have."""
    told: str = ""
    """The last hold or advice, so that it is told once."""
    rates: tuple[float, float] | None = None
    """Requests per second of a prefill and of a decode, as they were known last."""
    spare_since: float | None = None
    """Since when equation (2) asks for the group to go, or to come; None: it stays as it is."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Begin with ``Memory()``: a new controller changes no ratio before its first window is full.

    It has no time of its own, and is never stored.
    """

    groups: Mapping[str, GroupMemory] = field(default_factory=dict)
    serving_since: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """The number under which each instance serves, and since when."""
    not_before: Mapping[str, float] = field(default_factory=dict)
    """For each instance that did not become what it should: when it is tried again."""
    short: frozenset[str] = frozenset()
    """Members whose loss was told, while there is no spare."""

    def of(self, group: str) -> GroupMemory:
        return self.groups.get(group, GroupMemory())
