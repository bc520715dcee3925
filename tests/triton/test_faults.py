"""Tests for faults that users of disaggregated serving report, in a deployment of one server."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from pdctl.errors import ServerError
from pdctl.triton import EXIT_TIMEOUT_S
from pdserve.config import Decode, Gateway, Prefill
from tests.clients import (
    Answer,
    Part,
    Refused,
    connected,
    generate,
    held,
    stream,
    stub,
    wait_idle,
    wait_linked,
    wait_until,
)
from tests.servers import Running, emulated_deployment, running

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.triton, pytest.mark.alone]

STALL_S = 3.0
"""An instance that is silent for so long has failed."""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Running]:
    """Two prefills and two decodes; 2 ms per prompt token, 20 ms per step."""
    deployment = emulated_deployment(
        tmp_path,
        {"prefill": {"per_token_ms": 2}, "decode": {"base_ms": 20}},
        instances=2,
        prefill=Prefill(arena_mib=16, lease_s=4.0),
        gateway=Gateway(stall_s=STALL_S, ttft_limit_ms=10_000),
    )
    with running(deployment, tmp_path) as server:
        wait_linked(server)
        yield server


def test_a_killed_prefill_costs_no_request(pair: Running) -> None:
    """vllm#29906, TensorRT-LLM#15363: no request waits for a dead instance without a bound."""
    stub(pair, "prefill_0").kill()

    def one(number: int) -> tuple[float, Answer]:
        began = time.monotonic()
        answer = generate(pair, text_input=f"question {number}", max_tokens=4)
        return time.monotonic() - began, answer

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(24)))

    assert {answer.stats["prefill"] for _, answer in answers} == {"prefill_1"}
    assert max(seconds for seconds, _ in answers) < 6
    last, _ = one(99)
    assert last < 1
    wait_until(lambda: not _of_the_living(pair, "prefill_0"), 3, lambda: f"{held(pair)}")


def test_a_prefill_killed_at_work_costs_no_request(pair: Running) -> None:
    """No token of the answer has been sent yet, so another prefill computes it."""
    asked = {"input_ids": [7] * 600, "max_tokens": 4}
    victim = stub(pair, "prefill_0")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, pair, "scheduler", **asked)
        wait_until(lambda: any("'prefill_0'" in key for key in held(pair)), 5)
        victim.kill()
        stats = answer.result(timeout=15).stats

    assert stats["prefill"] == "prefill_1"
    assert stats["attempts"] == 2
    assert stats["ms"]["e2e"] / 1e3 < STALL_S + 4


def test_a_decode_killed_in_mid_stream_costs_no_request(pair: Running) -> None:
    """TensorRT-LLM#14565, vllm#46283: every stream continues elsewhere, and nothing stays held."""
    tokens = 400

    async def run() -> list[list[Part]]:
        async with connected(pair) as client:
            decoding = [asyncio.Event() for _ in range(8)]

            async def one(number: int) -> list[Part]:
                asked = {"input_ids": [number + 5] * 20, "max_tokens": tokens, "stream": True}
                parts = []
                async for part in stream(client, "scheduler", **asked):
                    parts.append(part)
                    if len(parts) == 2:
                        decoding[number].set()
                return parts

            streams = [asyncio.create_task(one(number)) for number in range(8)]
            for event in decoding:
                await asyncio.wait_for(event.wait(), 10)
            stub(pair, "decode_0").kill()
            return await asyncio.gather(*streams)

    answers = asyncio.run(run())

    def undisturbed(number: int) -> list[int]:
        asked = {"input_ids": [number + 5] * 20, "max_tokens": tokens}
        return generate(pair, "scheduler", **asked).ids

    with ThreadPoolExecutor(len(answers)) as pool:
        whole = list(pool.map(undisturbed, range(len(answers))))
    again = 0
    for ids, parts in zip(whole, answers, strict=True):
        last = parts[-1]
        assert last.finish_reason == "length"
        assert last.stats is not None
        assert last.stats["decode"] == "decode_1"
        again += last.stats["attempts"] > 1
        assert [token for part in parts for token in part.ids] == ids
    assert again == 4
    # The gauges of dead instances stay as they were; all others must hold nothing.
    wait_until(lambda: not _of_the_living(pair, "decode_0"), 6, lambda: f"{held(pair)}")


