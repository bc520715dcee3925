"""The requirements of a deployment on this host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pdctl.doctor.inventory import Server
from pdctl.repository import processes
from pdserve.config import ROLES, Deployment, TransportName

_MODEL_SHM_MIB = 1
"""Shared memory that Triton takes for each model's process at its start."""


class Needs(NamedTuple):
    """Requirements of this host's servers; ``shm_mib`` counts those that do not run yet."""

    engine: str
    gpus: frozenset[int]
    """CUDA devices that compute."""
    instances: int
    arena_mib: int
    """Size of one prefill's arena."""
    shm_mib: int
    transports: tuple[TransportName, ...]
    """Transports of the deployment; empty: the engine moves KV caches itself."""
    rdma_only: bool
    near: bool
    """A prefill here has a decode here."""
    far: bool
    """One of the two is on another host."""

    @property
    def nixl(self) -> bool:
        """Tell whether NIXL is the first transport for some pair."""
        return "nixl" in self.transports and (self.far or self.transports[0] == "nixl")

    @property
    def device(self) -> str:
        """Return the engine's device in words."""
        numbers = ", ".join(map(str, sorted(self.gpus)))
        if self.engine == "tensorrtllm_backend":
            return "in another Triton server"
        return f"on GPU {numbers}" if self.gpus else "on the CPU"


def needs(deployment: Deployment, servers: Sequence[Server]) -> Needs:
    engine = deployment.engine
    here = {server.name for server in servers if server.here}
    to_start = {server.name for server in servers if server.here and server.pid is None}
    transports = () if engine.external else deployment.transports
    arena = deployment.prefill.arena_mib
    shared = arena if engine.gpu is None and "shm" in transports else 0
    pairs = _pairs(deployment, here)
    return Needs(
        engine=engine.kind,
        gpus=frozenset(_gpus(deployment, here)),
        instances=sum(
            len(server.prefill) + len(server.decode)
            for server in deployment.servers
            if server.name in here
        ),
        arena_mib=arena,
        shm_mib=sum(
            len(list(processes(server))) * _MODEL_SHM_MIB
            # Each flexible instance may become a prefill.
            + len({*server.prefill, *server.flexible}) * shared
            for server in deployment.servers
            if server.name in to_start
        ),
        transports=transports,
        rdma_only=deployment.transfer.require == "rdma",
        near=(True, True) in pairs,
        far=not pairs.isdisjoint({(True, False), (False, True)}),
    )


def _pairs(deployment: Deployment, here: set[str]) -> set[tuple[bool, bool]]:
    """Tell for all pairs whether prefill and decode are on this host."""
    prefills, decodes = (deployment.instances(role) for role in ROLES)
    return {
        (prefills[prefill].name in here, decodes[decode].name in here)
        for scenario in deployment.served
        for group in scenario.groups
        for prefill in group.prefill
        for decode in group.decode
    }


def _gpus(deployment: Deployment, here: set[str]) -> Iterable[int]:
    engine = deployment.engine
    if engine.gpu is not None:
        yield engine.gpu
    if engine.kind == "tensorrt_llm":
        for role in ROLES:
            for name, server in deployment.instances(role).items():
                if server.name in here:
                    yield from engine.gpus.get(name, range(deployment.ranks(role)))
