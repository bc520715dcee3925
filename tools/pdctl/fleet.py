"""All servers of a deployment together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pdctl import watchers
from pdctl.errors import AlreadyRunning
from pdctl.server import Progress, Server


def start(servers: Sequence[Server], *, held: bool, timeout_s: float, progress: Progress) -> None:
    """Start every server and wait until all are ready; if one fails, none stays.

    Raises:
        AlreadyRunning, PortTaken, ServerError, DeploymentError: as the first that failed.
    """
    started: list[Server] = []
    try:
        for server in servers:
            started.append(server)
            try:
                server.start(held=held)
            except AlreadyRunning:
                started.remove(server)
                raise
        for server in servers:
            server.wait_ready(timeout_s, progress)
    except BaseException:
        stop(started)
        raise


def watch(servers: Sequence[Server], *, held: bool) -> None:
    """Look after the servers from now on, each by a watchdog of its own; see watchers.py."""
    for server in servers:
        watchers.start(server.folder, held=held)


def stop(servers: Sequence[Server]) -> None:
    """Stop the servers, all at the same time."""
    if servers:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(Server.stop, servers))
