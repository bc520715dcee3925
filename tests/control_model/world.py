"""The world of the queue model: time, a gateway's lines, and instances that compute.

There is neither a network nor a thread: events in a heap, by time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.control.records import Phase
from tests.control_model.instances import Instance
from tests.control_model.requests import DECODE_SLOTS, PREFILL_SLOTS, Request


@dataclass(slots=True)
class Result:
    """What became of the requests of a run."""

    good: int = 0
    """Within both limits."""
    late: int = 0
    expired: int = 0
    failed: int = 0
    handed: int = 0
    """Requests that went on elsewhere, since their instance drained too long or was killed."""

    @property
    def total(self) -> int:
        return self.good + self.late + self.expired + self.failed

    @property
    def slo(self) -> float:
        """Return the share of requests within both limits, in percent."""
        return 100 * self.good / self.total if self.total else 100.0


@dataclass(slots=True, eq=False)
class Line:
    """A group's requests at the gateway."""

    waiting: deque[Request] = field(default_factory=deque)
    ready: deque[tuple[Instance, Request]] = field(default_factory=deque)
    """Computed, with the prefill that holds the KV cache; they wait for a decode."""
    routed: int = 0
    arrived: int = 0


class World:
    """Requests of one or several groups, and who serves them.

    Args:
        ttft_s, tpot_s: limits; a request that waits longer than the first is given up.
    """

    def __init__(self, instances: list[Instance], groups: list[str], ttft_s: float, tpot_s: float):
        self.instances = {one.name: one for one in instances}
        self.lines = {name: Line() for name in groups}
        self.ttft_s, self.tpot_s = ttft_s, tpot_s
        self.now = 0.0
        self.result = Result()
        self.on_change: Callable[[], None] = lambda: None
        self.serves: dict[str, bool] = {}
        """By instance: whether desired state lets gateways send it requests; default: yes."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._members: dict[tuple[str, str], list[Instance]] = {}

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._ids), do))

    def run(self, until: float) -> None:
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, do = heapq.heappop(events)
            do()
        self.now = until

    def arrive(self, group: str, request: Request) -> None:
        line = self.lines[group]
        line.routed += 1
        line.arrived += 1
        line.waiting.append(request)
        self.dispatch(group)

    def members(self, group: str, role: str) -> list[Instance]:
        """Return who serves a group in a role."""
        found = self._members.get((group, role))
        if found is None:
            found = self._members[group, role] = [
                one
                for one in self.instances.values()
                if one.serving
                and one.assignment is not None
                and one.assignment.group == group
                and one.assignment.role == role
                and self.serves.get(one.name, True)
            ]
        return found

    def changed(self) -> None:
        """Notice that an instance has another phase, assignment or desired state."""
        self._members.clear()
        self.on_change()

    def dispatch(self, group: str) -> None:
        """Give what waits to who has room."""
        line = self.lines[group]
        self.expire(line)
        while line.ready and (decode := self._freest(group, "decode")) is not None:
            prefill, request = line.ready.popleft()
            prefill.advance(self.now)
            prefill.leased.remove(request)
            self._pull(decode, request)
            self._empty(prefill)
        while line.waiting and (prefill := self._freest(group, "prefill")) is not None:
            prefill.advance(self.now)
            prefill.queue.append(line.waiting.popleft())
            if len(prefill.queue) == 1:
                prefill.began = self.now
                self._schedule(prefill)

    def _freest(self, group: str, role: str) -> Instance | None:
        """Return who has the most room; None: nobody has any."""
        found, least = None, PREFILL_SLOTS if role == "prefill" else DECODE_SLOTS
        for one in self.members(group, role):
            held = len(one.queue) + len(one.leased) + len(one.running)
            if held < least:
                found, least = one, held
        return found

    def expire(self, line: Line) -> None:
        """Give up requests that have waited too long for their first token."""
        waiting = line.waiting
        while waiting and self.now - waiting[0].arrived > self.ttft_s:
            if not math.isnan(waiting[0].first):
                return  # it is being recovered
            waiting.popleft()
            self.result.expired += 1

    def requeue(self, instance: Instance) -> None:
        """Let all requests of an instance go on elsewhere: recovery recomputes them."""
        instance.advance(self.now)
        group = instance.assignment.group if instance.assignment else ""
        line = self.lines.get(group)
        held = instance.drop()
        if line is None:
            self.result.failed += len(held)
            return
        self.result.handed += len(held)
        line.ready = deque(one for one in line.ready if one[0] is not instance)
        line.waiting.extendleft(reversed(held))
        self.dispatch(group)

    def _pull(self, decode: Instance, request: Request) -> None:
        decode.advance(self.now)
        decode.push(request)
        self._schedule(decode)

    def _schedule(self, instance: Instance) -> None:
        instance.version += 1
        end = instance.next_end()
        if end is not None:
            version = instance.version
            self.at(max(end, self.now), lambda: self._end(instance, version))

    def _end(self, instance: Instance, version: int) -> None:
        """A prompt is computed, or an answer is complete."""
        if version != instance.version:
            return
        instance.advance(self.now)
        assert instance.assignment is not None
        group = instance.assignment.group
        instance.completed += 1
        if instance.role == "prefill":
            request = instance.queue.popleft()
            if math.isnan(request.first):
                request.first = self.now
            instance.leased.append(request)
            instance.began = self.now
            self.lines[group].ready.append((instance, request))
            self._schedule(instance)
        else:
            _, _, request = heapq.heappop(instance.running)
            self._ended(request)
            self._schedule(instance)
        self.dispatch(group)
        self._empty(instance)

    def _ended(self, request: Request) -> None:
        request.done = self.now
        ttft_s = request.first - request.arrived
        tpot_s = (request.done - request.first) / request.tokens
        if ttft_s <= self.ttft_s and tpot_s <= self.tpot_s:
            self.result.good += 1
        else:
            self.result.late += 1

    def _empty(self, instance: Instance) -> None:
        """Notice that an instance that drains holds nothing any more."""
        if instance.phase is Phase.DRAINING and not instance.used and not instance.leased:
            instance.phase = Phase.DRAINED
            self.changed()
