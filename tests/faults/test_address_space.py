"""Tests for a limit on address space that one instance reaches while it serves."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdctl import fleet
from pdserve.config import Decode, Deployment, Gateway, Prefill
from tests.clients import wait_idle, wait_linked, wait_until
from tests.faults.load import Load
from tests.faults.serving import (
    LEASE_S,
    RESTARTED_S,
    STALL_S,
    TTFT_LIMIT_S,
    on_this_machine,
    stub,
    whole,
)
from tests.servers import Running, emulated_deployment, running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

# 16 KiB a token, so that every pull is handed to a thread.
PROFILE: dict[str, Any] = {
    "layers": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "prefill": {"base_ms": 10},
    "decode": {"base_ms": 20},
}
MIB = 1 << 20


def deployment(folder: Path) -> Deployment:
    return emulated_deployment(
        folder,
        PROFILE,
        instances=2,
        prefill=Prefill(arena_mib=64, lease_s=LEASE_S),
        decode=Decode(slots=16, blocks=256),
        gateway=Gateway(stall_s=STALL_S, ttft_limit_ms=int(TTFT_LIMIT_S * 1e3)),
    )


@contextmanager
def limited(server: Running, model: str, headroom: int) -> Iterator[None]:
    """Limit a model's process to this many more bytes than now, less than a thread's stack."""
    process = stub(server.servers[0], model)
    before = process.rlimit(resource.RLIMIT_AS)
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + headroom, before[1]))
    try:
        yield
    finally:
        if process.is_running():
            process.rlimit(resource.RLIMIT_AS, before)


def test_pulls_go_on_where_no_thread_can_be_started(tmp_path: Path) -> None:
    with running(deployment(tmp_path), tmp_path) as server:
        wait_linked(server)
        # This is before the first request, so no thread has been started on demand.
        with (
            limited(server, "decode_0", 4 * MIB),
            limited(server, "decode_1", 4 * MIB),
            Load(server, rate=4, tokens=30) as load,
        ):
            time.sleep(3)
        assert not load.lost
        assert not load.wrong
        assert load.gap < STALL_S / 2
        wait_idle(server, 5.0)


@pytest.mark.full
def test_no_request_waits_for_an_instance_without_memory(tmp_path: Path) -> None:
    """20 times, with between 0 and 8 MiB left: whatever breaks is repaired."""
    rng = random.Random(0)
    with running(deployment(tmp_path), tmp_path) as server:
        fleet.watch(server.servers)
        with whole(server):
            pass
        for number in range(20):
            model = ("decode_0", "prefill_0", "decode_1", "prefill_1")[number % 4]
            headroom = rng.choice((0, 0, 1, 4, 8)) * MIB
            began = time.monotonic()
            with limited(server, model, headroom), Load(server, rate=4, tokens=30) as load:
                time.sleep(3)
            wait_until(server.servers[0].ready, on_this_machine(RESTARTED_S))
            print(
                f"\n{model} with {headroom // MIB} MiB: {len(load.streams)} streams, "
                f"{len(load.lost)} lost, {load.retried} retried, longest gap {load.gap:.2f} s, "
                f"{time.monotonic() - began:.1f} s"
            )
            assert not load.lost
            assert not load.wrong
            assert load.gap < STALL_S + 3
            wait_idle(server, on_this_machine(10.0))
