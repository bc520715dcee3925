"""What the prefill and the decode model share: messages in, messages out."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve import config, errors, messages
from pdserve.engines.decode import DecodeInstance
from pdserve.engines.prefill import PrefillInstance
from pdserve.messages import (
    DecodeRequest,
    Failed,
    PrefillRequest,
    Release,
    Reply,
    Request,
)
from pdserve.metrics import Registry
from pdserve.models.triton import LoopThread, Outbox, Publisher, deployment

# Each look at a request is a round trip to the server.
ORPHAN_POLL_S = 1.0


class InstanceModel(ABC):
    """A Triton model around one instance, which a subclass makes.

    Input ``request`` and output ``reply`` are UINT8 [-1]; see ``pdserve.messages``.
    """

    @abstractmethod
    def make(
        self, name: str, deployment: config.Deployment, metrics: Registry
    ) -> PrefillInstance | DecodeInstance:
        """The instance; its model is loaded here."""

    def initialize(self, args: dict[str, str]) -> None:
        metrics = Registry()
        self._instance = self.make(args["model_name"], deployment(args), metrics)
        self._publisher = Publisher(metrics)
        self._outbox = Outbox()
        self._waiting: dict[str, Any] = {}
        """Senders of the requests whose last reply has not been sent, by request id."""
        self._loop = LoopThread()
        self._loop.run(self._start())

    def execute(self, requests: list[Any]) -> None:
        """Every request is answered by its own sender; nothing here waits."""
        self._loop.call(self._accept, requests)

    def finalize(self) -> None:
        self._loop.run(self._close())
        self._outbox.close()
        self._loop.close()

    async def _start(self) -> None:
        self._instance.start()
        self._background = [
            asyncio.create_task(self._publisher.run()),
            asyncio.create_task(self._watch()),
        ]

    async def _close(self) -> None:
        for task in self._background:
            task.cancel()
        await self._instance.close()

    def _accept(self, requests: list[Any]) -> None:
        for request in requests:
            send = self._sender(request.request_id(), request.get_response_sender())
            try:
                data = request.inputs()[0].as_numpy().tobytes()
                self._submit(messages.decode_request(data), send)
            except errors.PDServeError as error:
                send(Failed(error.code, str(error)), True)
            except Exception as error:  # an exception here would leave the caller without an answer
                pb_utils.Logger.log_error(f"request not accepted: {error!r}")
                send(Failed(errors.InstanceError.code, repr(error)), True)

    def _submit(self, request: Request, send: Callable[[Reply, bool], None]) -> None:
        match self._instance, request:
            case _, Release(id=call):
                self._instance.release(call, send)
            case PrefillInstance() as prefill, PrefillRequest():
                prefill.submit(request, send)
            case DecodeInstance() as decode, DecodeRequest():
                decode.submit(request, send)
            case instance, _:
                raise errors.InstanceError(
                    f"a {type(request).__name__} came to a {type(instance).__name__}"
                )

    def _sender(self, call: str, sender: Any) -> Callable[[Reply, bool], None]:
        self._waiting[call] = sender

        def send(reply: Reply, last: bool) -> None:
            data = np.frombuffer(messages.encode(reply), np.uint8)
            response = pb_utils.InferenceResponse([pb_utils.Tensor("reply", data)])
            self._outbox.send(sender, response, last=last)
            if last:
                self._waiting.pop(call, None)

        return send

    async def _watch(self) -> None:
        """Let go of what a gateway held that has died: its stream is cancelled with it.

        A gateway that lives says so by a Release, at once.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(ORPHAN_POLL_S)
            for call in await loop.run_in_executor(None, _cancelled, list(self._waiting.items())):
                self._instance.release(call, lambda _reply, _last: None)


def _cancelled(waiting: list[tuple[str, Any]]) -> list[str]:
    return [call for call, sender in waiting if sender.is_cancelled()]
