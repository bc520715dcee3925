"""What a leader looks at beside the store: the servers' metrics, and instances without an agent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from pdserve.config import Deployment
from pdserve.control import observer
from pdserve.control.cluster import Load
from pdserve.control.decide import TICK_S
from pdserve.control.loads import Page, loads
from pdserve.control.stored import Stored
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.supervision import repeat

PROBE_S = 2.0
"""Seconds between two probes of an instance whose agent is gone."""

Scrape = Callable[[Deployment], Awaitable[Mapping[str, Page | None]]]
"""Reads the metrics page of every server; None: it did not answer."""
Clock = Callable[[], float]
Probe = Callable[[Deployment, str], Awaitable[bool]]
"""False: an instance answers neither this process nor any gateway, of which one answered."""


class Outlook:
    """Looks again and again.

    Args:
        deployment: returns the deployment as it is now.
        clock: returns the seconds since 1970.

    Attributes:
        stored: what the store held when it was read last; None: it has not been.
        loads: the last sample of each group.
        silent: since when no probe of an instance was answered, in seconds since 1970.
        changed: set when there is something new.
    """

    def __init__(
        self,
        deployment: Callable[[], Deployment],
        scrape: Scrape,
        probe: Probe,
        metrics: Registry,
        changed: asyncio.Event,
        clock: Clock,
    ) -> None:
        self.stored: Stored | None = None
        self.loads: Mapping[str, Load] = {}
        self.silent: dict[str, float] = {}
        self.changed = changed
        self._deployment = deployment
        self._scrape = scrape
        self._probe = probe
        self._metrics = metrics
        self._clock = clock

    async def run(self) -> None:
        """Look until cancelled; errors are logged."""
        await asyncio.gather(
            repeat("reading the servers' metrics", self._sample),
            repeat("probing instances", self._ask),
        )

    async def _sample(self) -> float:
        """Read the load of every group; returns the seconds until the next time."""
        deployment = self._deployment()
        control = deployment.control
        assert control is not None
        if control.ratio == "never" and not any(tide.volume for tide in control.tides):
            self.loads = {}
            return TICK_S
        loop = asyncio.get_running_loop()
        at, until = self._clock(), loop.time() + TICK_S
        pages = await self._scrape(deployment)
        for page in pages.values():
            outcome = "unknown" if page is None else "read"
            self._metrics.add(catalogue.CONTROL_SCRAPES, 1, outcome=outcome)
        if self.stored is not None:
            self.loads = loads(deployment, pages, observer.members(self.stored), at)
            self.changed.set()
        return max(0.0, until - loop.time())  # the time of day may be set back

    async def _ask(self) -> float:
        """Probe the instances whose agent is gone; returns the seconds until the next time."""
        if self.stored is None:
            return PROBE_S
        deployment = self._deployment()
        names = observer.unattended(deployment, self.stored)
        answers = await asyncio.gather(*(self._probe(deployment, name) for name in names))
        now, before = self._clock(), self.silent
        self.silent = {
            name: before.get(name, now)
            for name, answered in zip(names, answers, strict=True)
            if not answered
        }
        if self.silent:  # how long they are silent decides, too
            self.changed.set()
        return PROBE_S
