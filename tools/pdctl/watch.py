"""``python -m pdctl.watch FOLDER``: the watchdog of the server with that folder.

It needs only the folder, from which it reads the deployment beside the server's models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pdctl import footprint, keys, private, questions, watchers
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
from pdserve.node.liveness import Liveness, Read
from pdserve.node.probes import Limits, Probes
from pdserve.node.watchdog import SERVER, Check, Dismissed, NotRestored, Watchdog
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.client import Channel
from pdserve.transfer import key

# The intervals of probes, and the time for an answer.
ALIVE_EVERY_S, ALIVE_WITHIN_S = 1.0, heartbeat.STILL_S
PROBE_EVERY_S = 5.0
TELL_S, TELL_TIMES = 1.0, 10
"""Seconds of an attempt to tell a gateway of a lost instance, and the number of attempts."""
REPORT_S = 0.5
LOOK_S = 0.2
"""Seconds between two looks at a server that still loads."""

_log = logging.getLogger(__name__)


class WatchedServer:
    """A server as its watchdog handles it (see ``pdserve.node.watchdog.Ward``)."""

    def __init__(self, folder: Path) -> None:
        """Raises ServerError, DeploymentError: this server does not run."""
        self._folder = folder
        self.token = footprint.token(folder)
        started = records.noted(folder)
        if self.token is None or started is None:
            raise ServerError(f"server {folder.name} has not been started")
        self._file = DeploymentFile(folder / "models" / "deployment.yaml")
        # A deployment that has been reloaded may have other ports and instances for it, or none.
        self.server = Server(self._file.deployment, started.spec, folder.parent)
        self.models = dict(processes(started.spec))
        self.key = key.load(keys.copy(folder))
        self._stubs = self._new_stubs()
        self._telling: set[asyncio.Task[None]] = set()

    async def begun(self) -> None:
        """Wait until all models have been loaded, or the server has ended.

        Until then, a missing process is one that has not begun yet.
        """
        leader = footprint.server_process(self.token or "")
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
            token = self.server.token or ""
            return [
                beats for model in models for beats in heartbeat.read(heartbeat.path(token, model))
            ]

        return read

    def look(self) -> Mapping[str, Life]:
        try:
            stopped = (self._folder / "token").read_text() != self.token
        except FileNotFoundError:
            stopped = True
        if stopped:
            raise Dismissed(f"server {self._folder.name} has been stopped")
        return self._stubs.look()

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
        given_up = GivenUp(self.token or "")
        while not (await asyncio.wait([loading], timeout=LOOK_S))[0]:
            given_up.end([model])
        await loading

    def _restart(self) -> None:
        self.server.start(held=False, again=True)
        self.server.wait_ready(self.deployment.engine.load_s)
        self._stubs = self._new_stubs()

    def _new_stubs(self) -> Stubs:
        return Stubs(self.token or "", self.models)

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


class Channels:
    """Channels to any instance of the deployment, made on request."""

    def __init__(self, watched: WatchedServer) -> None:
        self._tended = watched
        self._made: dict[str, Channel] = {}

    def __call__(self, instance: str) -> Channel:
        address = self._address(instance)
        name = f"{address}/{instance}"
        if name not in self._made:
            self._made[name] = GrpcChannel(address, instance, self._tended.key)
        return self._made[name]

    def _address(self, instance: str) -> str:
        """Raises InstanceError: the instance no longer exists."""
        if instance in self._tended.models:  # whatever the deployment says of it now
            return self._tended.server.grpc
        deployment = self._tended.deployment
        server = (deployment.instances("prefill") | deployment.instances("decode")).get(instance)
        if server is None:
            raise InstanceError(f"{instance} is not in the deployment any more")
        return f"{server.host}:{server.grpc_port}"


def checks(watched: WatchedServer, probes: Probes, limits: Limits) -> Iterator[Check]:
    """Yield all checks of a server and its models."""
    address = watched.server.grpc
    live = partial(questions.live, address)
    of_all = watched.heartbeat(*watched.models)
    # A model whose threads are stuck has a check of its own.
    yield _alive(SERVER, lambda: [beats._replace(turns=0) for beats in of_all()], live)
    for model, template in watched.models.items():
        if template in ("prefill", "decode"):
            alive = partial(probes.alive, model)
            computes = partial(getattr(probes, template), model)
            yield Check(model, computes, PROBE_EVERY_S, limits.first_token_s + 3 * limits.reply_s)
        elif template in ("pdserve", "scheduler"):
            alive = partial(
                questions.gateway,
                address,
                model,
                failure_notice.encode(failure_notice.ALIVE, watched.key),
            )
        else:
            alive = partial(questions.tokens, address, model)
        yield _alive(model, watched.heartbeat(model), alive)


def _alive(thing: str, read: Read, ask: Callable[[], Awaitable[bool]]) -> Check:
    # The probe keeps the limit itself; the check's own is for a watchdog that is late.
    return Check(thing, Liveness(read, ask, ALIVE_WITHIN_S), ALIVE_EVERY_S, 2 * ALIVE_WITHIN_S)


async def watch(folder: Path) -> None:
    """Watch a server until cancelled, or until it has been stopped.

    Raises:
        ServerError, DeploymentError: it does not run.
        Dismissed: it has been stopped.
    """
    watched = WatchedServer(folder)
    watchers.begun()
    await watched.begun()

    def prefills() -> list[str]:
        return list(watched.deployment.instances("prefill"))

    limits = Limits.of(watched.deployment)
    probes = Probes(Channels(watched), prefills, watched.steps, limits)
    watchdog = Watchdog(
        watched,
        list(watched.models),
        list(checks(watched, probes, limits)),
        whole=watched.whole,
        load_s=watched.deployment.engine.load_s,
    )

    _log.info("watches %s (process %d)", folder.name, os.getpid())
    reporting = asyncio.create_task(report(folder, watchdog))
    try:
        await watchdog.run()
    finally:
        reporting.cancel()


async def report(folder: Path, watchdog: Watchdog) -> None:
    """Write the watchdog's report again and again until cancelled.

    Nothing depends on the report: if it cannot be written now, that is tried again.
    """
    failed = ""
    while True:
        try:
            watchers.report(folder, state(watchdog))
            failed = ""
        except Exception as error:
            if failed != (failed := repr(error)):
                _log.warning("what it knows cannot be reported: %s", failed)
        await asyncio.sleep(REPORT_S)


def state(watchdog: Watchdog) -> dict[str, Any]:
    """Return the report for people, with rounded seconds since the epoch."""
    offset = time.time() - asyncio.get_running_loop().time()

    def when(moment: float) -> float | None:
        return round(moment + offset, 3) if moment > 0 else None

    return {
        "at": round(time.time(), 3),
        "things": {
            thing: {
                "state": health.state.value,
                "since": when(health.since),
                "answered": when(health.answered),
                "proven": when(health.proven),
                "repairs": health.repairs,
                "down_s": round(health.down_s, 3),
                "reason": health.reason,
            }
            for thing, health in watchdog.health.items()
        },
    }


def main() -> None:
    os.umask(private.UMASK)
    folder = Path(sys.argv[1])
    form = logging.Formatter(f"%(asctime)s {folder.name}: %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    with contextlib.suppress(OSError):  # it works without a log
        handlers.append(logging.FileHandler(folder / "watch.log"))
    for handler in handlers:
        handler.setFormatter(form)
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    try:
        asyncio.run(watch(folder))
    except Dismissed as error:
        _log.info("ends: %s", error)
    except (ServerError, DeploymentError) as error:
        _log.error("%s", error)
        sys.exit(1)
    except Exception:
        _log.exception("the watchdog itself has failed")
        raise


if __name__ == "__main__":
    main()
