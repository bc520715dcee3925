"""Tests for prefills and decodes that join and leave while requests are under way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pdserve import config
from pdserve.rpc.messages import DecodeRequest, PrefillRequest
from pdserve.scheduling.request import State
from pdserve.scheduling.scheduler import Scheduler
from tests.unit.gateway.test_groups import ConnectedGroups, deployment, serve
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


def wanted(prefills: int, decodes: int, first: int = 0) -> config.Deployment:
    """Return a group of this many instances, without the first ones."""
    group = config.Group(
        "a",
        tuple(f"prefill_{i}" for i in range(first, prefills)),
        tuple(f"decode_{i}" for i in range(first, decodes)),
    )
    return deployment(group)


async def takes_whoever_comes_and_lets_go(tmp_path: Path, scheduler: type[Scheduler]) -> None:
    """Check joining and leaving under any policy that chooses the prefill of a request."""
    async with Site(tmp_path, prefills=3, decodes=3, profile=TIMES) as site:
        connected = ConnectedGroups(site, scheduler)

        async def served_by(made: config.Deployment) -> tuple[set[str], set[str]]:
            group = connected.groups.take(made)["a"]
            requests = [site.request() for _ in range(9)]
            answers = await asyncio.gather(*(serve(group, one) for one in requests))
            assert answers == [site.expected(one) for one in requests]
            await connected.groups.sweep()
            return {one.prefill for one in requests}, {one.decode for one in requests}

        assert await served_by(wanted(1, 1)) == ({"prefill_0"}, {"decode_0"})
        prefills, decodes = await served_by(wanted(3, 3))
        assert (len(prefills), len(decodes)) == (3, 3)
        prefills, decodes = await served_by(wanted(3, 3, first=1))
        assert prefills == {"prefill_1", "prefill_2"}
        assert decodes == {"decode_1", "decode_2"}
        assert connected.closed == {"prefill_0", "decode_0"}
        await connected.groups.close()
        await site.idle()


@virtual
async def test_a_group_takes_whoever_comes_and_lets_go(tmp_path: Path) -> None:
    """TensorRT-LLM#8602: a router that could not accept new servers."""
    await takes_whoever_comes_and_lets_go(tmp_path, Scheduler)


@virtual
async def test_decodes_are_told_how_many_there_are_now(tmp_path: Path) -> None:
    """Decodes space their responses by this number."""
    async with Site(tmp_path, prefills=3, decodes=3, profile=TIMES) as site:
        connected = ConnectedGroups(site)
        for made, peers in ((wanted(3, 1), 1), (wanted(3, 3), 3), (wanted(3, 3, first=1), 2)):
            group = connected.groups.take(made)["a"]
            before = {name: len(link.requests) for name, link in connected.links.items()}
            requests = [site.request() for _ in range(6)]
            await asyncio.gather(*(serve(group, one) for one in requests))
            since = [
                message
                for name, link in connected.links.items()
                for message in link.requests[before.get(name, 0) :]
                if isinstance(message, DecodeRequest)
            ]
            assert len(since) >= len(requests)
            assert {message.peers for message in since} == {peers}
        await connected.groups.close()
        await site.idle()


@virtual
async def test_who_leaves_finishes_and_hands_over(tmp_path: Path) -> None:
    """dynamo#13559, dynamo#4917: it accepts nothing new, but ends its work and its hand-overs."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES, decode={"slots": 1}) as site:
        connected = ConnectedGroups(site)
        before = connected.groups.take(wanted(1, 1))["a"]
        running, waits = site.request(max_tokens=50), site.request(max_tokens=5)
        tasks = [asyncio.create_task(serve(before, one)) for one in (running, waits)]
        await asyncio.sleep(0.1)
        assert (running.state, waits.state) == (State.DECODING, State.PREFILLED)

        after = connected.groups.take(wanted(2, 2, first=1))["a"]
        new = [site.request(max_tokens=5) for _ in range(4)]
        asked = {name: len(link.requests) for name, link in connected.links.items()}
        answers = await asyncio.gather(*(serve(after, one) for one in new))
        assert answers == [site.expected(one) for one in new]
        for name in ("prefill_0", "decode_0"):
            since = connected.links[name].requests[asked[name] :]
            assert not [one for one in since if isinstance(one, PrefillRequest)]
            prompts = [one.prompt for one in since if isinstance(one, DecodeRequest)]
            assert set(prompts) <= {waits.prompt}

        for _ in range(3):
            await connected.groups.sweep()
            assert connected.closed == {"prefill_0"}, (
                "the requests that waited there have gone to the decode that joined"
            )
        assert waits.decode == "decode_1"
        answers = await asyncio.gather(*tasks)
        assert answers == [site.expected(running), site.expected(waits)]
        assert [running.attempts, waits.attempts] == [1, 1]
        await connected.groups.sweep()
        assert connected.closed == {"prefill_0", "decode_0"}
        await connected.groups.close()
        await site.idle()
