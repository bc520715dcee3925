"""Tests that long answers, more than the decode has room for, continue after their first token."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pdserve.config import Decode, Gateway, Prefill
from tests.clients import Part, Refused, connected, stream, wait_idle, wait_linked
from tests.servers import Running, emulated_deployment, running

pytestmark = [pytest.mark.triton, pytest.mark.alone]


async def ask(server: Running, number: int, max_tokens: int) -> tuple[int, str]:
    """Return the tokens of a stream and its error, asked at one of the server's two gateways."""
    asked: dict[str, Any] = {"max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    if number % 2:
        asked |= {"model": "scheduler", "input_ids": [100 + number] * 20}
    else:
        asked |= {"model": "pdserve", "text_input": f"client {number}"}
    parts: list[Part] = []
    async with connected(server) as client:
        try:
            async for part in stream(client, **asked):
                parts.append(part)  # noqa: PERF401 (those before an error count)
        except Refused as refused:
            return len(parts), str(refused)
    stats = parts[-1].stats
    assert stats is not None
    return stats["output_tokens"], ""


@pytest.mark.parametrize(
    ("clients", "max_tokens", "blocks"),
    [
        pytest.param(16, 1024, 256),
        pytest.param(16, 4096, 1024, marks=pytest.mark.full),
        pytest.param(6, 8000, 1024, marks=pytest.mark.full),
    ],
)
def test_nobody_gets_a_token_and_then_no_room(
    tmp_path: Path, clients: int, max_tokens: int, blocks: int
) -> None:
    """Two gateways do not know each other's requests; three answers, or two, fit at once."""
    deployment = emulated_deployment(
        tmp_path,
        {"prefill": {"base_ms": 5}, "decode": {"base_ms": 1}, "context_length": 16384},
        prefill=Prefill(arena_mib=16, lease_s=2.0),
        decode=Decode(blocks=blocks),
        gateway=Gateway(ttft_limit_ms=120_000),
    )

    async def all_at_once(server: Running) -> list[tuple[int, str]]:
        return await asyncio.gather(*(ask(server, n, max_tokens) for n in range(clients)))

    with running(deployment, tmp_path) as server:
        wait_linked(server)
        answers = asyncio.run(all_at_once(server))
        print(f"\n{clients} clients of max_tokens {max_tokens}: {answers}")
        assert answers == [(max_tokens, "")] * clients
        wait_idle(server, 5.0)
