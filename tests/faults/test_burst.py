"""Tests that thousands of requests at once count as load, not as a failure."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.config import Gateway, Prefill
from tests.clients import held, metrics, wait_until
from tests.faults.serving import said, stub, watched
from tests.servers import Running, emulated_deployment, running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

CHANNELS = 8
MAX_OPEN = 4096
NOTICED_S = 2.0
"""The time that the architecture promises for noticing a cancel among so many requests."""
MODELS = ("pdserve", "scheduler", "prefill_0", "prefill_1", "decode_0", "decode_1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose engines take no time, so that only the request path has work."""
    folder = tmp_path_factory.mktemp("burst")
    deployment = emulated_deployment(
        folder, {}, instances=2, prefill=Prefill(arena_mib=64), gateway=Gateway()
    )
    with watched(deployment, folder) as started:
        yield started


def request(tokens: int) -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest(model_name="pdserve")
    for name, kind, data in (
        ("text_input", "BYTES", b"\1\0\0\0a"),
        ("max_tokens", "INT32", tokens.to_bytes(4, "little")),
        ("ignore_eos", "BOOL", b"\1"),
    ):
        made.inputs.add(name=name, datatype=kind, shape=[1, 1])
        made.raw_input_contents.append(data)
    return made


async def burst(server: Running, count: int, tokens: int = 5) -> Counter[str]:
    """Send many requests at once, a stream each; return how each of them ended."""
    channels = [
        grpc.aio.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CHANNELS)
    ]

    async def ask(number: int) -> str:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channels[number % CHANNELS])
        call = stub.ModelStreamInfer(timeout=120)
        ends = set()
        await call.write(request(tokens))
        await call.done_writing()
        async for message in call:
            ends.add(message.error_message.partition(":")[0] or "answered")
        assert len(ends) == 1, "each ends once"
        return ends.pop()

    try:
        return Counter(await asyncio.gather(*map(ask, range(count))))
    finally:
        for channel in channels:
            await channel.close()


def processes(server: Running) -> dict[str, int]:
    return {model: stub(server.servers[0], model).pid for model in MODELS}


def bursts(server: Running, times: int, count: int) -> list[Counter[str]]:
    """After each burst, no process has ended, nothing was repaired, and nothing is held."""
    before = processes(server)
    ended = []
    for _ in range(times):
        began = time.monotonic()
        ended.append(asyncio.run(burst(server, count)))
        print(f"\n{count} at once: {dict(ended[-1])} in {time.monotonic() - began:.1f} s")
        assert ended[-1].total() == count
        assert set(ended[-1]) <= {"answered", "UNAVAILABLE"}
    wait_until(lambda: not held(server), 10, lambda: f"{held(server)}")
    assert processes(server) == before
    assert "has failed" not in said(server.servers[0])
    return ended


def test_a_burst(server: Running) -> None:
    (ended,) = bursts(server, 1, 1000)
    assert ended["answered"] == 1000


@pytest.mark.full
def test_ten_bursts(server: Running) -> None:
    for ended in bursts(server, 10, 4000):
        assert ended["answered"] == 4000


@pytest.mark.full
def test_what_is_too_much_is_refused_at_the_door(server: Running) -> None:
    (ended,) = bursts(server, 1, 8000)
    assert ended["answered"] >= 4096


@pytest.mark.full
def test_a_client_that_leaves_among_the_most_open_requests_is_noticed(tmp_path: Path) -> None:
    """With the maximum of open requests, each sending thread checks all of its own in turn."""
    deployment = emulated_deployment(
        tmp_path,
        {"prefill": {"base_ms": 3_600_000}},
        prefill=Prefill(arena_mib=16),
        gateway=Gateway(ttft_limit_ms=600_000, stall_s=600.0),
    )
    with running(deployment, tmp_path) as started:
        asyncio.run(leave(started))


async def leave(server: Running) -> None:
    def opened() -> float:
        return sum(
            one.value
            for one in metrics(server)
            if one.name == "pdserve_open_requests" and one.labels["gateway"] == "pdserve"
        )

    async def reach(count: int, within: float) -> float:
        began = time.monotonic()
        await asyncio.to_thread(wait_until, lambda: opened() == count, within)
        return time.monotonic() - began

    channels = [
        grpc.aio.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CHANNELS)
    ]
    calls = []
    for number in range(MAX_OPEN):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channels[number % CHANNELS])
        calls.append(stub.ModelStreamInfer())
        await calls[-1].write(request(5))
    await reach(MAX_OPEN, 60)
    for leaving in range(4):
        for call in calls[leaving::1024]:
            call.cancel()
        taken = await reach(MAX_OPEN - 4 * (leaving + 1), 4 * NOTICED_S)
        print(f"\n4 of {MAX_OPEN} have left: noticed after {taken:.2f} s")
        assert taken < NOTICED_S + 1  # metrics are published four times a second, and then read
    for channel in channels:
        await channel.close()
