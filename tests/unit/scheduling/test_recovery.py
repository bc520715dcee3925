"""Tests for recovery: another pair continues a running request, and every token is the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc.messages import DecodeRequest, PrefillRequest, Release, Tokens
from pdserve.sampling import Sampling
from pdserve.scheduling.request import RECOVER_S, Chunk, Request, State
from pdserve.scheduling.scheduler import ATTEMPTS
from tests.unit.inprocess import EOS, Link, Site, virtual

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
# One reply for every token.
EACH = {"response_cost_ms": 0.0}


async def interrupted(
    site: Site, request: Request, after: int, how: Callable[[Link], None]
) -> list[Chunk]:
    """Return its chunks; after this many tokens, the given event happens to its decode."""
    chunks, count = [], 0
    async for chunk in site.scheduler.run(request):
        chunks.append(chunk)
        if count < after <= (count := count + len(chunk.ids)) and request.decode:
            how(site.d_links[int(request.decode[-1])])
    return chunks


def breaks(link: Link) -> None:
    """Break the connection for a moment, and the streams on it."""
    link.break_("connection reset")
    link.broken = None


async def heals(site: Site) -> None:
    for role in site.instances:
        for instance in role:
            instance.breaker.good()


def ids(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.ids]


@pytest.mark.parametrize("decodes", [1, 2])
@virtual
async def test_at_every_token(tmp_path: Path, decodes: int) -> None:
    """No token is lost, repeated or different, whichever was the last one received."""
    async with Site(tmp_path, decodes=decodes, profile=TIMES, decode=EACH) as site:
        for position in range(2, 12):
            request = site.request(max_tokens=12)
            chunks = await interrupted(site, request, position, breaks)
            assert ids(chunks) == site.expected(request), f"after {position}"
            assert [bool(chunk.finish_reason) for chunk in chunks].count(True) == 1
            assert chunks[-1].finish_reason == request.finish_reason == "length"
            assert (request.output_tokens, request.attempts) == (12, 2)
            again = site.p_links[0].of(PrefillRequest)[-1]
            assert again.resumed_tokens == position
            assert again.prompt == request.prompt + bytes(request.output[: 4 * position])
            asked = [one for link in site.d_links for one in link.of(DecodeRequest)]
            last = max(asked, key=lambda one: (int(one.id.split("-")[1]), one.resumed_tokens))
            # The prefill that computes the last token needs no hand-over.
            assert (last.resumed_tokens, last.max_tokens) == (
                (position, 12 - position) if position < 11 else (0, 12)
            )
            await heals(site)
        await site.idle(0.2)
        assert site.total("pdserve_requests_total", outcome="length") == 10
        assert site.total("pdserve_ttft_seconds_count") == 10
        assert site.total("pdserve_retries_total", phase="decode") == 10


@pytest.mark.parametrize("times", [2, 3])
@virtual
async def test_again_and_again(tmp_path: Path, times: int) -> None:
    async with Site(tmp_path, prefills=2, decodes=4, profile=TIMES, decode=EACH) as site:
        request = site.request(max_tokens=40)
        task = site.start(request)
        for number in range(1, times + 1):
            while request.output_tokens < 10 * number:
                await asyncio.sleep(0.001)
            breaks(site.d_links[int(request.decode[-1])])
        assert await task == site.expected(request)
        assert request.attempts == 1 + times <= ATTEMPTS
        await site.idle(0.5)


@virtual
async def test_more_often_than_is_tried(tmp_path: Path) -> None:
    """The request ends in one clear error, its last failure, and is not tried again."""
    async with Site(tmp_path, decodes=6, profile=TIMES, decode=EACH) as site:
        request = site.request(max_tokens=100)
        task = site.start(request)
        for number in range(1, ATTEMPTS + 1):
            while request.output_tokens < 10 * number:
                await asyncio.sleep(0.001)
            last = request.decode
            breaks(site.d_links[int(last[-1])])
        with pytest.raises(errors.InstanceError, match=f"{last}: connection reset"):
            await task
        assert (request.state, request.attempts) == (State.FAILED, ATTEMPTS)
        asked = sum(len(link.of(DecodeRequest)) for link in site.d_links)
        await site.idle(1.0)
        assert sum(len(link.of(DecodeRequest)) for link in site.d_links) == asked == ATTEMPTS


@pytest.mark.parametrize("at", [3, 7])
@virtual
async def test_end_of_text_is_where_it_was(tmp_path: Path, at: int) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES, decode=EACH) as site:
        site.model.script = lambda prompt, position: EOS if position == at else 5 + position
        for after in range(2, at + 1):
            request = site.request(max_tokens=50)
            chunks = await interrupted(site, request, after, breaks)
            assert ids(chunks) == [*range(5, 5 + at), EOS]
            assert (request.finish_reason, request.attempts) == ("stop", 2)
            await heals(site)
        ignoring = site.request(max_tokens=at + 3, ignore_eos=True)
        chunks = await interrupted(site, ignoring, at, breaks)
        assert ids(chunks)[at] == EOS
        assert (ignoring.output_tokens, ignoring.finish_reason) == (at + 3, "length")
        await site.idle(0.6)


@virtual
async def test_stop_string_that_is_complete_in_the_second_part(tmp_path: Path) -> None:
    """The reader counts tokens of the whole answer, whichever instance made them."""
    async with Site(tmp_path, decodes=2, profile=TIMES, decode=EACH) as site:
        request, got = site.request(max_tokens=30), 0
        async for chunk in site.scheduler.run(request):
            got += len(chunk.ids)
            if got == 5:
                breaks(site.d_links[int(request.decode[-1])])
            if got == 9:
                request.end_answer(8)
        assert (got, request.output_tokens) == (9, 8)
        assert (request.state, request.finish_reason) == (State.FINISHED, "stop")
        await site.idle(0.4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, seed=7),
        Sampling(temperature=0.8, seed=7, repetition_penalty=1.3, presence_penalty=0.5),
    ],
    ids=["seed", "penalties"],
)
@virtual
async def test_sampling_goes_on(tmp_path: Path, sampling: Sampling) -> None:
    """The next pair knows which tokens are output, for their positions and for penalties."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES, decode=EACH) as site:
        request = site.request(50, max_tokens=20, sampling=sampling)
        chunks = await interrupted(site, request, 10, breaks)
        assert ids(chunks) == site.expected(request)
        first, second = (one for link in site.p_links for one in link.of(PrefillRequest))
        assert first.sampling == second.sampling == sampling
        assert sorted((first.resumed_tokens, second.resumed_tokens)) == [0, 10]
        assert max(len(first.prompt), len(second.prompt)) // 4 == 60
        await site.idle(0.4)


