"""What is known of a server and of each of its models."""

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
    """

    HEALTHY = "healthy"
    LATE = "late"
    FAILED = "failed"
    """Taken out of service; its repair waits for the pause between two repairs."""
    REPAIRING = "repairing"


class Life(enum.Enum):
    """How a process looks from outside."""

    RUNS = enum.auto()
    STOPPED = enum.auto()
    """By a signal: it will not go on by itself."""
    GONE = enum.auto()


@dataclass
class Health:
    """What is known of a server or a model. Times are ``loop.time()`` seconds."""

    state: State = State.HEALTHY
    since: float = -math.inf
    reason: str = ""
    """Of the latest failure."""
    answered: float = -math.inf
    """The latest answer to any question."""
    proven: float = -math.inf
    """The latest probe that came through it from end to end."""
    repairs: int = 0
    down_s: float = 0.0
    """How long the latest failure kept it out of service."""
    backoff: Backoff = field(default_factory=Backoff, repr=False)

    def to(self, state: State, now: float) -> None:
        if state is not self.state:
            self.state, self.since = state, now
