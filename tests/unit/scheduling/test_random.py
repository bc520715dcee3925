"""Test with random losses, failures and breaks: every request ends once, and nothing is left."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc.messages import DecodeRequest, PrefillRequest
from pdserve.scheduling.request import FINAL, Request, State
from pdserve.scheduling.scheduler import ATTEMPTS
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


async def trouble(site: Site, rng: random.Random) -> None:
    """Make a forward, a step, a hand-over or a link fail now and then."""
    failing = [
        *((engine.failures, "forward") for engine in site.p_engines),
        *((engine.failures, "step") for engine in site.d_engines),
        *((engine.refusals, "join") for engine in site.d_engines),
    ]
    try:
        while True:
            await asyncio.sleep(rng.uniform(0.05, 0.4))
            failures, what = rng.choice(failing)
            failures.append(RuntimeError(what))
            if rng.random() < 0.3:
                link = rng.choice([*site.p_links, *site.d_links])
                link.break_("connection reset")
                await asyncio.sleep(0.05)
                link.broken = None
    finally:
        for link in (*site.p_links, *site.d_links):
            link.broken, link.lose = None, lambda message: False
        for failures, _ in failing:
            failures.clear()


@pytest.mark.parametrize("seed", range(3))
@virtual
async def test_every_request_ends_once_whatever_is_lost(tmp_path: Path, seed: int) -> None:
    """TensorRT-LLM#14565, dynamo#13088: lost messages, failing engines, broken links, cancels."""
    async with Site(
        tmp_path, prefills=3, decodes=3, profile=TIMES, prefill={"lease_s": 3.0}, seed=seed
    ) as site:
        rng = random.Random(seed)
        for link in (*site.p_links, *site.d_links):
            link.delay = (0.0, 0.003)
            link.lose = lambda message: rng.random() < 0.01

        requests = [
            site.request(rng.randrange(1, 400), max_tokens=rng.randrange(1, 40)) for _ in range(150)
        ]
        answers: dict[str, list[int]] = {}

        async def client(request: Request) -> None:
            answers[request.id] = await site.answer(request)

        troubles = asyncio.create_task(trouble(site, rng))
        tasks = []
        for request in requests:
            tasks.append(asyncio.create_task(client(request)))
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.3), tasks[-1].cancel)
            await asyncio.sleep(rng.expovariate(1 / 0.02))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        troubles.cancel()
        for request, result in zip(requests, results, strict=True):
            assert isinstance(result, errors.PDServeError | asyncio.CancelledError | None)
            if result is None:
                assert answers[request.id] == site.expected(request)
        ended = [request for request in requests if request.state in FINAL]
        assert site.total("pdserve_requests_total") == len(ended) >= 145
        # A request that was not cancelled has its whole answer, except a few with many failures.
        assert sum(result is None for result in results) > 75
        failed = [request for request in requests if request.state is State.FAILED]
        assert len(failed) <= 8
        assert {request.attempts for request in failed} <= {ATTEMPTS}
        assert site.total("pdserve_retries_total", reason="error") > 20
        # What a lost release left behind ends with its lease, or with its answer.
        await site.idle(3.5)
        assert sum(len(link.of(PrefillRequest)) for link in site.p_links) < 400
        assert sum(len(link.of(DecodeRequest)) for link in site.d_links) < 300
        probe = site.request()
        assert await site.answer(probe) == site.expected(probe)
