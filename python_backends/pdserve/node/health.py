"""The health of a server and of each of its models."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from pdserve.node.backoff import Backoff


class State(enum.Enum):
    """
    ::

        HEALTHY ◄──► LATE          questions are not answered in time
           │           │
           └─────┬─────┘
                 ▼
              FAILED ◄──► REPAIRING ──► HEALTHY

        any ──► DRAINING ──► ABSENT ──► HEALTHY      as is desired of it
    """

    HEALTHY = "healthy"
    LATE = "late"
    FAILED = "failed"
    """Taken out of service; the repair waits for the pause between two repairs."""
    REPAIRING = "repairing"
    DRAINING = "draining"
    """Not probed."""
    ABSENT = "absent"
    """There is nothing to watch."""


class Life(enum.Enum):
    """State of a process, as seen from outside."""

    RUNS = enum.auto()
    STOPPED = enum.auto()
    """Stopped by a signal: it will not continue by itself."""
    GONE = enum.auto()


@dataclass
class Health:
    """The health of a server or a model. Times are ``loop.time()`` seconds."""

    state: State = State.HEALTHY
    since: float = -math.inf
    reason: str = ""
    """Reason of the latest failure."""
    answered: float = -math.inf
    """Time of the latest answer to any check."""
    proven: float = -math.inf
    """Time of the latest probe that passed through it from end to end."""
    repairs: int = 0
    down_s: float = 0.0
    """Seconds for which the latest failure kept it out of service."""
    backoff: Backoff = field(default_factory=Backoff, repr=False)

    def to(self, state: State, now: float) -> None:
        if state is not self.state:
            self.state, self.since = state, now
