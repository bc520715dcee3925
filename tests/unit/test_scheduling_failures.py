"""Instances that fail, fall silent or answer late: bounded, one clear error, nothing left held."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from pdserve import errors, messages
from pdserve.messages import (
    Accepted,
    Busy,
    Failed,
    Prefilled,
    Release,
    Tokens,
)
from pdserve.scheduling.request import Request, State
from pdserve.scheduling.scheduler import ANSWER_S
from tests.unit.inprocess import Message, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


def everything(message: Message) -> bool:
    return True


async def fails(site: Site, request: Request, match: str) -> None:
    """It ends in one InstanceError."""
    with pytest.raises(errors.InstanceError, match=match):
        await site.answer(request)
    assert request.state is State.FAILED


# --------------------------------------------------------------------- prefill


@virtual
async def test_prefill_that_cannot_be_reached_is_passed_over(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        site.p_links[0].broken = "connection refused"
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert (request.prefill, request.attempts) == ("prefill_1", 1)
        assert request.ended - request.arrived < 0.2
        assert site.total("pdserve_retries_total", phase="offer", reason="error") == 1
        await site.idle()


@virtual
async def test_prefill_whose_forward_fails_is_followed_by_another(tmp_path: Path) -> None:
    """The other one, though the one that failed has fewer open requests now."""
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        others = [site.start(site.request(max_tokens=100)) for _ in range(2)]
        await asyncio.sleep(0.1)
        site.p_engines[0].failures = [RuntimeError("out of memory")]
        site.p_engines[1].failures = [RuntimeError("out of memory")]
        request = site.request()
        task = site.start(request)
        await asyncio.sleep(0.015)
        (site.p_engines[1] if request.prefill == "prefill_0" else site.p_engines[0]).failures = []
        first = request.prefill
        assert await task == site.expected(request)
        assert request.attempts == 2
        assert request.prefill != first
        assert site.total("pdserve_retries_total", phase="prefill", reason="error") == 1
        await asyncio.gather(*others)
        await site.idle()


@virtual
async def test_retries_have_a_budget(tmp_path: Path) -> None:
    """vllm#29906, agentic-pd-hybrid ef4dc81: what fails everywhere is not spread further."""
    async with Site(tmp_path, prefills=4, profile=TIMES) as site:
        for engine in site.p_engines:
            engine.failures = [RuntimeError("out of memory")]
        request = site.request()
        await fails(site, request, r"prefill_1: RuntimeError\('out of memory'\)")
        assert request.attempts == 2
        assert sum(len(engine.forwards) for engine in site.p_engines) == 2
        assert not site.d_links[0].requests
        await site.idle()


