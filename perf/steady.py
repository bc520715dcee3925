"""Load without a gap, and the growth of each process of a server with every response.

Memory that is kept until no request is open is never freed here, since an answer is always on its
way.
"""

from __future__ import annotations

import asyncio
import itertools
import time

import grpc.aio
from msgspec import Struct
from tritonclient.grpc import service_pb2_grpc

from pdctl.server import Server
from pdserve.connections import GRPC_OPTIONS
from perf import client, processes
from perf.budgets import Budget
from perf.prompts import prompts

STREAMS = 16
PROMPT_TOKENS, TOKENS = 8, 100
LIMIT_KIB = 10.0
"""Limit for one process per 1,000 responses to clients."""
NOISE_KIB = 4096
"""Growth of a process that is allowed once, whatever the load."""


class Grown(Struct):
    """The growth between two looks."""

    seconds: float
    answers: int
    responses: int
    """Number of responses to clients; a decode sends one message to all its streams at once."""
    kib: dict[str, int]
    """Growth of the private memory of each process."""

    def budgets(self) -> list[Budget]:
        """Return the growth per 1,000 responses, the worst process first."""
        thousands = self.responses / 1000
        return [
            Budget(
                f"{name}: {kib} KiB in {self.seconds:.0f} s, {self.responses} responses",
                round(max(0, kib - NOISE_KIB) / thousands, 3),
                "KiB / 1000",
                "at most",
                LIMIT_KIB,
            )
            for name, kib in sorted(self.kib.items(), key=lambda one: -one[1])
        ]


def grown(server: Server, warm_s: float, seconds: float) -> Grown:
    """Put load on a server, and look at it after ``warm_s`` and ``seconds`` later.

    Raises:
        RuntimeError: the server answered with an error.
    """
    return asyncio.run(_grown(server, warm_s, seconds))


async def _grown(server: Server, warm_s: float, seconds: float) -> Grown:
    made = _Made()
    async with grpc.aio.insecure_channel(server.grpc, options=GRPC_OPTIONS) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        streams = [asyncio.create_task(_stream(stub, n, made)) for n in range(STREAMS)]
        looks: list[tuple[float, int, int, dict[str, int]]] = []
        for wait_s in (warm_s, seconds):
            ended, _ = await asyncio.wait(
                streams, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
            )
            for stream in ended:
                stream.result()
            memory = await asyncio.to_thread(_memory_kib, server)
            looks.append((time.monotonic(), made.answers, made.responses, memory))
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    (began, answers, responses, before), (ended_at, *counts, after) = looks
    return Grown(
        ended_at - began,
        counts[0] - answers,
        counts[1] - responses,
        {name: after[name] - kib for name, kib in before.items()},
    )


def _memory_kib(server: Server) -> dict[str, int]:
    return {name: used.uss_kib for name, used in processes.usage(server).items()}


class _Made:
    """Numbers of answers and responses so far."""

    def __init__(self) -> None:
        self.answers = 0
        self.responses = 0


async def _stream(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, number: int, made: _Made
) -> None:
    """Request one answer after another, over one connection, without end."""
    for turn in itertools.count():
        (text,) = prompts(1, PROMPT_TOKENS, (number << 32) + turn)
        request = client.message("pdserve", f"{number}-{turn}", text, TOKENS, True)
        async for reply in stub.ModelStreamInfer(iter([request])):
            if reply.error_message:
                raise RuntimeError(reply.error_message)
            made.responses += 1
        made.answers += 1
