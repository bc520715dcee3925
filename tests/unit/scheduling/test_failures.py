"""Tests for prefills that fail, fall silent or answer late: another one serves, or one error."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc import messages
from pdserve.rpc.messages import Accepted, Failed, Prefilled, Release
from pdserve.scheduling.offering import ANSWER_S
from pdserve.scheduling.request import Request, State
from pdserve.scheduling.scheduler import ATTEMPTS
from tests.unit.inprocess import Message, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


def everything(message: Message) -> bool:
    return True


async def expires(site: Site, request: Request, match: str) -> None:
    """Check that the request expires, in one error that names what it waited for."""
    with pytest.raises(errors.Late, match=match):
        await site.answer(request)
    assert request.state is State.EXPIRED
    assert site.total("pdserve_requests_total", outcome="expired") == 1


async def fails(site: Site, request: Request, match: str) -> None:
    """Check that the request ends in one InstanceError."""
    with pytest.raises(errors.InstanceError, match=match):
        await site.answer(request)
    assert request.state is State.FAILED


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
    """The other prefill is chosen, though the failed one has fewer open requests by then."""
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
    """vllm#29906, agentic-pd-hybrid ef4dc81: a failure that happens everywhere is not amplified."""
    async with Site(tmp_path, prefills=ATTEMPTS + 2, profile=TIMES) as site:
        for engine in site.p_engines:
            engine.failures = [RuntimeError("out of memory")]
        request = site.request()
        await fails(site, request, r"prefill_3: RuntimeError\('out of memory'\)")
        assert request.attempts == ATTEMPTS
        assert sum(len(engine.forwards) for engine in site.p_engines) == ATTEMPTS
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
    """The request waits until its limit, and the error says why no prefill was reached."""
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        for link in site.p_links:
            link.broken = "connection refused"
        request = site.request(ttft_limit_s=3.0)
        await expires(
            site, request, r"no healthy prefill \(.*prefill_\d: connection refused\) within"
        )
        assert request.ended - request.arrived == pytest.approx(3.0, abs=1e-3)
        assert len(request.offers) <= 10, "with growing pauses"
        await site.idle()


@virtual
async def test_a_prefill_comes_back_while_requests_wait(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        for link in site.p_links:
            link.broken = "connection refused"
        requests = [site.request() for _ in range(6)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.8)
        assert {request.state for request in requests} == {State.WAITING}
        for link in site.p_links:
            link.broken = None
        assert await asyncio.gather(*tasks) == [site.expected(request) for request in requests]
        assert max(request.forwarded for request in requests) < 0.8 + 1.0, "the longest pause"
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
        assert max(one.ended - one.arrived for one in soon) < 0.5, "it is not tried for a while"
        site.p_links[0].lose = lambda message: False
        await asyncio.sleep(5)
        later = [site.request() for _ in range(2)]
        await asyncio.gather(*map(site.answer, later))
        assert {one.prefill for one in later} == {"prefill_0", "prefill_1"}, "and then tried again"
        await site.idle()


@virtual
async def test_silent_prefill_does_not_hold_up_those_who_wait_for_another(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES, prefill={"slots": 1}) as site:
        site.p_links[0].lose = everything
        await site.answer(site.request())  # this request finds out that it is silent
        requests = [site.request(max_tokens=2) for _ in range(40)]
        await asyncio.gather(*map(site.answer, requests))
        assert max(one.ended - one.arrived for one in requests) < 40 * 0.06
        await site.idle()


@virtual
async def test_all_prefills_silent(tmp_path: Path) -> None:
    """TensorRT-LLM#15363, sglang#10110: offers go on with growing pauses until the limit."""
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        for link in site.p_links:
            link.lose = everything
        request = site.request(ttft_limit_s=10.0)
        await expires(site, request, r"no (healthy prefill|answer of prefill)")
        assert request.ended - request.arrived == pytest.approx(10.0, abs=1e-3)
        assert len(request.offers) <= 8
        await site.idle()


@virtual
async def test_silent_prefill_and_short_limits(tmp_path: Path) -> None:
    """dynamo#13088: a prefill that never answers looks idle; only a few requests are lost to it."""
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        site.p_links[0].lose = everything
        requests = [site.request(ttft_limit_s=0.5, max_tokens=2) for _ in range(400)]
        tasks = []
        for request in requests:
            tasks.append(site.start(request))
            await asyncio.sleep(0.03)
        await asyncio.wait(tasks)
        expired = [request for request in requests if request.state is State.EXPIRED]
        # At first those of its slots; then one for each trial, with pauses that double.
        assert len(expired) <= 4 + 6
        for task in tasks:
            task.exception()
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
    """tensorrtllm_backend#653: a version mismatch is one clear error, not a hang."""
    async with Site(tmp_path, profile=TIMES) as site:
        arrive = site.p_links[0].arrive_back
        site.p_links[0].arrive_back = (  # type: ignore[method-assign]
            lambda key, _: arrive(key, b"\x91\x92\xa1a\x81\xa4type\xa5later")
        )
        request = site.request(ttft_limit_s=0.1)
        await expires(site, request, "malformed message between scheduler and instance")
        await site.idle(2.1)


# ----------------------------------------------------------------------------------------- messages


def test_messages_of_this_version_are_understood() -> None:
    release = messages.Release("7")
    assert messages.decode_request(messages.encode(release)) == release
    with pytest.raises(errors.InstanceError, match=r"message version 1; .* speaks version 7"):
        messages.decode_request(messages.encode(messages.Release("7", version=1)))
