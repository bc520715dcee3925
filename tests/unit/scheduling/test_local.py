"""Tests for local prefill: a decode computes short prompts, and any while prefills are busy."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc.messages import Busy, DecodeRequest, PrefillRequest, Tokens
from pdserve.sampling import Sampling
from pdserve.scheduling.request import State
from tests.unit.inprocess import EOS, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
SHORT = 32


@virtual
async def test_off_is_never(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        requests = [site.request(1), *(site.request() for _ in range(5))]
        await asyncio.gather(*map(site.answer, requests))
        assert all(request.prefill == "prefill_0" for request in requests)
        assert all(one.handle for one in site.d_links[0].of(DecodeRequest))
        await site.idle()


@pytest.mark.parametrize("stream", [True, False])
@virtual
async def test_whole_on_a_decode(tmp_path: Path, stream: bool) -> None:
    """No prefill is asked, and nothing is transferred; the answer is the same."""
    async with Site(tmp_path, profile=TIMES, gateway={"local": "on"}) as site:
        request = site.request(50, stream=stream)
        assert await site.answer(request) == site.expected(request)
        assert [state for _, state in request.history] == [State.DECODING, State.FINISHED]
        assert request.first_token - request.arrived == pytest.approx(0.02, abs=0.001)
        stats = request.stats()
        assert (stats["prefill"], stats["decode"], stats["attempts"]) == ("", "decode_0", 1)
        assert (stats["kv"]["bytes"], stats["kv"]["transport"]) == (0, "local")
        assert stats["ms"]["prefill"] == pytest.approx(20.0, abs=0.1)
        [asked] = site.d_links[0].of(DecodeRequest)
        assert (asked.handle, asked.first_token, asked.max_tokens) == (b"", None, 8)
        assert not site.p_links[0].requests
        await site.idle()


@virtual
async def test_prefix_that_the_decode_has(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, gateway={"local": "on"}) as site:
        first = site.request(100)
        await site.answer(first)
        again = site.request(first.prompt + site.prompt(30))
        assert await site.answer(again) == site.expected(again)
        assert 64 <= again.stats()["cached_tokens"] <= 107
        await site.idle()


@pytest.mark.parametrize("how", ["one token", "end of text"])
@virtual
async def test_answers_of_one_token(tmp_path: Path, how: str) -> None:
    async with Site(tmp_path, profile=TIMES, gateway={"local": "on"}) as site:
        if how == "end of text":
            site.model.script = lambda prompt, position: EOS
        request = site.request(max_tokens=1 if how == "one token" else 9)
        [chunk] = await site.chunks(request)
        assert chunk.finish_reason == ("length" if how == "one token" else "stop")
        await site.idle()


# -------------------------------------------------------------------------- automatic local prefill


@virtual
async def test_short_prompts_are_not_worth_the_way(tmp_path: Path) -> None:
    async with Site(
        tmp_path, profile=TIMES, gateway={"local": "auto", "local_tokens": SHORT}
    ) as site:
        short, longer = site.request(SHORT), site.request(SHORT + 1)
        for request in (short, longer):
            assert await site.answer(request) == site.expected(request)
        assert (short.prefill, longer.prefill) == ("", "prefill_0")
        assert len(site.p_links[0].of(PrefillRequest)) == 1
        await site.idle()


@virtual
async def test_cached_prompts_are_not_worth_the_way(tmp_path: Path) -> None:
    """The next turn of a conversation goes to the decode that has the previous turns."""
    async with Site(
        tmp_path, decodes=2, profile=TIMES, gateway={"local": "auto", "local_tokens": SHORT}
    ) as site:
        first, other = site.request(200), site.request(200)
        for request in (first, other):
            assert await site.answer(request) == site.expected(request)
        assert {first.decode, other.decode} == {"decode_0", "decode_1"}
        for before in (first, other):
            turn = site.request(before.so_far + site.prompt(10))
            assert await site.answer(turn) == site.expected(turn)
            assert (turn.prefill, turn.decode, turn.cached_tokens) == ("", before.decode, 192)
        stranger = site.request(first.so_far + site.prompt(10), salt="another")
        assert await site.answer(stranger) == site.expected(stranger)
        assert stranger.prefill == "prefill_0", (
            "a tenant that does not share its prefix cannot use it"
        )
        await site.idle()


@virtual
async def test_all_prefills_are_busy_and_a_decode_is_idle(tmp_path: Path) -> None:
    """sglang#15070: when the prefills are congested, an idle decode computes the prompt."""
    slow = {"prefill": {"base_ms": 500.0}, "decode": {"base_ms": 1.0}}
    waits = {}
    for local in ("off", "auto"):
        async with Site(
            tmp_path,
            prefills=2,
            decodes=2,
            profile=slow,
            prefill={"slots": 1},
            gateway={"local": local, "local_tokens": 0},
        ) as site:
            requests = [site.request(200, max_tokens=2) for _ in range(4)]
            tasks = []
            for request in requests:
                tasks.append(site.start(request))
                await asyncio.sleep(0.01)
            assert await asyncio.gather(*tasks) == [site.expected(one) for one in requests]
            waits[local] = [round(one.first_token - one.arrived, 2) for one in requests]
            if local == "auto":
                assert [one.prefill for one in requests[:2]] == ["prefill_0", "prefill_1"]
                assert [one.prefill for one in requests[2:]] == ["", ""]
                assert {one.decode for one in requests[2:]} == {"decode_0", "decode_1"}
            await site.idle()
    assert max(waits["auto"]) == pytest.approx(0.5, abs=0.02)
    assert max(waits["off"]) > 0.95


