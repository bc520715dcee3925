"""Which prefills a request may go to: whichever is idle first, or one that is chosen on arrival.

``on_demand`` is what this project is about. The others are what it is held against: they choose
one prefill when a request arrives, by what they believe of its load, and the request stands in a
line of its own there, first come first served, as in a queue inside that prefill. (It is kept at
the gateway, where a request whose limit passes leaves it: the queues of others compute for nobody.)

    round_robin      in turn
    fewest_streams   fewest open answers, decoding included: P/D-Serve's own old version
    shortest_queue   fewest requests that wait or are computed, by the last report
    pending_tokens   fewest prompt tokens of those, by the last report
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pdserve.config import PolicyName
from pdserve.scheduling.forwarding import Forwarding
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.request import Request

MakeForwarding = Callable[[Sequence[Instance], bool], Forwarding[Any]]
"""Over some prefills; True: their line is to be as a queue inside a prefill would be."""


class Queue(Forwarding[Any]):
    """Requests wait as in a queue inside an instance: first come first served, to the limit."""


class Policy(Protocol):
    """Decides which prefills of a group a request may go to."""

    @property
    def lines(self) -> Sequence[Forwarding[Any]]: ...

    @contextmanager
    def bound(self, request: Request) -> Iterator[Forwarding[Any]]:
        """The prefills that it may go to, until it ends."""

    def computed(self, request: Request) -> None:
        """Its first token has come."""


class OnDemand:
    """Any prefill of the group."""

    def __init__(self, prefills: Sequence[Instance], make: MakeForwarding) -> None:
        self.lines = [make(prefills, False)]

    def update(self, prefills: Sequence[Instance]) -> None:
        """Go on with these prefills."""
        self.lines[0].update(prefills)

    @contextmanager
    def bound(self, request: Request) -> Iterator[Forwarding[Any]]:
        yield self.lines[0]

    def computed(self, request: Request) -> None:
        pass


@dataclass(slots=True)
class Load:
    """What a prefill has been given by this gateway."""

    streams: int = 0
    requests: int = 0
    """Without a first token so far."""
    tokens: int = 0
    """Of their prompts."""


class Bound:
    """One prefill, chosen on arrival by the least of something about the loads.

    Args:
        report_s: the loads are seen as they were when they were last reported, which is every
            ``report_s`` seconds; 0: as they are.
    """

    def __init__(
        self,
        prefills: Sequence[Instance],
        make: MakeForwarding,
        cost: Callable[[Load], int],
        report_s: float = 0.0,
    ) -> None:
        self.lines = [make([prefill], True) for prefill in prefills]
        self._cost = cost
        self._report_s = report_s
        self._loads = [Load() for _ in prefills]
        self._reported = list(map(replace, self._loads))
        self._next_report = 0.0
        self._waiting: dict[str, tuple[Load, int]] = {}
        self._turn = itertools.count()

    @contextmanager
    def bound(self, request: Request) -> Iterator[Forwarding[Any]]:
        self._report()
        seen = self._reported if self._report_s else self._loads
        first, count = next(self._turn), len(seen)
        # In turn among equals.
        number = min(range(count), key=lambda i: (self._cost(seen[i]), (i - first) % count))
        load, tokens = self._loads[number], request.prompt_tokens
        load.streams += 1
        load.requests += 1
        load.tokens += tokens
        self._waiting[request.id] = load, tokens
        try:
            yield self.lines[number]
        finally:
            self.computed(request)
            load.streams -= 1

    def computed(self, request: Request) -> None:
        self._report()
        if (waiting := self._waiting.pop(request.id, None)) is not None:
            load, tokens = waiting
            load.requests -= 1
            load.tokens -= tokens

    def _report(self) -> None:
        """Called before anything changes: what was reported since is what is still true."""
        now = asyncio.get_running_loop().time()
        if self._report_s and now >= self._next_report:
            self._reported = list(map(replace, self._loads))
            self._next_report = (now // self._report_s + 1) * self._report_s


def build(
    name: PolicyName, prefills: Sequence[Instance], make: MakeForwarding, report_s: float
) -> Policy:
    """The policy of that name."""
    match name:
        case "on_demand":
            return OnDemand(prefills, make)
        case "round_robin":
            return Bound(prefills, make, lambda _: 0)
        case "fewest_streams":
            return Bound(prefills, make, lambda load: load.streams)
        case "shortest_queue":
            return Bound(prefills, make, lambda load: load.requests, report_s)
        case "pending_tokens":
            return Bound(prefills, make, lambda load: load.tokens, report_s)
