"""The instances of one server, made what is desired of them; see ``pdserve.node.reconciler``."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Literal

from msgspec.structs import replace

from pdctl.channels import Channels
from pdctl.host_control import HostControl
from pdctl.instance_models import InstanceModels
from pdctl.repository import INSTANCES
from pdctl.watched_server import WatchedServer
from pdserve.control.records import ObservedInstance, Phase
from pdserve.node.assignments import Assignments
from pdserve.node.instance_calls import InstanceCalls
from pdserve.node.reconcile import Kind, Presence
from pdserve.node.reconciler import TRIES, Reconciler

State = Literal["absent", "loading", "ready", "failed"]
MOST_REASON = 1000
"""Characters of a reason that is reported."""


class Instances:
    """Reconciles every instance of a server, and reports it."""

    def __init__(
        self,
        watched: WatchedServer,
        models: InstanceModels,
        channels: Channels,
        assignments: Assignments,
        control: HostControl,
    ) -> None:
        self._watched = watched
        self._models = models
        self._channels = channels
        self._assignments = assignments
        self._control = control
        calls = InstanceCalls(channels.whatever, channels.once)
        kinds: dict[str, Kind] = {
            name: kind
            for name, template in watched.models.items()
            for kind in INSTANCES
            if kind == template
        }
        self._reconcilers = {
            name: Reconciler(
                name,
                kind,
                models,
                calls,
                partial(control.desired, name),
                self._decodes,
                lambda: watched.deployment.drain_s,
                partial(self._report, name),
            )
            for name, kind in kinds.items()
        }

    async def run(self) -> None:
        """Reconcile until cancelled; the instances stay as they are then."""
        end = self._control.listen(self._changed)
        for name in self._deployed():
            self._changed(name)
        works = [asyncio.create_task(one.run()) for one in self._reconcilers.values()]
        try:
            await asyncio.gather(*works)
        finally:
            end()
            for work in works:
                work.cancel()

    def report_stopped(self) -> None:
        """Report that the server has been stopped on purpose, and its instances with it."""
        for name in self._reconcilers:
            seen = self._observed(name, "absent", "its server has been stopped")
            self._control.observe(name, seen)

    def _deployed(self) -> list[str]:
        deployment = self._watched.deployment
        return [*(deployment.instances("prefill") | deployment.instances("decode"))]

    def _decodes(self) -> list[str]:
        """Return all instances that may have a link to another's memory."""
        return [name for name in self._deployed() if not self._control.absent(name)]

    def _changed(self, name: str) -> None:
        """Take notice that something else is desired of any instance of the deployment."""
        desired = self._control.desired(name)
        if desired is None:
            return
        if desired.state == "serving":
            self._assignments.take(name, desired.assignment)
        else:
            self._assignments.forget(name)
        own = self._reconcilers.get(name)
        if own is not None:
            own.soon.set()
        elif desired.state != "serving":
            self._channels.drop(name)

    def _report(self, name: str) -> None:
        one = self._reconcilers[name]
        presence = one.presence
        reason = one.reason
        state: State
        if failure := self._models.failure(name):
            state, reason = "failed", failure
        elif one.tries >= TRIES:
            state = "failed"
        elif presence is Presence.ABSENT:
            state = "absent"
        else:
            state = "ready" if one.known is not None else "loading"
        if one.known is not None and one.known.phase is Phase.SERVING:
            self._assignments.take(name, one.known.assignment)
        self._control.observe(name, self._observed(name, state, reason))

    def _observed(self, name: str, state: State, reason: str) -> ObservedInstance:
        one, server = self._reconcilers[name], self._watched.server
        seen = ObservedInstance(
            host=self._control.agent,
            server=server.name,
            address=server.grpc,
            kind=one.kind,
            state=state,
            reason=reason[:MOST_REASON],
        )
        known = one.known
        if known is None or state == "absent":
            return seen
        return replace(
            seen,
            epoch=known.epoch.hex(),
            assignment=known.assignment,
            phase=known.phase,
            used=known.used,
            leases=known.leases,
        )
