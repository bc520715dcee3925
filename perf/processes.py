"""Resource usage of a server's processes: CPU time, memory, file descriptors, shared memory."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
from msgspec import Struct

from pdctl import footprint
from pdctl.server import Server


class Usage(Struct):
    """The usage of one process at one moment."""

    rss_kib: int
    pss_kib: int
    descriptors: int
    uss_kib: int = 0
    """Memory that would be freed if the process ended: pages that no other process has mapped."""


def ids(server: Server) -> dict[str, int]:
    """Return the processes of a running server: ``tritonserver``, and each model's stub by its
    name."""
    assert server.token is not None
    found = {}
    for process in footprint.processes([server.token]):
        if process.name() == "tritonserver":
            found["tritonserver"] = process.pid
        for part in process.cmdline():
            if part.endswith("/1/model.py"):
                found[part.split("/")[-3]] = process.pid
    return dict(sorted(found.items()))


def cpu_s(watched: Mapping[str, int]) -> dict[str, float]:
    """Return the CPU seconds, user and system, that each process has used so far."""
    times = {name: psutil.Process(pid).cpu_times() for name, pid in watched.items()}
    return {name: time.user + time.system for name, time in times.items()}


def usage(server: Server) -> dict[str, Usage]:
    """Return memory and file descriptors of every process of a running server."""
    used = {}
    for name, pid in ids(server).items():
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        used[name] = Usage(
            memory.rss // 1024, memory.pss // 1024, process.num_fds(), memory.uss // 1024
        )
    return used


def shared_memory_kib(server: Server) -> int:
    """Return the memory that the server uses in /dev/shm, as far as it has been touched."""
    assert server.token is not None
    return sum(region.stat().st_blocks // 2 for region in footprint.regions(server.token))
