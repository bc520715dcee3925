"""Small requests to a running Triton server over gRPC."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.connections import GRPC_OPTIONS
from pdserve.errors import InstanceError
from pdserve.node.probes import TENANT

_FIRST = 1000
"""A priority before all waiting requests, whose priorities are small."""


async def live(address: str) -> bool:
    """Check that the server itself answers. Raises: InstanceError: it does not."""
    async with _reached(address) as stub:
        answer = await stub.ServerLive(service_pb2.ServerLiveRequest())
    if not answer.live:
        raise InstanceError(f"{address} says that it is not live")
    return False


async def gateway(address: str, model: str, notice: str) -> bool:
    """Check that a gateway's model takes requests and answers them.

    Args:
        notice: a message of ``pdserve.node.failure_notice.encode``.

    Raises:
        InstanceError: it does not.
    """
    request = service_pb2.ModelInferRequest(model_name=model)
    if model == "scheduler":
        _add(request, "input_ids", "INT32", (1).to_bytes(4, "little"))
    else:
        _add(request, "text_input", "BYTES", _bytes(b"a"))
    request.parameters["failure_notice"].string_param = notice
    await _streamed(address, request)
    return False


async def reached(address: str, notice: str) -> bool:
    """Ask the gateway ``pdserve`` whether an instance answers it.

    Args:
        notice: a question of ``pdserve.node.failure_notice``, encoded.

    Raises:
        InstanceError: the gateway does not say.
    """
    request = service_pb2.ModelInferRequest(model_name="pdserve")
    _add(request, "text_input", "BYTES", _bytes(b"a"))
    request.parameters["failure_notice"].string_param = notice
    response = await _streamed(address, request)
    names = (output.name for output in response.outputs)
    outputs = dict(zip(names, response.raw_output_contents, strict=True))
    return bytes(outputs["finish_reason"][4:]) == b"stop"


async def answer(address: str, within_s: float) -> dict[str, Any]:
    """Get two tokens of ``pdserve``, one of a prefill and one of a decode; return the ``stats``.

    Args:
        within_s: its TTFT limit. It has priority over all waiting requests, since it tests whether
            anything is computed, not how long the queue is.

    Raises:
        InstanceError: there is no answer, or an error.
    """
    request = service_pb2.ModelInferRequest(model_name="pdserve")
    _add(request, "text_input", "BYTES", _bytes(b"a"))
    _add(request, "max_tokens", "INT32", (2).to_bytes(4, "little"))
    _add(request, "ignore_eos", "BOOL", b"\1")
    _add(request, "tenant", "BYTES", _bytes(TENANT.encode()))
    _add(request, "priority", "INT32", _FIRST.to_bytes(4, "little"))
    _add(request, "ttft_limit_ms", "INT32", max(int(within_s * 1e3), 1).to_bytes(4, "little"))
    response = await _streamed(address, request)
    names = (output.name for output in response.outputs)
    outputs = dict(zip(names, response.raw_output_contents, strict=True))
    stats: dict[str, Any] = json.loads(outputs["stats"][4:])
    return stats


async def tokens(address: str, model: str) -> bool:
    """Check that the tokenizer or the detokenizer answers. Raises: InstanceError: it does not."""
    request = service_pb2.ModelInferRequest(model_name=model)
    if model == "tokenizer":
        _add(request, "text_input", "BYTES", _bytes(b"a"))
    else:
        _add(request, "output_ids", "INT32", (1).to_bytes(4, "little"))
    async with _reached(address) as stub:
        await stub.ModelInfer(request)
    return False


async def _streamed(address: str, request: service_pb2.ModelInferRequest) -> Any:
    """Return the first response of a decoupled model. Raises: InstanceError: none, or an error."""
    async with _reached(address) as stub:
        call = stub.ModelStreamInfer()
        try:
            await call.write(request)
            response = await call.read()
        finally:
            call.cancel()
    if response is grpc.aio.EOF:
        raise InstanceError(f"{request.model_name} ended without an answer")
    if response.error_message:
        raise InstanceError(response.error_message)
    return response.infer_response


def _add(request: service_pb2.ModelInferRequest, name: str, datatype: str, data: bytes) -> None:
    """Add an input of one element, in a batch of one."""
    request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
    request.raw_input_contents.append(data)


def _bytes(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


@asynccontextmanager
async def _reached(address: str) -> AsyncIterator[Any]:
    """Raises InstanceError: no connection, or the server answers with an error."""
    async with grpc.aio.insecure_channel(address, options=GRPC_OPTIONS) as channel:
        try:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)
        except grpc.RpcError as error:
            raise InstanceError(f"{address}: {error.code().name}: {error.details()}") from error
