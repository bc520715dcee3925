"""``python -m pdctl.watch FOLDER``: the watchdog of the server whose folder it is.

It needs nothing but the folder: the deployment is the one that lies beside the server's models.
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

from pdctl import private, questions, watchers
from pdctl.errors import ServerError
from pdctl.repository import GATEWAY_MODELS, models
from pdctl.server import Server
from pdctl.status import scrape
from pdctl.stubs import Stubs
from pdserve.channels.grpc import GrpcChannel
from pdserve.channels.protocol import Channel
from pdserve.cluster import loss, pulse
from pdserve.cluster.health import Life
from pdserve.cluster.liveness import Liveness, Read
from pdserve.cluster.probes import Limits, Probes
from pdserve.cluster.watchdog import SERVER, Check, NotRestored, Watchdog
from pdserve.config import Deployment
from pdserve.errors import DeploymentError
from pdserve.reloading import DeploymentFile
from pdserve.transfer import key

# How often each thing is asked whether it is alive, and how long it may think.
ALIVE_EVERY_S, ALIVE_WITHIN_S = 1.0, 3.0
PROBE_EVERY_S = 5.0
TELL_S = 1.0
"""For a gateway to hear what has been lost."""
REPORT_S = 0.5

_log = logging.getLogger(__name__)


class Tended:
    """A server as its watchdog handles it (see ``pdserve.cluster.watchdog.Ward``)."""

    def __init__(self, folder: Path) -> None:
        """Raises: ServerError, DeploymentError: this server does not run."""
        self._file = DeploymentFile(folder / "models" / "deployment.yaml")
        deployment = self._file.deployment
        spec = next(one for one in deployment.servers if one.name == folder.name)
        self.server = Server(deployment, spec, folder.parent)
        if self.server.token is None:
            raise ServerError(f"server {spec.name} has not been started")
        self.models = dict(models(spec))
        self._stubs = self._new_stubs()

    @property
    def deployment(self) -> Deployment:
        """As it is now: it may be another than at the start."""
        with contextlib.suppress(DeploymentError):
            self._file.changed()
        return self._file.deployment

    @property
    def whole(self) -> set[str]:
        """Models that are repaired by a restart of the server, which closes every connection.

        Nothing else ends the streams of a gateway's model that has died, or tells gateways at once
        what has become of an instance; one that is alone in its server loses nothing by it.
        """
        instances = {*self.server.spec.prefill, *self.server.spec.decode}
        if not self.server.spec.gateway and len(instances) == 1:
            return instances
        return {"pdserve", "scheduler"} & self.models.keys()

    async def steps(self, instance: str) -> float:
        """How many an instance of this server has made. Raises: OSError."""
        values = await asyncio.to_thread(scrape, self.server)
        return values.get(f'pdserve_steps_total{{instance="{instance}"}}', 0.0)

    def pulse(self, *models: str) -> Read:
        """Reads what the threads of these models have counted."""

        def read() -> list[pulse.Beats]:
            token = self.server.token or ""
            return [beats for model in models for beats in pulse.read(pulse.path(token, model))]

        return read

    def look(self) -> Mapping[str, Life]:
        return self._stubs.look()

    async def withdraw(self, thing: str) -> None:
        if thing == SERVER:
            await asyncio.to_thread(self.server.kill)
            return
        self._stubs.kill(thing)
        await asyncio.to_thread(self.server.unload, thing)
        if thing not in GATEWAY_MODELS:
            await self._tell_gateways(thing)

    async def restore(self, thing: str) -> None:
        try:
            if thing == SERVER:
                await asyncio.to_thread(self._restart)
            else:
                await asyncio.to_thread(self.server.load, thing, self.deployment.engine.load_s)
                self._stubs.renewed(thing)
        except (ServerError, DeploymentError) as error:
            raise NotRestored(str(error)) from error

    def _restart(self) -> None:
        self.server.start(held=False, again=True)
        self.server.wait_ready(self.deployment.engine.load_s)
        self._stubs = self._new_stubs()

    def _new_stubs(self) -> Stubs:
        return Stubs(self.server.token or "", self.models)

    async def _tell_gateways(self, instance: str) -> None:
        """So that they wait no longer for what was open on it."""
        secret = key.load(Path(self.deployment.transfer.key_file))
        lost = loss.told(loss.Lost(instance, time.time()), secret)
        told = [
            asyncio.wait_for(
                questions.gateway(f"{server.host}:{server.grpc_port}", model, lost), TELL_S
            )
            for server in self.deployment.servers
            if server.gateway
            for model in ("pdserve", "scheduler")
        ]
        for error in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(error, Exception):
                _log.warning("a gateway does not hear that %s is lost: %r", instance, error)


class Channels:
    """To any instance of the deployment, made when it is asked for."""

    def __init__(self, tended: Tended) -> None:
        self._tended = tended
        self._secret = key.load(Path(tended.deployment.transfer.key_file))
        self._made: dict[str, Channel] = {}

    def __call__(self, instance: str) -> Channel:
        deployment = self._tended.deployment
        server = (deployment.instances("prefill") | deployment.instances("decode"))[instance]
        address = f"{server.host}:{server.grpc_port}"
        place = f"{address}/{instance}"
        if place not in self._made:
            self._made[place] = GrpcChannel(address, instance, self._secret)
        return self._made[place]


def probe_limits(deployment: Deployment) -> Limits:
    """No longer than what makes the engine useless, and no shorter than what is a full house."""
    gateway = deployment.gateway
    ttft_limits = [scenario.ttft_limit_ms or 0 for scenario in deployment.served]
    first_token_s = max(gateway.ttft_limit_ms, *ttft_limits) / 1e3
    held_s = max(deployment.prefill.lease_s, deployment.transfer.timeout_s)
    return Limits(gateway.stall_s, first_token_s, 2 * max(first_token_s, held_s))


def checks(tended: Tended, probes: Probes, limits: Limits) -> Iterator[Check]:
    """All that a server and its models are asked."""
    address = tended.server.grpc
    live = partial(questions.live, address)
    of_all = tended.pulse(*tended.models)
    # A model that stands still has a check of its own.
    yield _alive(SERVER, lambda: [beats._replace(turns=0) for beats in of_all()], live)
    for model, template in tended.models.items():
        if template in ("prefill", "decode"):
            alive = partial(probes.alive, model)
            computes = partial(getattr(probes, template), model)
            yield Check(model, computes, PROBE_EVERY_S, limits.first_token_s + 3 * limits.reply_s)
        elif template in ("pdserve", "scheduler"):
            alive = partial(questions.gateway, address, model)
        else:
            alive = partial(questions.tokens, address, model)
        yield _alive(model, tended.pulse(model), alive)


def _alive(thing: str, read: Read, ask: Callable[[], Awaitable[bool]]) -> Check:
    # The limit is kept by what is asked; the check's own is for a watchdog that is late itself.
    return Check(thing, Liveness(read, ask, ALIVE_WITHIN_S), ALIVE_EVERY_S, 2 * ALIVE_WITHIN_S)


async def watch(folder: Path) -> None:
    """Look after a server until cancelled."""
    tended = Tended(folder)

    def prefills() -> list[str]:
        return list(tended.deployment.instances("prefill"))

    limits = probe_limits(tended.deployment)
    probes = Probes(Channels(tended), prefills, tended.steps, limits)
    dog = Watchdog(
        tended,
        list(tended.models),
        list(checks(tended, probes, limits)),
        whole=tended.whole,
        load_s=tended.deployment.engine.load_s,
    )

    async def report() -> None:
        while True:
            watchers.report(folder, state(dog))
            await asyncio.sleep(REPORT_S)

    _log.info("looks after %s (process %d)", folder.name, os.getpid())
    await asyncio.gather(dog.run(), report())


def state(dog: Watchdog) -> dict[str, Any]:
    """What it knows, for people: times as seconds since the epoch, rounded."""
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
            for thing, health in dog.health.items()
        },
    }


def main() -> None:
    os.umask(private.UMASK)
    folder = Path(sys.argv[1])
    watchers.announce(folder)
    form = logging.Formatter(f"%(asctime)s {folder.name}: %(message)s")
    for handler in (logging.FileHandler(folder / "watch.log"), logging.StreamHandler()):
        handler.setFormatter(form)
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    try:
        asyncio.run(watch(folder))
    except (ServerError, DeploymentError) as error:
        sys.exit(str(error))
    except Exception:
        _log.exception("the watchdog itself has failed")
        raise


if __name__ == "__main__":
    main()
