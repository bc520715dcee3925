"""Real servers for tests: any deployment, on free ports, stopped when the block ends."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from pdctl import fleet, watchers
from pdctl.errors import ServerError
from pdctl.paths import MODEL_REPOSITORY, ROOT
from pdctl.server import Server
from pdserve.config import Deployment, Engine, load
from pdserve.config import Server as Spec

START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Running:
    """A running deployment; the addresses are those of its first gateway."""

    http: str
    """http://host:port, for KServe and /v2/models/.../generate."""
    grpc: str
    """host:port, as tritonclient takes it."""
    metrics: str
    """http://host:port/metrics."""
    deployment: Deployment
    servers: list[Server]
    """Each with its ``pid``, ``read_log()``, ``token`` and ``folder``."""


def free_ports(count: int) -> list[int]:
    """Return TCP ports on loopback that no process listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def on_free_ports(deployment: Deployment) -> Deployment:
    """Return the same deployment with its servers on free ports of loopback."""
    ports = iter(free_ports(3 * len(deployment.servers)))
    servers = tuple(
        msgspec.structs.replace(
            server,
            host="127.0.0.1",
            http_port=next(ports),
            grpc_port=next(ports),
            metrics_port=next(ports),
        )
        for server in deployment.servers
    )
    return msgspec.structs.replace(deployment, servers=servers)


def default_deployment(kind: str) -> Deployment:
    """Return the project's deployment.yaml (two prefills, two decodes) with this engine."""
    deployment = load(ROOT / "deployment.yaml")
    return msgspec.structs.replace(deployment, engine=msgspec.structs.replace(Engine(), kind=kind))


def emulated_deployment(
    folder: Path, profile: dict[str, Any], instances: int = 1, **sections: Struct
) -> Deployment:
    """Return ``instances`` prefills and as many decodes of the emulated engine in one server.

    Args:
        folder: receives the timing profile.
        profile: as ``pdserve.engines.emulated.Profile``.
        sections: ``prefill``, ``decode`` and ``gateway`` where they differ from the default.
    """
    path = folder / "profile.yaml"
    path.write_bytes(msgspec.yaml.encode(profile))
    numbers = range(instances)
    server = Spec(
        name="local",
        prefill=tuple(f"prefill_{number}" for number in numbers),
        decode=tuple(f"decode_{number}" for number in numbers),
    )
    return msgspec.structs.replace(
        default_deployment("emulated"),
        servers=(server,),
        engine=Engine(kind="emulated", profile=str(path)),
        **sections,
    )


@contextlib.contextmanager
def running(
    deployment: Deployment, tmp_path: Path, source: Path = MODEL_REPOSITORY
) -> Iterator[Running]:
    """Start a deployment on free ports and wait until it is ready; kill it at the end.

    ``tmp_path`` receives each server's folder, with its ``models/`` and its ``log``. The servers
    end with the test process, however that ends. How a server ends that is asked to is tested
    where that matters: a server whose stub has died takes its whole time-out for it.

    Raises:
        ServerError: it did not start; the message has the log's relevant lines.
    """
    deployment = on_free_ports(deployment)
    servers = [Server(deployment, spec, tmp_path, source) for spec in deployment.servers]
    fleet.start(servers, held=True, timeout_s=START_TIMEOUT_S, progress=lambda *_: None)
    try:
        front = next((server for server in servers if server.spec.gateway), servers[0])
        yield Running(front.http, front.grpc, front.metrics, deployment, servers)
    finally:
        for server in servers:
            with contextlib.suppress(ServerError):
                watchers.end(server.folder)  # otherwise it would start the server again
            server.kill()
        fleet.stop(servers)
