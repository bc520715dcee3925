"""Deployments for fault tests: emulated engines with watchdogs, in one server or in several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pdctl import fleet, footprint, watchers
from pdctl.server import Server
from pdserve.config import Deployment, Gateway, Prefill
from pdserve.config import Server as Spec
from tests import clients
from tests.clients import wait_until
from tests.servers import Running, emulated_deployment, running

STEP_MS = 20
PROFILE: dict[str, Any] = {"prefill": {"base_ms": 10}, "decode": {"base_ms": STEP_MS}}
STALL_S = 5.0
TTFT_LIMIT_S = 10.0
LEASE_S = 4.0

KNOWN_S = 2.0
"""Time within which a dead process is noticed, and the endpoints say so."""
STOPPED_S = 2.0
"""The same for a stopped process."""
RELOADED_S = 6.0
RESTARTED_S = 15.0


def on_this_machine(limit_s: float) -> float:
    """Scale a limit for free cores to this machine; starting a server takes CPU time."""
    return limit_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def all_in_one(folder: Path) -> Deployment:
    """Two prefills, two decodes and the gateway in one server."""
    return emulated_deployment(
        folder,
        PROFILE,
        instances=2,
        prefill=Prefill(arena_mib=16, lease_s=LEASE_S),
        gateway=Gateway(stall_s=STALL_S, ttft_limit_ms=int(TTFT_LIMIT_S * 1e3)),
    )


def gateway_and_workers(whole: Deployment, gateways: int) -> Deployment:
    """The same instances, each in a server that has its name."""
    workers = [
        *(Spec(name=f"prefill_{i}", gateway=False, prefill=(f"prefill_{i}",)) for i in range(2)),
        *(Spec(name=f"decode_{i}", gateway=False, decode=(f"decode_{i}",)) for i in range(2)),
    ]
    fronts = [Spec(name=f"gateway_{i}") for i in range(gateways)]
    return msgspec.structs.replace(whole, servers=(*fronts, *workers))


@contextlib.contextmanager
def watched(deployment: Deployment, folder: Path) -> Iterator[Running]:
    """Run a deployment, each server with its watchdog."""
    with running(deployment, folder) as started:
        with whole(started):
            pass
        yield started


@contextlib.contextmanager
def whole(running: Running) -> Iterator[None]:
    """At the end, wait until all is in service and has its watchdog."""
    yield
    fleet.watch(running.servers)
    wait_until(
        lambda: all(watchers.reported(one.folder) and one.ready() for one in running.servers),
        on_this_machine(2 * RESTARTED_S),
    )
    for front in gateways(running):
        assert serves(front)


def serves(server: Running) -> bool:
    return clients.generate(server, text_input="Who is there?", max_tokens=4).finish_reason != ""


def gateways(running: Running) -> list[Running]:
    """Yield the same deployment, with requests to each of its gateways."""
    return [
        replace(running, http=one.http, grpc=one.grpc, metrics=one.metrics)
        for one in running.servers
        if one.spec.gateway
    ]


def server_of(running: Running, model: str) -> Server:
    """Return the server that holds an instance; for any other model, the first gateway."""
    for server in running.servers:
        if model in (*server.spec.prefill, *server.spec.decode):
            return server
    return next(server for server in running.servers if server.spec.gateway)


def stub(server: Server, model: str) -> psutil.Process:
    """Return the process that runs a model."""
    assert server.token is not None
    found = [
        process
        for process in footprint.processes([server.token])
        if any(f"/{model}/1/model.py" in word for word in process.cmdline())
    ]
    return max(found, key=lambda process: process.create_time())


def leader(server: Server) -> psutil.Process:
    """Return its ``tritonserver``."""
    assert server.token is not None
    found = footprint.server_process(server.token)
    assert found is not None
    return found


def repairs(server: Server) -> int:
    """Return the number of repairs by its watchdog."""
    state = watchers.reported(server.folder)
    assert state is not None
    return sum(health["repairs"] for health in state["things"].values())


def said(server: Server) -> str:
    """Return the log of its watchdogs."""
    log = server.folder / "watch.log"
    return log.read_text() if log.exists() else ""


@dataclass(frozen=True)
class Fault:
    """A fault of the process of a model."""

    of: str
    """stub or server"""
    how: str
    """kill or stop"""

    def __str__(self) -> str:
        return f"{self.how} {self.of}"

    def strike(self, running: Running, model: str) -> None:
        """Cause it, and wait until the watchdog has repaired it."""
        server = server_of(running, model)
        before = repairs(server)
        self.hit(server, model)
        limit_s = on_this_machine(RESTARTED_S)
        wait_until(lambda: repairs(server) > before and server.ready(), limit_s)

    def hit(self, server: Server, model: str) -> psutil.Process:
        process = stub(server, model) if self.of == "stub" else leader(server)
        if self.how == "kill":
            process.kill()
        else:
            process.suspend()
        return process


FAULTS = [Fault(of, how) for of in ("stub", "server") for how in ("kill", "stop")]
