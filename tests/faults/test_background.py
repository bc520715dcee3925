"""Tests that a background task that dies is logged and ends its process, which is restarted."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl import fleet
from tests.clients import wait_until
from tests.fakes import dying
from tests.faults.load import Load
from tests.faults.serving import (
    RESTARTED_S,
    STALL_S,
    all_in_one,
    on_this_machine,
    repairs,
    said,
    whole,
)
from tests.servers import Running, running

pytestmark = [pytest.mark.triton, pytest.mark.alone]


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[Running]:
    with running(all_in_one(tmp_path), tmp_path, dying.models(tmp_path)) as started:
        fleet.watch(started.servers)
        with whole(started):
            pass
        yield started


def test_background_work_that_dies_is_noticed_at_once(fragile: Running, tmp_path: Path) -> None:
    (server,) = fragile.servers
    with Load(fragile, rate=4, tokens=60) as load:
        time.sleep(1)
        for number, death in enumerate(dying.DEATHS, repairs(server) + 1):
            (tmp_path / death).touch()
            wait_until(
                lambda number=number: repairs(server) >= number and server.ready(),
                on_this_machine(RESTARTED_S),
                lambda: said(server),
            )
            time.sleep(1)
    print(
        f"\n{len(load.streams)} streams, {len(load.lost)} lost, {load.retried} retried, "
        f"longest gap {load.gap:.2f} s, longest TTFT {load.ttft:.2f} s"
    )
    assert not load.lost
    assert not load.wrong
    assert load.retried
    assert load.gap < STALL_S, "its death was noticed, not its silence"
    log = server.log.read_text()
    for what in ("RunningBatch.run", "PromptComputation.run", "thread outbox"):
        assert f"pdserve: {what} has ended" in log
    assert len(re.findall(r"\nRuntimeError \(.*dying\.py:", log)) == len(dying.DEATHS)
    assert log.count("Traceback (most recent call last)") >= len(dying.DEATHS)
    assert log.count("pdserve: this process ends") == len(dying.DEATHS)
