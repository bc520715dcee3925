"""All decisions of one tick."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from pdserve.control.cluster import Cluster
from pdserve.control.events import Event
from pdserve.control.memory import Memory
from pdserve.control.policy import Policy

TICK_S = 5.0
"""Time between two samples of the metrics. Decisions may be made more often: whatever has changed
in between, such as a step that is over, is then seen at once."""


@dataclass(frozen=True, slots=True)
class Write:
    """A record to put, or to delete, in the fenced write of one decision."""

    key: str
    record: Struct | None
    """None: the key is deleted."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """What follows from what is known."""

    writes: tuple[Write, ...]
    """All in one fenced write, at most `MOST_WRITES`; no key twice."""
    events: tuple[Event, ...]
    """To be kept in the same write if they are about it."""
    memory: Memory
    """Given to the next call, also if the write failed: decisions are made again from what is
    stored. A new controller begins with ``Memory()``, and does not change a ratio for one window.
    """


def decide(cluster: Cluster, policy: Policy, memory: Memory) -> Decisions:
    """Return what to write, what to tell, and what to remember.

    It is a pure function; called again with the same state it decides the same. What it writes
    is level-triggered: nothing is written while what is stored is what should be.
    """
    raise NotImplementedError
