"""What a controller does while it leads: a turn after each change in the store, and each `TICK_S`.

A turn lists the whole store (one revision, so that all of it belongs together), decides, and writes
what follows, with its events, in one transaction that is fenced by leader and generation. So
whatever stops a controller at any point leaves the state before a turn or after it, and the next
leader decides again from what is stored. Nothing that is remembered has to survive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from pdserve.config import Deployment
from pdserve.control import event_log, first_state, policies, reconciling, records
from pdserve.control.cluster import Cluster
from pdserve.control.decide import TICK_S, Decisions, Write
from pdserve.control.events import Event
from pdserve.control.memory import Memory
from pdserve.control.observer import Observer
from pdserve.control.outlook import Clock, Outlook
from pdserve.control.policy import Policy
from pdserve.control.store.election import Leadership
from pdserve.control.store.errors import Fenced, StoreError
from pdserve.control.store.keys import MAX_OPERATIONS
from pdserve.control.store.protocol import Delete, Put, Store
from pdserve.control.stored import Stored, read
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.supervision import traced

_log = logging.getLogger(__name__)

BUSY_S, CALM_S = 0.05, 0.5
"""Pause after a turn, in seconds: while a group is being changed, and else. Reports of hosts arrive
all the time, and few of them matter."""
RETRY_S = 1.0
"""Pause after a turn that failed, in seconds."""
MOST_WRITES = 100
"""Keys that are taken over from the file in one turn; the rest follows in the next one."""

Decide = Callable[[Cluster, Policy, Memory], Decisions]


class Term:
    """One leadership.

    Args:
        deployment: returns the deployment as it is now; a reload changes it.
        clock: returns the seconds since 1970.

    Attributes:
        heard: when the store answered last (``loop.time()``); None: it has not yet.
    """

    def __init__(
        self,
        leadership: Leadership,
        store: Store,
        deployment: Callable[[], Deployment],
        outlook: Outlook,
        metrics: Registry,
        decide: Decide,
        clock: Clock,
    ) -> None:
        self.heard: float | None = None
        self._leadership = leadership
        self._store = store
        self._deployment = deployment
        self._outlook = outlook
        self._metrics = metrics
        self._decide = decide
        self._clock = clock
        self._observer = Observer()
        self._memory = Memory()

    async def run(self) -> None:
        """Make turns until the leadership is lost; neither errors nor bad values end it."""
        changed = self._outlook.changed
        while not self._leadership.lost.is_set():
            changed.clear()
            await asyncio.sleep(await self._turn())
            timer = asyncio.get_running_loop().call_later(TICK_S, changed.set)
            try:
                await changed.wait()
            finally:
                timer.cancel()

    async def _turn(self) -> float:
        """Make one turn; returns the seconds until the next may begin."""
        began = time.perf_counter()
        try:
            outcome = "written" if await self._decided() else "nothing"
        except Fenced as error:
            outcome = "fenced"
            _log.warning("%s", error)
            self._outlook.changed.set()
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
        stored = self._outlook.stored
        changing = stored is not None and stored.transactions
        return BUSY_S if changing or outcome == "written" else CALM_S

    async def _decided(self) -> bool:
        """Write what follows from what is stored; tell whether that was anything.

        Raises:
            StoreError: as `Leadership.write`.
        """
        listing = await self._store.list_prefix("")
        self.heard = asyncio.get_running_loop().time()
        stored = self._outlook.stored = read(listing, self._outlook.stored)
        deployment, now = self._deployment(), self._clock()
        changes = reconciling.changes(first_state.first(deployment), stored)
        if changes.writes:
            writes = [Write(key, record) for key, record in changes.writes.items()]
            event = Event(now, "file", "", "; ".join(changes.why)[:1000])
            await self._write(stored, writes[:MOST_WRITES], [event])
            return True
        outlook = self._outlook
        cluster = self._observer.cluster(now, deployment, stored, outlook.loads, outlook.silent)
        self._show(cluster, stored)
        decisions = self._decide(cluster, policies.policy(deployment), self._memory)
        self._memory = decisions.memory
        if decisions.writes or decisions.events:
            await self._write(stored, decisions.writes, decisions.events)
            return True
        return False

    async def _write(
        self, stored: Stored, writes: Sequence[Write], events: Sequence[Event]
    ) -> None:
        operations: list[Put | Delete] = [
            Delete(one.key) if one.record is None else Put(one.key, records.encode(one.record))
            for one in writes
        ]
        room = MAX_OPERATIONS - 1 - len(operations)
        operations += event_log.operations([key for key, _ in stored.events], events, room)
        await self._leadership.write(stored.generation, operations)
        self._outlook.changed.set()
        for event in events:
            _log.info("%s %s: %s", event.what, event.group, event.text)
            self._metrics.add(catalogue.CONTROL_EVENTS, 1, what=event.what)

    def _show(self, cluster: Cluster, stored: Stored) -> None:
        self._metrics.set(catalogue.CONTROL_GENERATION, stored.generation)
        for group in cluster.groups:
            for role in ("prefill", "decode"):
                found = cluster.of(group, role)
                serving = sum(member.serving for member in found)
                for state, count in (("desired", len(found)), ("serving", serving)):
                    self._metrics.set(
                        catalogue.CONTROL_INSTANCES, count, group=group, role=role, state=state
                    )
