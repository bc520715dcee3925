"""The servers that are measured: flexible instances, a fixed one, a gateway in each server."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from tests.servers import Running, running

from pdctl import keys
from pdctl.server import Server
from pdserve import config
from pdserve.config import Role
from pdserve.control.assignment import ANY, FIRST, Assignment
from pdserve.node.role_switch import RoleSwitch, Switched
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.transfer import key
from perf import processes
from perf.role_switch.memory import OwnMemory
from perf.serving import MODEL

Engine = Literal["emulated", "torch"]
GROUP = "default"
"""The group of a deployment without scenarios."""
FIXED = "fixed_0"
"""A prefill that changes its role by being loaded anew."""
PROFILE: dict[str, Any] = {
    "layers": 30,
    "kv_heads": 3,
    "head_dim": 64,
    "prefill": {"base_ms": 60.0},
    "decode": {"base_ms": 5.0},
}
"""KV caches as large as the default model's, and enough waiting that the prefills are busy."""
ARENA_MIB, BLOCKS = 192, 288
"""A pool of so many blocks has 203 MiB: three times what the probe of a link takes for a moment."""
DRAIN_S = 40.0


def deployment(
    engine: Engine, instances: int, gateways: int, folder: Path, *, fixed: bool
) -> config.Deployment:
    """Return a deployment of flexible instances, half of them prefills at first.

    Args:
        gateways: number of servers, each with a gateway and its share of the instances.
        folder: receives timing profile and key.
        fixed: whether there is a prefill beside them that is not flexible.
    """
    names = [f"flexible_{n}" for n in range(instances)]
    servers = []
    for n in range(gateways):
        first = {
            name: "prefill" if i < instances // 2 else "decode" for i, name in enumerate(names)
        }
        own = names[n::gateways]
        prefill = [name for name in own if first[name] == "prefill"]
        servers.append(
            config.Server(
                f"server_{n}",
                prefill=(*prefill, *([FIXED] if fixed and n == 0 else [])),
                decode=tuple(name for name in own if first[name] == "decode"),
                flexible=tuple(own),
            )
        )
    profile = folder / "profile.yaml"
    profile.write_bytes(msgspec.yaml.encode(PROFILE))
    torch = config.Engine(threads=1)
    emulated = config.Engine(kind="emulated", profile=str(profile))
    return config.Deployment(
        model=str(MODEL),
        servers=tuple(servers),
        engine=torch if engine == "torch" else emulated,
        prefill=config.Prefill(slots=2, batch=1, arena_mib=ARENA_MIB),
        decode=config.Decode(slots=32, blocks=BLOCKS, response_cost_ms=0.0),
        transfer=config.Transfer(key_file=str(folder / "kv.key")),
    )


@dataclass
class Site:
    """The running servers, and what each flexible instance is by now."""

    servers: list[Server]
    roles: dict[str, Role]
    numbers: dict[str, int] = field(default_factory=dict)
    _channels: dict[str, GrpcChannel] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def of(cls, wanted: config.Deployment, folder: Path) -> Iterator[Site]:
        """Start the servers; they end with the ``with`` block."""
        with running(wanted, folder) as started:
            yield cls(started.servers, _roles(started))

    def server(self, name: str) -> Server:
        """Return the server of an instance."""
        specs = {
            one: server
            for server in self.servers
            for one in (*server.spec.prefill, *server.spec.decode)
        }
        return specs[name]

    def channel(self, name: str) -> GrpcChannel:
        """Return a channel to an instance, whatever its assignment."""
        if name not in self._channels:
            server = self.server(name)
            secret = key.load(keys.copy(server.folder))
            self._channels[name] = GrpcChannel(server.grpc, name, secret, ANY)
        return self._channels[name]

    async def switch(self, name: str, role: Role) -> Switched:
        """Give an instance this role.

        Raises:
            NotSwitched: it has kept its own.
        """
        number = self.numbers.get(name, FIRST) + 1
        everyone = [
            one for server in self.servers for one in (*server.spec.prefill, *server.spec.decode)
        ]
        switch = RoleSwitch(name, self.channel, everyone, DRAIN_S)
        done = await switch.run(Assignment(number, role, GROUP))
        self.numbers[name], self.roles[name] = number, role
        return done

    def own_memory(self, name: str) -> OwnMemory:
        """Return what reads the memory of an instance's process."""
        server = self.server(name)
        return OwnMemory(server.token or "", name, processes.ids(server)[name])

    async def disconnect(self, name: str) -> None:
        """Close the channel to an instance: an open stream pins the version of its model."""
        await self._channels.pop(name).close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


def _roles(started: Running) -> dict[str, Role]:
    flexible = started.deployment.flexible
    return {
        name: role
        for role in config.ROLES
        for name in started.deployment.instances(role)
        if name in flexible
    }


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pdserve-perf-") as made:
        yield Path(made)
