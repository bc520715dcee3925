"""Tests for cancels at any moment: nothing is left behind, and no other request is harmed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from pdserve import errors
from pdserve.scheduling.request import FINAL, Request, State
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


async def cancelled(task: asyncio.Task[Any]) -> bool:
    """Cancel the task and wait; return whether the cancel came before its end."""
    task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        return True
    task.result()
    return False


async def steps(count: int) -> None:
    """Let the loop run for this number of turns, while no time passes."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", [20, 3000], ids=["pulled inline", "pulled aside"])
@virtual
async def test_after_any_number_of_loop_steps(tmp_path: Path, stream: bool, prompt: int) -> None:
    """vllm#29906, TensorRT-LLM#12313: at every step of its life; the engine does not wait."""
    async with Site(tmp_path, profile={"speed": 0}) as site:
        states, held = set(), set()
        for count in range(1, 1000):  # before its first step it is no request yet
            request = site.request(prompt, stream=stream, max_tokens=5)
            task = site.start(request)
            await steps(count)
            states.add(request.state)
            held.update(site.held())
            came_first = await cancelled(task)
            assert request.state is (State.CANCELLED if came_first else State.FINISHED)
            await asyncio.sleep(0.03)  # one sweep of the leases
            assert site.held() == {}, f"after {count} steps, in {request.state}"
            if not came_first:
                break
        # The engine's first token comes with the acceptance, so TRANSFERRING takes no step of its
        # own.
        assert {State.WAITING, State.PREFILLED, State.FINISHED} <= states
        assert {"prefill_0 slots", "prefill_0 leases", "decode_0 open", "decode_0 blocks"} <= held
        assert ("decode_0 pulls" in held) == (prompt == 3000)
        # The answer is not streamed: the only reply with tokens is the last.
        assert (State.DECODING in states) == stream
        ended = site.total("pdserve_requests_total")
        assert ended == count
        assert site.total("pdserve_requests_total", outcome="cancelled") == count - 1
        probe = site.request()
        assert await site.answer(probe) == site.expected(probe)
        await site.idle()


@pytest.mark.parametrize("stream", [True, False])
@virtual
async def test_at_any_time(tmp_path: Path, stream: bool) -> None:
    """python_backend#398: the same with slow engines, slow messages, and requests that wait."""
    async with Site(
        tmp_path, profile=TIMES, prefill={"slots": 2}, decode={"slots": 1}, seed=3
    ) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (0.0005, 0.003)
        loop = asyncio.get_running_loop()
        states = set()
        for moment in range(0, 600, 3):
            others = [site.request(max_tokens=12) for _ in range(3)]
            tasks = [site.start(other) for other in others]
            victim = site.request(max_tokens=12, stream=stream)
            task = site.start(victim)
            began = loop.time()
            await asyncio.sleep(moment / 1e3)
            states.add(victim.state)
            came_first = await cancelled(task)
            if came_first:
                assert victim.state in (State.CANCELLED, State.WAITING)
            answers = await asyncio.gather(*tasks)
            assert answers == [site.expected(other) for other in others], f"cancelled at {moment}"
            await site.idle(0.02)
            if not came_first:
                break
            assert loop.time() - began < 2.0
        assert not came_first
        assert {State.WAITING, State.PREFILLING, State.PREFILLED, State.TRANSFERRING} <= states
        assert site.total("pdserve_requests_total", outcome="cancelled") >= 15


@virtual
async def test_everything_is_free_within_200_ms(tmp_path: Path) -> None:
    """TensorRT-LLM#12313: the cancel itself frees everything, not the next work; in each phase."""
    async with Site(
        tmp_path, profile=TIMES, prefill={"lease_s": 60.0}, decode={"slots": 2}
    ) as site:
        for moment in (0.01, 0.025, 0.05):
            requests = [site.request(max_tokens=1000) for _ in range(4)]
            tasks = [site.start(request) for request in requests]
            await asyncio.sleep(moment)
            for task in tasks:
                assert await cancelled(task)
            assert {request.state for request in requests} == {State.CANCELLED}
            await site.idle(0.2)