@virtual
async def test_a_decode_that_has_something_to_do_is_left_alone(tmp_path: Path) -> None:
    """A long prompt would stall the decode's streams, so it waits for a prefill."""
    async with Site(
        tmp_path,
        profile=TIMES,
        prefill={"slots": 1},
        gateway={"local": "auto", "local_tokens": 0},
    ) as site:
        stream = site.start(site.request(max_tokens=100))
        await asyncio.sleep(0.1)
        requests = [site.request(200, max_tokens=2) for _ in range(4)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(one) for one in requests]
        assert {one.prefill for one in requests} == {"prefill_0"}
        assert not stream.done()
        await stream
        await site.idle()


@virtual
async def test_what_must_be_reproducible_goes_over_a_prefill(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, gateway={"local": "on"}) as site:
        seeded = site.request(sampling=Sampling(temperature=0.9, seed=3))
        greedy = site.request(sampling=Sampling(seed=3))
        for request in (seeded, greedy):
            assert await site.answer(request) == site.expected(request)
        assert (seeded.prefill, greedy.prefill) == ("prefill_0", "")
        await site.idle()


@virtual
async def test_decodes_that_are_full_refuse_and_a_prefill_takes_it(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"slots": 2}, gateway={"local": "on"}) as site:
        other = site.beside()
        streams = [other.start(other.request(max_tokens=50)) for _ in range(2)]
        await asyncio.sleep(0.1)
        request = site.request(max_tokens=4)
        assert await site.answer(request) == site.expected(request)
        assert request.prefill == "prefill_0"
        assert site.d_links[0].of(Busy)
        await asyncio.gather(*streams)
        after = site.request()
        await site.answer(after)
        assert after.prefill == "", "the refusal does not count as a failure"
        await site.idle()


@virtual
async def test_decode_that_cannot_be_reached(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES, gateway={"local": "on"}) as site:
        site.d_links[0].broken = "connection refused"
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert (request.prefill, request.decode, request.attempts) == ("", "decode_1", 1)
        await site.idle()


# ------------------------------------------------------------------------ failures, limits, cancels


@pytest.mark.parametrize("after", [0, 1, 5])
@virtual
async def test_lost_decode_is_made_up_for(tmp_path: Path, after: int) -> None:
    """The decode is lost while it computes the prompt, and in the middle of the stream."""
    async with Site(
        tmp_path,
        decodes=2,
        profile=TIMES,
        decode={"response_cost_ms": 0.0},
        gateway={"local": "on"},
    ) as site:
        request = site.request(60, max_tokens=12)
        task = site.start(request)
        await asyncio.sleep(0.01)
        while request.output_tokens < after:
            await asyncio.sleep(0.001)
        site.d_links[0].break_("connection reset")
        assert await task == site.expected(request)
        assert (request.attempts, request.prefill, request.decode) == (2, "", "decode_1")
        [again] = site.d_links[1].of(DecodeRequest)
        assert (again.resumed_tokens, again.max_tokens) == (after, 12 - after)
        await site.idle(0.3)


