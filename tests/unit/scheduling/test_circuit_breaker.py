"""Tests for circuit breakers of instances and of pairs: closed, open, half-open, closed again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.kvcache.handle import KVHandle
from pdserve.rpc.messages import DecodeRequest, PrefillRequest
from pdserve.scheduling.circuit_breaker import FIRST_S, LONGEST_S, CircuitBreaker, RetryBudget
from pdserve.scheduling.request import State
from pdserve.scheduling.scheduler import ATTEMPTS
from tests.unit.fake_instances import FakeInstance, Gateway
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


def opened(now: float, times: int = 1) -> CircuitBreaker:
    """Return a breaker that has failed this often, each time as soon as it was tried again."""
    breaker = CircuitBreaker()
    breaker.failed(now)
    for _ in range(times - 1):
        breaker.failed(breaker.reopens)
    return breaker


def test_states() -> None:
    breaker = CircuitBreaker()
    assert breaker.closed
    assert breaker.allows(now=5.0, trying=7), "closed: any number of requests"
    breaker.failed(5.0)
    assert not breaker.closed
    assert not breaker.allows(5.0 + FIRST_S - 1e-3, trying=0), "open: no request"
    assert breaker.allows(5.0 + FIRST_S, trying=0), "half-open: one request"
    assert not breaker.allows(5.0 + FIRST_S, trying=1)
    breaker.good()
    assert breaker.closed
    assert breaker.allows(5.0 + FIRST_S, trying=7)


def test_pauses_double_up_to_a_bound_and_start_anew() -> None:
    breaker, pauses, now = CircuitBreaker(), [], 0.0
    for _ in range(9):
        breaker.failed(now)
        pauses.append(breaker.reopens - now)
        now = breaker.reopens
    assert pauses == pytest.approx([0.25, 0.5, 1, 2, 4, 8, 15, 15, 15])
    assert pauses[0] == FIRST_S
    assert pauses[-1] == pytest.approx(LONGEST_S)
    breaker.good()
    breaker.failed(now)
    assert breaker.reopens == now + FIRST_S


def test_many_failures_of_one_outage_are_one() -> None:
    """When a connection breaks, each of its streams reports a failure."""
    breaker = opened(1.0)
    for moment in (1.0, 1.1, 1.2):
        breaker.failed(moment)
    assert breaker.reopens == 1.0 + FIRST_S
    breaker.failed(1.0 + FIRST_S)
    assert breaker.reopens == 1.0 + FIRST_S + 2 * FIRST_S


def test_budget_is_a_share_of_what_comes() -> None:
    """vllm#29906: retries do not amplify an overload."""
    budget = RetryBudget()
    spent = sum(budget.spend() for _ in range(1000))
    assert spent == RetryBudget.MOST
    for _ in range(100):
        budget.earn()
    assert 19 <= sum(budget.spend() for _ in range(1000)) <= 20 == round(100 * RetryBudget.SHARE)
    for _ in range(100_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(1000)) == RetryBudget.MOST, "and no more is saved up"


# -------------------------------------------------------------------------------------- an instance


@virtual
async def test_one_trial_at_a_time() -> None:
    """One of many waiting requests tries the instance, and the others wait for the result."""
    fake = FakeInstance(4)
    gateway = Gateway([fake], hold_s=1.0)
    [instance] = gateway.instances
    instance.failed()
    fake.lose_all()
    tasks = [gateway.start(gateway.request()) for _ in range(20)]
    seen = 0
    for _ in range(100):
        await asyncio.sleep(0.05)
        assert instance.load.offers <= 1
        seen += instance.load.offers
    assert seen > 40, "a trial was under way most of the time"
    assert fake.messages[PrefillRequest] <= 3
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@virtual
async def test_it_is_left_alone_and_found_well(tmp_path: Path) -> None:
    """sglang#10110, sglang#9266: it recovers without a restart, and without a burst of retries."""
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        site.p_links[0].broken = "connection refused"
        requests = [site.request(max_tokens=2) for _ in range(300)]
        for request in requests:
            assert await site.answer(request) == site.expected(request)
        assert {request.prefill for request in requests} == {"prefill_1"}
        took = asyncio.get_running_loop().time()
        trials = sum(offer.instance == "prefill_0" for one in requests for offer in one.offers)
        assert 4 <= trials <= 7, f"after 0.25, 0.5, 1, 2, 4, ... s; in {took} s"
        site.p_links[0].broken = None
        await asyncio.sleep(LONGEST_S)
        pairs = [[site.request(), site.request()] for _ in range(2)]
        for pair in pairs:
            await asyncio.gather(*map(site.answer, pair))
        assert {one.prefill for one in pairs[1]} == {"prefill_0", "prefill_1"}
        assert site.instances[0][0].breaker.closed
        await site.idle()


