"""Real servers on several hosts: the gateway in the root namespace, workers where placed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from pdctl import fleet
from pdctl.errors import ServerError
from pdctl.server import Server
from pdserve.config import Deployment
from tests.hosts.network import Network
from tests.servers import START_TIMEOUT_S, Running, on_free_ports

STOP_S = 30.0


@contextlib.contextmanager
def running_on(
    network: Network, deployment: Deployment, placement: Mapping[str, str], tmp_path: Path
) -> Iterator[Running]:
    """Start a deployment on hosts and wait until it is ready; stop it at the end.

    Args:
        placement: server's name to host; servers that are not in it, a gateway among them, run
            in the root namespace.
        tmp_path: receives ``deployment.yaml`` and each server's folder, as `tests.servers.running`.

    Raises:
        ServerError: one did not start; the message has the log's relevant lines.
    """
    deployment = _addressed(network, on_free_ports(deployment), placement)
    file = tmp_path / "deployment.yaml"
    file.write_bytes(msgspec.yaml.encode(deployment))
    servers = [Server(deployment, spec, tmp_path) for spec in deployment.servers]
    here = [server for server in servers if server.spec.name not in placement]
    front = next(server for server in here if server.spec.gateway)
    workers = []
    try:
        for name, host in placement.items():
            workers.append(_start(network, host, file, name))
        fleet.start(here, held=True, timeout_s=START_TIMEOUT_S, progress=lambda *_: None)
        for worker in workers:
            assert worker.stdout is not None
            said = worker.stdout.readline()
            if said != "ready\n":
                raise ServerError(said + worker.stdout.read())
        yield Running(front.http, front.grpc, front.metrics, deployment, servers)
    finally:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
        fleet.stop(here)
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.close()
            worker.wait(STOP_S)


def _addressed(
    network: Network, deployment: Deployment, placement: Mapping[str, str]
) -> Deployment:
    servers = [
        msgspec.structs.replace(server, host=network.address(placement[server.name]))
        if server.name in placement
        else server
        for server in deployment.servers
    ]
    return msgspec.structs.replace(deployment, servers=tuple(servers))


def _start(network: Network, host: str, file: Path, name: str) -> subprocess.Popen[str]:
    """Start a process on a host that keeps a server while its standard input is open."""
    argv = [sys.executable, "-m", "tests.hosts.serve", str(file), name, str(file.parent)]
    return subprocess.Popen(
        network.command(host, argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