@virtual
async def test_one_bad_forward_fails_its_prompts_and_no_others(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        site.p_engines[0].failures = [RuntimeError("broken kernel")]
        request, other = site.request(), site.request()
        task = site.start(request)
        await asyncio.sleep(0.01)
        answers = await asyncio.gather(task, site.answer(other))
        assert answers == [site.expected(request), site.expected(other)]
        assert (request.attempts, other.attempts) == (2, 1)
        await site.idle()


@virtual
async def test_no_prefill_can_be_reached(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        for link in site.p_links:
            link.broken = "connection refused"
        request = site.request()
        await fails(site, request, "prefill_1: connection refused")
        assert request.ended == request.arrived
        for link in site.p_links:
            link.broken = None
        again = site.request()
        assert await site.answer(again) == site.expected(again), "suspects are asked if all are"
        await site.idle()


@virtual
async def test_silent_prefill_is_passed_over_after_a_bound(tmp_path: Path) -> None:
    """TensorRT-LLM#15363, dynamo#13088: no wait is unbounded."""
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        site.p_links[0].lose = everything
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert request.forwarded - request.arrived == pytest.approx(ANSWER_S, abs=1e-3)
        soon = [site.request() for _ in range(6)]
        await asyncio.gather(*map(site.answer, soon))
        assert max(one.ended - one.arrived for one in soon) < 0.5, "it is left alone for a while"
        site.p_links[0].lose = lambda message: False
        await asyncio.sleep(5)
        later = [site.request() for _ in range(2)]
        await asyncio.gather(*map(site.answer, later))
        assert {one.prefill for one in later} == {"prefill_0", "prefill_1"}, "and then asked again"
        await site.idle()


@virtual
async def test_silent_prefill_does_not_hold_up_those_who_wait_for_another(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES, prefill={"slots": 1}) as site:
        site.p_links[0].lose = everything
        await site.answer(site.request())  # finds out
        requests = [site.request(max_tokens=2) for _ in range(40)]
        await asyncio.gather(*map(site.answer, requests))
        assert max(one.ended - one.arrived for one in requests) < 40 * 0.06
        await site.idle()


@virtual
async def test_all_prefills_silent(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        for link in site.p_links:
            link.lose = everything
        request = site.request()
        await fails(site, request, "no answer within 2 s")
        assert request.ended - request.arrived == pytest.approx(2 * ANSWER_S, abs=1e-3)
        await site.idle()


@virtual
async def test_prefill_that_falls_silent_after_accepting(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES, stall_s=3.0) as site:
        site.p_links[0].lose = lambda message: isinstance(message, Prefilled)
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert request.attempts == 2
        assert request.forwarded - request.arrived == pytest.approx(3.005, abs=1e-3)
        await site.idle()


@virtual
async def test_long_prefill_shows_that_it_lives(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"prefill": {"base_ms": 22_000.0}}, stall_s=6.0) as site:
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert request.attempts == 1
        assert len(site.p_links[0].of(Accepted)) == 5  # after 5 ms, then every 5 s
        await site.idle()


@virtual
async def test_late_answer_is_ignored(tmp_path: Path) -> None:
    """vllm#46283: an answer that comes after the release changes nothing."""
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        site.p_links[0].delay = (1.5, 1.5)  # there and back takes 3 s
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert request.prefill == "prefill_1"
        await asyncio.sleep(4)
        assert site.p_links[0].of(Prefilled), "it did compute"
        assert site.p_links[0].of(Release)
        await site.idle()
        assert site.total("pdserve_requests_total") == 1


@virtual
async def test_retry_does_not_lose_its_place_in_the_line(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        site.p_engines[0].failures = [RuntimeError("broken kernel")]
        requests = [site.request(max_tokens=2) for _ in range(4)]
        tasks = []
        for request in requests:
            tasks.append(site.start(request))
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        forwarded = [request.forwarded for request in requests]
        assert requests[0].attempts == 2
        assert forwarded == sorted(forwarded)
        await site.idle()


@virtual
async def test_prefill_that_shuts_down_says_so(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile={"prefill": {"base_ms": 500.0}}) as site:
        request = site.request()
        task = site.start(request)
        await asyncio.sleep(0.1)
        assert request.prefill == "prefill_0"
        await site.p[0].close()
        assert await task == site.expected(request)
        assert request.prefill == "prefill_1"
        assert request.forwarded - request.arrived < 0.2
        failed = site.p_links[0].of(Failed)
        assert failed == [Failed("INTERNAL", "prefill_0 is shutting down")]
        site.p[0].close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]


@virtual
async def test_message_of_another_version_is_refused(tmp_path: Path) -> None:
    """tensorrtllm_backend#653: a mismatch is one clear error, not a hang."""
    async with Site(tmp_path, profile=TIMES) as site:
        arrive = site.p_links[0].arrive_back
        site.p_links[0].arrive_back = (  # type: ignore[method-assign]
            lambda key, _: arrive(key, b"\x91\x92\xa1a\x81\xa4type\xa5later")
        )
        await fails(site, site.request(), "malformed message between scheduler and instance")
        await site.idle(2.1)


# ---------------------------------------------------------------------- decode


@virtual
async def test_decode_that_breaks_in_mid_stream(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        request = site.request(max_tokens=500)
        task = site.start(request)
        await asyncio.sleep(1.0)
        site.d_links[0].break_("connection reset")
        with pytest.raises(errors.InstanceError, match="decode_0: connection reset"):
            await task
        assert request.state is State.FAILED
        assert [one.open for role in site.instances for one in role] == [0, 0, 0]
        other = site.request()
        assert await site.answer(other) == site.expected(other)
        assert other.decode == "decode_1"
        # It never heard of the release: the answer that nobody wants runs to its end.
        await site.idle(5.0)


@virtual
async def test_decode_that_cannot_be_reached(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        site.d_links[0].broken = "connection refused"
        request = site.request()
        await fails(site, request, "decode_0: connection refused")
        assert request.output_tokens == 1
        await site.idle()
        other = site.request()
        assert await site.answer(other) == site.expected(other)


@virtual
async def test_decode_whose_step_fails(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        requests = [site.request(max_tokens=100) for _ in range(3)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.3)
        site.d_engines[0].failures = [RuntimeError("illegal memory access")]
        for task in tasks:
            with pytest.raises(errors.InstanceError, match=r"decode_0: RuntimeError\('illegal"):
                await task
        await site.idle()
        assert site.total("pdserve_requests_total", outcome="failed") == 3
        after = site.request()
        assert await site.answer(after) == site.expected(after), "the instance goes on"


@pytest.mark.parametrize("prompt", [20, 3000], ids=["pulled inline", "pulled aside"])
@virtual
async def test_decode_that_cannot_take_the_kv_cache_over(tmp_path: Path, prompt: int) -> None:
    """TensorRT-LLM#12542: an error of the transfer reaches the client; nobody waits on."""
    async with Site(tmp_path, profile=TIMES) as site:
        site.d_engines[0].refusals = [RuntimeError("copy failed")]
        request = site.request(prompt)
        await fails(site, request, "decode_0: copy failed")
        assert request.ended - request.first_token < 0.05
        await site.idle()


@virtual
async def test_silent_decode(tmp_path: Path) -> None:
    """vllm#46283, sglang#10110: bounded by seconds, though the lease and the stall are longer."""
    async with Site(tmp_path, profile=TIMES, prefill={"lease_s": 60.0}, stall_s=60.0) as site:
        site.d_links[0].lose = everything
        request = site.request()
        await fails(site, request, "no answer within 2 s")
        assert request.ended - request.first_token == pytest.approx(ANSWER_S, abs=1e-3)
        await site.idle()


@virtual
async def test_decode_that_falls_silent_in_mid_stream(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, stall_s=3.0) as site:
        request = site.request(max_tokens=200)
        task = site.start(request)
        await asyncio.sleep(0.5)
        site.d_links[0].lose = lambda message: isinstance(message, Tokens)
        with pytest.raises(errors.InstanceError, match="no answer within 3 s"):
            await task
        assert request.ended < 3.6
        await site.idle()


@virtual
async def test_a_lost_reply_is_noticed_by_the_next(tmp_path: Path) -> None:
    """A stream with tokens missing is an error, never an answer that lacks them."""
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request(max_tokens=200)
        task = site.start(request)
        await asyncio.sleep(0.5)
        lost: list[Message] = []

        def lose_one(message: Message) -> bool:
            if lost or not isinstance(message, Tokens):
                return False
            lost.append(message)
            return True

        site.d_links[0].lose = lose_one
        with pytest.raises(errors.InstanceError, match=r"decode_0 sent token \d+ after \d+"):
            await task
        assert request.ended < 0.6
        await site.idle()


@virtual
async def test_decode_that_shuts_down_says_so(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request(max_tokens=500)
        task = site.start(request)
        await asyncio.sleep(0.3)
        await site.d[0].close()
        with pytest.raises(errors.InstanceError, match="decode_0 is shutting down"):
            await task
        assert site.held() == {}
        site.d[0].close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]


@virtual
async def test_slow_steps_are_no_silence(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"decode": {"base_ms": 3000.0}}, stall_s=4.0) as site:
        request = site.request(max_tokens=4)
        assert await site.answer(request) == site.expected(request)
        await site.idle()


# ---------------------------------------------------------------------- leases


@virtual
async def test_lost_release_is_made_up_for_by_the_lease(tmp_path: Path) -> None:
    """TensorRT-LLM#12313: freed on time though no new work arrives, and ready to admit again."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 2, "lease_s": 1.0}) as site:
        site.p_links[0].lose = lambda message: isinstance(message, Release)
        for _ in range(2):
            chunks = site.scheduler.run(site.request())
            await anext(chunks)
            await chunks.aclose()
        await asyncio.sleep(0.9)
        assert site.held()["prefill_0 slots"] == 2
        await asyncio.sleep(0.13)
        await site.idle(0.0)
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert not site.p_links[0].of(Busy)


@virtual
async def test_lost_release_of_a_decode_ends_with_its_answer(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        site.d_links[0].lose = lambda message: isinstance(message, Release)
        chunks = site.scheduler.run(site.request(max_tokens=100))
        for _ in range(2):
            await anext(chunks)
        await chunks.aclose()
        await site.idle(1.05)


@virtual
async def test_decode_refuses_what_the_prefill_no_longer_holds(tmp_path: Path) -> None:
    """vllm#21570: an error, never another prompt's tokens, once the lease has ended."""
    async with Site(
        tmp_path, profile=TIMES, prefill={"slots": 1, "lease_s": 0.3, "arena_mib": 1}
    ) as site:
        site.d_links[0].delay = (0.2, 0.2)
        hold = site.d_links[0]._after

        def late(way: str, *args: object) -> None:
            """The message to the decode stays on its way for longer than the lease."""
            asyncio.get_running_loop().call_later(0.5, hold, way, *args)

        site.d_links[0]._after = late  # type: ignore[method-assign]
        request, other = site.request(4000), site.request(8000, max_tokens=1)
        task = site.start(request)
        await asyncio.sleep(0.35)
        assert len(await site.answer(other)) == 1, "the range has gone to another prompt"
        with pytest.raises(errors.InstanceError, match="KV handle expired"):
            await task
        await site.idle(1.0)


@virtual
async def test_rejection_by_the_decode_is_told(tmp_path: Path) -> None:
    """vllm#41269: rejected at once, and the prefill lets go as soon as the client has."""
    async with Site(
        tmp_path, profile=TIMES, prefill={"lease_s": 60.0}, decode={"slots": 1}
    ) as site:
        first = site.start(site.request(max_tokens=200))
        await asyncio.sleep(0.1)
        second = site.request()
        task = site.start(second)
        await asyncio.sleep(0.3)
        rejections = site.d_links[0].of(Busy)
        assert rejections
        assert set(rejections) == {Busy("slots")}
        assert site.held()["prefill_0 leases"] == 1
        task.cancel()
        await asyncio.sleep(0.05)
        assert "prefill_0 leases" not in site.held()
        await first
        await site.idle()


# -------------------------------------------------------------------- messages


def test_messages_of_this_version_are_understood() -> None:
    release = messages.Release("7")
    assert messages.decode_request(messages.encode(release)) == release
    with pytest.raises(errors.InstanceError, match=r"message version 1; .* speaks version 2"):
        messages.decode_request(messages.encode(messages.Release("7", version=1)))
