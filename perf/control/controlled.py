"""A node agent and a controller beside running servers; the controller's clock is hurried."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.clients import wait_until
from tests.servers import Running, free_ports

from pdctl import agents, controllers, fleet
from pdserve import config
from pdserve.control import event_log, stores
from pdserve.control.events import Event
from pdserve.control.stored import Stored, read
from pdserve.control.transaction import Kind
from perf.control.hurried import Clock
from perf.control.mixes import ratio
from perf.control.points import Change
from perf.control.servers import NAMES
from perf.control.traffic import SCALE

BEGIN_S = 60.0
"""Seconds for all instances to be reported, and a controller to lead."""
END_S = 10.0


def section() -> config.Control:
    """Return the section ``control`` of the deployment: the controller may change the ratio."""
    return config.Control(id="bench", ratio="act", metrics_port=free_ports(1)[0])


class Control:
    """The decisions of a controller.

    Args:
        run: the folder of the servers' folders.
    """

    def __init__(self, deployment: config.Deployment, run: Path, clock: Clock) -> None:
        assert deployment.control is not None
        self._control = deployment.control
        self._run = run
        self.clock = clock

    def stored(self) -> Stored:
        """Return what its store holds. Raises StoreError."""
        return asyncio.run(self._stored())

    async def _stored(self) -> Stored:
        store = await stores.opened(self._control, self._run)
        try:
            return read(await store.list_prefix(""))
        finally:
            await store.close()

    def leads(self) -> bool:
        """Tell whether every instance is desired and reported."""
        stored = self.stored()
        return set(NAMES) <= stored.desired.keys() & stored.observed.keys()

    def events(self) -> list[Event]:
        return [event for _, event in event_log.decoded(self.stored().events)]


def changes(events: Sequence[Event], clock: Clock, began: float) -> list[Change]:
    """Return the changes of the ratio that events tell of.

    Args:
        began: time of day from which they count, in seconds since 1970.
    """
    found: list[Change] = []
    for event in events:
        at = round(clock.real(event.at) - began, 2)
        if event.what == "begin" and event.text.startswith(Kind.RATIO.value):
            now, wanted = event.numbers["prefills"], event.numbers["target_prefills"]
            moved = len(event.instances) if wanted > now else -len(event.instances)
            found.append(Change(at, ratio(round(now) + moved)))
        elif event.what == "end" and found and event.text.startswith(Kind.RATIO.value):
            found[-1].took_s = round(at - found[-1].at_s, 2)
    return found


def texts(events: Sequence[Event], clock: Clock, began: float) -> list[str]:
    """Return events as lines, each with its seconds since a time of day."""
    lines = []
    for event in events:
        at = f"{clock.real(event.at) - began:.1f} s"
        numbers = (f"{name} {value:.4g}" for name, value in event.numbers.items())
        inputs = ", ".join([*event.instances, *numbers])
        lines.append(f"{at}: {event.what}: {event.text}" + (f" ({inputs})" if inputs else ""))
    return lines


@contextmanager
def controlling(server: Running) -> Iterator[Control]:
    """Start an agent and a controller, and wait until the controller knows every instance."""
    run = server.servers[0].folder.parent
    deployment = server.deployment
    fleet.watch(server.servers)
    place = controllers.give(deployment, run)
    origin = time.time()
    command = [sys.executable, "-m", "perf.control.hurried", str(place), str(SCALE), str(origin)]
    with (place / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        control = Control(deployment, run, Clock(SCALE, origin))
        wait_until(control.leads, BEGIN_S)
        yield control
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        process.kill()
        process.wait()
        agents.end(run)
