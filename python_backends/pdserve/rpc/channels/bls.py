"""A channel to an instance in the same server, by Triton's business logic scripting (BLS).

``async_exec`` on a decoupled model returns an iterator whose ``next`` blocks, so every awaited
response occupies one thread; calls beyond ``threads`` wait for a free one.
"""

from __future__ import annotations

import asyncio
import uuid
from types import ModuleType

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve import pools
from pdserve.connections import GRPC_OPTIONS
from pdserve.control.assignment import FIRST
from pdserve.errors import InstanceEnded, InstanceError
from pdserve.rpc import messages
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import Request
from pdserve.rpc.seal import Seal

LOOK_S = 0.1
"""Interval at which a model asks whether it has been loaded, in seconds."""
ANSWER_S = 2.0
"""Seconds for which it waits for the answer."""


async def loaded(address: str, model: str) -> None:
    """Return once the server at ``address`` (host:port) says that it has loaded a model.

    The model has to wait for that before its first BLS call: such a call before its own
    ``initialize`` has returned can crash Triton 24.10 with a segmentation fault, seen in 2 of 5
    starts of a busy machine.
    """
    asked = service_pb2.ModelReadyRequest(name=model)
    async with grpc.aio.insecure_channel(address, options=GRPC_OPTIONS) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        while True:
            try:
                if (await stub.ModelReady(asked, timeout=ANSWER_S)).ready:
                    return
            except grpc.RpcError:
                pass  # the port is not open yet
            await asyncio.sleep(LOOK_S)


class BlsChannel:
    """A channel to Triton model ``model`` of this server; ``pb_utils`` is the stub's module.

    Args:
        key: key of the deployment, with which messages are sealed.
        may_call: set once calls may be sent; see ``loaded``. Those before fail.
        number: number of the assignment that the instance has, or ANY.
    """

    def __init__(
        self,
        pb_utils: ModuleType,
        model: str,
        key: bytes,
        threads: int,
        may_call: asyncio.Event,
        number: int = FIRST,
    ) -> None:
        self._pb = pb_utils
        self._model = model
        self._seal = Seal(key, model)
        self._number = number
        self._threads = pools.started(threads, f"bls-{model}")
        self._may_call = may_call
        self._stream = uuid.uuid4().hex
        self._calls = Calls()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def open(self, call: str, request: Request) -> Replies:
        if self._closed or not self._may_call.is_set():
            why = "the channel is closed" if self._closed else "this model is not loaded yet"
            replies = self._calls.open(call)
            replies.fail(InstanceError(f"{self._model}: {why}"))
            return replies
        sealed = self._seal.close(messages.encode(request), self._number)
        task = asyncio.create_task(self._run(call, sealed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self._calls.open(call)

    def forget(self, call: str) -> None:
        # The task itself goes on: a BLS call cannot be abandoned, only drained.
        self._calls.forget(call)

    def lose(self, epoch: bytes) -> None:
        if self._calls.lost(epoch):
            self._calls.fail_all(InstanceEnded(f"{self._model}: its process is gone"))

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: str, payload: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            request = self._pb.InferenceRequest(
                model_name=self._model,
                request_id=f"{self._stream}/{call}",
                requested_output_names=["reply"],
                inputs=[self._pb.Tensor("request", np.frombuffer(payload, np.uint8))],
            )
            responses = iter(await request.async_exec(decoupled=True))
            while True:
                response = await loop.run_in_executor(self._threads, next, responses, None)
                if response is None:
                    break
                if response.has_error():
                    raise InstanceError(response.error().message())
                for tensor in response.output_tensors():
                    self._calls.deliver(call, tensor.as_numpy().tobytes())
        except Exception as error:  # any error at all: its caller may not wait in vain
            known = isinstance(error, self._pb.TritonModelException | InstanceError)
            self._calls.fail(call, InstanceError(str(error) if known else repr(error)))
