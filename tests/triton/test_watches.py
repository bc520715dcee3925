"""Test that a client with slot watches under many names does not block others."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pdserve.instances.slot_watches import MAX_WATCHES
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.messages import Release, Watch
from pdserve.transfer import key
from tests.clients import Answer, ask, connected, metrics
from tests.servers import emulated_deployment, running

if TYPE_CHECKING:
    from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

NAMES = 3000
TTFT_S = 2.0
"""It was 14 s with one turn per name, and about 10 ms without watches; the machine is shared."""


def watching(server: Running) -> float:
    return sum(one.value for one in metrics(server) if one.name == "pdserve_slot_watches")


def test_many_names_have_one_turn(tmp_path: Path) -> None:
    deployment = emulated_deployment(tmp_path, {"prefill": {"base_ms": 5}})

    async def run(server: Running) -> tuple[float, Answer]:
        secret = key.load(Path(deployment.transfer.key_file))
        channel = GrpcChannel(server.grpc, "prefill_0", secret)
        for number in range(NAMES):
            call = f"watch {number}"
            channel.open(call, Watch(call, f"gateway {number}"))
        done = channel.open("last", Release("last"))
        await done.get(60.0)  # by now, all earlier messages have been received
        assert watching(server) <= MAX_WATCHES
        async with connected(server) as client:
            began = time.monotonic()
            answer = await ask(client, text_input="Who is there?", max_tokens=4, stream=True)
        await channel.close()
        return answer.parts[0].at - began, answer

    with running(deployment, tmp_path) as server:
        ttft, answer = asyncio.run(run(server))
    assert answer.finish_reason
    assert ttft < TTFT_S