@virtual
async def test_recovery_may_change_the_way(tmp_path: Path) -> None:
    """A prefill computes first and then a decode alone, if the rest is short; or vice versa."""
    async with Site(
        tmp_path, decodes=2, profile=TIMES, gateway={"local": "auto", "local_tokens": 25}
    ) as site:
        request = site.request(20, max_tokens=30)
        task = site.start(request)
        while request.output_tokens < 10:
            await asyncio.sleep(0.001)
        assert request.prefill == ""
        site.d_links[int(request.decode[-1])].break_("connection reset")
        assert await task == site.expected(request)
        assert request.prefill == "prefill_0"
        await site.idle(0.5)


@virtual
async def test_lost_reply_is_noticed(tmp_path: Path) -> None:
    async with Site(
        tmp_path, profile=TIMES, decode={"response_cost_ms": 0.0}, gateway={"local": "on"}
    ) as site:
        lost: list[object] = []

        def lose_the_first(message: object) -> bool:
            if lost or not isinstance(message, Tokens):
                return False
            lost.append(message)
            return True

        site.d_links[0].lose = lose_the_first
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert request.attempts == 2
        await site.idle()


@virtual
async def test_first_token_that_comes_too_late(tmp_path: Path) -> None:
    slow = {"prefill": {"base_ms": 400.0}, "decode": {"base_ms": 10.0}}
    async with Site(tmp_path, profile=slow, gateway={"local": "on"}) as site:
        late = site.request(ttft_limit_s=0.3)
        with pytest.raises(errors.Late, match=r"no first token .*TTFT limit of 300 ms"):
            await site.answer(late)
        assert (late.state, late.output_tokens) == (State.EXPIRED, 0)
        await site.idle(0.3)


@virtual
async def test_prompt_that_no_decode_can_hold(tmp_path: Path) -> None:
    async with Site(tmp_path, decode={"blocks": 4}, gateway={"local": "on"}) as site:
        huge = site.request(60, max_tokens=5)
        with pytest.raises(errors.InvalidRequest, match="need more than the 64 tokens"):
            await site.answer(huge)
        assert huge.attempts == 1
        await site.idle()


@virtual
async def test_cancelled_at_any_time(tmp_path: Path) -> None:
    """vllm#29906: nothing is left behind, and the prompt is not computed any further."""
    async with Site(tmp_path, profile=TIMES, gateway={"local": "on"}) as site:
        states = set()
        for moment in range(0, 60, 3):
            request = site.request(30, max_tokens=50)
            task = site.start(request)
            await asyncio.sleep(moment / 1e3)
            states.add(request.state)
            task.cancel()
            await asyncio.wait([task])
            assert request.state in (State.CANCELLED, State.WAITING)
            await site.idle(0.05)
        assert {State.WAITING, State.DECODING} <= states


@virtual
async def test_many_both_ways(tmp_path: Path) -> None:
    """Requests are short, long, reproducible or cancelled; all answers are exact."""
    rng = random.Random(8)
    async with Site(
        tmp_path,
        prefills=2,
        decodes=2,
        profile={"prefill": {"per_token_ms": 0.1}, "decode": {"base_ms": 2.0}},
        prefill={"slots": 2},
        decode={"slots": 12},
        gateway={"local": "auto", "local_tokens": 60},
        seed=8,
    ) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (0.0, 0.002)
        requests, tasks = [], []
        for number in range(200):
            sampling = Sampling(temperature=1.0, seed=number) if number % 7 == 0 else Sampling()
            request = site.request(
                rng.randrange(1, 300), max_tokens=rng.randrange(1, 30), sampling=sampling
            )
            requests.append(request)
            tasks.append(site.start(request))
            if rng.random() < 0.1:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.1), tasks[-1].cancel)
            await asyncio.sleep(rng.expovariate(1 / 0.008))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for request, result in zip(requests, results, strict=True):
            if not isinstance(result, asyncio.CancelledError):
                assert result == site.expected(request)
        alone = [one for one in requests if one.decode and not one.prefill]
        assert 20 < len(alone) < 150
        assert not any(one.sampling.reproducible for one in alone)
        await site.idle()
