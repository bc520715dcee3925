"""The models of a server's instances, which come and go as is desired of them."""

from __future__ import annotations

import asyncio
import shutil
import time

from pdctl import private
from pdctl.channels import Channels
from pdctl.paths import MODEL_REPOSITORY
from pdctl.repository import INSTANCES, write
from pdctl.watched_server import WatchedServer
from pdserve.errors import DeploymentError, InstanceError
from pdserve.node.health import Life, State
from pdserve.node.reconcile import Duty, Presence
from pdserve.node.watchdog import SERVER, Dismissed, NotRestored, Watchdog

UNLOAD_S = 5.0
"""Seconds for the process of an unloaded model to end; a stream of a gateway that is still open
keeps it. It holds nothing, and is killed then."""
LOOK_S = 0.05
FAILED_AFTER = 3
"""Repairs in a row that did not help, after which an instance counts as failed."""


class InstanceModels:
    """See `pdserve.node.reconciler.Models`."""

    def __init__(self, watched: WatchedServer, watchdog: Watchdog, channels: Channels) -> None:
        self._watched = watched
        self._watchdog = watchdog
        self._channels = channels
        self._repository = watched.server.repository
        self._aside = watched.folder / "unloaded"
        for name, template in watched.models.items():
            if template in INSTANCES and not (self._repository / name).exists():
                watchdog.set_duty(name, Duty.ABSENT)

    def presence(self, name: str) -> Presence:
        gone, there = self._watched.life(name) is Life.GONE, (self._repository / name).exists()
        missed = self._watchdog.duty(name) is not Duty.ABSENT
        if gone and not (there or missed):
            return Presence.ABSENT
        # If it is missed, the watchdog finds that at its next look, and tells the gateways.
        if self._watchdog.repairs(name) or (gone and missed):
            return Presence.BUSY
        return Presence.UNLOADED if gone else Presence.LOADED

    def epoch(self, name: str) -> bytes | None:
        return self._watched.epoch(name)

    def failure(self, name: str) -> str:
        for thing in (SERVER, name):
            health = self._watchdog.health[thing]
            failing = health.state in (State.FAILED, State.REPAIRING)
            if failing and health.backoff.tries >= FAILED_AFTER:
                return f"{thing}: {health.reason}"
        return ""

    def set_duty(self, name: str, duty: Duty) -> None:
        self._watchdog.set_duty(name, duty)

    async def load(self, name: str) -> None:
        load_s = self._watched.deployment.engine.load_s
        try:
            await asyncio.to_thread(self._put_back, name)
            await asyncio.wait_for(self._watched.restore(name), load_s)
        except asyncio.TimeoutError as error:
            # Triton may never return from it (server#8766); only a restart helps.
            reason = f"the load of {name} has not ended within {load_s:g} s"
            self._watchdog.fail(SERVER, reason)
            raise InstanceError(reason) from error
        except (NotRestored, Dismissed, OSError, DeploymentError) as error:
            raise InstanceError(f"{name} is not loaded: {error}") from error

    async def unload(self, name: str) -> None:
        if self._watchdog.repairs(SERVER):
            raise InstanceError(f"the server of {name} is being repaired")
        self._watchdog.set_duty(name, Duty.ABSENT)
        self._channels.drop(name)
        try:
            await asyncio.to_thread(self._watched.server.unload, name)
        except OSError as error:
            raise InstanceError(f"{name} is not unloaded: {error}") from error
        deadline = time.monotonic() + UNLOAD_S
        while self._watched.life(name) is not Life.GONE:
            if time.monotonic() > deadline:
                self._watched.kill(name)
            await asyncio.sleep(LOOK_S)
            if time.monotonic() > deadline + UNLOAD_S:
                raise InstanceError(f"the process of {name} does not end")

    async def remove(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._put_aside, name)
        except OSError as error:
            raise InstanceError(f"{name} stays in the repository: {error}") from error

    def _put_aside(self, name: str) -> None:
        """Take a model out of the repository, whole: the server would load it when it starts."""
        private.folder(self._aside)
        shutil.rmtree(self._aside / name, ignore_errors=True)
        (self._repository / name).rename(self._aside / name)

    def _put_back(self, name: str) -> None:
        """Put a model into the repository, whole: half of one could stop the server's loads.

        Raises:
            OSError, DeploymentError: it cannot be.
        """
        if (self._repository / name).exists():
            return
        if not (self._aside / name).exists():
            new = self._aside / f"{name}.new"
            shutil.rmtree(new, ignore_errors=True)
            template = self._watched.models[name]
            write(name, MODEL_REPOSITORY / template, new)
            new.rename(self._aside / name)
        (self._aside / name).rename(self._repository / name)
