"""Findings about the deployment's servers: ports, Triton's model repository, the model."""

from __future__ import annotations

from collections.abc import Iterator

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.inventory import Inventory
from pdserve.config import Deployment


def servers(inventory: Inventory, deployment: Deployment) -> Iterator[Finding]:
    found = inventory.servers
    here = [server for server in found if server.here]
    if not here:
        hosts = ", ".join(sorted({server.host for server in deployment.servers}))
        yield Finding(
            about="servers",
            state="problem",
            found=f"none is of this host; they are of {hosts}",
            mend="servers[].host: an address of this host; or pdctl doctor there",
        )
    running = [f"{server.name} (process {server.pid})" for server in here if server.pid]
    idle = [server for server in here if not server.pid]
    free = [server for server in idle if not any(port.holder for port in server.ports)]
    listed = [f"{s.name} {', '.join(str(port.number) for port in s.ports)}" for s in free]
    elsewhere = [server.name for server in found if not server.here]
    parts = {"run": running, "ports free": listed, "on other hosts": elsewhere}
    said = [f"{what}: {'; '.join(names)}" for what, names in parts.items() if names]
    if running or free:
        yield Finding(about="servers", state="ok", found=". ".join(said))
    for server in idle:
        for port in server.ports:
            if port.holder:
                yield Finding(
                    about=f"server {server.name}",
                    state="problem",
                    found=f"{port.use}_port {port.number}: {port.holder}",
                    mend=f"end that process, or another servers[].{port.use}_port",
                )


def model(inventory: Inventory, deployment: Deployment) -> Iterator[Finding]:
    """Return what is wrong with the model, or what has been looked at."""
    if not inventory.model:
        tried = deployment.engine.kind == "torch"
        yield Finding(
            about="model",
            state="ok",
            found=deployment.model
            + (": its files are whole; its layers are tried when it is loaded" if tried else ""),
        )
    else:
        yield Finding(
            about="model",
            state="problem",
            found=inventory.model,
            mend="make setup, for the default one; or what the deployment names in its place",
        )


def gateways(deployment: Deployment) -> Iterator[Finding]:
    """Return a finding if no server has a gateway."""
    if not any(server.gateway for server in deployment.servers):
        yield Finding(
            about="gateways",
            state="note",
            found="no server has gateway: true",
            unused="all instances, since no server takes the requests of clients",
            mend="servers[].gateway: true, for one at least",
        )
