"""Requests to every gateway, without a gap, whose answers are compared with a reference."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc.aio
import msgspec
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.config import Role
from pdserve.connections import GRPC_OPTIONS
from perf.role_switch.reference import ANSWER_TOKENS, Prompt

ANSWER_S = 60.0


@dataclass
class Answer:
    """One request, with times in ``loop.time()`` seconds."""

    gateway: int
    sent: float
    first: float = 0.0
    """Time of its first token."""
    second: float = 0.0
    """Time of its first token from a decode."""
    ended: float = 0.0
    prefill: str = ""
    decode: str = ""
    error: str = ""
    right: bool = False

    def served(self, role: Role, name: str) -> float:
        """Return when an instance in this role has served it; infinity: another one has."""
        if getattr(self, role) != name:
            return float("inf")
        return self.first if role == "prefill" else self.second


class Traffic:
    """A number of clients at each gateway; each sends its next request when one is answered.

    Args:
        addresses: host and port of each gateway's gRPC.
        pause_s: seconds between an answer and the next request of the same client.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        answers: Sequence[tuple[Prompt, list[int]]],
        clients: int,
        pause_s: float = 0.0,
    ) -> None:
        self.answers: list[Answer] = []
        self._expected = itertools.cycle(answers)
        self._pause_s = pause_s
        self._connections = [
            grpc.aio.insecure_channel(address, options=GRPC_OPTIONS) for address in addresses
        ]
        self._tasks = [
            asyncio.create_task(self._client(number, connection))
            for number, connection in enumerate(self._connections)
            for _ in range(clients)
        ]

    async def _client(self, gateway: int, connection: grpc.aio.Channel) -> None:
        loop = asyncio.get_running_loop()
        while True:
            prompt, expected = next(self._expected)
            answer = Answer(gateway, loop.time())
            try:
                ids = await asyncio.wait_for(self._ask(connection, prompt, answer), ANSWER_S)
                answer.right = ids == expected
            except (grpc.aio.AioRpcError, RuntimeError, asyncio.TimeoutError) as error:
                answer.error = repr(error)
            answer.ended = loop.time()
            self.answers.append(answer)
            await asyncio.sleep(self._pause_s)

    async def _ask(self, connection: grpc.aio.Channel, prompt: Prompt, answer: Answer) -> list[int]:
        async def request() -> AsyncIterator[service_pb2.ModelInferRequest]:
            yield _message(prompt)

        ids: list[int] = []
        call = service_pb2_grpc.GRPCInferenceServiceStub(connection).ModelStreamInfer(request())
        async for reply in call:
            if reply.error_message:
                raise RuntimeError(reply.error_message)
            now = asyncio.get_running_loop().time()
            if answer.first:
                answer.second = answer.second or now
            answer.first = answer.first or now
            response = reply.infer_response
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
                if output.name == "output_ids":
                    ids += np.frombuffer(raw, "<i4").tolist()
                elif output.name == "stats":
                    stats = msgspec.json.decode(raw[4:])
                    answer.prefill, answer.decode = stats["prefill"], stats["decode"]
        return ids

    async def served(
        self, name: str, role: Role, since: float, within_s: float
    ) -> list[float | None]:
        """Wait until an instance in a new role has served a request of every gateway.

        Return for each gateway the seconds from ``since`` to the first token of that instance;
        None: not within ``within_s``.
        """
        loop = asyncio.get_running_loop()
        first = dict.fromkeys(range(len(self._connections)), float("inf"))
        looked = 0
        while loop.time() < since + within_s and float("inf") in first.values():
            await asyncio.sleep(0.01)
            for answer in self.answers[looked:]:
                at = answer.served(role, name)
                if at > since:
                    first[answer.gateway] = min(first[answer.gateway], at)
            looked = len(self.answers)
        return [None if at == float("inf") else at - since for at in first.values()]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for connection in self._connections:
            await connection.close()


def _message(prompt: Prompt) -> service_pb2.ModelInferRequest:
    inputs = (
        ("input_ids", "INT32", len(prompt), prompt.astype("<i4").tobytes()),
        ("max_tokens", "INT32", 1, struct.pack("<i", ANSWER_TOKENS)),
        ("stream", "BOOL", 1, b"\1"),
        ("ignore_eos", "BOOL", 1, b"\1"),
    )
    tensor = service_pb2.ModelInferRequest.InferInputTensor
    return service_pb2.ModelInferRequest(
        model_name="scheduler",
        inputs=[
            tensor(name=name, datatype=kind, shape=[1, count]) for name, kind, count, _ in inputs
        ],
        raw_input_contents=[raw for *_, raw in inputs],
    )
