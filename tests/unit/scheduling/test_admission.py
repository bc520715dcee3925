"""Tests for admission: which requests are accepted, wait or are refused; slots and TTFT limit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc import messages
from pdserve.rpc.messages import Busy, DecodeRequest, PrefillRequest
from pdserve.sampling import Sampling
from pdserve.scheduling import forwarding
from pdserve.scheduling.request import Answer, Request, State
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

PREFILL_MS, STEP_MS = 20.0, 10.0
TIMES = {"prefill": {"base_ms": PREFILL_MS}, "decode": {"base_ms": STEP_MS}}


async def at(seconds: float) -> None:
    """Sleep until a moment of the loop's clock."""
    await asyncio.sleep(seconds - asyncio.get_running_loop().time())


@virtual
async def test_slot_is_held_until_the_kv_cache_was_pulled(tmp_path: Path) -> None:
    """vllm#41269: decode back-pressure shows as a full prefill, and nowhere else."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}, decode={"slots": 1}) as site:
        # The other gateway's request: this gateway does not know yet that there is no room.
        other = site.beside()
        first = other.start(other.request(max_tokens=50))
        await at(0.1)  # `first` decodes until about 0.52
        second, third = site.request(max_tokens=2), site.request(max_tokens=2)
        tasks = [site.start(second), site.start(third)]
        await at(0.45)
        assert (second.state, third.state) == (State.PREFILLED, State.WAITING)
        assert second.output_tokens == 1, "the client has the first token"
        assert len(site.p_engines[0].forwards) == 2, "the third has not been computed"
        assert not third.offers, "a gateway does not offer to a prefill that it has filled itself"
        await asyncio.gather(first, *tasks)
        assert third.forwarded > second.first_token + 0.3
        await site.idle()


@virtual
async def test_offers_beyond_the_slots_are_rejected_at_once(tmp_path: Path) -> None:
    """vllm#49445: an instance has no queue."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 3}) as site:
        loop = asyncio.get_running_loop()
        answers: list[tuple[float, int, messages.Reply]] = []
        for number in range(8):
            site.p[0].submit(
                PrefillRequest(str(number), site.prompt(10), Sampling(), "", 60_000),
                lambda reply, last, number=number: answers.append((loop.time(), number, reply)),
            )
        assert [(number, reply) for _, number, reply in answers] == [
            (number, Busy("slots")) for number in range(3, 8)
        ]
        assert {moment for moment, *_ in answers} == {loop.time()}
        for number in range(3):
            site.p[0].release(str(number), lambda reply, last: None)
        await site.idle()


