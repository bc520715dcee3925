"""Tests for the upper estimate of a prefill's time, and for requests that give up because of it."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.latency_estimate import LatencyEstimate
from pdserve.scheduling.request import State
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"per_token_ms": 0.1}, "decode": {"base_ms": 1.0}}


def test_by_size() -> None:
    estimate = LatencyEstimate()
    assert estimate.expected(1000) == 0.0
    estimate.saw(1000, 0.1)
    assert estimate.expected(1000) == pytest.approx(0.1)
    assert estimate.expected(512) == pytest.approx(0.0512)
    assert estimate.expected(300) == 0.0, "another size"


def test_with_a_margin_that_follows_how_much_they_differ() -> None:
    estimate, rng = LatencyEstimate(), random.Random(0)
    taken = [rng.normalvariate(0.1, 0.005) for _ in range(400)]
    for seconds in taken:
        estimate.saw(1000, seconds)
    in_time = sum(seconds <= estimate.expected(1000) for seconds in taken)
    assert 0.98 * len(taken) <= in_time
    assert estimate.expected(1000) < 0.12


def test_it_follows_a_change() -> None:
    estimate = LatencyEstimate()
    for seconds in [0.1] * 20 + [0.4] * 40:
        estimate.saw(1000, seconds)
    assert estimate.expected(1000) == pytest.approx(0.4, rel=0.03)


@virtual
async def test_who_can_only_be_late_leaves_the_line(tmp_path: Path) -> None:
    """It gives its place to a request that can be in time."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        await site.answer(site.request(1000, max_tokens=1))
        first = site.start(site.request(1000, max_tokens=1))
        await asyncio.sleep(0.01)
        late = site.request(1000, max_tokens=1, ttft_limit_s=0.15)
        in_time = site.request(1000, max_tokens=1, ttft_limit_s=0.3)
        waits = site.start(late)
        answer = site.start(in_time)
        with pytest.raises(
            errors.Unavailable, match=r"no idle prefill within .*; a prefill would take 10\d ms"
        ):
            await waits
        assert late.state is State.EXPIRED
        assert late.ended - late.arrived == pytest.approx(0.05, abs=0.01)
        await asyncio.gather(first, answer)
        assert in_time.first_token - in_time.arrived < 0.2
        await site.idle()


@virtual
@pytest.mark.parametrize("others", [False, True])
async def test_who_stands_in_nobodys_way_waits_longer(tmp_path: Path, others: bool) -> None:
    """It would be late in the worst case only, and gives up for one that would be in time."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        for seconds in (0.1, 0.2):
            site.scheduler._prefill_stage._latency.saw(1000, seconds)
        busy = site.start(site.request(1000, max_tokens=1))
        await asyncio.sleep(0.01)
        late = site.request(1000, max_tokens=1, ttft_limit_s=0.25)  # after 0.19 s in the worst case
        waits = site.start(late)
        await asyncio.sleep(0.01)
        other = site.request(1000, max_tokens=1, ttft_limit_s=10.0)
        behind = site.start(other) if others else None
        if behind is None:
            assert await waits == site.expected(late)
            assert late.first_token - late.arrived == pytest.approx(0.19, abs=0.002)
        else:
            with pytest.raises(errors.Unavailable, match=r"would take 18[78] ms"):
                await waits
            await behind
            assert other.first_token - other.arrived == pytest.approx(0.18, abs=0.002)
        await busy
        await site.idle()


@virtual
async def test_a_wrong_guess_refuses_nobody_who_finds_an_idle_prefill(tmp_path: Path) -> None:
    """Layr-Labs#381: an estimate is no gate; one slow forward is corrected by the next request."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        await asyncio.sleep(0)
        slow = site.p_engines[0].prefill

        async def stutter(jobs: object) -> list[int]:
            await asyncio.sleep(3.0)
            return await slow(jobs)  # type: ignore[arg-type]

        site.p_engines[0].prefill = stutter  # type: ignore[assignment]
        await site.answer(site.request(1000, max_tokens=1))
        site.p_engines[0].prefill = slow  # type: ignore[method-assign]
        request = site.request(1000, max_tokens=1, ttft_limit_s=0.3)
        assert await site.answer(request) == site.expected(request)
        await site.idle()
