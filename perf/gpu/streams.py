"""Clients of the suite's server: streams whose times or whose tokens are recorded."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import Sequence
from typing import Any

import grpc.aio
from msgspec import Struct
from tests import clients
from tests.servers import Running

from pdserve.connections import GRPC_OPTIONS
from perf.answers import Answer
from perf.client import STREAMS_PER_CONNECTION, message, one_stream

LIMIT_S = 300.0
BYTES = 256
"""Tokens of the tokenizer of `perf.gpu.model`, whose last one ends a text."""


def texts(count: int, tokens: int, seed: int) -> list[str]:
    """Return texts of so many tokens for the tokenizer of `perf.gpu.model`, each another one."""
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_letters, k=tokens)) for _ in range(count)]


def prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    """Return token ids of bytes, of lengths from 1 to `longest`, even on a logarithmic scale."""
    rng = random.Random(seed)
    lengths = [round(longest ** (n / max(count - 1, 1))) for n in range(count)]
    return [[rng.randrange(BYTES) for _ in range(length)] for length in lengths]


async def timed(
    address: str, model: str, work: Sequence[Sequence[str]], output: int
) -> list[list[Answer]]:
    """Send the texts of each stream one after another, all streams at the same time.

    Raises:
        RuntimeError: the server answered a request with an error.
        TimeoutError: not all have ended within LIMIT_S.
    """
    connections = [
        grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)
        for _ in range(-(-len(work) // STREAMS_PER_CONNECTION))
    ]
    try:
        streams = [
            one_stream(
                connections[n % len(connections)],
                [message(model, f"{n}-{i}", text, output, True) for i, text in enumerate(some)],
            )
            for n, some in enumerate(work)
        ]
        return list(await asyncio.wait_for(asyncio.gather(*streams), LIMIT_S))
    finally:
        for connection in connections:
            await connection.close()


class End(Struct):
    """How one request has ended."""

    tokens: list[int]
    error: str = ""
    """Empty: with its last token."""
    ends: int = 0
    """Number of responses that were said to be its last; an error is one, too."""
    attempts: int = 0


async def asked(server: Running, ids: Sequence[int], output: int, **options: Any) -> End:
    """Return how a request for so many tokens has ended; options are inputs of `scheduler`."""
    end = End([])
    inputs: dict[str, Any] = {"input_ids": list(ids), "max_tokens": output, "ignore_eos": True}
    try:
        async with clients.connected(server, [("grpc.use_local_subchannel_pool", 1)]) as client:
            parts = clients.stream(client, "scheduler", timeout=LIMIT_S, **inputs, **options)
            async for part in parts:
                end.tokens += part.ids
                end.ends += bool(part.finish_reason)
                end.attempts = part.stats["attempts"] if part.stats else end.attempts
    except Exception as error:  # whatever ends a request is recorded as its end
        end.error, end.ends = f"{error!r:.300}", end.ends + 1
    return end
