"""Instances of the queue model: one engine each, that computes as prefill or as decode."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

from pdserve.control.assignment import Assignment
from pdserve.control.records import Phase
from pdserve.control.work import Work
from tests.control_model.requests import Request, step_s

if TYPE_CHECKING:
    from typing import Literal


class Instance:
    """An instance, its process included."""

    def __init__(self, name: str, host: str, kind: Literal["prefill", "decode", "flexible"]):
        self.name, self.host, self.kind = name, host, kind
        self.process: Literal["absent", "loading", "ready", "failed"] = "ready"
        self.assignment: Assignment | None = None
        self.phase = Phase.UNASSIGNED
        self.epoch = 0
        self.reason = ""
        self.failed_since: float | None = None
        self.silent_since: float | None = None
        self.busy_until = 0.0
        """When the agent has ended what it does with it."""
        self.drain_until = float("inf")
        self.queue: deque[Request] = deque()
        """The requests that a prefill computes, the first one now."""
        self.leased: deque[Request] = deque()
        """Of a prefill: computed, and waiting for a decode."""
        self.running: list[tuple[float, int, Request]] = []
        """Of a decode: by the value of its clock at which they end."""
        self.clock = 0.0
        """Of a decode: tokens that a sequence would have got since its start."""
        self.began = self.at = 0.0
        self.version = 0
        self._ids = itertools.count()
        self.restart()

    def restart(self) -> None:
        """Begin to count from zero, as a new process does."""
        self.completed = self.busy_s = self.slot_s = 0.0
        self.steps = self.sequences = self.squared = self.sequence_s = 0.0

    def drop(self) -> list[Request]:
        """Give up all requests, and return them."""
        for end, _, request in self.running:
            request.left = max(1.0, end - self.clock)
        held = [*self.queue, *self.leased, *(one for *_, one in self.running)]
        self.queue.clear()
        self.leased.clear()
        self.running.clear()
        self.version += 1
        return sorted(held, key=lambda one: one.arrived)

    @property
    def role(self) -> str:
        return self.assignment.role if self.assignment else "none"

    @property
    def serving(self) -> bool:
        return self.process == "ready" and self.phase is Phase.SERVING

    @property
    def used(self) -> int:
        return len(self.queue) + len(self.running)

    def advance(self, now: float) -> None:
        """Count the work since the last time."""
        seconds, self.at = now - self.at, now
        if self.role == "prefill":
            self.slot_s += seconds * (len(self.queue) + len(self.leased))
            self.busy_s += seconds if self.queue else 0.0
            return
        batch = len(self.running)
        if not batch:
            return
        steps = seconds / step_s(batch)
        self.clock += steps
        self.busy_s += seconds
        self.slot_s += batch * seconds
        self.steps += steps
        self.sequences += steps * batch
        self.squared += steps * batch**2
        self.sequence_s += seconds * batch

    def push(self, request: Request) -> None:
        """Let a decode begin with a request."""
        heapq.heappush(self.running, (self.clock + request.left, next(self._ids), request))

    def next_end(self) -> float | None:
        """Return when its next request ends if nothing else happens; None: never."""
        if self.role == "prefill":
            return self.began + self.queue[0].prompt_s if self.queue else None
        if not self.running:
            return None
        left = max(0.0, self.running[0][0] - self.clock)
        return self.at + left * step_s(len(self.running))

    def work(self) -> Work:
        return Work(
            self.completed,
            self.busy_s,
            self.slot_s,
            self.steps,
            self.sequences,
            self.squared,
            self.sequence_s,
        )