def _of_the_living(server: Running, dead: str) -> dict[str, float]:
    return {key: value for key, value in held(server).items() if f"'{dead}'" not in key}


def test_with_every_prefill_dead_the_error_comes_within_the_limit(pair: Running) -> None:
    for name in ("prefill_0", "prefill_1"):
        stub(pair, name).kill()
    for limit in (5.0, 3.0):
        began = time.monotonic()
        refusal = (
            rf"no healthy prefill \(.*prefill_[01].* within the TTFT limit of {limit * 1e3:g} ms"
        )
        with pytest.raises(Refused, match=refusal):
            generate(
                pair, text_input="anybody there?", max_tokens=4, ttft_limit_ms=int(limit * 1e3)
            )
        assert time.monotonic() - began < limit + 2
    wait_until(lambda: not open_requests(pair), 2)


def open_requests(server: Running) -> dict[str, float]:
    return {key: value for key, value in held(server).items() if "open_requests" in key}


def test_a_stopping_server_ends_every_request(pair: Running) -> None:
    """dynamo#13559: running requests get an end, and later ones get an error at once."""
    ends: list[Any] = []
    stopping = threading.Thread(target=pair.servers[0].stop)

    async def run() -> None:
        async with connected(pair) as client:

            async def one(tokens: int, decoding: asyncio.Event) -> Answer:
                parts = []
                async for part in stream(
                    client, text_input="a", max_tokens=tokens, stream=True, timeout=30
                ):
                    parts.append(part)
                    if len(parts) > 1:
                        decoding.set()
                return Answer(parts)

            both = asyncio.Event(), asyncio.Event()
            served = [
                asyncio.create_task(one(tokens, decoding))
                for tokens, decoding in zip((60, 3000), both, strict=True)
            ]
            for decoding in both:
                await asyncio.wait_for(decoding.wait(), 10)
            stopping.start()
            await asyncio.sleep(0.3)
            began = time.monotonic()
            for task in (asyncio.create_task(one(2, asyncio.Event())), *served):
                (end,) = await asyncio.gather(task, return_exceptions=True)
                ends.append((end, time.monotonic() - began))

    asyncio.run(run())
    stopping.join()
    (late, at_once), (short, _), (endless, after) = ends

    assert isinstance(late, Exception)
    assert at_once < 2
    assert isinstance(short, Answer)
    assert short.stats["output_tokens"] == 60
    assert isinstance(endless, Exception)
    assert after < EXIT_TIMEOUT_S + 5


def test_an_arena_that_does_not_fit_is_said_so_at_the_start(tmp_path: Path) -> None:
    """A container's /dev/shm has 64 MiB by default."""
    size = psutil.disk_usage("/dev/shm").total
    mib = (size >> 20) + 1024
    deployment = emulated_deployment(tmp_path, {"speed": 0}, prefill=Prefill(arena_mib=mib))
    with pytest.raises(ServerError, match=r"/dev/shm") as refused, running(deployment, tmp_path):
        pytest.fail("started")

    message = str(refused.value)
    assert "model prefill_0" in message
    assert str(mib << 20)[:4] in message or str(mib) in message
    assert "Traceback" not in message.splitlines()[1]


def test_more_than_the_decodes_hold_waits_and_is_served(tmp_path: Path) -> None:
    """vllm#41269, TensorRT-LLM#12313: a full decode costs time, not requests."""
    deployment = emulated_deployment(
        tmp_path,
        {"decode": {"base_ms": 2}},
        prefill=Prefill(slots=2, arena_mib=16),
        decode=Decode(slots=3, blocks=12),
    )
    with running(deployment, tmp_path) as server:

        def one(number: int) -> Answer:
            return generate(server, text_input=f"question {number}", max_tokens=20 + number)

        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(one, range(72)))

        assert [answer.stats["output_tokens"] for answer in answers] == list(range(20, 92))
        with pytest.raises(Refused, match=r"max_tokens: 500; allowed: 1 to 191"):
            generate(server, text_input="a", max_tokens=500)
        wait_idle(server, 2)
