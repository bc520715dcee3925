"""Tests near the limit of capacity, with a fault every 20 s and clients that leave.

A second test puts as much load as can be answered, without a fault and without a gap.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from perf import steady
from perf.processes import usage

from pdctl import footprint
from pdserve.config import Gateway, Prefill
from tests.clients import held, wait_until
from tests.faults.load import Load
from tests.faults.serving import (
    FAULTS,
    LEASE_S,
    STALL_S,
    STEP_MS,
    gateway_and_workers,
    gateways,
    watched,
)
from tests.servers import Running, emulated_deployment
from tests.servers import running as running_server

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.alone]

PREFILL_S = 0.2
PROFILE: dict[str, Any] = {
    "prefill": {"base_ms": PREFILL_S * 1e3},
    "decode": {"base_ms": STEP_MS},
}
RATE = 0.9 * 2 / PREFILL_S
TOKENS, LEAVING = 50, 0.02
EVERY_S = 20.0
TTFT_LIMIT_S = 30.0
"""While one prefill is repaired, the load is twice what the other can compute."""
WARM_S = 60.0
GROWTH, NOISE_KIB = 0.05, 4096
"""Growth of a process that does not count as a leak: a share, and KiB."""
EVERYTHING = [(fault, model) for fault in FAULTS for model in ("prefill_0", "decode_1")] + [
    (fault, model) for fault in FAULTS for model in ("prefill_1", "decode_0")
]


@pytest.mark.parametrize("seconds", [30, pytest.param(600, marks=pytest.mark.full)])
def test_nothing_is_lost_and_nothing_is_left(tmp_path: Path, seconds: float) -> None:
    whole = emulated_deployment(
        tmp_path,
        PROFILE,
        instances=2,
        prefill=Prefill(slots=2, batch=1, arena_mib=16, lease_s=LEASE_S),
        gateway=Gateway(stall_s=STALL_S, ttft_limit_ms=int(TTFT_LIMIT_S * 1e3)),
    )
    with watched(gateway_and_workers(whole, gateways=1), tmp_path) as running:
        (front,) = gateways(running)
        with Load(front, rate=RATE, tokens=TOKENS, leaving=LEAVING) as load:
            began = time.monotonic()
            before, struck, lives = {}, 0, tokens(running)
            for fault, model in itertools.cycle(EVERYTHING):
                time.sleep(max(0.0, began + EVERY_S / 2 + struck * EVERY_S - time.monotonic()))
                if time.monotonic() - began >= seconds:
                    break
                fault.strike(running, model)
                struck += 1
                lives |= tokens(running)
                if not before and time.monotonic() - began > WARM_S:
                    before = memory_kib(running)
        after = memory_kib(running)
        wait_until(lambda: not in_use(running), LEASE_S + 2, lambda: f"{in_use(running)}")
        left = [region for life in lives - tokens(running) for region in footprint.regions(life)]
    print(
        f"\n{seconds} s, {struck} faults: {len(load.streams)} streams, "
        f"{sum(one.left for one in load.streams)} left, {load.retried} retried, "
        f"{len(load.lost)} lost; longest gap {load.gap:.2f} s, longest TTFT {load.ttft:.2f} s; "
        f"gateway, KiB: {before} to {after}"
    )
    assert struck >= seconds // EVERY_S
    assert not load.lost
    assert not load.wrong
    assert not left, "shared memory of servers that have ended"
    grown = {
        name: (old, after[name])
        for name, old in before.items()
        if after[name] > old * (1 + GROWTH) + NOISE_KIB
    }
    assert not grown


@pytest.mark.parametrize(
    ("warm_s", "seconds"), [(8, 16), pytest.param(60, 3600, marks=pytest.mark.full)]
)
def test_memory_is_flat_under_load_without_a_gap(
    tmp_path: Path, warm_s: float, seconds: float
) -> None:
    """The memory that Triton keeps per response until its request has ended does not accumulate."""
    profile = {"prefill": {"base_ms": 1}, "decode": {"base_ms": 10}}
    deployment = emulated_deployment(
        tmp_path, profile, instances=2, prefill=Prefill(arena_mib=2, lease_s=LEASE_S)
    )
    with running_server(deployment, tmp_path) as running:
        grown = steady.grown(running.servers[0], warm_s, seconds)
    print(f"\n{grown}")
    assert grown.answers > seconds
    for budget in grown.budgets():
        assert budget.met(budget.limit), budget


def tokens(running: Running) -> set[str]:
    """Return the marks of the servers as they run now; see `footprint`."""
    return {server.token for server in running.servers if server.token is not None}


def memory_kib(running: Running) -> dict[str, int]:
    """Return the memory of each process of the gateway, which the test does not kill."""
    return {name: used.pss_kib for name, used in usage(running.servers[0]).items()}


def in_use(running: Running) -> dict[str, float]:
    """Return what the servers report as held."""
    places = [replace(running, metrics=server.metrics) for server in running.servers]
    return {
        f"{place.metrics} {key}": value for place in places for key, value in held(place).items()
    }
