"""Small questions to a running Triton server, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.errors import InstanceError

_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


async def live(address: str) -> bool:
    """The server itself answers. Raises: InstanceError: it does not."""
    async with _reached(address) as stub:
        answer = await stub.ServerLive(service_pb2.ServerLiveRequest())
    if not answer.live:
        raise InstanceError(f"{address} says that it is not live")
    return False


async def gateway(address: str, model: str, lost: str = "") -> bool:
    """A gateway's model takes requests and answers them.

    Args:
        lost: as ``pdserve.cluster.loss.told`` says it.

    Raises:
        InstanceError: it does not.
    """
    request = service_pb2.ModelInferRequest(model_name=model)
    if model == "scheduler":
        _add(request, "input_ids", "INT32", (1).to_bytes(4, "little"))
    else:
        _add(request, "text_input", "BYTES", _bytes(b"a"))
    request.parameters["lost"].string_param = lost

    async with _reached(address) as stub:
        call = stub.ModelStreamInfer()
        try:
            await call.write(request)
            response = await call.read()
        finally:
            call.cancel()
    if response is grpc.aio.EOF:
        raise InstanceError(f"{model} ended without an answer")
    if response.error_message:
        raise InstanceError(response.error_message)
    return False


async def tokens(address: str, model: str) -> bool:
    """The tokenizer or the detokenizer answers. Raises: InstanceError: it does not."""
    request = service_pb2.ModelInferRequest(model_name=model)
    if model == "tokenizer":
        _add(request, "text_input", "BYTES", _bytes(b"a"))
    else:
        _add(request, "output_ids", "INT32", (1).to_bytes(4, "little"))
    async with _reached(address) as stub:
        await stub.ModelInfer(request)
    return False


def _add(request: service_pb2.ModelInferRequest, name: str, datatype: str, data: bytes) -> None:
    """An input of one element, in a batch of one."""
    request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
    request.raw_input_contents.append(data)


def _bytes(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


@asynccontextmanager
async def _reached(address: str) -> AsyncIterator[Any]:
    """Raises: InstanceError: no connection, or the server answers with an error."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)
        except grpc.RpcError as error:
            raise InstanceError(f"{address}: {error.code().name}: {error.details()}") from error
