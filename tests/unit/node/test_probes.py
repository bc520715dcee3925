"""Tests for probes, which use the messages of requests, and leave nothing held."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import msgspec
import pytest

from pdserve.config import Deployment, Gateway, Group, Prefill, Scenario, Server, Transfer
from pdserve.control.assignment import ANY, FIRST, Assignment, Role
from pdserve.errors import InstanceError
from pdserve.node.assignments import Assignments
from pdserve.node.probes import Limits, Probes
from pdserve.rpc.messages import Assign, Connect, DecodeRequest, Drain, PrefillRequest, Request
from tests.unit.inprocess import Link, Site, process, virtual

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = Limits(reply_s=6.0, first_token_s=8.0, idle_s=20.0)


def test_limits_are_above_the_times_of_a_loaded_engine() -> None:
    """The longest wait for a first token may be that of a scenario."""
    one = Deployment(
        model="m",
        servers=(Server("local", prefill=("p",), decode=("d",)),),
        gateway=Gateway(ttft_limit_ms=8000, stall_s=6),
        prefill=Prefill(lease_s=5),
        transfer=Transfer(timeout_s=5),
        scenarios=(
            Scenario("slow", (Group("g", prefill=("p",), decode=("d",)),), ttft_limit_ms=20_000),
        ),
    )
    assert Limits.of(one) == Limits(reply_s=6, first_token_s=20, idle_s=40)
    one = msgspec.structs.replace(one, transfer=Transfer(timeout_s=90))
    assert Limits.of(one).idle_s == 180


def links(site: Site) -> dict[str, Link]:
    return {
        instance.name: link
        for role, ends in zip(site.instances, (site.p_links, site.d_links), strict=True)
        for instance, link in zip(role, ends, strict=True)
    }


def probes(site: Site) -> Probes:
    roles: tuple[Role, ...] = ("prefill", "decode")
    known = Assignments(
        {
            instance.name: Assignment(FIRST, role)
            for role, instances in zip(roles, site.instances, strict=True)
            for instance in instances
        }
    )

    async def steps(instance: str) -> float:
        return site.total("pdserve_steps_total", instance=instance)

    def channel(name: str) -> Link:
        link = links(site)[name]
        if (assignment := known.of(name)) is not None:
            link.number = assignment.number
        return link

    return Probes(channel, known, steps, LIMITS)


@virtual
async def test_all_is_well(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=2) as site:
        probe = probes(site)
        for name in links(site):
            assert not await probe.alive(name), (
                "an answered message does not show that the engine computes"
            )
        for i in range(2):
            assert await probe.computes(f"prefill_{i}")
            assert await probe.computes(f"decode_{i}")
        await site.idle()


@virtual
async def test_decodes_are_probed_with_every_prefill_in_turn(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=3) as site:
        probe = probes(site)
        for _ in range(6):
            assert await probe.computes("decode_0")
        assert [len(link.of(PrefillRequest)) for link in site.p_links] == [2, 2, 2]
        assert len(site.d_links[0].of(DecodeRequest)) == 6


@virtual
async def test_who_has_no_link_is_connected(tmp_path: Path) -> None:
    async with Site(tmp_path, linked=False) as site:
        probe = probes(site)
        assert not await probe.computes("decode_0")
        assert len(site.d_links[0].of(Connect)) == 1
        assert await probe.computes("decode_0")
        await site.idle()


@virtual
async def test_busy_is_alive(tmp_path: Path) -> None:
    times = {"prefill": {"base_ms": 5000.0}, "decode": {"base_ms": 5000.0}}
    async with Site(tmp_path, profile=times, prefill={"slots": 1}, decode={"slots": 1}) as site:
        probe = probes(site)
        request = site.start(site.request(max_tokens=3))
        await asyncio.sleep(1)
        assert not await probe.computes("prefill_0")
        assert not await probe.computes("decode_0"), "no prefill has a KV cache to hand over"
        await asyncio.sleep(5)
        assert not await probe.computes("decode_0"), "its only slot is taken"
        assert len(site.d_links[0].of(DecodeRequest)) == 2
        await request
        await site.idle()


@virtual
async def test_an_instance_that_does_not_answer_has_failed(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        probe = probes(site)
        for link in (*site.p_links, *site.d_links):
            link.lose = lambda message: True
        for ask, name in (
            (probe.alive, "prefill_0"),
            (probe.alive, "decode_0"),
            (probe.computes, "prefill_0"),
        ):
            with pytest.raises(InstanceError, match="no answer within 6 s"):
                await ask(name)
        assert not await probe.computes("decode_0"), "the decode is not blamed for a silent prefill"
        site.p_links[0].lose = lambda message: False
        with pytest.raises(InstanceError, match="no answer within 6 s"):
            await probe.computes("decode_0")
        site.d_links[0].lose = lambda message: False
        await site.idle()


@virtual
async def test_an_engine_that_fails_has_failed(tmp_path: Path) -> None:
    """TensorRT-LLM#12313: a health status of 200 must mean that requests can be served."""
    async with Site(tmp_path) as site:
        probe = probes(site)
        site.p_engines[0].failures.append(RuntimeError("device-side assert"))
        assert not await probe.alive("prefill_0")
        with pytest.raises(InstanceError, match=r"prefill_0 answered .*device-side assert"):
            await probe.computes("prefill_0")
        site.d_engines[0].failures.append(RuntimeError("device-side assert"))
        with pytest.raises(InstanceError, match=r"decode_0 answered .*device-side assert"):
            await probe.computes("decode_0")
        await site.idle()


