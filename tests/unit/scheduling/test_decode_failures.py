"""Tests for decodes that fail, fall silent or answer late.

The request continues with another pair, or with the same one once it has recovered. Where none is
left it ends in one clear error, and nothing is held.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from pdserve import errors
from pdserve.rpc.messages import Busy, DecodeRequest, Release, Tokens
from pdserve.scheduling.circuit_breaker import FIRST_S
from pdserve.scheduling.offering import ANSWER_S
from pdserve.scheduling.request import Request, State
from pdserve.scheduling.scheduler import ATTEMPTS
from tests.unit.inprocess import Message, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


def everything(message: Message) -> bool:
    return True


async def fails(site: Site, request: Request, error: type[Exception], match: str) -> None:
    """Check that the request ends in one error."""
    with pytest.raises(error, match=match):
        await site.answer(request)
    assert request.state is State.FAILED
    assert site.total("pdserve_requests_total", outcome="failed") == 1


async def loses_its_decode(site: Site, request: Request, how: str) -> asyncio.Task[list[int]]:
    """Make the decode fail while it decodes: a broken connection, silence, or its end."""
    task = site.start(request)
    await asyncio.sleep(0.5)
    assert request.state is State.DECODING
    number = int(request.decode[-1])
    if how == "breaks":
        site.d_links[number].break_("connection reset")
    elif how == "falls silent":
        site.d_links[number].lose = everything
    else:
        await site.d[number].close()
        await asyncio.sleep(0.001)  # which is reported
        site.d_links[number].broken = "connection refused"
        site.d[number].close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    return task


async def nothing_held(site: Site) -> None:
    """Check that nothing is held after some seconds; a closed instance has no gauges."""
    await asyncio.sleep(2.0)
    assert site.held() == {}


HOW = {
    "breaks": "decode_0: connection reset",
    "falls silent": "decode_0: no answer within",
    "shuts down": "decode_0: connection refused",
}


@pytest.mark.parametrize("how", HOW)
@virtual
async def test_lost_in_mid_stream_another_goes_on(tmp_path: Path, how: str) -> None:
    """vllm#46283, sglang#10110: within the stall's bound, with no token lost or repeated."""
    async with Site(tmp_path, decodes=2, profile=TIMES, stall_s=3.0) as site:
        request = site.request(max_tokens=200)
        task = await loses_its_decode(site, request, how)
        assert await task == site.expected(request)
        assert (request.attempts, request.decode) == (2, "decode_1")
        assert site.total("pdserve_retries_total", phase="decode", reason="error") == 1
        silence = 3.0 if how == "falls silent" else 0.0
        assert request.ended - request.arrived < 2.02 + silence + 0.1
        assert [one.load.open for role in site.instances for one in role] == [0, 0, 0]
        # It may not have received the release: then the unwanted answer runs to its end.
        await nothing_held(site)


@pytest.mark.parametrize("how", HOW)
@virtual
async def test_lost_in_mid_stream_and_no_other_is_left(tmp_path: Path, how: str) -> None:
    """The next prefill holds the KV cache for its lease; then there is one clear error."""
    async with Site(tmp_path, profile=TIMES, stall_s=3.0) as site:
        request = site.request(max_tokens=200)
        task = await loses_its_decode(site, request, how)
        with pytest.raises(
            errors.Unavailable, match=rf"no healthy decode \(.*{HOW[how]}.* within 2"
        ):
            await task
        assert request.state is State.FAILED
        assert 40 < request.output_tokens < 60, "the tokens that were sent stay valid"
        assert request.ended < 0.5 + 3.0 + 2.0 + ANSWER_S
        assert site.total("pdserve_requests_total", outcome="failed") == 1
        await nothing_held(site)