@virtual
async def test_a_waiting_request_goes_on_when_a_slot_is_freed(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        first, second = site.request(), site.request()
        answers = await asyncio.gather(site.answer(first), site.answer(second))
        assert answers == [site.expected(first), site.expected(second)]
        # The slot is free when the decode has pulled, which a message reports.
        assert 0 < second.forwarded - first.first_token < 0.003
        asked = [offer.answer for offer in second.offers if offer.instance == "prefill_0"]
        assert asked == [Answer.ACCEPTED]
        await site.idle()


@virtual
async def test_priority_then_arrival(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        blocker = site.start(site.request())
        await at(0.002)
        requests: list[Request] = []
        tasks = []
        for priority in (0, 0, 7, -3, 7, 0):
            requests.append(site.request(priority=priority, max_tokens=2))
            tasks.append(site.start(requests[-1]))
            await asyncio.sleep(0.0005)
        await asyncio.gather(blocker, *tasks)
        order = sorted(range(6), key=lambda i: requests[i].forwarded)
        assert order == [2, 4, 0, 1, 5, 3]
        await site.idle()


@virtual
async def test_newcomers_do_not_overtake_those_who_wait(tmp_path: Path) -> None:
    """dynamo#12864: on-demand forwarding goes in order of arrival, over all prefills."""
    async with Site(tmp_path, prefills=2, profile=TIMES, prefill={"slots": 1}) as site:
        requests = [site.request(max_tokens=2) for _ in range(30)]
        tasks = []
        for request in requests:
            tasks.append(site.start(request))
            await asyncio.sleep(0.003)
        await asyncio.gather(*tasks)
        forwarded = [request.forwarded for request in requests]
        assert forwarded == sorted(forwarded)
        served = [sum(r.prefill == name for r in requests) for name in ("prefill_0", "prefill_1")]
        assert served == [15, 15]
        await site.idle()


@virtual
async def test_ttft_limit_ends_a_wait(tmp_path: Path) -> None:
    """Layr-Labs#381: refused by what is the case, not by an estimate; the error names the limit."""
    slow = {"prefill": {"base_ms": 1000.0}}
    async with Site(tmp_path, profile=slow, prefill={"slots": 1}) as site:
        first = site.start(site.request(max_tokens=1))
        await at(0.1)
        late = site.request(ttft_limit_s=0.25)
        with pytest.raises(errors.Unavailable, match=r"no idle prefill .*TTFT limit of 250 ms"):
            await site.answer(late)
        assert late.state is State.EXPIRED
        assert late.ended - late.arrived == pytest.approx(0.25, abs=1e-3)
        assert not first.done()
        await first
        assert site.total("pdserve_requests_total", outcome="expired") == 1
        await site.idle()


@virtual
async def test_ttft_limit_is_checked_after_prefill_not_during(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"prefill": {"base_ms": 400.0}}) as site:
        late = site.request(ttft_limit_s=0.3)
        with pytest.raises(errors.Unavailable, match=r"no first token .*TTFT limit of 300 ms"):
            await site.answer(late)
        assert late.state is State.EXPIRED
        assert late.ended - late.arrived == pytest.approx(0.4, abs=1e-3)
        assert not site.d_links[0].requests
        await site.idle()


@virtual
async def test_ttft_limit_is_checked_before_an_accepted_prompt_is_computed(tmp_path: Path) -> None:
    slow = {"prefill": {"base_ms": 500.0}}
    async with Site(tmp_path, profile=slow, prefill={"batch_tokens": 1}) as site:
        first = site.start(site.request(max_tokens=1))
        await at(0.01)
        late = site.request(ttft_limit_s=0.3)
        with pytest.raises(errors.Unavailable, match="TTFT limit of 300 ms"):
            await site.answer(late)
        assert late.state is State.EXPIRED
        assert late.attempts == 1, "a prefill that is itself on time is not blamed"
        assert len(site.p_engines[0].forwards) == 1
        await first
        await site.idle()


@virtual
async def test_ttft_limit_that_has_passed_is_not_forwarded_again(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"prefill": {"base_ms": 400.0}}) as site:
        site.p_engines[0].failures = [RuntimeError("out of memory")]
        late = site.request(ttft_limit_s=0.3)
        with pytest.raises(errors.Unavailable, match="TTFT limit of 300 ms"):
            await site.answer(late)
        assert late.state is State.EXPIRED
        assert len(site.p_engines[0].forwards) == 1
        await site.idle()


@virtual
async def test_no_more_than_so_many_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm#49445: the wait queue is bounded."""
    monkeypatch.setattr(forwarding, "MAX_WAITING", 3)
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        requests = [site.request(max_tokens=2) for _ in range(4)]
        tasks = [site.start(request) for request in requests]
        await at(0.01)
        refused = site.request()
        with pytest.raises(errors.Unavailable, match="3 requests wait for a prefill already"):
            await site.answer(refused)
        assert refused.state is State.REJECTED
        await asyncio.gather(*tasks)
        assert site.total("pdserve_requests_total", outcome="rejected") == 1
        assert site.total("pdserve_requests_total", outcome="length") == 4
        await site.idle()


@virtual
async def test_prompt_that_no_arena_can_hold_is_refused(tmp_path: Path) -> None:
    profile = {"context_length": 16_384}
    async with Site(tmp_path, profile=profile, prefill={"arena_mib": 1}) as site:
        huge = site.request(8193)
        with pytest.raises(
            errors.InvalidRequest,
            match="8193 prompt tokens takes 1048704 bytes; prefill_0's arena has 1048576",
        ):
            await site.answer(huge)
        assert huge.state is State.REJECTED
        assert huge.attempts == 1, "it is not tried elsewhere"
        assert await site.answer(site.request(8192, max_tokens=1))
        await site.idle()


