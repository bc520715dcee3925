"""A server as its watchdog sees it, and what it does to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pdctl import footprint, keys, questions
from pdctl import started as records
from pdctl.errors import ServerError, Stopped
from pdctl.loading import GivenUp
from pdctl.repository import GATEWAY_MODELS, processes
from pdctl.server import Server
from pdctl.status import scrape
from pdctl.stubs import Stubs
from pdserve.config import Deployment
from pdserve.config.reloading import DeploymentFile
from pdserve.errors import DeploymentError, InstanceError
from pdserve.node import failure_notice, heartbeat
from pdserve.node.health import Life
from pdserve.node.liveness import Read
from pdserve.node.watchdog import SERVER, Dismissed, NotRestored
from pdserve.transfer import key

TELL_S, TELL_TIMES = 1.0, 10
"""Seconds of an attempt to tell a gateway of a lost instance, and the number of attempts."""
LOOK_S = 0.2
"""Seconds between two looks at a server that still loads."""

_log = logging.getLogger(__name__)


class WatchedServer:
    """A server as its watchdog handles it (see ``pdserve.node.watchdog.Ward``)."""

    def __init__(self, folder: Path) -> None:
        """Raises ServerError, DeploymentError: this server does not run."""
        self.folder = folder
        token, started = footprint.token(folder), records.noted(folder)
        if token is None or started is None:
            raise ServerError(f"server {folder.name} has not been started")
        self.token = token
        self._file = DeploymentFile(folder / "models" / "deployment.yaml")
        # A deployment that has been reloaded may have other ports and instances for it, or none.
        self.server = Server(self._file.deployment, started.spec, folder.parent)
        self.server.inherited = footprint.environment(token)
        self.models = dict(processes(started.spec))
        self.key = key.load(keys.copy(folder))
        self._stubs = self._new_stubs()
        self._telling: set[asyncio.Task[None]] = set()

    async def begun(self) -> None:
        """Wait until all models have been loaded, or the server has ended.

        Until then, a missing process is one that has not begun yet.
        """
        leader = footprint.server_process(self.token)
        deadline = time.monotonic() + self.deployment.engine.load_s
        while leader is not None and not footprint.is_dead(leader):
            if await asyncio.to_thread(self.server.live) or time.monotonic() > deadline:
                return
            await asyncio.sleep(LOOK_S)

    @property
    def deployment(self) -> Deployment:
        """Return the present deployment, which may differ from that at the start."""
        with contextlib.suppress(DeploymentError):
            self._file.changed()
        return self._file.deployment

    @property
    def whole(self) -> set[str]:
        """Return the models whose repair is a restart of the server, which closes every connection.

        Nothing else ends the streams of a gateway's model that has died, or tells gateways at once
        that an instance has died; an instance that is alone in its server loses nothing by it.
        """
        instances = {*self.server.spec.prefill, *self.server.spec.decode}
        if not self.server.spec.gateway and len(instances) == 1:
            return instances
        return {"pdserve", "scheduler"} & self.models.keys()

    async def steps(self, instance: str) -> float:
        """Return the steps of an instance of this server. Raises InstanceError: no answer."""
        try:
            values = await asyncio.to_thread(scrape, self.server)
        except OSError as error:
            raise InstanceError(f"{self.server.metrics}: {error}") from error
        return values.get(f'pdserve_steps_total{{instance="{instance}"}}', 0.0)

    def heartbeat(self, *models: str) -> Read:
        """Return a function that reads the counters of these models' threads."""

        def read() -> list[heartbeat.Beats]:
            paths = (heartbeat.path(self.token, model) for model in models)
            return [beats for path in paths for beats in heartbeat.read(path)]

        return read

    def look(self) -> Mapping[str, Life]:
        try:
            stopped = (self.folder / "token").read_text() != self.token
        except FileNotFoundError:
            stopped = True
        if stopped:
            raise Dismissed(f"server {self.folder.name} has been stopped")
        return self._stubs.look()

    def life(self, model: str) -> Life:
        """Return how the process of a model is."""
        return self._stubs.life(model)

    def epoch(self, model: str) -> bytes | None:
        """Return the epoch of a model's latest process; None: none was seen."""
        return self._stubs.epoch(model)

    def kill(self, model: str) -> None:
        """End the process of a model."""
        self._stubs.kill(model)

    async def withdraw(self, thing: str) -> None:
        if thing == SERVER:
            await asyncio.to_thread(self.server.kill)
            return
        epoch = self._stubs.epoch(thing)
        self._stubs.kill(thing)
        await asyncio.to_thread(self.server.unload, thing)
        if thing not in GATEWAY_MODELS and epoch is not None:
            self._tell_gateways(failure_notice.FailureNotice(thing, epoch))

    async def restore(self, thing: str) -> None:
        try:
            if thing == SERVER:
                await asyncio.to_thread(self._restart)
            else:
                await self._load(thing)
                self._stubs.renewed(thing)
        except Stopped as error:
            raise Dismissed(str(error)) from error
        except (ServerError, DeploymentError) as error:
            raise NotRestored(str(error)) from error

    async def _load(self, model: str) -> None:
        load = partial(self.server.load, model, self.deployment.engine.load_s)
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        # A cancelled repair leaves it behind, and nothing else would take its error.
        loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        given_up = GivenUp(self.token)
        while not (await asyncio.wait([loading], timeout=LOOK_S))[0]:
            given_up.end([model])
        await loading

    def _restart(self) -> None:
        self.server.start(held=False, again=True)
        self.server.wait_ready(self.deployment.engine.load_s)
        self._stubs = self._new_stubs()

    def _new_stubs(self) -> Stubs:
        return Stubs(self.token, self.models)

    def _tell_gateways(self, notice: failure_notice.FailureNotice) -> None:
        """Tell them, so that they stop waiting for its calls. The repair continues meanwhile."""
        told = failure_notice.encode(notice, self.key)
        for server in self.deployment.servers:
            for model in ("pdserve", "scheduler") if server.gateway else ():
                address = f"{server.host}:{server.grpc_port}"
                task = asyncio.create_task(self._tell(address, model, notice.instance, told))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    async def _tell(self, address: str, model: str, instance: str, told: str) -> None:
        """Tell one gateway, up to TELL_TIMES: it may be busy, or under repair itself."""
        for _ in range(TELL_TIMES):
            began = time.monotonic()
            try:
                await asyncio.wait_for(questions.gateway(address, model, told), TELL_S)
                return
            except Exception as error:
                _log.warning(
                    "%s at %s does not hear that %s is lost: %r", model, address, instance, error
                )
            await asyncio.sleep(max(0.0, began + TELL_S - time.monotonic()))
