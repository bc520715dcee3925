"""Tests for whole answers over every transport and strategy; the decode checks every byte."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from pdserve.rpc.messages import NotConnected
from pdserve.scheduling.forwarding import WATCH_S
from pdserve.scheduling.request import Request, State
from pdserve.transfer.protocol import TransferError
from tests.unit.inprocess import Site, real
from tests.unit.memcpy import MemcpyTransport
from tests.unit.transfers import pick

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.transfer.consumer.cost_model import Strategy

# Transport, strategy, whether the decode pulls during the computation.
OVER = [
    ("shm", None, False),
    ("memcpy", "whole", False),
    ("memcpy", "direct", False),
    ("memcpy", None, True),
    ("nixl", "whole", False),
    ("nixl", "direct", False),
    ("nixl", "whole", True),
    ("nixl over tcp", "whole", False),
    ("nixl over tcp", "direct", False),
    ("nixl over tcp", None, True),
]
# Within which the memory that a pull held is freed.
CLEAN_S = 0.05
QUICK = {
    "layers": 4,
    "prefill": {"base_ms": 8.0},
    "decode": {"base_ms": 1.0},
}


def links(site: Site) -> list[MemcpyTransport]:
    transports = [receiver.peers._transports[0] for receiver in site.receivers]
    return [one for one in transports if isinstance(one, MemcpyTransport)]


@pytest.mark.parametrize(("way", "strategy", "layered"), OVER)
@real
async def test_answers_are_exact(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    strategy: Strategy | None,
    layered: bool,
) -> None:
    """Prompts share prefixes, exceed the staging buffers, and go to scattered blocks."""
    name, rng = pick(way, monkeypatch), random.Random(1)
    async with Site(
        tmp_path,
        prefills=2,
        decodes=2,
        profile=QUICK,
        prefill={"slots": 6},
        transport=name,
        strategy=strategy,
        layered=layered,
    ) as site:
        system = site.prompt(90)
        requests = [
            site.request(
                site.prompt(rng.randrange(1, 700), system if rng.random() < 0.5 else b""),
                max_tokens=rng.randrange(2, 20),
            )
            for _ in range(16)
        ]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        pulls = [request.transfer for request in requests if request.transfer is not None]
        assert len(pulls) == 16
        assert {transfer.transport for transfer in pulls} == {name}
        used = {transfer.strategy for transfer in pulls}
        if layered:
            assert "layered" in used
        elif strategy is not None:
            assert used == {strategy}
        await site.idle(CLEAN_S)


@pytest.mark.parametrize("layered", [False, True], ids=["", "layered"])
@real
async def test_cancels_harm_no_other_over_the_same_link(tmp_path: Path, layered: bool) -> None:
    """TensorRT-LLM#12540; the link stays, since making it anew takes seconds."""
    rng = random.Random(2)
    async with Site(
        tmp_path,
        profile=QUICK,
        prefill={"slots": 8},
        transport="memcpy",
        strategy="whole",
        layered=layered,
    ) as site:
        [transport] = links(site)
        transport.links[0].nap_s = 5e-4
        requests = [site.request(rng.randrange(100, 400), max_tokens=8) for _ in range(40)]
        tasks = []
        for request in requests:
            tasks.append(site.start(request))
            if rng.random() < 0.5:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.02), tasks[-1].cancel)
            await asyncio.sleep(0.008)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for request, result in zip(requests, results, strict=True):
            if not isinstance(result, asyncio.CancelledError):
                assert result == site.expected(request)
        ends = [request.state for request in requests]
        assert min(ends.count(State.FINISHED), ends.count(State.CANCELLED)) > 5
        assert len(transport.links) == 1
        assert not transport.links[0].closed
        await site.idle(CLEAN_S)


@real
async def test_a_link_that_breaks_is_made_again(tmp_path: Path) -> None:
    """TensorRT-LLM#12542: the scheduler hears of it at once; the request uses the new link."""
    async with Site(tmp_path, profile=QUICK, transport="memcpy", strategy="direct") as site:
        [transport] = links(site)

        def cut(number: int) -> None:
            raise TransferError("cable cut")

        transport.links[0].before = cut
        broken: Request = site.request(200)
        assert await site.answer(broken) == site.expected(broken)
        assert broken.attempts == 2
        assert broken.ended - broken.first_token < WATCH_S[1] + 2.0
        after = site.request(200)
        assert await site.answer(after) == site.expected(after)
        assert len(site.d_links[0].of(NotConnected)) == 1
        assert [link.closed for link in transport.links] == [True, False]
        # No message has said that the first pull is over: its range waits until that counts as
        # silent.
        await asyncio.sleep(0.05)  # one sweep of the leases
        held = site.held()
        assert held.pop("prefill_0 leases") == held.pop("prefill_0 quarantined") == 1
        assert held == {"prefill_0 ranges": 1}
