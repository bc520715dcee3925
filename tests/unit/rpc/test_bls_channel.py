"""Tests for when a gateway may make its first BLS call, with a real gRPC server."""

from __future__ import annotations

import asyncio
import socket
from typing import Any
from unittest import mock

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.errors import InstanceError
from pdserve.rpc.channels.bls import BlsChannel, loaded
from pdserve.rpc.messages import Describe
from tests.unit.inprocess import real


class Loading(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A servicer that has loaded a model when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def ModelReady(self, request: Any, _: Any) -> Any:  # noqa: N802 - gRPC's name
        self.asked.append(request.name)
        return service_pb2.ModelReadyResponse(ready=len(self.asked) >= 3)


@real
async def test_a_model_waits_until_it_has_been_loaded() -> None:
    """Its server opens the port while it waits, and then is not ready at first."""
    server, loading = grpc.aio.server(), Loading()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(loading, server)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    waiting = asyncio.ensure_future(loaded(f"127.0.0.1:{port}", "pdserve"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    await server.start()
    await asyncio.wait_for(waiting, 10.0)
    assert loading.asked == ["pdserve"] * 3
    await server.stop(None)


@real
async def test_no_call_is_made_before_the_own_model_has_been_loaded() -> None:
    made: list[str] = []

    def request(**given: Any) -> Any:
        made.append(given["model_name"])
        return mock.Mock(async_exec=mock.AsyncMock(return_value=[]))

    pb_utils: Any = mock.Mock(InferenceRequest=request, TritonModelException=ValueError)
    may_call = asyncio.Event()
    channel = BlsChannel(pb_utils, "decode_0", b"k" * 32, 1, may_call)
    with pytest.raises(InstanceError, match="decode_0: this model is not loaded yet"):
        await channel.open("a", Describe("a")).get(1.0)
    may_call.set()
    await asyncio.sleep(0.1)
    assert made == []  # none has waited for that
    channel.forget("a")
    channel.open("b", Describe("b"))
    await asyncio.sleep(0.1)
    assert made == ["decode_0"]
    await channel.close()
