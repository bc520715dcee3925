"""Tests that a prefill starts the next forward without waiting for hand-overs or offers."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from pdserve.instances.forwards import AHEAD_S, Forwards
from pdserve.rpc.messages import Busy, Freed
from pdserve.scheduling.request import State
from tests.unit.inprocess import Site, virtual
from tests.unit.instances.test_slot_watches import Gateway

if TYPE_CHECKING:
    from pathlib import Path

FORWARD_S = 0.02
TIMES: dict[str, Any] = {"prefill": {"base_ms": FORWARD_S * 1e3}, "decode": {"base_ms": 5.0}}
OVERLAPPED: dict[str, Any] = {"slots": 2, "batch": 1}
WAY_S = 5e-4, 1e-3
"""The delay of a message."""


async def one_forward(site: Site) -> None:
    """Compute one prompt, so that the duration of a forward is known and all slots are free."""
    await site.answer(site.request(max_tokens=2))
    await site.idle()


@virtual
async def test_the_next_batch_is_let_in_shortly_before_the_end(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=OVERLAPPED) as site:
        await one_forward(site)
        gateway = Gateway(site, "a")
        assert gateway.offer("first") is None
        await asyncio.sleep(FORWARD_S - AHEAD_S - 1e-3)
        assert gateway.offer("too early") == Busy("slots")
        await asyncio.sleep(2e-3)
        assert gateway.offer("next") is None
        assert gateway.offer("third") == Busy("slots"), "a batch is one prompt"
        assert len(site.p_engines[0].forwards) == 2
        await asyncio.sleep(AHEAD_S)
        assert len(site.p_engines[0].forwards) == 3


@virtual
async def test_watchers_are_told_in_time_to_offer(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=OVERLAPPED) as site:
        await one_forward(site)
        gateway = Gateway(site, "a")
        assert gateway.offer("first") is None
        gateway.watch()
        await asyncio.sleep(FORWARD_S - AHEAD_S - 1e-3)
        assert gateway.of("watch") == []
        await asyncio.sleep(2e-3)
        assert gateway.of("watch") == [Freed()]


@virtual
async def test_nothing_is_let_in_ahead_of_a_forward_of_unknown_length(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=OVERLAPPED) as site:
        gateway = Gateway(site, "a")
        assert gateway.offer("first") is None
        await asyncio.sleep(FORWARD_S - 1e-3)
        assert gateway.offer("next") == Busy("slots")


@virtual
async def test_one_is_computed_while_the_last_waits_for_a_decode(tmp_path: Path) -> None:
    """Only one is: when another gateway has filled the decodes, the prefill rejects."""
    async with Site(tmp_path, profile=TIMES, prefill=OVERLAPPED, decode={"slots": 1}) as site:
        decoding = site.beside().start(site.request(max_tokens=60))
        await asyncio.sleep(0.1)
        requests = [site.request(max_tokens=2) for _ in range(3)]
        tasks = [site.start(request) for request in requests]
        await asyncio.sleep(0.1)
        assert [request.state for request in requests] == [
            State.PREFILLED,
            State.PREFILLED,
            State.WAITING,
        ]
        assert not requests[2].offers, (
            "a gateway does not offer to instances that it has filled itself"
        )
        await asyncio.gather(decoding, *tasks)
        await site.idle()


@virtual
async def test_a_busy_prefill_does_not_stand_still(tmp_path: Path) -> None:
    """Messages and hand-overs take time, and the prefill computes meanwhile."""
    async with Site(tmp_path, profile=TIMES, prefill=OVERLAPPED, seed=1) as site:
        await one_forward(site)
        for link in (*site.p_links, *site.d_links):
            link.delay = WAY_S
        requests = [site.request(max_tokens=2) for _ in range(20)]
        await asyncio.gather(*map(site.answer, requests))
        firsts = sorted(request.first_token for request in requests)
        took = [after - before for before, after in itertools.pairwise(firsts)]
        # The first tokens are late by one message's delay, each by a different one.
        assert sum(took) / len(took) == pytest.approx(FORWARD_S, rel=0.01)
        assert max(took) < FORWARD_S + WAY_S[1]
        await site.idle()


@virtual
async def test_a_forward_that_fails_says_nothing_of_how_long_one_takes() -> None:
    told: list[float] = []
    loop = asyncio.get_running_loop()
    forwards = Forwards(lambda: told.append(loop.time()))

    async def fail() -> None:
        with forwards.running(1, 100):
            await asyncio.sleep(0.01)
            raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        await fail()
    assert forwards.prompts == 0
    with forwards.running(1, 100):
        await asyncio.sleep(0.1)
    assert not told
    with forwards.running(3, 100):
        began = loop.time()
        assert forwards.prompts == 3
        await asyncio.sleep(0.1)
        assert forwards.prompts == 0
    assert told == [pytest.approx(began + 0.1 - AHEAD_S)]