@virtual
async def test_one_bad_prompt_closes_nothing_for_long(tmp_path: Path) -> None:
    """The request fails everywhere, and counts its own attempts; others continue at once."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        poison = site.prompt(40)
        for engine in site.p_engines:
            compute = engine.prefill

            async def prefill(jobs, compute=compute):  # type: ignore[no-untyped-def]
                if any(job.tokens.tobytes() == poison for job in jobs):
                    raise RuntimeError("illegal memory access")
                return await compute(jobs)

            engine.prefill = prefill  # type: ignore[method-assign]
        bad = site.request(poison)
        task = site.start(bad)
        await asyncio.sleep(0.3)
        others = [site.request() for _ in range(4)]
        answers = await asyncio.gather(*map(site.answer, others))
        assert answers == [site.expected(one) for one in others]
        assert max(one.ended - one.arrived for one in others) < 2.5
        with pytest.raises(errors.InstanceError, match="illegal memory access"):
            await task
        assert bad.attempts == ATTEMPTS
        await site.idle()


# ------------------------------------------------------------------------------------------- a pair


@virtual
async def test_pair_that_cannot_hand_over_is_avoided_and_its_two_are_not(tmp_path: Path) -> None:
    """sglang#23272, sglang#12688: each of the two continues with other partners."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        receiver = site.receivers[0]
        opened = receiver.open

        def refuse(data: bytes) -> KVHandle:
            handle = opened(data)
            if receiver.peers.find(handle.epoch).holder.name == "prefill_0":
                raise errors.HandleError("the link between them is down")
            return handle

        receiver.open = refuse  # type: ignore[method-assign]
        requests = [site.request() for _ in range(16)]
        for first, second in zip(requests[::2], requests[1::2], strict=True):
            answers = await asyncio.gather(site.answer(first), site.answer(second))
            assert answers == [site.expected(first), site.expected(second)]
        used = {(one.prefill, one.decode) for one in requests}
        assert ("prefill_0", "decode_0") not in used
        assert {("prefill_0", "decode_1"), ("prefill_1", "decode_0")} <= used
        tried = sum(one.attempts - 1 for one in requests)
        assert 1 <= tried <= 3, "it is tried now and then, after a pause that doubles"
        await site.idle()


@virtual
async def test_budget_of_retries_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm#29906: when much fails at once, most of it is tried only once."""
    monkeypatch.setattr(RetryBudget, "MOST", 5.0)
    monkeypatch.setattr(RetryBudget, "SHARE", 0.0)
    async with Site(tmp_path, decodes=2, profile=TIMES, prefill={"slots": 16}) as site:
        requests = [site.request(max_tokens=50) for _ in range(12)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.3)
        for engine in site.d_engines:
            engine.failures = [RuntimeError("illegal memory access")]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [one for one in results if isinstance(one, errors.InstanceError)]
        assert len(failed) == 12 - 5
        assert sum(request.state is State.FINISHED for request in requests) == 5
        assert sum(len(link.of(DecodeRequest)) for link in site.d_links) == 12 + 5
        await site.idle()


# ---------------------------------------------------------------------------------------- the group


@virtual
async def test_healthy_while_each_role_has_one_that_may_be_tried(tmp_path: Path) -> None:
    """TensorRT-LLM#12313: healthy means that a request could be served, not just running."""
    async with Site(tmp_path, prefills=2, decodes=1, profile=TIMES) as site:
        prefills, [decode] = site.instances
        assert site.scheduler.healthy
        prefills[0].failed()
        assert site.scheduler.healthy
        prefills[1].failed()
        assert not site.scheduler.healthy
        await asyncio.sleep(FIRST_S)
        assert site.scheduler.healthy, "they may be tried again"
        decode.failed()
        assert not site.scheduler.healthy
        await asyncio.sleep(FIRST_S)
        assert await site.answer(site.request())
        assert decode.breaker.closed
        assert site.scheduler.healthy