@virtual
async def test_request_waits_for_room_in_the_arena(tmp_path: Path) -> None:
    async with Site(
        tmp_path, profile=TIMES, prefill={"arena_mib": 1}, decode={"blocks": 1000}
    ) as site:
        requests = [site.request(5000, max_tokens=2, stream=False) for _ in range(3)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        assert Busy("arena") in site.p_links[0].of(Busy)
        await site.idle()


@virtual
async def test_prefill_with_the_fewest_open_requests_is_asked_first(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=3, decodes=3, profile=TIMES) as site:
        await asyncio.gather(*(site.answer(site.request()) for _ in range(12)))
        assert [len(link.of(PrefillRequest)) for link in site.p_links] == [4, 4, 4]
        assert [len(link.of(DecodeRequest)) for link in site.d_links] == [4, 4, 4]
        await site.idle()


@virtual
async def test_an_idle_prefill_is_fed_until_it_is_full(tmp_path: Path) -> None:
    """Requests that arrive together are computed together, which fills the batch."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 8}) as site:
        requests = [site.request(max_tokens=2) for _ in range(9)]
        await asyncio.gather(*map(site.answer, requests))
        assert [len(jobs) for jobs in site.p_engines[0].forwards] == [8, 1]
        await site.idle()


@virtual
async def test_those_behind_do_not_wait_for_an_acceptance(tmp_path: Path) -> None:
    """If other requests wait, the prefill accepts at once, not with the result or after a delay."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        requests = [site.request(max_tokens=1) for _ in range(12)]
        await asyncio.gather(*map(site.answer, requests))
        waited = [one for one in site.p_links[0].of(PrefillRequest) if one.hurry]
        assert len(waited) >= 10
        accepted = [
            offer.ended - offer.began
            for request in requests[2:]
            for offer in request.offers
            if offer.answer is Answer.ACCEPTED
        ]
        assert max(accepted) < 0.001
        await site.idle()


# ------------------------------------------------------------------------------------------- decode


@virtual
async def test_decodes_that_become_free_together_are_taken_together(tmp_path: Path) -> None:
    """A decode reports that it accepts, so the next request need not wait for first tokens."""
    async with Site(tmp_path, decodes=2, profile=TIMES, decode={"slots": 1}) as site:
        running = [site.start(site.request(max_tokens=40)) for _ in range(2)]
        await at(0.1)
        waiting = [site.request(max_tokens=150, stream=False) for _ in range(2)]
        tasks = [site.start(request) for request in waiting]
        await asyncio.gather(*running)
        freed = asyncio.get_running_loop().time()
        await asyncio.sleep(0.1)
        assert [site.d[i]._batch.calls != {} for i in range(2)] == [True, True]
        await asyncio.gather(*tasks)
        assert all(request.ended - freed < 1.6 for request in waiting)
        await site.idle()


@virtual
async def test_decode_line_is_in_order_of_priority_then_arrival(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 8}, decode={"slots": 1}) as site:
        blocker = site.start(site.request(max_tokens=60))
        await at(0.1)
        requests = [site.request(priority=p, max_tokens=3) for p in (0, 0, 4, -1)]
        tasks = []
        for request in requests:
            tasks.append(site.start(request))
            await asyncio.sleep(0.03)
        late = site.request(priority=0, max_tokens=3)
        await asyncio.gather(blocker, site.answer(late), *tasks)
        order = sorted([*requests, late], key=lambda one: one.ended)
        assert [one.id for one in order] == ["4", "2", "3", "6", "5"]
        await site.idle()


@virtual
async def test_no_idle_decode_within_the_lease(tmp_path: Path) -> None:
    """vllm#41269: a prefill does not hold a KV cache longer than its lease.

    A request that has sent a token continues when there is room.
    """
    async with Site(tmp_path, profile=TIMES, prefill={"lease_s": 0.5}, decode={"slots": 1}) as site:
        other = site.beside()
        running = other.start(other.request(max_tokens=120))
        await at(0.1)
        request = site.request()
        task = site.start(request)
        await at(0.4)
        assert (request.state, request.output_tokens) == (State.PREFILLED, 1)
        await at(0.8)
        assert (request.state, request.output_tokens) == (State.WAITING, 1)
        assert not site.p[0]._slots.held
        assert await task == site.expected(request)
        assert request.attempts == 2
        await running
        await site.idle()


@virtual
async def test_prompt_that_no_decode_can_hold_is_refused(tmp_path: Path) -> None:
    async with Site(tmp_path, decode={"blocks": 4}) as site:
        huge = site.request(60, max_tokens=5)
        with pytest.raises(
            errors.InvalidRequest,
            match="60 prompt tokens and max_tokens 5 need more than the 64 tokens that decode_0",
        ):
            await site.answer(huge)
        assert huge.state is State.FAILED
        assert len(await site.answer(site.request(60, max_tokens=4))) == 4
        await site.idle()