@virtual
async def test_answer_that_nobody_reads_as_it_comes(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        request = site.request(max_tokens=300, stream=False)
        task = site.start(request)
        await asyncio.sleep(1.7)
        site.d_links[0].break_("connection reset")
        assert await task == site.expected(request)
        assert request.attempts == 2
        await site.idle(3.0)


@virtual
async def test_prefill_and_decode_at_once(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        requests = [site.request(max_tokens=60) for _ in range(6)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.3)
        late = [site.request(max_tokens=60) for _ in range(4)]
        tasks += [site.start(request) for request in late]
        await asyncio.sleep(0.01)
        for link in (site.p_links[0], site.d_links[0]):
            link.break_("host is down")
        answers = await asyncio.gather(*tasks)
        assert answers == [site.expected(request) for request in (*requests, *late)]
        assert {one.attempts for one in requests} == {one.attempts for one in late} == {1, 2}
        assert {one.prefill for one in requests if one.attempts == 2} == {"prefill_1"}
        await site.idle(2.5)


@virtual
async def test_fifty_streams_of_one_decode(tmp_path: Path) -> None:
    """All of them continue, within the time that the prefill of their tokens takes."""
    async with Site(
        tmp_path,
        prefills=2,
        decodes=2,
        profile=TIMES,
        prefill={"slots": 16},
        decode={"blocks": 2048},
    ) as site:
        requests = [site.request(max_tokens=100) for _ in range(100)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.5)
        assert {request.state for request in requests} == {State.DECODING}
        site.d_links[0].break_("connection reset")
        assert await asyncio.gather(*tasks) == [site.expected(request) for request in requests]
        lost = [request for request in requests if request.attempts == 2]
        assert 40 <= len(lost) <= 60
        assert max(request.ended for request in requests) < 0.4 + 1.0 + 0.4
        assert site.total("pdserve_requests_total", outcome="length") == 100
        await site.idle(0.3)


@virtual
async def test_who_has_begun_goes_before_those_who_wait(tmp_path: Path) -> None:
    slow = {"prefill": {"base_ms": 100.0}, "decode": {"base_ms": 10.0}}
    async with Site(tmp_path, decodes=2, profile=slow, prefill={"slots": 1}) as site:
        request = site.request(max_tokens=50)
        task = site.start(request)
        await asyncio.sleep(0.2)
        waiting = [site.start(site.request(max_tokens=1, priority=3)) for _ in range(20)]
        await asyncio.sleep(0.05)
        breaks(site.d_links[int(request.decode[-1])])
        assert await task == site.expected(request)
        assert request.ended < 0.1 + 0.5 + 2 * 0.1 + 0.1, "one that had begun, and its own"
        assert sum(one.done() for one in waiting) < 10
        await asyncio.gather(*waiting)
        await site.idle()


@virtual
async def test_nobody_is_let_down_for_a_limit_that_was_kept(tmp_path: Path) -> None:
    """The first token came in time. The next pair has RECOVER_S; after that there is one error."""
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        requests = [site.request(max_tokens=100, ttft_limit_s=0.1) for _ in range(2)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.5)
        site.p_links[0].break_("connection refused")
        breaks(site.d_links[0])
        await asyncio.sleep(10.0)
        site.p_links[0].broken = None
        answers = await asyncio.gather(*tasks)
        assert answers == [site.expected(request) for request in requests]

        request = site.request(max_tokens=100, ttft_limit_s=0.1)
        task = site.start(request)
        await asyncio.sleep(0.5)
        site.p_links[0].break_("connection refused")
        breaks(site.d_links[int(request.decode[-1])])
        with pytest.raises(errors.Late, match=r"no healthy prefill \(.*refused\) within the 30 s"):
            await task
        assert request.state is State.EXPIRED
        assert request.ended - request.arrived == pytest.approx(0.5 + RECOVER_S, abs=0.05)
        await site.idle(2.0)


# ------------------------------------------------------------------------------ cancelled, and late


@virtual
async def test_cancelled_while_it_recovers(tmp_path: Path) -> None:
    """vllm#29906: the cancel wins. At no moment is there another attempt after it."""
    async with Site(
        tmp_path, prefills=2, decodes=2, profile=TIMES, prefill={"slots": 1}, decode=EACH
    ) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (0.001, 0.002)
        states = set()
        for moment in range(0, 60, 2):
            request = site.request(max_tokens=40)
            task = site.start(request)
            while request.output_tokens < 10:
                await asyncio.sleep(0.001)
            breaks(site.d_links[int(request.decode[-1])])
            await asyncio.sleep(moment / 1e3)
            states.add(request.state)
            task.cancel()
            await asyncio.wait([task])
            assert request.state is State.CANCELLED
            await asyncio.sleep(0.005)
            links = (*site.p_links, *site.d_links)
            asked = sum(len(link.of(PrefillRequest) + link.of(DecodeRequest)) for link in links)
            await site.idle(0.4)
            later = sum(len(link.of(PrefillRequest) + link.of(DecodeRequest)) for link in links)
            assert later == asked
            await heals(site)
        assert {State.WAITING, State.PREFILLING, State.PREFILLED, State.DECODING} <= states
        assert site.total("pdserve_requests_total", outcome="cancelled") == 30


@pytest.mark.parametrize("decodes", [1, 2])
@virtual
async def test_late_replies_of_the_first_attempt_are_ignored(tmp_path: Path, decodes: int) -> None:
    """vllm#46283: they come during the second attempt, even from the same decode."""
    async with Site(tmp_path, decodes=decodes, profile=TIMES, stall_s=0.5, decode=EACH) as site:
        request = site.request(max_tokens=60)
        task = site.start(request)
        while request.output_tokens < 20:
            await asyncio.sleep(0.001)
        link = site.d_links[0]
        forward, late = link.arrive_back, []
        link.arrive_back = lambda key, data: late.append((key, data))  # type: ignore[method-assign]
        await asyncio.sleep(0.55)
        link.arrive_back = forward  # type: ignore[method-assign]
        assert len(late) >= 40
        for number, (key, data) in enumerate(late):
            asyncio.get_running_loop().call_later(number * 0.01, forward, key, data)
        assert await task == site.expected(request)
        assert request.attempts == 2
        assert site.total("pdserve_requests_total") == 1
        await site.idle(0.6)


@virtual
async def test_every_attempt_has_calls_of_its_own(tmp_path: Path) -> None:
    """Calls are named by request, attempt and offer; each one is released or ended once."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES, decode=EACH) as site:
        requests = [site.request(max_tokens=30) for _ in range(6)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.15)
        site.d_links[0].lose = lambda message: isinstance(message, Tokens)
        await asyncio.gather(*tasks)
        for links, kind in ((site.p_links, PrefillRequest), (site.d_links, DecodeRequest)):
            calls = [one.id for link in links for one in link.of(kind)]
            assert len(set(calls)) == len(calls)
            released = [one.id for link in links for one in link.of(Release)]
            assert len(set(released)) == len(released)
            assert set(released) <= set(calls)
        await site.idle(0.3)
