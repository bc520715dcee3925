"""Reach an instance in the same server by Triton's business logic scripting (BLS).

``async_exec`` on a decoupled model gives an iterator whose ``next`` blocks, so
every open call keeps one thread; calls beyond ``threads`` wait for one.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np

from pdserve.channels.protocol import Replies
from pdserve.errors import InstanceError


class BlsChannel:
    """A channel to Triton model ``model`` of this server; ``pb_utils`` is the stub's module."""

    def __init__(self, pb_utils: ModuleType, model: str, threads: int) -> None:
        self._pb = pb_utils
        self._model = model
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"bls-{model}")
        self._open: dict[str, tuple[Replies, asyncio.Task[None]]] = {}

    def open(self, call: str, payload: bytes) -> Replies:
        replies = Replies()
        self._open[call] = (replies, asyncio.create_task(self._run(call, payload, replies)))
        return replies

    def forget(self, call: str) -> None:
        # The task itself goes on: a BLS call cannot be abandoned, only drained.
        self._open.pop(call, None)

    async def close(self) -> None:
        tasks = [task for _, task in self._open.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: str, payload: bytes, replies: Replies) -> None:
        loop = asyncio.get_running_loop()
        try:
            request = self._pb.InferenceRequest(
                model_name=self._model,
                request_id=call,
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
                    replies.put(tensor.as_numpy().tobytes())
        except self._pb.TritonModelException as error:
            replies.fail(InstanceError(str(error)))
        except InstanceError as error:
            replies.fail(error)
        finally:
            self._open.pop(call, None)