@virtual
async def test_an_engine_that_never_comes_to_an_end_has_failed(tmp_path: Path) -> None:
    """The engine accepts, and repeats the acceptance again and again."""
    async with Site(tmp_path, profile={"prefill": {"base_ms": 1e6}}) as site:
        probe = probes(site)
        began = asyncio.get_running_loop().time()
        with pytest.raises(InstanceError, match="computed no token within 8 s"):
            await probe.computes("prefill_0")
        assert asyncio.get_running_loop().time() - began == pytest.approx(8)
        assert not await probe.computes("decode_0"), "the decode is not to blame"


@virtual
async def test_busy_for_ever_is_not_alive(tmp_path: Path) -> None:
    """TensorRT-LLM#12313: health means that requests are admitted, not just a status of 200."""
    times = {"prefill": {"base_ms": 1e6}}
    async with Site(tmp_path, profile=times, prefill={"slots": 1}) as site:
        probe = probes(site)
        request = site.start(site.request(ttft_limit_s=1000))
        for _ in range(6):
            await asyncio.sleep(LIMITS.idle_s / 5)
            assert not await probe.computes("prefill_0")
        await asyncio.sleep(LIMITS.idle_s / 5)
        with pytest.raises(InstanceError, match="is busy, and has made no step for 24 s"):
            await probe.computes("prefill_0")
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


@virtual
async def test_busy_with_steps_is_alive_however_long(tmp_path: Path) -> None:
    times = {"decode": {"base_ms": 100.0}}
    async with Site(tmp_path, profile=times, decode={"slots": 1}) as site:
        probe = probes(site)
        request = site.start(site.request(max_tokens=1000))
        for _ in range(18):
            await asyncio.sleep(5)
            assert not await probe.computes("decode_0")
        await request
        assert await probe.computes("decode_0")


@virtual
async def test_given_up_it_leaves_nothing_behind(tmp_path: Path) -> None:
    times = {"prefill": {"base_ms": 1000.0}, "decode": {"base_ms": 1000.0}}
    async with Site(tmp_path, profile=times) as site:
        probe = probes(site)
        for limit in (0.5, 1.5):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(probe.computes("decode_0"), limit)
            await site.idle(2)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@virtual
async def test_an_instance_that_drains_or_is_reassigned_has_not_failed(
    tmp_path: Path, role: Literal["prefill", "decode"]
) -> None:
    async with Site(tmp_path) as site:
        probe, name = probes(site), f"{role}_0"
        ask = probe.computes

        def control(request: Request) -> None:
            site.assigned[name].handle(ANY, request, "agent", lambda *_: None)

        assert await ask(name)
        control(Drain("drain", process(name), 1, 60.0))
        for _ in range(8):  # for longer than a busy instance may make no step
            assert not await ask(name)
            assert not await probe.alive(name)
            await asyncio.sleep(LIMITS.idle_s / 4)
        wanted = Assignment(2, role)
        control(Assign("assign", process(name), 1, wanted))
        assert not await ask(name), "it learns the number"
        for _ in range(3):  # a decode is connected anew
            done = await ask(name)
        assert done
        await site.idle()
