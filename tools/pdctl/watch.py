"""Watches one server until it is stopped: its checks, and the report of its watchdog."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from pdctl import questions, watchers
from pdctl.channels import Channels
from pdctl.host_control import HostControl
from pdctl.instance_models import InstanceModels
from pdctl.instances import Instances
from pdctl.repository import INSTANCES
from pdctl.watched_server import WatchedServer
from pdserve.control import first_state
from pdserve.node import failure_notice, heartbeat
from pdserve.node.assignments import Assignments
from pdserve.node.liveness import Liveness, Read
from pdserve.node.probes import Limits, Probes
from pdserve.node.watchdog import SERVER, Check, Dismissed, Watchdog

# The intervals of probes, and the time for an answer.
ALIVE_EVERY_S, ALIVE_WITHIN_S = 1.0, heartbeat.STILL_S
PROBE_EVERY_S = 5.0
REPORT_S, REFRESH_S = 0.5, 2.0
"""Seconds after which a change of health, and the time of the latest answers, are reported."""

_log = logging.getLogger(__name__)


async def watch(watched: WatchedServer, control: HostControl | None) -> None:
    """Watch a server until cancelled, and make its instances what is desired of them.

    Args:
        control: None: the deployment is static, and its instances stay as they are.

    Raises:
        Dismissed: it has been stopped.
    """
    await watched.begun()
    limits = Limits.of(watched.deployment)
    assignments = Assignments(first_state.assignments(watched.deployment))
    channels = Channels(watched, assignments)
    probes = Probes(channels, assignments, watched.steps, limits)
    watchdog = Watchdog(
        watched,
        list(watched.models),
        list(checks(watched, probes, limits)),
        whole=watched.whole,
        load_s=watched.deployment.engine.load_s,
    )

    models = InstanceModels(watched, watchdog, channels)
    works = [asyncio.create_task(report(watched, watchdog))]
    instances = None
    if control is not None:
        instances = Instances(watched, models, channels, assignments, control)
        works.append(asyncio.create_task(instances.run()))
        control.watches(watched.server.name, os.getpid())
    _log.info("watches %s (process %d)", watched.server.name, os.getpid())
    try:
        await watchdog.run()
    except Dismissed:
        if instances is not None:
            instances.report_stopped()
        raise
    finally:
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        if control is not None:
            control.leaves(watched.server.name)
        await channels.close()


def checks(watched: WatchedServer, probes: Probes, limits: Limits) -> Iterator[Check]:
    """Yield all checks of a server and its models."""
    address = watched.server.grpc
    live = partial(questions.live, address)
    of_all = watched.heartbeat(*watched.models)
    # A model whose threads are stuck has a check of its own.
    yield _alive(SERVER, lambda: [beats._replace(turns=0) for beats in of_all()], live)
    for model, template in watched.models.items():
        if template in INSTANCES:
            alive = partial(probes.alive, model)
            computes = partial(probes.computes, model)
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


async def report(watched: WatchedServer, watchdog: Watchdog) -> None:
    """Write the watchdog's report again and again until cancelled.

    Nothing depends on the report: if it cannot be written now, that is tried again.
    """
    failed, due = "", 0.0
    last: dict[str, Any] = {}
    while True:
        new, now = state(watchdog), time.monotonic()
        if now >= due or _lasting(new) != _lasting(last):
            try:
                watchers.report(watched.folder, new)
                failed, last, due = "", new, now + REFRESH_S
            except Exception as error:
                if failed != (failed := repr(error)):
                    _log.warning("what it knows cannot be reported: %s", failed)
        await asyncio.sleep(REPORT_S)


def _lasting(state: dict[str, Any]) -> dict[str, Any]:
    """Return what of a report does not change with every answer."""
    return {
        thing: {name: value for name, value in health.items() if name not in ("answered", "proven")}
        for thing, health in state.get("things", {}).items()
    }


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
