"""Tests for answers: their tokens, when they come, how they end, and their statistics."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pdserve.rpc.messages import DecodeRequest, PrefillRequest, Release, Tokens
from pdserve.scheduling.request import State
from tests.unit.inprocess import EOS, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


@virtual
async def test_states_of_a_served_request(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request(max_tokens=40)
        seen = [request.state]

        async def watch() -> None:
            while True:
                if request.state is not seen[-1]:
                    seen.append(request.state)
                await asyncio.sleep(0.0001)

        watching = asyncio.create_task(watch())
        assert await site.answer(request) == site.expected(request)
        await asyncio.sleep(0.001)
        watching.cancel()
        # PREFILLED until the decode has reported that it accepts; that takes 5 ms.
        assert seen == [
            State.WAITING, State.PREFILLING, State.PREFILLED,
            State.TRANSFERRING, State.DECODING, State.FINISHED
        ]  # fmt: skip
        await site.idle()


@virtual
async def test_first_token_comes_before_decode_begins(tmp_path: Path) -> None:
    """vllm#25373, llm-d-inference-scheduler#701: computed once, by the prefill; sent at once."""
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request()
        chunks = site.scheduler.run(request)
        first = await anext(chunks)
        assert list(first.ids) == site.expected(request)[:1]
        assert request.state is State.PREFILLED
        assert request.first_token - request.arrived == pytest.approx(0.02, abs=1e-6)
        await asyncio.sleep(0.5)  # the reader is slow
        assert not site.d_links[0].requests
        rest = [token async for chunk in chunks for token in chunk.ids]
        assert rest == site.expected(request)[1:], "no token is computed or sent twice"
        [asked] = site.d_links[0].of(DecodeRequest)
        assert asked.first_token == first.ids[0]
        assert len(site.d_engines[0].steps) == request.max_tokens - 1
        await site.idle()


@pytest.mark.parametrize("stream", [True, False])
@virtual
async def test_one_token_needs_no_decode(tmp_path: Path, stream: bool) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request(max_tokens=1, stream=stream)
        [chunk] = await site.chunks(request)
        assert (list(chunk.ids), chunk.finish_reason) == (site.expected(request), "length")
        assert (request.state, request.finish_reason) == (State.FINISHED, "length")
        assert request.stats()["decode"] == ""
        await site.idle()
        assert not site.d_links[0].requests
        assert site.p_links[0].of(Release), "the prefill is told"


