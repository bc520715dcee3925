"""Tests for reading metrics pages from real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from pdserve.config import Deployment, Server
from pdserve.control import scrape as module
from pdserve.control.scrape import scrape

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answering(data: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        assert request.startswith(b"GET /metrics HTTP/1.0\r\n")
        writer.write(data)
        await writer.drain()
        writer.close()

    return answer


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


PAGE = b'pdserve_busy_seconds_total{instance="p0"} 2\n'
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"


def test_every_server_is_read_and_what_does_not_answer_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WITHIN_S", 0.5)
    monkeypatch.setattr(module, "MOST_BYTES", 100_000)
    answers = {
        "good": answering(OK + PAGE),
        "broken": answering(b"HTTP/1.1 500 no\r\n\r\n" + PAGE),
        "other": answering(b"SSH-2.0 hello\r\n"),
        "large": answering(OK + PAGE * 10_000),
        "silent": silent,
    }

    async def run() -> None:
        servers = []
        for name, answer in answers.items():
            listening = await asyncio.start_server(answer, "127.0.0.1", 0)
            servers.append(Server(name, metrics_port=listening.sockets[0].getsockname()[1]))
        closed = await asyncio.start_server(silent, "127.0.0.1", 0)
        servers.append(Server("closed", metrics_port=closed.sockets[0].getsockname()[1]))
        closed.close()
        began = time.monotonic()
        pages = await scrape(Deployment("m", tuple(servers)))
        assert time.monotonic() - began < 5
        assert {name for name, page in pages.items() if page is not None} == {"good"}
        assert set(pages) == {*answers, "closed"}
        good = pages["good"]
        assert good is not None
        assert good.counters("p0", "prefill", 1).work.busy_s == 2

    asyncio.run(run())
