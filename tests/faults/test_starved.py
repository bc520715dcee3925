"""Tests for a process that stops while it loads its model: Triton gives up (pdctl.loading)."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pdctl import footprint, log
from tests.clients import wait_until
from tests.faults.serving import (
    RESTARTED_S,
    Fault,
    on_this_machine,
    repairs,
    serves,
    watched,
)
from tests.servers import emulated_deployment, running

pytestmark = pytest.mark.triton

STANDS_S = 3.0
"""Triton 24.10 waits 1 s for a sign of life."""
BEGINS_S = 30.0


def stands_still(folder: Path, but: int | None = None) -> None:
    """Wait for a process of prefill_0, other than ``but``, and stop it while it loads."""
    found = None
    deadline = time.monotonic() + BEGINS_S
    while found is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        for process in footprint.processes([footprint.token(folder) or ""]):
            try:
                loads = any("/prefill_0/1/model.py" in word for word in process.cmdline())
            except psutil.Error:
                continue
            if loads and process.pid != but:
                found = process
    time.sleep(0.5)
    found.suspend()
    time.sleep(STANDS_S)
    found.resume()


def test_a_start_that_is_given_up_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "local"
    deployment = emulated_deployment(tmp_path, {"speed": 0})
    with ThreadPoolExecutor(1) as pool:
        stood: Future[None] = pool.submit(stands_still, folder)
        with running(deployment, tmp_path) as server:
            stood.result()
            assert serves(server)
            assert log.starved((folder / "log.old").read_text())


def test_a_repair_that_is_given_up_is_made_again(tmp_path: Path) -> None:
    deployment = emulated_deployment(tmp_path, {"speed": 0})
    with watched(deployment, tmp_path) as server, ThreadPoolExecutor(1) as pool:
        (one,) = server.servers
        before = Fault("stub", "kill").hit(one, "prefill_0")
        pool.submit(stands_still, one.folder, before.pid).result()
        wait_until(
            lambda: repairs(one) > 0 and one.ready() and serves(server),
            on_this_machine(2 * RESTARTED_S),
        )
        text = one.read_log() + "".join(old.read_text() for old in one.folder.glob("log.old"))
        assert log.starved(text)
