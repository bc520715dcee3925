"""The controller: the one that leads makes the desired state what it should be.

::

    CANDIDATE ──► LEADING ──► CANDIDATE
       elected       its lease ended, a write was fenced by another leader, or the store
                     has not been reached for the lease's time

While it leads, a *turn* follows each change in the store, and `TICK_S` passes without any: list the
whole store (one revision, so that all of it belongs together), decide, and write what follows, with
its events, in one transaction that is fenced by leader and generation. So whatever stops a
controller at any point leaves the state before a turn or after it, and the next leader decides
again from what is stored. Nothing that it remembers has to survive it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum

from pdserve.config import Deployment
from pdserve.control import event_log, first_state, observer, policies, reconciling, records
from pdserve.control.cluster import Cluster, Load
from pdserve.control.decide import TICK_S, Decisions, Write, decide
from pdserve.control.events import Event
from pdserve.control.loads import Page, loads
from pdserve.control.memory import Memory
from pdserve.control.observer import Observer
from pdserve.control.policy import Policy
from pdserve.control.store.election import TTL_S, Candidate, Leadership
from pdserve.control.store.errors import Fenced, StoreError
from pdserve.control.store.keys import MAX_OPERATIONS
from pdserve.control.store.protocol import Delete, Put, Store
from pdserve.control.store.view import View
from pdserve.control.stored import Stored, read
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.supervision import repeat, traced

_log = logging.getLogger(__name__)

BUSY_S, CALM_S = 0.05, 0.5
"""Least seconds between the ends and beginnings of turns: while a group is being changed, and else.
Reports of hosts arrive all the time, and few of them matter."""
PROBE_S = 2.0
"""Seconds between two probes of an instance whose agent is gone."""
RETRY_S = 1.0
"""Pause after a turn that failed, in seconds."""
MOST_WRITES = 100
"""Keys that are taken over from the file in one turn; the rest follows in the next one."""

Decide = Callable[[Cluster, Policy, Memory], Decisions]
Scrape = Callable[[Deployment], Awaitable[Mapping[str, Page | None]]]
"""Reads the metrics page of every server; None: it did not answer."""
Probe = Callable[[Deployment, str], Awaitable[bool]]
"""Tells whether an instance answers this process, or at least one gateway."""


class State(Enum):
    """See the drawing above."""

    CANDIDATE = "candidate"
    LEADING = "leading"


class Controller:
    """One controller of a deployment, of which there may be several.

    Args:
        name: identifies it in the leader's key, for people to read.
        deployment: returns the deployment as it is now; a reload changes it.
        decisions: `decide`, except in tests.
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
    ) -> None:
        self.state = State.CANDIDATE
        self._store = store
        self._name = name
        self._deployment = deployment
        self._scrape = scrape
        self._probe = probe
        self._metrics = metrics
        self._ttl_s = ttl_s
        self._decide = decisions
        self._heard: float | None = None
        self._begin()

    def _begin(self) -> None:
        """Forget what another leadership knew."""
        self._stored: Stored | None = None
        self._observer = Observer()
        self._memory = Memory()
        self._loads: Mapping[str, Load] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Lead whenever elected, until cancelled; neither errors nor bad values end it."""
        while True:
            candidate = Candidate(self._store, self._name, self._ttl_s)
            leadership = await candidate.lead()
            _log.info("%s leads (elected at revision %d)", self._name, leadership.revision)
            self.state = State.LEADING
            try:
                await self._lead(leadership)
            finally:
                self.state = State.CANDIDATE
                self._begin()
                self._metrics.drop(state="desired")
                self._metrics.drop(state="serving")
            _log.warning("%s leads no more", self._name)

    async def _lead(self, leadership: Leadership) -> None:
        view = View(self._store, "", lambda *_: None, lambda _: self._changed.set())
        works = [
            asyncio.ensure_future(work)
            for work in (
                leadership.run(),
                view.run(),
                repeat("reading the servers' metrics", self._sample),
                repeat("probing instances", self._look_after),
                self._turns(leadership),
            )
        ]
        try:
            await leadership.lost.wait()
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _turns(self, leadership: Leadership) -> None:
        while not leadership.lost.is_set():
            self._changed.clear()
            pause_s = await self._turn(leadership)
            await asyncio.sleep(pause_s)
            try:
                await asyncio.wait_for(self._changed.wait(), TICK_S)
            except asyncio.TimeoutError:
                continue

    async def _turn(self, leadership: Leadership) -> float:
        """Make one turn; returns the seconds until the next may begin."""
        began = time.perf_counter()
        try:
            outcome = "written" if await self._decided(leadership) else "nothing"
        except Fenced as error:
            outcome = "fenced"
            _log.warning("%s", error)
            self._changed.set()
        except StoreError as error:
            outcome = "unreachable"
            _log.warning("%s", error)
        except Exception as error:
            outcome = "failed"
            _log.error("a turn has failed\n%s", traced(error))
        self._metrics.add(catalogue.CONTROL_TURNS, 1, outcome=outcome)
        self._metrics.observe(catalogue.CONTROL_TURN, time.perf_counter() - began)
        if outcome in ("unreachable", "failed"):
            return RETRY_S
        changing = self._stored is not None and self._stored.transactions
        return BUSY_S if changing or outcome == "written" else CALM_S

    async def _decided(self, leadership: Leadership) -> bool:
        """Write what follows from what is stored; tell whether that was anything.

        Raises:
            StoreError: as `Leadership.write`.
        """
        stored = await self._read()
        deployment, now = self._deployment(), time.time()
        changes = reconciling.changes(first_state.first(deployment), stored)
        if changes.writes:
            writes = [Write(key, record) for key, record in changes.writes.items()]
            text = "; ".join(changes.why)[:1000]
            event = Event(now, "file", "", text)
            await self._write(leadership, stored, writes[:MOST_WRITES], [event])
            return True
        cluster = self._observer.cluster(now, deployment, stored, self._loads)
        self._show(cluster, stored)
        decisions = self._decide(cluster, policies.policy(deployment), self._memory)
        if decisions.writes or decisions.events:
            try:
                await self._write(leadership, stored, decisions.writes, decisions.events)
            finally:
                self._memory = decisions.memory
            return True
        self._memory = decisions.memory
        return False

    async def _read(self) -> Stored:
        listing = await self._store.list_prefix("")
        self._heard = asyncio.get_running_loop().time()
        self._stored = read(listing, self._stored)
        return self._stored

    async def _write(
        self,
        leadership: Leadership,
        stored: Stored,
        writes: Sequence[Write],
        events: Sequence[Event],
    ) -> None:
        operations: list[Put | Delete] = [
            Delete(one.key) if one.record is None else Put(one.key, records.encode(one.record))
            for one in writes
        ]
        room = MAX_OPERATIONS - 1 - len(operations)
        operations += event_log.operations([key for key, _ in stored.events], events, room)
        await leadership.write(stored.generation, operations)
        self._changed.set()
        for event in events:
            _log.info("%s %s: %s", event.what, event.group, event.text)
            self._metrics.add(catalogue.CONTROL_EVENTS, 1, what=event.what)

    # ------------------------------------------------------------------ what it looks at

    async def _sample(self) -> float:
        """Read the load of every group; returns the seconds until the next time."""
        deployment = self._deployment()
        control = deployment.control
        assert control is not None
        if control.ratio == "never" and not any(tide.volume for tide in control.tides):
            self._loads = {}
            return TICK_S
        began = time.time()
        pages = await self._scrape(deployment)
        for page in pages.values():
            outcome = "unknown" if page is None else "read"
            self._metrics.add(catalogue.CONTROL_SCRAPES, 1, outcome=outcome)
        if self._stored is not None:
            self._loads = loads(deployment, pages, observer.members(self._stored), began)
            self._changed.set()
        return max(0.0, began + TICK_S - time.time())

    async def _look_after(self) -> float:
        """Probe the instances whose agent is gone; returns the seconds until the next time."""
        if self._stored is None:
            return PROBE_S
        deployment = self._deployment()
        names = observer.unattended(deployment, self._stored)
        answers = await asyncio.gather(*(self._probe(deployment, name) for name in names))
        now, before = time.time(), self._observer.silent
        silent = {
            name: before.get(name, now)
            for name, answered in zip(names, answers, strict=True)
            if not answered
        }
        if silent.keys() != before.keys():
            self._changed.set()
        self._observer.silent = silent
        return PROBE_S

    # ------------------------------------------------------------------ what it shows

    def show(self) -> None:
        """Set the metrics of what it is at the moment."""
        leads = self.state is State.LEADING
        self._metrics.set(catalogue.CONTROL_LEADER, float(leads))
        age = -1.0
        if self._heard is not None:
            age = asyncio.get_running_loop().time() - self._heard
        self._metrics.set(catalogue.CONTROL_STORE_AGE, round(age, 3))

    def _show(self, cluster: Cluster, stored: Stored) -> None:
        self._metrics.set(catalogue.CONTROL_GENERATION, stored.generation)
        for group in cluster.groups:
            for role in ("prefill", "decode"):
                found = cluster.of(group, role)
                for state, count in (
                    ("desired", len(found)),
                    ("serving", sum(member.serving for member in found)),
                ):
                    self._metrics.set(
                        catalogue.CONTROL_INSTANCES, count, group=group, role=role, state=state
                    )
