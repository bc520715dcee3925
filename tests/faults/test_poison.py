"""Test for a request that kills every decode that computes it: it kills two, others are served."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pdctl import fleet
from pdserve.config import Gateway, Prefill
from tests import clients
from tests.clients import Refused, wait_idle
from tests.fakes import dying
from tests.faults.load import Load
from tests.faults.serving import (
    RESTARTED_S,
    STALL_S,
    all_in_one,
    on_this_machine,
    repairs,
    whole,
)
from tests.servers import Running, running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

STREAMS, RATE = 64, 32


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[Running]:
    # The test makes no claim about how soon both decodes are back.
    deployment = msgspec.structs.replace(
        all_in_one(tmp_path),
        prefill=Prefill(arena_mib=16, lease_s=30.0),
        gateway=Gateway(stall_s=STALL_S, ttft_limit_ms=60_000),
    )
    with running(deployment, tmp_path, dying.models(tmp_path)) as started:
        fleet.watch(started.servers)
        with whole(started):
            pass
        yield started


async def poison(server: Running) -> clients.Answer:
    async with clients.connected(server) as client:
        prompt = [*range(100, 150), dying.POISON]
        return await clients.ask(
            client, "scheduler", input_ids=prompt, max_tokens=20, stream=True, ignore_eos=True
        )


def test_a_request_that_ends_decodes_ends_two(fragile: Running, tmp_path: Path) -> None:
    (server,) = fragile.servers
    before = repairs(server)
    with Load(fragile, rate=RATE, tokens=60) as load:
        time.sleep(STREAMS / RATE / 2)
        with pytest.raises(Refused) as refused:
            asyncio.run(poison(fragile))
        time.sleep(STREAMS / RATE / 2)
    print(
        f"\n{len(load.streams)} streams, {len(load.lost)} lost, {load.retried} retried, "
        f"longest gap {load.gap:.2f} s, longest TTFT {load.ttft:.2f} s"
    )
    said = re.search(
        r"INTERNAL: request \d+ was open on (decode_\d) and (decode_\d) when they ended, and is "
        r"not tried again \(error (\w+) in the server's log\)",
        str(refused.value),
    )
    assert said, refused.value
    assert f"error {said[3]}: " in server.log.read_text()
    assert f"was open on {said[1]} and {said[2]}" in server.log.read_text()
    assert len((tmp_path / dying.ENDED).read_text().split()) == 2
    assert len(load.streams) >= STREAMS
    assert not load.lost
    assert not load.wrong
    clients.wait_until(lambda: repairs(server) == before + 2, on_this_machine(RESTARTED_S))
    wait_idle(fragile, 5.0)
