"""Tests for keep-alive pings of clients while the server sends nothing."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.clients import ask, connected
from tests.servers import emulated_deployment, running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

PING_MS = 1300
SILENCE_S = 9
"""More than four pings: gRPC disconnects a client at the third that comes too early."""


def test_a_client_that_pings_through_a_long_silence_keeps_its_connection(tmp_path: Path) -> None:
    """The client pings without any call, and while a prompt is computed."""
    profile = {"prefill": {"base_ms": SILENCE_S * 1000}}
    with running(emulated_deployment(tmp_path, profile), tmp_path) as server:
        asyncio.run(silent(server))


async def silent(server: Running) -> None:
    options = [
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    await asyncio.gather(without_a_call(server, options), while_it_is_computed(server, options))


Options = list[tuple[str, int]]


async def without_a_call(server: Running, options: Options) -> None:
    async with grpc.aio.insecure_channel(server.grpc, options=options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        await stub.ServerLive(service_pb2.ServerLiveRequest())
        states = asyncio.create_task(disconnected(channel))
        await asyncio.sleep(SILENCE_S)
        assert not states.done(), "the server has ended the connection"
        states.cancel()


async def while_it_is_computed(server: Running, options: Options) -> None:
    async with connected(server, options) as client:
        began = time.monotonic()
        answer = await ask(client, text_input="The sky is", max_tokens=2, ignore_eos=True)
    assert time.monotonic() - began > SILENCE_S * 0.9
    assert answer.finish_reason == "length"


async def disconnected(channel: grpc.aio.Channel) -> None:
    """Return when a connected channel is no longer connected."""
    await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
