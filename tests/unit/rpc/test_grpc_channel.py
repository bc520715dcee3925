"""Tests for the stream to an instance, with a real gRPC server that ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2_grpc

from pdserve.errors import InstanceError
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.messages import Release
from tests.unit.inprocess import real


class Ending(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A servicer that ends every stream at its first request."""

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        async for _ in requests:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        yield


@real
async def test_a_stream_that_the_server_ends_leaves_nothing_behind() -> None:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Ending(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = GrpcChannel(f"127.0.0.1:{port}", "prefill_0", bytes(32))
    for number in range(3):
        replies = channel.open(f"{number}", Release("nothing"))
        with pytest.raises(InstanceError, match=rf"127\.0\.0\.1:{port}: UNAVAILABLE: going away"):
            await replies.get(5.0)
    for _ in range(100):
        if not (left := _readers_of_requests()):
            break
        await asyncio.sleep(0.01)
    assert not left
    await channel.close()
    await server.stop(None)


def _readers_of_requests() -> list[str]:
    return [
        name
        for task in asyncio.all_tasks()
        if "_consume_request_iterator" in (name := f"{task.get_coro()}")
    ]