@virtual
async def test_one_that_cannot_be_reached_is_passed_over(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        site.d_links[0].broken = "connection refused"
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert (request.attempts, request.decode) == (1, "decode_1")
        assert request.ended - request.arrived < 0.1
        await site.idle()


@virtual
async def test_none_can_be_reached_for_a_while(tmp_path: Path) -> None:
    """The prefill holds the KV cache meanwhile, so nothing is computed twice."""
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        for link in site.d_links:
            link.broken = "connection refused"
        request = site.request()
        task = site.start(request)
        await asyncio.sleep(1.0)
        assert (request.state, request.output_tokens) == (State.PREFILLED, 1)
        for link in site.d_links:
            link.broken = None
        assert await task == site.expected(request)
        assert request.attempts == len(site.p_engines[0].forwards) == 1
        await site.idle()


@virtual
async def test_none_can_be_reached(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        for link in site.d_links:
            link.broken = "connection refused"
        request = site.request()
        match = r"no healthy decode \(.*decode_.: connection refused\) within 2 s"
        await fails(site, request, errors.Unavailable, match)
        assert request.output_tokens == 1
        assert request.ended - request.first_token == pytest.approx(2.0, abs=1e-3)
        trials = sum(offer.instance == "decode_0" for offer in request.offers)
        assert 3 <= trials <= 4, "after 0.25, 0.5 and 1 s, or a little later"
        await site.idle()


@virtual
async def test_silent_one_is_passed_over_after_a_bound(tmp_path: Path) -> None:
    """vllm#46283, sglang#10110: seconds at most, though the lease and the stall are longer."""
    async with Site(
        tmp_path, decodes=2, profile=TIMES, prefill={"lease_s": 60.0}, stall_s=60.0
    ) as site:
        site.d_links[0].lose = everything
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert request.ended - request.first_token == pytest.approx(ANSWER_S + 0.07, abs=0.01)
        soon = [site.request() for _ in range(4)]
        await asyncio.gather(*map(site.answer, soon))
        assert {one.decode for one in soon} == {"decode_1"}, "it is not tried for a while"
        await site.idle()


@virtual
async def test_failed_step_is_made_up_for(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        requests = [site.request(max_tokens=100) for _ in range(3)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.3)
        site.d_engines[0].failures = [RuntimeError("illegal memory access")]
        assert await asyncio.gather(*tasks) == [site.expected(request) for request in requests]
        assert [request.attempts for request in requests] == [2, 2, 2]
        # The only decode is not tried for a moment, and the three requests count as one failure.
        assert max(request.ended for request in requests) < 0.02 + 1.0 + FIRST_S + 0.1
        assert site.total("pdserve_retries_total", phase="decode") == 3
        await site.idle()


@virtual
async def test_step_that_keeps_failing(tmp_path: Path) -> None:
    """agentic-pd-hybrid ef4dc81: repeated failures are not amplified."""
    async with Site(tmp_path, decodes=6, profile=TIMES) as site:
        for engine in site.d_engines:
            engine.failures = [RuntimeError("illegal memory access")]
        request = site.request()
        await fails(site, request, errors.InstanceError, r"decode_\d: RuntimeError\('illegal mem")
        assert request.attempts == ATTEMPTS
        assert sum(bool(engine.failures) for engine in site.d_engines) == 6 - ATTEMPTS
        after = [site.request() for _ in range(6)]
        for engine in site.d_engines:
            engine.failures.clear()
        answers = await asyncio.gather(*map(site.answer, after))
        assert answers == [site.expected(one) for one in after]
        await site.idle()


@pytest.mark.parametrize("prompt", [20, 3000], ids=["pulled inline", "pulled aside"])
@virtual
async def test_one_that_cannot_take_the_kv_cache_over(tmp_path: Path, prompt: int) -> None:
    """TensorRT-LLM#12542: an error of the transfer is reported at once; no request waits."""
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        site.d_engines[0].refusals = [RuntimeError("copy failed")]
        request = site.request(prompt)
        assert await site.answer(request) == site.expected(request)
        assert (request.attempts, request.decode) == (2, "decode_1")
        assert request.ended - request.first_token < 0.2
        await site.idle()


@virtual
async def test_pair_that_never_hands_over(tmp_path: Path) -> None:
    """TensorRT-LLM#12542, sglang#23272: some attempts with growing pauses, then one error."""
    async with Site(tmp_path, profile=TIMES, prefill={"lease_s": 10.0}) as site:
        site.d_engines[0].refusals = [RuntimeError("copy failed")] * 9
        request = site.request()
        await fails(site, request, errors.InstanceError, "decode_0: copy failed")
        assert request.attempts == ATTEMPTS == len(site.d_links[0].of(DecodeRequest))
        assert request.output_tokens == ATTEMPTS, "each prefill adds one token"
        assert FIRST_S * 7 < request.ended - request.first_token < FIRST_S * 7 + 3
        await site.idle()


@virtual
async def test_a_lost_reply_is_noticed_by_the_next(tmp_path: Path) -> None:
    """A stream with missing tokens is broken off and recovered; no answer lacks a token."""
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
        assert await task == site.expected(request)
        assert lost
        assert request.attempts == 2
        assert request.ended < 2.3
        await site.idle()


@virtual
async def test_slow_steps_are_no_silence(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"decode": {"base_ms": 3000.0}}, stall_s=4.0) as site:
        request = site.request(max_tokens=4)
        assert await site.answer(request) == site.expected(request)
        assert request.attempts == 1
        await site.idle()


# ------------------------------------------------------------------------------------------- leases


@virtual
async def test_lost_release_is_made_up_for_by_the_lease(tmp_path: Path) -> None:
    """TensorRT-LLM#12313: freed on time without new work, and then ready to admit again."""
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


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@virtual
async def test_decode_refuses_what_the_prefill_no_longer_holds(
    tmp_path: Path, always: bool
) -> None:
    """vllm#21570: it is computed anew or ends in an error, never with another prompt's tokens."""
    async with Site(
        tmp_path, profile=TIMES, prefill={"slots": 1, "lease_s": 1.0, "arena_mib": 1}
    ) as site:
        late, arrive = [], site.d_links[0]._arrive

        def detained(call: str, payload: bytes) -> None:
            """The message to the decode is under way for longer than the lease."""
            detain = always or not late
            late.append(call)
            asyncio.get_running_loop().call_later(1.5 * detain, arrive, call, payload)

        site.d_links[0]._arrive = detained  # type: ignore[method-assign]
        request, other = site.request(4000), site.request(8000, max_tokens=1)
        task = site.start(request)
        await asyncio.sleep(1.1)
        assert len(await site.answer(other)) == 1, "the range belongs to another prompt"
        if always:
            with pytest.raises(errors.PDServeError, match=r"KV handle expired|no idle decode"):
                await task
            assert request.state is State.FAILED
        else:
            assert await task == site.expected(request)
            assert request.attempts == 2
        await site.idle(1.6)


@virtual
async def test_rejection_by_the_decode_is_told(tmp_path: Path) -> None:
    """vllm#41269: it is rejected at once, and the prefill's slot is free when the client ends."""
    async with Site(
        tmp_path, profile=TIMES, prefill={"lease_s": 60.0}, decode={"slots": 1}
    ) as site:
        other = site.beside()
        first = other.start(other.request(max_tokens=200))
        await asyncio.sleep(0.1)
        second = site.request()
        task = site.start(second)
        await asyncio.sleep(0.3)
        (busy,) = site.d_links[0].of(Busy)
        assert busy == Busy("slots", mock.ANY), "it is not offered again and again"
        assert site.held()["prefill_0 leases"] == 1
        task.cancel()
        await asyncio.sleep(0.05)
        assert "prefill_0 leases" not in site.held()
        await first
        await site.idle()
