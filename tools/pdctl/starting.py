"""Starts servers at the terminal: checks first, progress, and what is ready."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pdctl import fleet, network
from pdctl.console import out
from pdctl.doctor import examination
from pdctl.repository import models
from pdctl.server import Server


@contextmanager
def held(servers: list[Server], timeout: float | None) -> Iterator[list[Server]]:
    """Start the servers, and stop them when the block ends. Raises: as `start`."""
    try:
        start(servers, keep=True, timeout=timeout)
        yield servers
    finally:
        fleet.stop([server for server in servers if server.held], own=True)


def start(servers: list[Server], *, keep: bool, timeout: float | None) -> None:
    """Start them, or wait for those that another command has started, and print what is ready.

    Args:
        keep: they are started by this process, and end with it.
        timeout: seconds until they are ready; None: as the deployment says.

    Raises:
        AlreadyRunning, PortTaken, ServerError, DeploymentError.
    """
    before = [server for server in servers if server.pid is not None and server.live()]
    if servers == before and not keep:
        return
    deployment = servers[0].deployment
    new = [server.spec.name for server in servers if server.pid is None]
    for line in examination.check(deployment, new) if new else ():
        out.print(line, markup=False)
    for name, value in network.variables(deployment).items():
        out.print(f"{name}={value}", markup=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed}/{task.total} models  {task.fields[loading]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, disable=not out.is_terminal, transient=True) as bar:
        total = sum(len(list(models(server.spec))) for server in servers)
        task = bar.add_task("starting", total=total, loading="")
        # What has run before is not loaded now.
        ready = {server.spec.name: set(dict(models(server.actual))) for server in before}

        def progress(server: Server, loaded: set[str], loading: set[str]) -> None:
            if not out.is_terminal:
                for name in sorted(loaded - ready.get(server.spec.name, set())):
                    out.print(f"{server.spec.name}: {name} loaded")
            ready[server.spec.name] = loaded
            bar.update(
                task,
                completed=sum(map(len, ready.values())),
                loading=", ".join(sorted(loading)[:3]),
            )

        begin = time.monotonic()
        limit = timeout or deployment.engine.load_s
        fleet.start(servers, held=keep, timeout_s=limit, progress=progress)
    for server in servers:
        if server in before:
            continue
        out.print(
            f"{server.spec.name} is ready after {time.monotonic() - begin:.1f} s: "
            f"HTTP {server.http}, gRPC {server.grpc}, metrics {server.metrics}"
        )
