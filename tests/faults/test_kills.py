"""Tests that instances killed or stopped under load cost no request and change no token."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from tests.clients import wait_until
from tests.faults.load import Load
from tests.faults.serving import (
    FAULTS,
    RESTARTED_S,
    STALL_S,
    STEP_MS,
    Fault,
    on_this_machine,
    server_of,
)
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

INSTANCES = ("prefill_0", "decode_0", "prefill_1", "decode_1")
CALM_S = 3.0
"""Pause between a repair and the next of many faults, so that each is repaired at once."""
GAP_S = 3.0
"""The longest gap of a stream: the fault is noticed, and another pair continues."""

KILL, STOP, KILL_SERVER = Fault("stub", "kill"), Fault("stub", "stop"), Fault("server", "kill")


def survive(running: Running, faults: Sequence[tuple[Fault, str]], calm_s: float = 1.0) -> None:
    """Cause one fault after another, each after the repair of the last, under load."""
    with Load(running, rate=3, tokens=100) as load:
        time.sleep(1)
        for fault, instance in faults:
            fault.strike(running, instance)
            time.sleep(calm_s)
    print(
        f"\n{', '.join(sorted({str(fault) for fault, _ in faults}))}, {len(faults)} times: "
        f"{len(load.streams)} streams, {len(load.lost)} lost, {load.retried} retried, "
        f"longest gap {load.gap:.2f} s, longest TTFT {load.ttft:.2f} s"
    )
    assert not load.lost
    assert not load.wrong
    assert load.gap < GAP_S
    assert load.ttft < GAP_S


def test_workers_lose_nothing(workers: Running) -> None:
    """TensorRT-LLM#15363, vllm#29906, dynamo#13088."""
    survive(workers, [(KILL, "decode_0"), (KILL_SERVER, "prefill_0"), (STOP, "decode_1")])


def test_one_server_loses_nothing(one_server: Running) -> None:
    survive(one_server, [(KILL, instance) for instance in INSTANCES])


def test_a_lone_stream_does_not_wait_until_its_decode_counts_as_stalled(
    one_server: Running,
) -> None:
    """Triton does not report a dead stub to those who wait for it; its watchdog does."""
    with Load(one_server, rate=0.02, tokens=250) as load:
        time.sleep(1)
        # No other request is sent to it that would fail at once.
        for instance in ("decode_0", "decode_1"):
            KILL.hit(server_of(one_server, instance), instance)
            time.sleep(1.5)
    (stream,) = load.streams
    assert not load.lost
    assert not load.wrong
    assert stream.attempts > 1
    assert stream.gap < STALL_S / 2
    assert stream.ended - stream.began < 250 * STEP_MS / 1e3 + STALL_S


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_workers_lose_nothing_for_long(workers: Running, fault: Fault) -> None:
    """50 prefills and 50 decodes fail."""
    survive(workers, [(fault, instance) for instance in 25 * INSTANCES], CALM_S)


@pytest.mark.full
@pytest.mark.parametrize("fault", [KILL, STOP], ids=str)
def test_one_server_loses_nothing_for_long(one_server: Running, fault: Fault) -> None:
    """Excepted are aborts of Triton itself, which end all models of the server.

    That happens about once in 100 times: a stub is killed while it holds a lock in the memory that
    they share.
    """
    (server,) = one_server.servers
    aborted = 0
    for _ in range(25):
        before = server.pid
        try:
            survive(one_server, [(fault, instance) for instance in INSTANCES], CALM_S)
        except AssertionError:
            if (
                "boost::interprocess::lock_exception"
                not in server.log.with_name("log.old").read_text()
            ):
                raise
            assert server.pid != before
            aborted += 1
            wait_until(server.ready, on_this_machine(RESTARTED_S))
    print(f"\nTriton aborted {aborted} times")
    assert aborted <= 5