@virtual
async def test_end_of_sequence_as_the_first_token_needs_no_decode(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        site.model.script = lambda prompt, position: EOS
        request = site.request()
        [chunk] = await site.chunks(request)
        assert (list(chunk.ids), chunk.finish_reason) == ([EOS], "stop")
        assert not site.d_links[0].requests
        await site.idle()
        assert site.total("pdserve_requests_total", outcome="stop") == 1


@virtual
async def test_end_of_sequence_while_decoding(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        site.model.script = lambda prompt, position: EOS if position == 3 else 5
        request = site.request(max_tokens=50)
        chunks = await site.chunks(request)
        assert [token for chunk in chunks for token in chunk.ids] == [5, 5, 5, EOS]
        assert [bool(chunk.finish_reason) for chunk in chunks] == [False] * (len(chunks) - 1) + [
            True
        ]
        assert (request.finish_reason, request.output_tokens) == ("stop", 4)
        await site.idle()


@virtual
async def test_ignore_eos(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        site.model.script = lambda prompt, position: EOS
        request = site.request(max_tokens=6, ignore_eos=True)
        assert await site.answer(request) == [EOS] * 6
        assert request.finish_reason == "length"
        await site.idle()


@pytest.mark.parametrize("after", [1, 3, 8])
@virtual
async def test_reader_ends_the_answer(tmp_path: Path, after: int) -> None:
    """At a complete stop string nothing more is asked for, and everything is released."""
    async with Site(tmp_path, profile=TIMES, decode={"response_cost_ms": 0.0}) as site:
        request = site.request(max_tokens=8)
        got = 0
        async for chunk in site.scheduler.run(request):
            got += len(chunk.ids)
            if got == after:
                request.end_answer(got - 1)
        assert got == after
        assert (request.state, request.finish_reason) == (State.FINISHED, "stop")
        assert request.output_tokens == after - 1
        await site.idle()


@virtual
async def test_stats_add_up(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        requests = [site.request(33 + i, max_tokens=2 + i) for i in range(5)]
        await asyncio.gather(*map(site.answer, requests))
        for request in requests:
            stats = request.stats()
            ms = stats["ms"]
            assert stats["prompt_tokens"] == len(request.prompt) // 4
            assert stats["output_tokens"] == request.max_tokens
            assert stats["attempts"] == 1
            assert stats["kv"]["bytes"] == site.model.layout.nbytes(stats["prompt_tokens"])
            assert (stats["prefill"], stats["decode"]) == ("prefill_0", "decode_0")
            assert ms["prefill"] == pytest.approx(20.0, abs=0.01)
            assert ms["ttft"] == pytest.approx(ms["forward"] + ms["prefill"], abs=0.1)
            assert ms["e2e"] >= ms["ttft"] + 10.0 * (stats["output_tokens"] - 1) - 0.1
            assert 0 <= ms["transfer"] < ms["e2e"]
        await site.idle()
        count = site.total
        assert count("pdserve_requests_total") == 5
        for name in ("ttft", "e2e", "tpot"):
            assert count(f"pdserve_{name}_seconds_count") == 5
        assert count("pdserve_kv_transfer_seconds_count") == 5
        assert count("pdserve_kv_transfer_bytes_total") == sum(
            request.stats()["kv"]["bytes"] for request in requests
        )
        assert count("pdserve_forward_attempts_total") == 5 + count(
            "pdserve_prefill_rejections_total"
        )
        assert count("pdserve_ttft_seconds_sum") == pytest.approx(
            sum(r.stats()["ms"]["ttft"] for r in requests) / 1e3, abs=1e-4
        )
        prompts = sum(request.prompt_tokens for request in requests)
        cached = sum(request.cached_tokens for request in requests)
        assert count("pdserve_prompt_tokens_total", source="cached", group="default") == cached
        assert count("pdserve_prompt_tokens_total", source="computed") == prompts - cached
        answers = sum(request.output_tokens for request in requests)
        assert count("pdserve_output_tokens_total", group="default") == answers
        steps = count("pdserve_steps_total", instance="prefill_0")
        assert count("pdserve_busy_seconds_total", instance="prefill_0") == pytest.approx(
            steps * 0.020, abs=1e-3
        )
        assert count("pdserve_prefill_seconds_count", instance="prefill_0") == 5
        assert count("pdserve_prefill_seconds_sum") == pytest.approx(5 * 0.020, abs=1e-3)
        assert count("pdserve_decode_seconds_count", instance="decode_0") == 5
        decoded = sum(10.0 * (request.output_tokens - 1) for request in requests) / 1e3
        assert count("pdserve_decode_seconds_sum") == pytest.approx(decoded, rel=0.2)
        assert decoded <= count("pdserve_slot_seconds_total", instance="decode_0") <= 1.5 * decoded
        assert count("pdserve_slot_seconds_total", instance="prefill_0") >= 5 * 0.020


@virtual
async def test_every_request_is_counted_once_under_its_scenario(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        await asyncio.gather(
            *(site.answer(site.request(scenario=f"s{i % 2}", max_tokens=1 + i)) for i in range(4))
        )
        assert site.total("pdserve_requests_total", scenario="s0", outcome="length") == 2
        assert site.total("pdserve_requests_total", scenario="s1") == 2
        await site.idle()


@virtual
async def test_a_reader_that_leaves_cancels(tmp_path: Path) -> None:
    """Everything has been released when the iterator is closed, not some time later."""
    async with Site(tmp_path, profile=TIMES) as site:
        for chunks_wanted in (1, 2):
            request = site.request(max_tokens=100)
            chunks = site.scheduler.run(request)
            for _ in range(chunks_wanted):
                await anext(chunks)
            gc.disable()
            try:
                await chunks.aclose()
                assert request.state is State.CANCELLED
                assert [i.load.open for role in site.instances for i in role] == [0, 0]
            finally:
                gc.enable()
            await site.idle()
        assert site.total("pdserve_requests_total", outcome="cancelled") == 2


@virtual
async def test_many_at_once_have_their_own_tokens(tmp_path: Path) -> None:
    """Lengths, priorities and delays are random; every request gets its own complete answer."""
    async with Site(
        tmp_path, prefills=3, decodes=2, profile=TIMES, decode={"slots": 20}, seed=5
    ) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (0.0, 0.004)
        rng = random.Random(6)
        requests = [
            site.request(
                rng.randrange(1, 200),
                max_tokens=rng.randrange(1, 60),
                stream=rng.random() < 0.5,
                priority=rng.randrange(3),
            )
            for _ in range(120)
        ]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        assert site.total("pdserve_requests_total", outcome="length") == 120
        await site.idle()


@virtual
async def test_answers_that_nobody_reads_as_they_come_are_few_messages(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request(max_tokens=400, stream=False)  # 4 s
        assert await site.answer(request) == site.expected(request)
        assert len(site.d_links[0].of(Tokens)) == 4
        assert (
            len(site.p_links[0].of(PrefillRequest)) == len(site.d_links[0].of(DecodeRequest)) == 1
        )
        await site.idle()


@virtual
async def test_offers_do_not_multiply_with_those_who_wait(tmp_path: Path) -> None:
    """sglang#10110, agentic-pd-hybrid ef4dc81: rejections under load are not amplified."""
    rejections = []
    for waiting in (50, 200):
        async with Site(tmp_path, prefills=2, profile=TIMES, prefill={"slots": 1}) as site:
            await asyncio.gather(*(site.answer(site.request(max_tokens=2)) for _ in range(waiting)))
            rejections.append(site.total("pdserve_prefill_rejections_total") / waiting)
            await site.idle()
    assert rejections == [0.0, 0.0], "a gateway knows the instances that it has filled itself"


def test_prompt_bytes_are_int32() -> None:
    """The helper of these tests makes the same bytes as the gateway."""
    site = Site(None)  # type: ignore[arg-type]
    site.rng = random.Random(0)
    assert np.frombuffer(site.prompt(4), "<i4").dtype == np.int32
