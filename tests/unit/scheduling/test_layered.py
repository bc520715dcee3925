"""Tests for a decode that pulls layer by layer during the prefill, with failures; in real time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from pdserve import errors
from pdserve.rpc.messages import Accepted, Busy, DecodeRequest, Prefilled
from pdserve.scheduling.request import FINAL, Request, State
from pdserve.scheduling.scheduler import ATTEMPTS
from tests.unit.inprocess import EOS, Site, real

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pdserve.engines.protocol import PrefillJob

# 8 layers of 5 ms.
COMPUTE_MS = 40.0
# Within which an unwanted computation has ended, and what it held is freed.
CLEAN_S = 0.1
SLOW: dict[str, Any] = {
    "layers": 8,
    "prefill": {"base_ms": COMPUTE_MS},
    "decode": {"base_ms": 2.0},
}


def followed(request: Request) -> bool:
    return request.transfer is not None and request.transfer.strategy == "layered"


@real
async def test_transfer_is_hidden_behind_the_computation(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=SLOW, layered=True) as site:
        request = site.request(600, max_tokens=6)
        assert await site.answer(request) == site.expected(request)
        assert followed(request)
        assert request.transfer is not None
        assert request.transfer.nbytes == site.model.layout.nbytes(600)
        ms = request.stats()["ms"]
        assert ms["transfer"] > COMPUTE_MS / 2, "the transfer began with the computation"
        assert ms["exposed"] < ms["transfer"] / 2, "and one layer was left after it"
        [asked] = site.d_links[0].of(DecodeRequest)
        assert asked.first_token is None, "the transfer was not known yet"
        [accepted, *_] = site.p_links[0].of(Accepted)
        assert accepted.handle == asked.handle
        [prefilled] = site.p_links[0].of(Prefilled)
        assert prefilled.handle == b"", "it is reported once"
        assert request.transfer.token == prefilled.token
        await site.idle(CLEAN_S)


@real
async def test_first_token_is_told_before_the_decode_has_all(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=SLOW, layered=True) as site:
        request = site.request(20, max_tokens=4)
        chunks = site.scheduler.run(request)
        first = await anext(chunks)
        assert list(first.ids) == site.expected(request)[:1]
        assert request.state is State.PREFILLED
        rest = [token async for chunk in chunks for token in chunk.ids]
        assert rest == site.expected(request)[1:]
        assert followed(request)
        await site.idle(CLEAN_S)


@real
async def test_several_at_once_and_their_prefixes(tmp_path: Path) -> None:
    """Prompts share forwards, and reuse cached prefixes of the prefill and of the decode."""
    async with Site(tmp_path, profile=SLOW, prefill={"slots": 12}, pulls=12, layered=True) as site:
        system = site.prompt(200)
        requests = [site.request(site.prompt(10 + i, system), max_tokens=5) for i in range(6)]
        requests += [site.request(50 + i, max_tokens=5, stream=i % 2 == 0) for i in range(6)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        assert all(map(followed, requests))
        assert sum(request.cached_tokens > 0 for request in requests) == 5
        await site.idle(CLEAN_S)


@real
async def test_those_who_follow_wait_for_no_thread(tmp_path: Path) -> None:
    """Layered transfers wait for a prefill most of the time, so `pulls` does not count them."""
    async with Site(
        tmp_path,
        profile=SLOW,
        prefill={"slots": 6, "batch_tokens": 4096},
        pulls=2,
        layered=True,
    ) as site:
        requests = [site.request(100 + i, max_tokens=5) for i in range(6)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        strategies = [request.transfer.strategy for request in requests if request.transfer]
        assert strategies == ["layered"] * 6
        await site.idle(CLEAN_S)


@real
async def test_ranks_of_either_side(tmp_path: Path) -> None:
    async with Site(
        tmp_path,
        profile={**SLOW, "kv_heads": 8, "head_dim": 4},
        prefill={"tensor_parallel": 2},
        decode={"tensor_parallel": 4},
        layered=True,
    ) as site:
        requests = [site.request(100 + i, max_tokens=5) for i in range(3)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        assert all(map(followed, requests))
        await site.idle(CLEAN_S)


@pytest.mark.parametrize("why", ["one token", "end of sequence"])
@real
async def test_answers_that_end_with_the_first_token(tmp_path: Path, why: str) -> None:
    """The decode has pulled in vain, and frees what it held."""
    async with Site(tmp_path, profile=SLOW, layered=True) as site:
        if why == "end of sequence":
            site.model.script = lambda prompt, position: EOS
        request = site.request(100, max_tokens=1 if why == "one token" else 5)
        [chunk] = await site.chunks(request)
        assert chunk.finish_reason == ("length" if why == "one token" else "stop")
        assert request.stats()["decode"] == ""
        await site.idle(CLEAN_S)


# ---------------------------------------------------------------------------------- no decode pulls


@real
async def test_all_decodes_are_busy(tmp_path: Path) -> None:
    """The same handle serves for an ordinary transfer."""
    async with Site(tmp_path, profile=SLOW, decode={"slots": 1}, layered=True) as site:
        first = site.beside().request(20, max_tokens=80)
        task = site.besides[0].start(first)
        await asyncio.sleep(0.08)
        second = site.request(20, max_tokens=4)
        assert await site.answer(second) == site.expected(second)
        assert await task == site.expected(first)
        assert second.transfer is not None
        assert second.transfer.strategy == "whole"
        assert Busy("slots", mock.ANY) in site.d_links[0].of(Busy)
        asked = site.d_links[0].of(DecodeRequest)
        assert len({one.handle for one in asked}) == 1
        assert asked[0].first_token is None
        assert asked[-1].first_token == site.expected(second)[0]
        await site.idle(CLEAN_S)


@real
async def test_no_decode_reaches_the_prefill(tmp_path: Path) -> None:
    """A decode that reaches the prefill is chosen; the others have said why they do not."""
    async with Site(tmp_path, decodes=2, profile=SLOW, layered=True) as site:
        site.kv_links.table._refused["prefill_0", "decode_0"] = "no way there"
        for _ in range(2):
            request = site.request(50)
            assert await site.answer(request) == site.expected(request)
            assert request.decode == "decode_1"
        site.kv_links.table._refused["prefill_0", "decode_1"] = "no way there either"
        request = site.request(50)
        with pytest.raises(errors.Unavailable, match=r"no decode reaches prefill_0: .*either"):
            await site.answer(request)
        await site.idle(CLEAN_S)


# ------------------------------------------------------------------------------------------ cancels


@real
async def test_cancelled_at_any_moment_of_the_computation(tmp_path: Path) -> None:
    """vllm#29906, TensorRT-LLM#12313: nothing is left, and no other request is harmed."""
    rng = random.Random(0)
    async with Site(
        tmp_path, profile=SLOW, prefill={"slots": 16, "batch_tokens": 4096}, layered=True
    ) as site:
        states = set()
        for _ in range(3):
            requests = [site.request(40 + i, max_tokens=20) for i in range(12)]
            tasks = [site.start(request) for request in requests]
            for number, task in enumerate(tasks[:-2]):
                moment = (number + rng.random()) * 7e-3

                def cancel(task: asyncio.Task[Any] = task, number: int = number) -> None:
                    states.add(requests[number].state)  # noqa: B023 - of this round
                    task.cancel()

                asyncio.get_running_loop().call_later(moment, cancel)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for request, result in zip(requests, results, strict=True):
                if isinstance(result, asyncio.CancelledError):
                    assert request.state in (State.CANCELLED, State.WAITING)
                else:
                    assert result == site.expected(request)
            assert len([r for r in results if isinstance(r, list)]) >= 2
            await site.idle(CLEAN_S)
        assert {State.PREFILLING, State.DECODING} <= states
        probe = site.request()
        assert await site.answer(probe) == site.expected(probe)
        await site.idle(CLEAN_S)


