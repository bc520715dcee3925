"""What a controller would write: desired state of instances, straight into a deployment's store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from pdserve.config import Control, Deployment
from pdserve.control import records, stores
from pdserve.control.assignment import Assignment, Role
from pdserve.control.records import DesiredInstance, ObservedAgent, ObservedInstance, Phase
from pdserve.control.store.protocol import Store, put
from tests.clients import wait_until
from tests.faults.serving import on_this_machine

T = TypeVar("T")
DRAIN_S = 12.0


def controlled(deployment: Deployment) -> Deployment:
    """Return the deployment with a control plane, whose store is a file of its run folder."""
    control = Control(id="test", ratio="never", drain_s=DRAIN_S + deployment.least_drain_s)
    return msgspec.structs.replace(deployment, control=control)


class Desires:
    """Writes what is desired, and reads what is observed."""

    def __init__(self, deployment: Deployment, run: Path) -> None:
        assert deployment.control is not None
        self._control = deployment.control
        self._run = run

    def _do(self, work: Callable[[Store], Awaitable[T]]) -> T:
        async def done() -> T:
            store = await stores.opened(self._control, self._run)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(done())

    def set(
        self,
        name: str,
        number: int,
        role: Role,
        state: Literal["serving", "draining", "absent"] = "serving",
        group: str = "default",
    ) -> DesiredInstance:
        desired = DesiredInstance(Assignment(number, role, group), state)
        key, value = records.DESIRED_INSTANCES + name, records.encode(desired)
        self._do(lambda store: put(store, key, value))
        return desired

    def seen(self, name: str) -> ObservedInstance | None:
        found = self._listed(records.OBSERVED_INSTANCES).get(name)
        return None if found is None else records.decode(found, ObservedInstance)

    def agents(self) -> list[ObservedAgent]:
        listed = self._listed(records.OBSERVED_AGENTS).values()
        return [records.decode(value, ObservedAgent) for value in listed]

    def _listed(self, prefix: str) -> dict[str, bytes]:
        listing = self._do(lambda store: store.list_prefix(prefix))
        return {entry.key.removeprefix(prefix): entry.value for entry in listing.entries}

    def reached(self, name: str, desired: DesiredInstance) -> bool:
        """Tell whether the agent has seen that an instance is as desired."""
        seen = self.seen(name)
        if seen is None:
            return False
        if desired.state == "absent":
            return seen.state == "absent"
        phase = Phase.SERVING if desired.state == "serving" else Phase.DRAINED
        return (seen.state, seen.assignment, seen.phase) == ("ready", desired.assignment, phase)

    def make(
        self,
        name: str,
        number: int,
        role: Role,
        state: Literal["serving", "draining", "absent"] = "serving",
        within_s: float = 10.0,
    ) -> float:
        """Have it so, and return the seconds until the agent has seen that it is."""
        began = time.monotonic()
        desired = self.set(name, number, role, state)
        wait_until(
            lambda: self.reached(name, desired), on_this_machine(within_s), lambda: self.seen(name)
        )
        return time.monotonic() - began
