"""What the prefill and the decode model share: messages in, messages out."""

from __future__ import annotations

import asyncio
import itertools
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

# What a gateway held that has died is let go of within this time.
ORPHAN_LOOK_S = 1.0


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
        self._keys = itertools.count()
        self._outbox = Outbox(ORPHAN_LOOK_S, self._orphaned)
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
        self._publishing = asyncio.create_task(self._publisher.run())

    async def _close(self) -> None:
        self._publishing.cancel()
        await self._instance.close()

    def _accept(self, requests: list[Any]) -> None:
        for request in requests:
            # Whoever calls this model past a gateway may give any id, or none.
            key = f"{next(self._keys)}/{request.request_id()}"
            send = self._sender(key, request.get_response_sender())
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

    def _sender(self, key: str, sender: Any) -> Callable[[Reply, bool], None]:
        self._outbox.open(key, sender)

        def send(reply: Reply, last: bool) -> None:
            data = np.frombuffer(messages.encode(reply), np.uint8)
            response = pb_utils.InferenceResponse([pb_utils.Tensor("reply", data)])
            self._outbox.send(key, response, last=last)

        return send

    def _orphaned(self, key: str) -> None:
        """The gateway has died: one that lives says so by a Release."""
        call = key.partition("/")[2]
        self._loop.call(self._instance.release, call, lambda _reply, _last: None)