@real
async def test_a_reader_who_leaves_with_the_first_token(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=SLOW, layered=True) as site:
        chunks = site.scheduler.run(site.request(200, max_tokens=50))
        await anext(chunks)
        await chunks.aclose()
        assert [i.load.open for role in site.instances for i in role] == [0, 0]
        await site.idle(CLEAN_S)


@real
async def test_its_time_limit_passes_while_it_is_followed(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=SLOW, layered=True) as site:
        request = site.request(100, max_tokens=50, time_limit_s=0.02)
        with pytest.raises(errors.Late, match="time limit"):
            await site.answer(request)
        assert request.state is State.EXPIRED
        assert [i.load.open for role in site.instances for i in role] == [0, 0]
        await site.idle(CLEAN_S)


# ----------------------------------------------------------------------------------------- failures


def break_in_mid_compute(site: Site, prefill: int, times: int) -> list[int]:
    """Make this many forwards fail after two layers; return the list of the prompts they had."""
    engine, broken = site.p_engines[prefill], []
    compute = engine.prefill

    async def prefill_or_break(jobs: Sequence[PrefillJob]) -> list[int]:
        if len(broken) == times:
            return await compute(jobs)
        broken.append(len(jobs))
        for job in jobs:
            rows = job.kv[:4].view("<i4")
            rows[:] = job.tokens[None, :, None]
            job.filled(4)
        await asyncio.sleep(0.03)
        raise RuntimeError("out of memory")

    engine.prefill = prefill_or_break  # type: ignore[method-assign]
    return broken


