"""The controller: the one that leads makes the desired state what it should be.

::

    CANDIDATE ──► LEADING ──► CANDIDATE
       elected       its lease ended, a write was fenced by another leader, or the store
                     has not been reached for the lease's time
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from enum import Enum

from pdserve.config import Deployment
from pdserve.control.decide import decide
from pdserve.control.outlook import Clock, Outlook, Probe, Scrape
from pdserve.control.store.election import LOOK_S, TTL_S, Candidate, Leadership
from pdserve.control.store.errors import StoreError
from pdserve.control.store.protocol import Store
from pdserve.control.store.view import View
from pdserve.control.term import Decide, Term
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry

_log = logging.getLogger(__name__)

AGAIN_S = 0.5
"""Seconds after which what has not ended is cancelled again."""


class State(Enum):
    """See the drawing above."""

    CANDIDATE = "candidate"
    LEADING = "leading"


class Controller:
    """One controller of a deployment, of which there may be several.

    Args:
        name: identifies it in the leader's key, for people to read.
        deployment: returns the deployment as it is now; a reload changes it.
        decisions, clock: others in tests; the clock returns the seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        deployment: Callable[[], Deployment],
        scrape: Scrape,
        probe: Probe,
        metrics: Registry,
        ttl_s: float = TTL_S,
        decisions: Decide = decide,
        clock: Clock = time.time,
    ) -> None:
        self._store = store
        self._name = name
        self._deployment = deployment
        self._scrape = scrape
        self._probe = probe
        self._metrics = metrics
        self._ttl_s = ttl_s
        self._decisions = decisions
        self._clock = clock
        self._term: Term | None = None

    @property
    def state(self) -> State:
        return State.CANDIDATE if self._term is None else State.LEADING

    async def run(self) -> None:
        """Lead whenever elected, until cancelled."""
        while True:
            leadership = await Candidate(self._store, self._name, self._ttl_s).lead()
            _log.info("%s leads (elected at revision %d)", self._name, leadership.revision)
            try:
                await self._lead(leadership)
            finally:
                self._term = None
                for state in ("desired", "serving"):
                    self._metrics.drop(state=state)
            _log.warning("%s leads no more", self._name)
            await self._resigned(leadership)

    async def _resigned(self, leadership: Leadership) -> None:
        """Give back the lease, however long that takes: in a file it lasts as long as we do."""
        while True:
            try:
                return await leadership.resign()
            except StoreError:
                await asyncio.sleep(LOOK_S)

    async def _lead(self, leadership: Leadership) -> None:
        changed, deployment, metrics = asyncio.Event(), self._deployment, self._metrics
        view = View(self._store, "", lambda *_: None, lambda _: changed.set())
        outlook = Outlook(deployment, self._scrape, self._probe, metrics, changed, self._clock)
        self._term = Term(
            leadership, self._store, deployment, outlook, metrics, self._decisions, self._clock
        )
        works = {
            asyncio.ensure_future(work)
            for work in (leadership.run(), view.run(), outlook.run(), self._term.run())
        }
        try:
            await leadership.lost.wait()
        finally:
            while works:  # before 3.12 asyncio.wait_for may lose a cancellation
                for work in works:
                    work.cancel()
                _, works = await asyncio.wait(works, timeout=AGAIN_S)

    def show(self) -> None:
        """Set the metrics of what it is at the moment."""
        self._metrics.set(catalogue.CONTROL_LEADER, float(self._term is not None))
        heard = self._term.heard if self._term is not None else None
        age_s = -1.0 if heard is None else asyncio.get_running_loop().time() - heard
        self._metrics.set(catalogue.CONTROL_STORE_AGE, round(age_s, 3))
