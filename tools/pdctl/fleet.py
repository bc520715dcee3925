"""All servers of a deployment together."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from pdctl import started as records
from pdctl import watchers
from pdctl.errors import AlreadyRunning, Starved
from pdctl.server import Progress, Server

STARTS = 3
"""Number of starts of a server that fails because the machine was too slow."""

_log = logging.getLogger(__name__)


def start(servers: Sequence[Server], *, held: bool, timeout_s: float, progress: Progress) -> None:
    """Start every server and wait until all are ready; if one fails, stop all.

    A server that another process has started is waited for, too, and left alone if it fails. If the
    servers are to be ``held``, it is an error.

    Raises:
        AlreadyRunning, PortTaken, ServerError, DeploymentError: the first failure.
    """
    started: list[Server] = []
    try:
        for server in servers:
            started.append(server)
            try:
                server.start(held=held)
            except AlreadyRunning:
                started.remove(server)
                if held:
                    raise
                server.refuse_other()
        for server in servers:
            _wait_ready(server, held if server in started else None, timeout_s, progress)
    except BaseException:
        stop(started, own=True)
        raise


def _wait_ready(server: Server, held: bool | None, timeout_s: float, progress: Progress) -> None:
    """Wait for a server; one that was starved is started again, up to STARTS times in all.

    Args:
        held: as it was started by this process; None: another process started it, and starts it
            again.
        timeout_s: seconds for all starts together.
    """
    deadline = time.monotonic() + timeout_s
    for left in reversed(range(STARTS)):
        try:
            server.wait_ready(max(deadline - time.monotonic(), 0.0), progress)
            return
        except Starved as error:
            if held is None or not left:
                raise
            _log.warning("%s\nThe server is started again.", error)
            server.stop(own=True)
            server.start(held=held)


def watch(servers: Sequence[Server], *, wanted: bool = True) -> None:
    """Have the servers watched from now on; see watchers.py.

    Args:
        wanted: False: they are meant to run without, which is recorded for ``status``. A server
            that has a watchdog keeps it.

    Raises:
        ServerError: one of the watchdogs does not begin.
    """
    for server in servers:
        started = server.started
        if started and started.watched != (wanted or watchers.watched(server.folder)):
            try:
                records.note(server.folder, msgspec.structs.replace(started, watched=wanted))
            except OSError as error:  # the watchdog itself needs no space on the disk
                _log.warning("%s: %s", error.filename, error.strerror)
    begun = [watchers.start(server.folder) for server in servers if wanted]
    for wait in begun:
        wait()


def left_behind(servers: Sequence[Server]) -> list[Server]:
    """Return servers that run, or are repaired, here by the deployment's file, which lost them.

    Args:
        servers: one or more servers of the deployment.
    """
    first = servers[0]
    run = first.folder.parent
    known = (one.started for one in (first, *first.others()) if not one.foreign)
    files = {first.file, *(started.file for started in known if started)} - {""}
    named = {spec.name for spec in first.deployment.servers}
    found = []
    for folder in sorted(record.parent for record in run.glob("*/started")):
        started = records.noted(folder)
        if started is None or started.file not in files or folder.name in named:
            continue
        left = Server(first.deployment, started.spec, run)
        left.file = started.file
        if left.token is not None and (left.pid is not None or watchers.watched(folder)):
            found.append(left)
    return found


def stop(servers: Sequence[Server], *, own: bool = False) -> None:
    """Stop the servers, all at the same time; see ``Server.stop``."""
    if servers:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(partial(Server.stop, own=own), servers))
