"""Tests for KV links: pairs are connected before they are needed, and again after a restart."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc.messages import (
    Connect,
    Connected,
    DecodeRequest,
    Describe,
    Described,
    Failed,
    NotConnected,
)
from pdserve.scheduling.kv_links import OVERLAP_S, ROUND_S
from pdserve.transfer.protocol import Unreachable
from pdserve.transfer.reports import LinkReport
from tests.unit.inprocess import Message, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


def drop_links(site: Site) -> None:
    """Let every decode restart: it has no links."""
    for receiver in site.receivers:
        for holder in site.holders:
            receiver.peers.leave(receiver.peers.find(holder.epoch))


@virtual
async def test_every_pair_is_connected_at_once(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=3, profile=TIMES, linked=False) as site:
        running = asyncio.create_task(site.kv_links.run())
        await asyncio.sleep(0.1)
        for link in site.d_links:
            assert {one.prefill for one in link.of(Connected)} == {"prefill_0", "prefill_1"}
        requests = [site.request() for _ in range(6)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        assert not [link for link in site.d_links if link.of(NotConnected)]
        assert site.level("pdserve_kv_link_bytes_per_second", transport="shm") > 0
        running.cancel()
        await site.idle()


@virtual
async def test_who_is_linked_is_not_bothered_again(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES, linked=False) as site:
        running = asyncio.create_task(site.kv_links.run())
        await asyncio.sleep(5 * ROUND_S + 0.1)
        assert [len(link.of(Connect)) for link in site.d_links] == [1, 1]
        assert len(site.p_links[0].of(Describe)) == 6, "one question to a prefill in each round"
        assert len({one.endpoint for one in site.p_links[0].of(Described)}) == 1
        running.cancel()
        await site.idle()


@virtual
async def test_a_pair_without_link_is_connected_by_the_request(tmp_path: Path) -> None:
    """Without a link, the first request of the pair connects it, and is served."""
    async with Site(tmp_path, profile=TIMES, linked=False) as site:
        first, second = site.request(), site.request()
        assert await site.answer(first) == site.expected(first)
        assert len(site.d_links[0].of(NotConnected)) == 1
        assert len(site.d_links[0].of(Connect)) == 1
        assert await site.answer(second) == site.expected(second)
        assert len(site.d_links[0].of(Connect)) == 1
        await site.idle()


@virtual
async def test_a_decode_with_a_new_life(tmp_path: Path) -> None:
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        running = asyncio.create_task(site.kv_links.run())
        await asyncio.sleep(0.1)
        for _ in range(2):
            drop_links(site)
            requests = [site.request() for _ in range(4)]
            answers = await asyncio.gather(*map(site.answer, requests))
            assert answers == [site.expected(request) for request in requests]
        assert all(link.of(NotConnected) for link in site.d_links)
        running.cancel()
        await site.idle()


@virtual
async def test_a_prefill_that_comes_later(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, profile=TIMES, linked=False) as site:
        site.p_links[1].broken = "connection refused"
        running = asyncio.create_task(site.kv_links.run())
        await asyncio.sleep(0.1)
        assert [one.prefill for one in site.d_links[0].of(Connected)] == ["prefill_0"]
        site.p_links[1].broken = None
        await asyncio.sleep(ROUND_S)
        assert [one.prefill for one in site.d_links[0].of(Connected)] == [
            "prefill_0",
            "prefill_1",
        ]
        running.cancel()
        await site.idle()


@virtual
async def test_one_that_does_not_answer_holds_up_no_other(tmp_path: Path) -> None:
    def everything(message: Message) -> bool:
        return True

    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES, linked=False) as site:
        site.p_links[0].lose = site.d_links[0].lose = everything
        running = asyncio.create_task(site.kv_links.run())
        await asyncio.sleep(0.1)
        assert [one.prefill for one in site.d_links[1].of(Connected)] == ["prefill_1"]
        running.cancel()
        await site.idle()


# ------------------------------------------------------------------- pairs that cannot be connected


@virtual
async def test_a_pair_that_cannot_be_connected_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vllm#55906: logged once, by name and with the reason, and no request is slowed by it."""

    def unreachable(endpoint: bytes) -> tuple[str, LinkReport]:
        raise Unreachable("prefill_0 cannot be reached; nixl: UCX has picked tcp")

    async with Site(tmp_path, decodes=2, profile=TIMES, linked=False) as site:
        connect = site.receivers[0].connect
        site.receivers[0].connect = unreachable  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING):
            running = asyncio.create_task(site.kv_links.run())
            await asyncio.sleep(3 * ROUND_S)
        said = [line for line in caplog.messages if "cannot be connected" in line]
        reason = "decode_0: prefill_0 cannot be reached; nixl: UCX has picked tcp"
        assert said == [f"prefill_0 and decode_0 cannot be connected: {reason}"]
        requests = [site.request() for _ in range(3)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        assert {request.decode for request in requests} == {"decode_1"}
        assert not site.d_links[0].of(DecodeRequest)
        site.receivers[0].connect = connect  # type: ignore[method-assign]
        await asyncio.sleep(ROUND_S)
        assert site.kv_links.table.refusal("prefill_0", "decode_0") is None, (
            "it may become reachable"
        )
        running.cancel()
        await site.idle()


@virtual
async def test_no_decode_reaches_the_prefill(tmp_path: Path) -> None:
    """sglang#15674, llm-d#2433: the reason goes to the client, not only to a log."""

    def unreachable(endpoint: bytes) -> tuple[str, LinkReport]:
        raise Unreachable("no way")

    async with Site(tmp_path, profile=TIMES, linked=False) as site:
        site.receivers[0].connect = unreachable  # type: ignore[method-assign]
        for match in ("no way", "no decode reaches prefill_0: .*no way"):
            request = site.request()
            with pytest.raises((errors.InstanceError, errors.Unavailable), match=match):
                await site.answer(request)
            assert request.output_tokens == 1
            await site.idle()
        assert site.d_links[0].of(Failed)


# ------------------------------------------ whether a decode is chosen before the prefill has begun


@virtual
async def test_long_transfers_are_overlapped(tmp_path: Path) -> None:
    """TensorRT-LLM#9212: the prefill's slowest link decides, since no decode is chosen yet."""
    latency_s = 1e-4
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        assert not site.kv_links.layered("prefill_0", 1 << 20), "no link of it is known"
        for pair, rate in (
            (("prefill_0", "decode_0"), 10e9),
            (("prefill_0", "decode_1"), 0.1e9),
            (("prefill_1", "decode_0"), 10e9),
        ):
            link = LinkReport("nixl", "tcp/eth0", latency_s, rate, {}, fallback=True)
            site.kv_links.table._links[pair] = (
                b"",
                Connected(pair[0], link, bytes_per_token=100_000),
            )
        longest = int((OVERLAP_S - latency_s) * 0.1e9 / 100_000)
        assert not site.kv_links.layered("prefill_0", longest)
        assert site.kv_links.layered("prefill_0", longest + 1)
        assert not site.kv_links.layered("prefill_1", longest + 1)
        assert site.kv_links.layered("prefill_1", 100 * (longest + 1))
        site.kv_links.forget(site.instances[1][1])
        assert not site.kv_links.layered("prefill_0", longest + 1)


@pytest.mark.parametrize("wanted", [True, False])
@virtual
async def test_a_deployment_may_say_so(tmp_path: Path, wanted: bool) -> None:
    async with Site(tmp_path, profile=TIMES, layered=wanted) as site:
        assert site.kv_links.layered("prefill_0", 1) is wanted
        assert site.kv_links.layered("prefill_0", 1 << 20) is wanted


@virtual
async def test_prefill_that_no_decode_reaches_takes_no_requests_from_the_others(
    tmp_path: Path,
) -> None:
    """Its slots become free soonest, because all requests that it accepts fail."""
    async with Site(tmp_path, prefills=2, linked=False) as site:
        site.receivers[0].connect(site.holders[0].endpoint)
        site.holders[1].region.unlink()
        task = asyncio.create_task(site.kv_links.run())
        await asyncio.sleep(0.1)
        requests = [site.request() for _ in range(6)]
        await asyncio.gather(*map(site.answer, requests))
        assert {request.prefill for request in requests} == {"prefill_0"}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await site.idle()
