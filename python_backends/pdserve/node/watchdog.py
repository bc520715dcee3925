"""Watches one server: detects what has failed, takes it out of service, and restores it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pdserve.errors import PDServeError
from pdserve.node.health import Health, Life, State
from pdserve.node.reconcile import Duty

SERVER = "server"
"""Name of the server itself among the things; every other thing is a model, by its name."""
LOOK_S = 0.1
STOPPED_S = 1.0

_STATES = {
    Duty.REPAIRED: State.HEALTHY,
    Duty.DRAINING: State.DRAINING,
    Duty.ABSENT: State.ABSENT,
}

_log = logging.getLogger(__name__)


class NotRestored(Exception):
    """An attempt to restore something has failed; the message says why. Another one may help."""


class Dismissed(Exception):
    """The server has been stopped on purpose: there is nothing to watch any more."""


class Ward(Protocol):
    """A server and its models, as its watchdog sees and controls them."""

    def look(self) -> Mapping[str, Life]:
        """Return the state of the processes of the server and of its models, without waiting.

        Raises:
            Dismissed: the server should not run any more.
        """

    async def withdraw(self, thing: str) -> None:
        """Take a thing out of service at once, and notify those who wait for it."""

    async def restore(self, thing: str) -> None:
        """Put a withdrawn thing into service again, and wait until it is.

        Raises:
            NotRestored: it could not be restored.
            Dismissed: it should not be restored.
        """


@dataclass(frozen=True)
class Check:
    """A check of one thing, repeated regularly."""

    thing: str
    ask: Callable[[], Awaitable[bool]]
    """Raises PDServeError if the thing has failed; any other exception means that it could not be
    asked, which says nothing about the thing. The result tells whether it has shown that it
    computes; a busy thing has not, but it is alive."""
    every_s: float
    within_s: float
    misses: int = 2
    """Number of misses in a row that are a failure."""


class Watchdog:
    """Repairs what is dead, stopped for longer than STOPPED_S, or does not answer.

    A model that cannot be loaded is tried again and again, with pauses (see ``Backoff``), while the
    rest of its server serves. If the server itself does not respond, or the load does not end
    within ``load_s`` seconds, the server is restarted. A model that drains is only withdrawn if its
    process ends, and one that should be absent is not looked at (``set_duty``).

    Args:
        whole: models whose failure is repaired by a restart of the server.
    """

    def __init__(
        self,
        ward: Ward,
        models: Sequence[str],
        checks: Sequence[Check],
        *,
        whole: Collection[str],
        load_s: float,
    ) -> None:
        self.health = {thing: Health() for thing in (SERVER, *models)}
        self._duties = dict.fromkeys(self.health, Duty.REPAIRED)
        self._ward = ward
        self._checks = checks
        self._whole = whole
        self._load_s = load_s
        self._stopped: dict[str, float] = {}
        """Times (``loop.time()``) since which processes have been stopped."""
        self._repairs: dict[str, asyncio.Task[None]] = {}
        self._troubles: dict[str, str] = {}
        """Actions that the watchdog itself cannot do at the moment, with the reason."""
        self._dismissed: asyncio.Future[None]

    async def run(self) -> None:
        """Watch until cancelled; repairs in progress are left as they are then.

        Raises:
            Dismissed: the server has been stopped.
        """
        self._dismissed = asyncio.get_running_loop().create_future()
        endless: list[Callable[[], Awaitable[None]]] = [self._look]
        endless += [partial(self._ask, check) for check in self._checks]
        work = [asyncio.create_task(self._go_on(one)) for one in endless]
        try:
            await self._dismissed
        finally:
            for task in (*work, *self._repairs.values()):
                task.cancel()

    async def _go_on(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run work that has no end again after an error."""
        while True:
            try:
                await work()
            except Dismissed as reason:
                self._dismiss(reason)
                return
            except Exception as error:
                self._trouble(f"{work}", error)
            await asyncio.sleep(LOOK_S)

    def repairs(self, thing: str) -> bool:
        """Tell whether a thing, or the whole server, is being repaired."""
        return SERVER in self._repairs or thing in self._repairs

    def duty(self, model: str) -> Duty:
        return self._duties[model]

    def set_duty(self, model: str, duty: Duty) -> None:
        """Say what is to be done for a model from now on; its repair ends if it is given up."""
        if self._duties[model] is duty:
            return
        self._duties[model] = duty
        if duty is not Duty.REPAIRED and (repair := self._repairs.get(model)):
            repair.cancel()
        self._stopped.pop(model, None)
        self._to(model, _STATES[duty], "")

    # ----------------------------------------------------------------- noticing

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for thing, life in self._ward.look().items():
                if self._duties[thing] is Duty.ABSENT:
                    continue
                if life is Life.STOPPED and not self.repairs(thing):
                    since = self._stopped.setdefault(thing, loop.time())
                    if loop.time() - since >= STOPPED_S:
                        self.fail(thing, f"its process has been stopped for {STOPPED_S:g} s")
                    continue
                self._stopped.pop(thing, None)
                if life is Life.GONE:
                    self.fail(thing, "its process is gone")
            await asyncio.sleep(LOOK_S)

    async def _ask(self, check: Check) -> None:
        now = asyncio.get_running_loop().time
        health = self.health[check.thing]
        misses = 0
        while True:
            await asyncio.sleep(check.every_s)
            life = self._life(check.thing)
            if life is None:
                continue
            said = await self._say(check)
            if said is None:
                continue
            problem, computes = said
            if life != self._life(check.thing):
                misses = 0  # the answer, or its absence, belonged to a former process
            elif problem:
                misses += 1
                health.reason = problem
                health.to(State.LATE, now())
                if misses == check.misses:
                    misses = 0
                    self.fail(check.thing, f"{problem}, {check.misses} times in a row")
            else:
                misses = 0
                health.answered = now()
                if computes:
                    health.proven = now()
                health.to(State.HEALTHY, now())

    async def _say(self, check: Check) -> tuple[str, bool] | None:
        """Return a thing's problem, if any, and whether it has shown that it computes.

        None: it could not be asked.
        """
        try:
            computes = await asyncio.wait_for(check.ask(), check.within_s)
        except asyncio.TimeoutError:
            return f"no answer within {check.within_s:g} s", False
        except PDServeError as error:
            return f"{error}" or repr(error), False
        except Exception as error:
            self._trouble(f"{check.thing} cannot be asked", error)
            return None
        self._troubles.pop(f"{check.thing} cannot be asked", None)
        return "", computes

    def _trouble(self, what: str, error: Exception) -> None:
        """Log a problem of the watchdog itself, which is no failure of what it watches, once."""
        if self._troubles.get(what) != repr(error):
            self._troubles[what] = repr(error)
            _log.warning("%s: %r", what, error, exc_info=error)

    def _dismiss(self, reason: Dismissed) -> None:
        if not self._dismissed.done():
            self._dismissed.set_exception(reason)

    def _life(self, thing: str) -> tuple[int, int] | None:
        """Return a number of a thing's current life; None: it is repaired now, or not probed."""
        if self.repairs(thing) or self._duties[thing] is not Duty.REPAIRED:
            return None
        return self.health[SERVER].repairs, self.health[thing].repairs

    # ---------------------------------------------------------------- repairing

    def fail(self, thing: str, reason: str) -> None:
        """Have a thing repaired that has failed for this reason, unless it is already."""
        if self.repairs(thing):
            return
        if thing in self._whole and self._duties[thing] is Duty.REPAIRED:
            thing, reason = SERVER, f"{thing}: {reason}"
        if thing == SERVER:
            for repair in self._repairs.values():
                repair.cancel()
        _log.error("%s has failed: %s", thing, reason)
        self._to(thing, State.FAILED, reason)
        repair = self._repairs[thing] = asyncio.create_task(self._repair(thing))
        repair.add_done_callback(partial(self._ended, thing))

    async def _repair(self, thing: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        health = self.health[thing]
        while True:
            await self._withdraw(thing)
            if self._duties[thing] is not Duty.REPAIRED:
                return
            if pause := health.backoff.pause(loop.time()):
                _log.warning("%s: next try in %g s", thing, pause)
                await asyncio.sleep(pause)
            self._to(thing, State.REPAIRING, health.reason)
            try:
                # A server's restart has several steps, each with its own bound.
                limit = None if thing == SERVER else self._load_s
                await asyncio.wait_for(self._ward.restore(thing), limit)
                break
            except NotRestored as error:
                _log.error("%s is not repaired: %s", thing, error)
                self._to(thing, State.FAILED, f"{error}")
            finally:
                health.backoff.ended(loop.time())
        health.repairs += 1
        health.down_s = loop.time() - began
        _log.warning("%s is repaired; it was out of service for %.1f s", thing, health.down_s)

    async def _withdraw(self, thing: str) -> None:
        try:
            await self._ward.withdraw(thing)
        except Exception as error:
            if thing != SERVER:
                raise
            # There is nothing larger to repair, and the restart ends what is left of it.
            self._trouble(f"{thing} cannot be withdrawn", error)

    def _ended(self, thing: str, repair: asyncio.Task[None]) -> None:
        del self._repairs[thing]
        if repair.cancelled():
            return
        error = repair.exception()
        if isinstance(error, Dismissed):
            self._dismiss(error)
            return
        if error is not None:
            what = "too slow" if isinstance(error, asyncio.TimeoutError) else repr(error)
            self.fail(SERVER, f"the repair of {thing} has failed: {what}")
            return
        if self._duties[thing] is Duty.DRAINING:
            self.set_duty(thing, Duty.ABSENT)
        for restored in self.health if thing == SERVER else (thing,):
            self._to(restored, _STATES[self._duties[restored]], self.health[restored].reason)

    def _to(self, thing: str, state: State, reason: str) -> None:
        self.health[thing].reason = reason
        self.health[thing].to(state, asyncio.get_running_loop().time())
