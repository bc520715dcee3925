"""What a store has of one host: what is desired of its instances, and what its agent reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from msgspec.structs import replace

from pdserve.control import records
from pdserve.control.records import DesiredInstance, ObservedAgent, ObservedInstance, Phase
from pdserve.control.store.election import TTL_S
from pdserve.control.store.leased import LeasedKeys
from pdserve.control.store.protocol import Store
from pdserve.control.store.view import Difference, View
from pdserve.supervision import traced

COUNTS_S = 10.0
"""Seconds between two reports of nothing but other numbers of slots and leases, while it serves."""
AGAIN_S = 1.0
"""Pause after an error that nobody has foreseen."""

_log = logging.getLogger(__name__)


class HostState:
    """Follows desired state, and keeps what the agent observes under the agent's lease.

    The lease is the agent's alone: when it ends, that says nothing of the instances.

    Args:
        agent: name of the agent, in the keys' characters; no other one of the deployment has it.
        told: called with the instances of which something else is desired.
    """

    def __init__(
        self,
        store: Store,
        agent: str,
        told: Callable[[Collection[str]], None],
        ttl_s: float = TTL_S,
    ) -> None:
        self._agent = agent
        self._told = told
        self._desired: View[DesiredInstance] = View(
            store, records.DESIRED_INSTANCES, _decoded, self._changed
        )
        self._observed: View[ObservedInstance] = View(store, records.OBSERVED_INSTANCES, _seen)
        self._keys = LeasedKeys(store, ttl_s)
        self._reported: dict[str, tuple[ObservedInstance, float]] = {}

    async def run(self) -> None:
        """Follow the store until cancelled; what it does not answer changes nothing."""
        await asyncio.gather(
            *(_endless(work) for work in (self._desired.run, self._observed.run, self._keys.run))
        )

    def desired(self, name: str) -> DesiredInstance | None:
        """Return what is desired of an instance, as last known; None: nothing ever was."""
        return self._desired.values.get(records.DESIRED_INSTANCES + name)

    def absent(self, name: str) -> bool:
        """Tell whether an agent has seen that an instance is not there."""
        seen = self._observed.values.get(records.OBSERVED_INSTANCES + name)
        return seen is not None and seen.state == "absent"

    def serve(self, pid: int, servers: Collection[str]) -> None:
        """Report which servers the agent watches."""
        record = ObservedAgent(pid, tuple(sorted(servers)))
        self._keys.set(records.OBSERVED_AGENTS + self._agent, records.encode(record))

    def observe(self, name: str, seen: ObservedInstance) -> None:
        """Report what is known of an instance; mere counts of one that serves, now and then."""
        now = asyncio.get_running_loop().time()
        before, at = self._reported.get(name, (None, 0.0))
        if before is not None:
            counted = replace(before, used=seen.used, leases=seen.leases)
            serves = seen.phase is Phase.SERVING
            if seen == before or (serves and counted == seen and now - at < COUNTS_S):
                return
        self._reported[name] = (seen, now)
        self._keys.set(records.OBSERVED_INSTANCES + name, records.encode(seen))

    def _changed(self, difference: Difference) -> None:
        self._told([key.removeprefix(records.DESIRED_INSTANCES) for key in difference.put])


async def _endless(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except Exception as error:
            _log.error("what is desired of this host is not followed\n%s", traced(error))
        await asyncio.sleep(AGAIN_S)


def _decoded(_: str, value: bytes) -> DesiredInstance:
    return records.decode(value, DesiredInstance)


def _seen(_: str, value: bytes) -> ObservedInstance:
    return records.decode(value, ObservedInstance)
