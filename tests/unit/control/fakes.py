"""Agents and servers as a controller sees them: what is in the store, and on metrics pages."""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import async_solipsism
from msgspec.structs import replace

from pdserve.config import Control, Decode, Deployment, Server
from pdserve.control import records
from pdserve.control.assignment import Assignment
from pdserve.control.loads import Page
from pdserve.control.records import DesiredInstance, ObservedAgent, ObservedInstance, Phase
from pdserve.control.store.protocol import Delete, Put, Store
from pdserve.control.stored import Stored, read

EPOCH_S = 1.8e9
"""When virtual time begins, in seconds since 1970."""
SLOTS = 10
LOOK_S = 0.2


def now() -> float:
    return EPOCH_S + asyncio.get_running_loop().time()


def virtually(limit_s: float = 3600.0) -> Callable[..., Callable[..., None]]:
    """Return a decorator that runs an async test in virtual time, of so many seconds at most."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            loop = async_solipsism.EventLoop()
            try:
                loop.run_until_complete(asyncio.wait_for(test(*args, **kwargs), limit_s))
            finally:
                loop.close()

        return run

    return decorate


def deployment(prefills: int, decodes: int, **control: Any) -> Deployment:
    """Return one server with a gateway and flexible instances ``p0``, ``d0`` and so on."""
    server = Server(
        "local",
        prefill=tuple(f"p{number}" for number in range(prefills)),
        decode=tuple(f"d{number}" for number in range(decodes)),
    )
    section = Control("test", **{"ratio": "act", **control})
    return Deployment("m", (server,), decode=Decode(slots=SLOTS), control=section)


@dataclass
class Agent:
    """Makes its instances what is desired, at once, and reports them."""

    store: Store
    deployment: Callable[[], Deployment]
    name: str = "host"
    failed: set[str] = field(default_factory=set)
    """Instances whose repairs do not help."""
    stuck: set[str] = field(default_factory=set)
    """Instances that do not change any more."""

    async def run(self) -> None:
        """Work until cancelled; then it is gone, as its lease is."""
        lease = (await self.store.grant(2.0)).id
        try:
            while True:
                await self.turn(lease)
                await asyncio.sleep(LOOK_S)
        finally:
            await self.store.revoke(lease)

    async def turn(self, lease: int) -> None:
        stored = read(await self.store.list_prefix(""))
        puts: list[Put | Delete] = []
        servers = self.deployment().servers
        if self.name not in stored.agents:
            agent = ObservedAgent(1, tuple(server.name for server in servers))
            puts.append(Put(records.OBSERVED_AGENTS + self.name, records.encode(agent), lease))
        for server in servers:
            for name in (*server.prefill, *server.decode):
                seen = self.observed(name, server, stored)
                if seen is not None and seen != stored.observed.get(name):
                    key = records.OBSERVED_INSTANCES + name
                    puts.append(Put(key, records.encode(seen), lease))
        if puts:
            await self.store.transact((), puts)

    def observed(self, name: str, server: Server, stored: Stored) -> ObservedInstance | None:
        before, wanted = stored.observed.get(name), stored.desired.get(name)
        if name in self.stuck or wanted is None:
            return before
        seen = ObservedInstance(
            self.name, server.name, f"{server.host}:1", "flexible", "ready", "e"
        )
        if name in self.failed:
            return replace(seen, state="failed", reason="it does not load")
        if wanted.state == "absent":
            return replace(seen, state="absent")
        phase = Phase.UNASSIGNED if wanted.assignment.role == "none" else Phase.SERVING
        if wanted.state == "draining":
            phase = Phase.DRAINED
        return replace(seen, assignment=wanted.assignment, phase=phase)


@dataclass
class Servers:
    """The metrics pages of a deployment under load: every role does what it can.

    Attributes:
        rate: requests that arrive per second.
        prefill_s: seconds of a prefill for a prompt.
        decode_s: seconds for which an answer holds one of the `SLOTS` of a decode.
        silent: servers that do not answer.
        extra: is appended to every page.
    """

    store: Store
    rate: float = 0.0
    prefill_s: float = 0.1
    decode_s: float = 1.0
    silent: set[str] = field(default_factory=set)
    extra: str = ""
    scraped: int = 0
    _values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _at: float = 0.0

    async def scrape(self, deployment: Deployment) -> Mapping[str, Page | None]:
        self.scraped += 1
        await self._pass()
        text = "".join(f"{series} {value}\n" for series, value in self._values.items())
        return {
            server.name: None if server.name in self.silent else Page(text + self.extra)
            for server in deployment.servers
        }

    async def _pass(self) -> None:
        """Count what was done since the last time, by the roles that instances have now."""
        passed, self._at = now() - self._at if self._at else 0.0, now()
        stored = read(await self.store.list_prefix(""))
        roles: dict[str, list[str]] = defaultdict(list)
        for name, seen in stored.observed.items():
            if seen.phase is Phase.SERVING and seen.assignment is not None:
                roles[seen.assignment.role].append(name)
        prefills, decodes = roles["prefill"], roles["decode"]
        by_prefill = len(prefills) / self.prefill_s
        by_decode = len(decodes) * SLOTS / self.decode_s
        done = min(self.rate, by_prefill, by_decode) * passed
        for name in prefills:
            self._add("pdserve_prefill_seconds_count", name, done / len(prefills))
            self._add("pdserve_busy_seconds_total", name, done / len(prefills) * self.prefill_s)
        for name in decodes:
            self._add("pdserve_decode_seconds_count", name, done / len(decodes))
            self._add("pdserve_slot_seconds_total", name, done / len(decodes) * self.decode_s)
            self._add("pdserve_busy_seconds_total", name, passed)
        short = self.rate > by_prefill and by_prefill <= by_decode
        line = 'gateway="pdserve",group="default",role="prefill"'
        self._values[f"pdserve_waiting_requests{{{line}}}"] = 50.0 if short else 0.0
        self._values[f"pdserve_oldest_waiting_seconds{{{line}}}"] = 40 + passed if short else 0.0
        routed = 'pdserve_routed_requests_total{scenario="default",group="default"}'
        self._values[routed] += self.rate * passed
        for name in prefills:
            short = self.rate > by_decode and by_decode < by_prefill
            series = f'pdserve_kv_leases{{instance="{name}",state="leased"}}'
            self._values[series] = 8.0 if short else 0.0

    def _add(self, name: str, instance: str, value: float) -> None:
        self._values[f'{name}{{instance="{instance}"}}'] += value


def ratio(stored: Stored, group: str = "default") -> tuple[int, int]:
    """Return the desired numbers of prefills and decodes."""
    roles = [
        one.assignment.role for one in stored.desired.values() if one.assignment.group == group
    ]
    return roles.count("prefill"), roles.count("decode")


def wanted(number: int, role: Any, group: str = "default") -> DesiredInstance:
    return DesiredInstance(Assignment(number, role, group))
