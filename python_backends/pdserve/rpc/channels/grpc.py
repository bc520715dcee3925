"""A channel to an instance over gRPC: one long-lived stream, its calls distinguished by request id.

One stream carries all calls, since opening one costs as much as ten messages. A broken stream fails
the calls that are open on it; the next call opens a new one, so that a restart on either side needs
no intervention.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve import errors
from pdserve.connections import GRPC_OPTIONS
from pdserve.control.assignment import FIRST
from pdserve.errors import InstanceEnded, InstanceError
from pdserve.rpc import messages
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import Request
from pdserve.rpc.seal import Seal
from pdserve.supervision import traced

_log = logging.getLogger(__name__)

Outgoing: TypeAlias = "asyncio.Queue[service_pb2.ModelInferRequest | None]"
"""Requests to send; None: there are no more."""


class GrpcChannel:
    """A channel to Triton model ``model`` of the server at ``address`` (host:port).

    Args:
        key: key of the deployment, with which messages are sealed.
        number: number of the assignment that the instance has, or ANY.
    """

    def __init__(self, address: str, model: str, key: bytes, number: int = FIRST) -> None:
        self._address = address
        self._model = model
        self._seal = Seal(key, model)
        self._number = number
        self._calls = Calls()
        self._stream = ""
        self._outgoing: Outgoing | None = None
        self._reader: asyncio.Task[None] | None = None
        self._closed = False

    def open(self, call: str, request: Request) -> Replies:
        return self.send(call, self._seal.close(messages.encode(request), self._number))

    def send(self, call: str, payload: bytes) -> Replies:
        """Send a request that has been encoded and sealed already; otherwise like ``open``."""
        if self._closed:
            replies = self._calls.open(call)
            replies.fail(self._error("the channel is closed"))
            return replies
        if self._reader is None or self._reader.done():
            self._stream = uuid.uuid4().hex
            self._outgoing = asyncio.Queue()
            self._reader = asyncio.create_task(self._read(self._outgoing))
        assert self._outgoing is not None
        tensor = service_pb2.ModelInferRequest.InferInputTensor(
            name="request", datatype="UINT8", shape=[len(payload)]
        )
        self._outgoing.put_nowait(
            service_pb2.ModelInferRequest(
                model_name=self._model,
                id=f"{self._stream}/{call}",
                inputs=[tensor],
                raw_input_contents=[payload],
            )
        )
        return self._calls.open(call)

    def forget(self, call: str) -> None:
        self._calls.forget(call)

    def lose(self, epoch: bytes) -> None:
        if not self._calls.lost(epoch):
            return
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            self._calls.fail_all(self._ended("its process is gone"))

    async def close(self) -> None:
        self._closed = True
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self, outgoing: Outgoing) -> None:
        async def requests() -> AsyncIterator[service_pb2.ModelInferRequest]:
            while (request := await outgoing.get()) is not None:
                yield request

        connection = grpc.aio.insecure_channel(self._address, options=GRPC_OPTIONS)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        connected = False
        failure: InstanceError = self._ended("the stream was closed")
        try:
            stream = stub.ModelStreamInfer(requests())
            await stream.wait_for_connection()
            connected = True
            async for message in stream:
                self._deliver(message)
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            # Without a connection, perhaps no server was there.
            failure = self._ended(reason) if connected else self._error(reason)
        except InstanceError as error:
            failure = self._error(str(error))
        except Exception as error:
            _log.error("%s: its stream of replies has ended\n%s", self._address, traced(error))
            failure = self._error(errors.loggable(error))
        finally:
            if self._reader is asyncio.current_task():
                self._reader = None
                self._calls.fail_all(failure)
            # grpc's task that reads the requests does not end with a call that the server ends.
            outgoing.put_nowait(None)
            await connection.close()

    def _deliver(self, message: service_pb2.ModelStreamInferResponse) -> None:
        """Deliver a response.

        Raises InstanceError if Triton names no failed call: none may wait in vain.
        """
        response = message.infer_response
        call = response.id.rpartition("/")[2]
        if not message.error_message:
            for data in response.raw_output_contents:
                self._calls.deliver(call, data)
        elif call:
            self._calls.fail(call, self._error(message.error_message))
        else:
            raise InstanceError(message.error_message)

    def _ended(self, reason: str) -> InstanceEnded:
        return InstanceEnded(f"{self._address}: {reason}")

    def _error(self, reason: str) -> InstanceError:
        return InstanceError(f"{self._address}: {reason}")