@virtual
async def test_cancel_wakes_who_waits(tmp_path: Path) -> None:
    async with Site(
        tmp_path, profile={"prefill": {"base_ms": 500.0}}, prefill={"slots": 1}
    ) as site:
        holder = site.start(site.request())
        await asyncio.sleep(0.01)
        head, second = site.request(priority=1), site.request()
        tasks = [site.start(head), site.start(second)]
        await asyncio.sleep(0.1)
        assert await cancelled(tasks[0])
        assert await cancelled(holder)
        assert await tasks[1] == site.expected(second)
        # A forward that has begun is not interrupted; its slot is free afterwards.
        assert 0.5 <= second.forwarded < 0.503
        await site.idle()


@virtual
async def test_cancel_is_not_swallowed_by_an_end_that_comes_with_it(tmp_path: Path) -> None:
    """A request ends once, whichever of the two comes first."""
    async with Site(tmp_path, profile={"speed": 0}) as site:
        for count in range(60):
            request = site.request(max_tokens=3)
            task = site.start(request)
            await steps(count)
            task.cancel()
            task.cancel()
            await asyncio.wait([task])
            assert request.state in FINAL | {State.WAITING}
            await asyncio.sleep(0.03)  # one sweep of the leases
            assert site.held() == {}


@virtual
async def test_500_requests_with_random_cancels(tmp_path: Path) -> None:
    """Afterwards nothing is in use, according to the metrics."""
    async with Site(
        tmp_path,
        prefills=2,
        decodes=2,
        profile={"prefill": {"base_ms": 5.0, "per_token_ms": 0.02}, "decode": {"base_ms": 3.0}},
        decode={"slots": 8, "blocks": 128},
        seed=11,
    ) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (0.0, 0.002)
        rng = random.Random(12)
        requests: list[Request] = []
        system = site.prompt(64)

        async def client() -> None:
            request = site.request(
                site.prompt(rng.randrange(1, 300), system if rng.random() < 0.5 else b""),
                max_tokens=rng.randrange(1, 80),
                stream=rng.random() < 0.7,
                priority=rng.randrange(3),
                ttft_limit_s=rng.choice([0.02, 0.5, 60.0]),
            )
            requests.append(request)
            got: list[int] = []
            patience = rng.expovariate(1 / 0.15)
            leave_after = rng.choice([None, None, rng.randrange(1, 40)])

            async def read() -> None:
                async with aclosing(site.scheduler.run(request)) as chunks:
                    async for chunk in chunks:
                        got.extend(chunk.ids)
                        if leave_after is not None and len(got) >= leave_after:
                            return

            with contextlib.suppress(errors.Unavailable, asyncio.TimeoutError):
                await asyncio.wait_for(read(), patience)
            assert got == site.expected(request)[: len(got)]

        clients = []
        for _ in range(500):
            clients.append(asyncio.create_task(client()))
            await asyncio.sleep(rng.expovariate(1 / 0.004))
        await asyncio.gather(*clients)
        await site.idle()
        ends = {state: sum(one.state is state for one in requests) for state in State}
        assert sum(ends[state] for state in FINAL) == len(requests) == 500
        assert site.total("pdserve_requests_total") == 500
        assert site.total("pdserve_requests_total", outcome="cancelled") == ends[State.CANCELLED]
        assert site.total("pdserve_requests_total", outcome="expired") == ends[State.EXPIRED]
        assert ends[State.FAILED] == ends[State.REJECTED] == 0
        assert min(ends[s] for s in (State.FINISHED, State.CANCELLED, State.EXPIRED)) > 20, ends
        last = site.request()
        assert await site.answer(last) == site.expected(last)
        await site.idle()
