"""The servers that are measured: eight instances on two servers, each with a gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
from tests.servers import Running

from pdserve import config
from perf import processes
from perf.control.mixes import INSTANCES, SLOTS
from perf.control.points import Used
from perf.control.traffic import TTFT_LIMIT_S
from perf.serving import MODEL, PROFILES

NAMES = tuple(f"worker_{number}" for number in range(INSTANCES))
SERVERS = ("one", "two")


def deployment(prefills: int, control: config.Control | None = None) -> config.Deployment:
    """Return a deployment in which so many instances are prefills, spread over both servers.

    Args:
        control: how the control plane changes that; None: it stays.
    """
    prefill, decode = NAMES[:prefills], NAMES[prefills:]
    servers = []
    for place, name in enumerate(SERVERS):
        mine = NAMES[place :: len(SERVERS)]
        servers.append(
            config.Server(
                name=name,
                prefill=tuple(one for one in prefill if one in mine),
                decode=tuple(one for one in decode if one in mine),
                flexible=mine,
            )
        )
    return config.Deployment(
        model=str(MODEL),
        servers=tuple(servers),
        engine=config.Engine(kind="emulated", profile=str(PROFILES / "control.yaml")),
        # A prefill computes one prompt at a time, and holds those that wait for a decode.
        prefill=config.Prefill(slots=4, batch=1, arena_mib=8),
        # Few responses for many tokens, since responses cost most of the CPU time.
        decode=config.Decode(slots=SLOTS, response_cost_ms=20.0, max_interval_ms=200.0),
        gateway=config.Gateway(ttft_limit_ms=round(TTFT_LIMIT_S * 1e3)),
        control=control,
    )


@contextmanager
def measuring(server: Running) -> Iterator[Used]:
    """Measure the CPU time in a block; the object that it gives is complete after its end.

    Of a process that ends in the block nothing is counted.
    """
    used = Used(0.0, 0.0, 0.0)
    began, client, machine, before = (
        time.monotonic(),
        time.process_time(),
        _machine(),
        _spent(server),
    )
    yield used
    seconds = time.monotonic() - began
    spent = sum(after - before.get(pid, 0.0) for pid, after in _spent(server).items())
    used.servers = round(spent / seconds, 3)
    used.client = round((time.process_time() - client) / seconds, 3)
    used.machine = round((_machine() - machine) / seconds, 3)


def _spent(server: Running) -> dict[int, float]:
    """Return the CPU seconds of every process of the servers, by its id."""
    found = {}
    for one in server.servers:
        for pid in processes.ids(one).values():
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                found[pid] = times.user + times.system
    return found


def _machine() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)
