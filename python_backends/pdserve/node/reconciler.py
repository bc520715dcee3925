"""Makes one instance what is desired of it, action by action; see ``pdserve.node.reconcile``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Protocol

from pdserve.control.records import DesiredInstance, Phase
from pdserve.errors import PDServeError
from pdserve.node.instance_calls import InstanceCalls
from pdserve.node.reconcile import Action, Duty, Kind, Next, Presence, Seen, duty, next_action
from pdserve.rpc.messages import Inspected
from pdserve.supervision import traced

LOOK_S = 1.0
"""Seconds between two looks at an instance that is as desired, and at one that cannot be so."""
DRAIN_LOOK_S = 0.02
"""The same while it drains, or something else goes on that has an end."""
LATE_S = 15.0
"""Seconds after which an answer or an end that is waited for is late."""
RETRY_S, MOST_RETRY_S = 0.2, 5.0
"""The pause after an action that has failed, doubled by each failure in a row up to the second."""
TRIES = 3
"""Loads in a row that fail until the instance counts as failed."""

_log = logging.getLogger(__name__)


class Models(Protocol):
    """The models of a server, as far as they can come and go."""

    def presence(self, name: str) -> Presence: ...

    def epoch(self, name: str) -> bytes | None:
        """Return the epoch of the model's process; None: it has none."""

    def failure(self, name: str) -> str:
        """Return why it is out of service although repairs were tried; empty: it is not."""

    def set_duty(self, name: str, duty: Duty) -> None: ...

    async def load(self, name: str) -> None:
        """Load it. Raises PDServeError: it cannot be, for this reason."""

    async def unload(self, name: str) -> None:
        """Unload it, and end its process. Raises PDServeError."""

    async def remove(self, name: str) -> None:
        """Take it out of the repository. Raises PDServeError."""


class Reconciler:
    """Looks at one instance again and again, and does what is next.

    Args:
        desired: returns what is desired of it; None: nothing is known.
        decodes: returns the instances that may have a link to its memory.
        drain_s: returns the seconds after which what is left of a drain goes on elsewhere.
        told: called after each turn.

    Attributes:
        soon: set to have it look again at once.
        known: what the instance has last said, as long as its process is the same.
        reason: why it is not as desired; empty: it is, or will be.
        tries: loads that have failed in a row.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        models: Models,
        calls: InstanceCalls,
        desired: Callable[[], DesiredInstance | None],
        decodes: Callable[[], Collection[str]],
        drain_s: Callable[[], float],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.soon = asyncio.Event()
        self.known: Inspected | None = None
        self.reason = ""
        self.tries = 0
        self._models = models
        self._calls = calls
        self._desired = desired
        self._decodes = decodes
        self._drain_s = drain_s
        self._told = told
        self._fresh = False
        """True if ``known`` is younger than the last action."""
        self._unlinked = (b"", 0)
        """Memory and number whose links have been closed."""
        self._waits: tuple[Action, float] | None = None
        """The thing that is waited for, and since when (``loop.time()``)."""
        self._retry_s = RETRY_S
        self._did = Next(Action.NOTHING)

    @property
    def presence(self) -> Presence:
        return self._models.presence(self.name)

    async def run(self) -> None:
        """Look and do until cancelled; an error is logged, and the next turn comes later."""
        while True:
            self.soon.clear()
            try:
                pause_s = await self._turn()
            except Exception as error:
                _log.error("%s: a turn has failed\n%s", self.name, traced(error))
                self.reason, pause_s = repr(error), MOST_RETRY_S
            self._told()
            if pause_s:
                timer = asyncio.get_running_loop().call_later(pause_s, self.soon.set)
                try:
                    await self.soon.wait()
                finally:
                    timer.cancel()

    def _see(self) -> Seen:
        presence = self.presence
        if presence is not Presence.LOADED:
            self.known, self._fresh = None, False
        known = self.known
        if known is not None and known.epoch != self._models.epoch(self.name):
            self.known, self._fresh = None, False
        if not self._fresh or known is None:
            return Seen(presence, self.kind, late=self._late())
        unlinked = not known.memory or self._unlinked == (known.memory, known.assignment.number)
        return Seen(presence, self.kind, known.assignment, known.phase, unlinked, self._late())

    def _late(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self._waits is not None and now - self._waits[1] > LATE_S

    async def _turn(self) -> float:
        """Do what is next; returns the seconds until the next turn."""
        desired, seen = self._desired(), self._see()
        self._models.set_duty(self.name, duty(desired, seen))
        found = next_action(desired, seen)
        self._say(found)
        try:
            await self._do(found.action, desired)
        except PDServeError as error:
            self._wait(found.action, found.action in (Action.INSPECT, Action.UNLINK))
            self.reason = f"{found.action.value}: {error}"
            self._fresh = False
            pause_s, self._retry_s = self._retry_s, min(2 * self._retry_s, MOST_RETRY_S)
            return pause_s
        if found.action is Action.INSPECT:
            if self._waits is not None and self._waits[0] is Action.INSPECT:
                self._waits = None
            return 0.0
        self._retry_s = RETRY_S
        self._wait(found.action, found.action is Action.WAIT and seen.phase is Phase.UNASSIGNED)
        self.reason = found.reason
        if found.action is Action.NOTHING:
            self._fresh = False
            return LOOK_S
        return DRAIN_LOOK_S if found.action is Action.WAIT else 0.0

    def _wait(self, action: Action, waits: bool) -> None:
        if not waits:
            self._waits = None
        elif self._waits is None or self._waits[0] is not action:
            self._waits = (action, asyncio.get_running_loop().time())

    def _say(self, found: Next) -> None:
        """Log what is done, once."""
        if found.action in (Action.INSPECT, Action.WAIT) or found == self._did:
            return
        self._did = found
        if found.action is not Action.NOTHING:
            _log.info("%s: %s", self.name, found.action.value)
        elif found.reason:
            _log.warning("%s is not as desired: %s", self.name, found.reason)

    async def _do(self, action: Action, desired: DesiredInstance | None) -> None:
        known = self.known
        if action is Action.INSPECT:
            self.known = await self._calls.inspect(self.name)
            self._fresh = True
            return
        if action in (Action.LOAD, Action.UNLOAD, Action.REMOVE):
            await self._move(action)
        elif action is Action.UNLINK:
            assert known is not None
            others = [name for name in self._decodes() if name != self.name]
            await self._calls.unlink(self.name, known, others)
            self._unlinked = (known.memory, known.assignment.number)
            return
        elif known is not None and desired is not None:
            await self._say_to(action, known, desired)
        self._fresh = False

    async def _move(self, action: Action) -> None:
        if action is Action.LOAD:
            self.tries += 1
            await self._models.load(self.name)
            self.tries = 0
        elif action is Action.UNLOAD:
            await self._models.unload(self.name)
        else:
            await self._models.remove(self.name)

    async def _say_to(self, action: Action, known: Inspected, desired: DesiredInstance) -> None:
        if action is Action.DRAIN:
            await self._calls.drain(self.name, known, self._drain_s())
        elif action is Action.RESUME:
            await self._calls.resume(self.name, known)
        elif action is Action.ASSIGN:
            await self._calls.assign(self.name, known, desired.assignment)
