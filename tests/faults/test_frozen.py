"""Tests that no wait is unbounded: each component is stopped in turn, without repairs.

dynamo#13088: of 1,536 requests 24 hung for ever, after a worker had been chosen for them.
"""

from __future__ import annotations

import contextlib
import time

import psutil
import pytest

from pdctl import watchers
from tests.faults.load import Load
from tests.faults.serving import STALL_S, STEP_MS, TTFT_LIMIT_S, Fault, server_of
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

TOKENS = 100
ANSWER_S = TOKENS * STEP_MS / 1e3
FIRST_S = STALL_S + 2.0
"""A first token or an error comes within this: a silent instance is given up, another is asked."""


def freeze(running: Running, fault: Fault, model: str, seconds: float) -> None:
    """Stop a component for a time under load; every stream must end in time."""
    server = server_of(running, model)
    watchers.end(server.folder)
    with Load(running, rate=3, tokens=TOKENS) as load:
        time.sleep(2)
        process = fault.hit(server, model)
        began = time.monotonic()
        try:
            time.sleep(seconds)
        finally:
            process.resume()
        thawed = time.monotonic()
        time.sleep(2)
    hit = load.open_at(began)
    longest = max(one.ended - one.began for one in load.streams)
    print(
        f"\n{fault} {model} for {seconds:g} s: {len(load.streams)} streams, {len(hit)} open then, "
        f"{len(load.lost)} lost, {load.retried} retried, longest {longest:.1f} s"
    )
    assert hit
    assert not load.lost
    assert not load.wrong
    assert longest < ANSWER_S + 2 * FIRST_S
    assert max(one.ended - one.began for one in load.streams if one.began > thawed) < ANSWER_S + 1


def test_a_frozen_worker(workers: Running) -> None:
    freeze(workers, Fault("stub", "stop"), "decode_0", STALL_S + 1)


@pytest.mark.full
@pytest.mark.parametrize("of", ["stub", "server"])
@pytest.mark.parametrize("model", ["prefill_0", "decode_0", "prefill_1", "decode_1"])
def test_a_worker_frozen_for_long(workers: Running, model: str, of: str) -> None:
    freeze(workers, Fault(of, "stop"), model, 30)


@pytest.mark.full
@pytest.mark.parametrize("of", ["stub", "server"])
def test_a_gateway_frozen_for_long(workers: Running, of: str) -> None:
    """Its clients hear of their request's end when it continues, since no other process answers.

    A stub alone has its watchdog, which does not wait: Triton itself aborts when it has waited for
    10 s for a lock that both use.
    """
    server = server_of(workers, "scheduler")
    if of == "server":
        watchers.end(server.folder)
    with Load(workers, rate=3, tokens=TOKENS) as load:
        time.sleep(2)
        process = Fault(of, "stop").hit(server, "scheduler")
        try:
            time.sleep(30)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        thawed = time.monotonic()
        time.sleep(2)
    assert max(one.ended for one in load.streams) < thawed + ANSWER_S + TTFT_LIMIT_S
    late = [one for one in load.streams if one.began > thawed + 1]
    assert late
    assert not any(one.error for one in late)


@pytest.mark.full
def test_a_frozen_watchdog_harms_nobody(workers: Running) -> None:
    found = [watchers.pid(server.folder) for server in workers.servers]
    with Load(workers, rate=3, tokens=TOKENS) as load:
        for pid in found:
            psutil.Process(pid).suspend()
        time.sleep(30)
        for pid in found:
            psutil.Process(pid).resume()
        time.sleep(5)
    assert not load.lost
    assert not load.wrong
    assert [watchers.pid(server.folder) for server in workers.servers] == found