@real
async def test_prefill_that_fails_in_mid_compute(tmp_path: Path) -> None:
    """Another prefill computes the prompt; the lease tells the decode that followed the first."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=SLOW, layered=True) as site:
        broken = break_in_mid_compute(site, 0, 1)
        request = site.request(100, max_tokens=5)
        assert await site.answer(request) == site.expected(request)
        assert (broken, request.attempts, request.prefill) == ([1], 2, "prefill_1")
        assert followed(request)
        assert sum(len(link.of(DecodeRequest)) for link in site.d_links) == 2
        await site.idle(CLEAN_S)


@real
async def test_prefills_that_keep_failing(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=ATTEMPTS, profile=SLOW, layered=True) as site:
        for number in range(ATTEMPTS):
            break_in_mid_compute(site, number, 1)
        request = site.request(100)
        with pytest.raises(errors.InstanceError, match="out of memory"):
            await site.answer(request)
        assert (request.state, request.attempts) == (State.FAILED, ATTEMPTS)
        await site.idle(CLEAN_S)
        again = site.request(100)
        assert await site.answer(again) == site.expected(again)
        await site.idle(CLEAN_S)


@real
async def test_decode_that_cannot_be_reached(tmp_path: Path) -> None:
    """Another decode follows instead, and the prefill computes once."""
    async with Site(tmp_path, decodes=2, profile=SLOW, layered=True) as site:
        site.d_links[0].broken = "connection refused"
        request = site.request(100)
        assert await site.answer(request) == site.expected(request)
        assert (request.attempts, request.decode) == (1, "decode_1")
        assert followed(request)
        await site.idle(0.3)


@real
async def test_decode_that_is_gone_in_mid_compute(tmp_path: Path) -> None:
    """The client gets the first token all the same, and another pair continues from there."""
    async with Site(tmp_path, decodes=2, profile=SLOW, layered=True) as site:
        request = site.request(100, max_tokens=5)
        task = site.start(request)
        await asyncio.sleep(0.02)
        assert request.state is State.PREFILLING
        gone = next(i for i, link in enumerate(site.d_links) if link.of(DecodeRequest))
        site.d_links[gone].break_("connection reset")
        assert await task == site.expected(request)
        assert (request.attempts, request.decode) == (2, f"decode_{1 - gone}")
        await site.idle(0.3)  # it never got the release: its answer runs to its end


@real
async def test_decode_that_is_gone_in_mid_stream(tmp_path: Path) -> None:
    """The other decode follows the second prefill like the first one did."""
    async with Site(tmp_path, decodes=2, profile=SLOW, layered=True) as site:
        request = site.request(100, max_tokens=60)
        task = site.start(request)
        while request.output_tokens < 20:
            await asyncio.sleep(0.001)
        first = request.decode
        site.d_links[int(first[-1])].break_("connection reset")
        assert await task == site.expected(request)
        assert request.attempts == 2
        assert {first, request.decode} == {"decode_0", "decode_1"}
        assert followed(request)
        [asked] = site.d_links[int(request.decode[-1])].of(DecodeRequest)
        assert asked.first_token is None
        assert len(asked.prompt) // 4 == 100 + asked.resumed_tokens
        await site.idle(0.3)


@real
async def test_decode_that_cannot_take_the_kv_cache_over(tmp_path: Path) -> None:
    """TensorRT-LLM#12542: an error of the transfer is reported at once; no request waits."""
    async with Site(tmp_path, decodes=2, profile=SLOW, layered=True) as site:
        site.d_engines[0].refusals = [RuntimeError("copy failed")]
        request = site.request(100)
        assert await site.answer(request) == site.expected(request)
        assert (request.attempts, request.decode) == (2, "decode_1")
        assert request.ended - request.first_token < 0.3
        await site.idle(CLEAN_S)


@real
async def test_every_request_ends_once_whatever_happens(tmp_path: Path) -> None:
    """Messages are lost, engines fail, requests are cancelled; every answer that comes is exact."""
    rng = random.Random(3)
    async with Site(
        tmp_path,
        prefills=2,
        decodes=2,
        profile={"layers": 4, "prefill": {"base_ms": 16.0}, "decode": {"base_ms": 1.0}},
        prefill={"lease_s": 1.0, "slots": 8},
        decode={"slots": 6},
        layered=True,
        seed=3,
    ) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (0.0, 0.002)
        requests: list[Request] = []

        async def client() -> None:
            request = site.request(rng.randrange(1, 300), max_tokens=rng.randrange(1, 30))
            requests.append(request)
            patience = rng.expovariate(1 / 0.3)
            with contextlib.suppress(asyncio.TimeoutError):
                answer = await asyncio.wait_for(site.answer(request), patience)
                assert answer == site.expected(request)

        clients = []
        for number in range(80):
            clients.append(asyncio.create_task(client()))
            if number % 17 == 5:
                rng.choice(site.p_engines).failures.append(RuntimeError("forward"))
            if number % 23 == 11:
                rng.choice(site.d_engines).refusals.append(RuntimeError("copy"))
            await asyncio.sleep(rng.expovariate(1 / 0.012))
        await asyncio.gather(*clients)
        for engine in (*site.p_engines, *site.d_engines):
            engine.failures.clear()
        for decode in site.d_engines:
            decode.refusals.clear()
        await site.idle(0.5)
        assert all(request.state in FINAL for request in requests)
        ends = [request.state for request in requests]
        assert min(ends.count(s) for s in (State.FINISHED, State.CANCELLED)) > 10, ends
        assert State.FAILED not in ends
        assert sum(request.attempts > 1 for request in requests) > 1
        assert sum(map(followed, requests)) > 20
        probe = site.request()
        assert await site.answer(probe) == site.expected(probe)
        await site.idle(CLEAN_S)
