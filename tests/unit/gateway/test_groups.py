"""Tests for the groups of a deployment, and for how another deployment changes them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
import pytest

from pdserve import config
from pdserve.control.assignment import ANY
from pdserve.errors import PDServeError
from pdserve.gateway.groups import Group, Groups
from pdserve.gateway.router import Scenario
from pdserve.observability.metrics import Registry
from pdserve.rpc.client import Replies
from pdserve.scheduling.scheduler import Scheduler
from tests.unit.inprocess import Link, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.rpc.messages import Request as Message
    from pdserve.scheduling.request import Request

PROFILE = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


class ConnectedGroups:
    """A gateway's groups over the instances of a site, and the channels that it has opened."""

    def __init__(self, site: Site, scheduler: type[Scheduler] = Scheduler) -> None:
        self._instances = site.assigned
        self.links: dict[str, Link] = {}
        """The latest channel to each instance."""
        self.opened: list[str] = []
        self.groups = Groups("gateway", self._connect, site.metrics, random.Random(1), scheduler)

    def _connect(self, name: str, server: config.Server, number: int) -> Link:
        link = Link(name, self._instances[name], len(self.opened), number)
        if number != ANY:
            self.opened.append(name)
            self.links[name] = link
        return link

    @property
    def closed(self) -> set[str]:
        return {name for name, link in self.links.items() if link.broken}


def deployment(*groups: config.Group) -> config.Deployment:
    """Return a deployment of one scenario with these groups, all instances in one server."""
    server = config.Server(
        name="local",
        prefill=tuple(name for group in groups for name in group.prefill),
        decode=tuple(name for group in groups for name in group.decode),
    )
    return config.Deployment(
        model="m",
        servers=(server,),
        gateway=config.Gateway(default_scenario="s", stall_s=5.0),
        scenarios=(config.Scenario("s", groups),),
    )


A = config.Group("a", ("prefill_0",), ("decode_0", "decode_1"))
B = config.Group("b", ("prefill_1",), ("decode_2",))
C = config.Group("c", ("prefill_0", "prefill_1"), ("decode_0", "decode_1", "decode_2"))


def replaced(group: config.Group, **fields: object) -> config.Group:
    return msgspec.structs.replace(group, **fields)


async def serve(group: Group, request: Request) -> list[int]:
    with group.serving(request) as scheduler:
        async with aclosing(scheduler.run(request)) as chunks:
            return [token async for chunk in chunks for token in chunk.ids]


@virtual
async def test_a_group_is_served_by_its_own_instances_alone(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=3, profile=PROFILE) as site:
        connected = ConnectedGroups(site)
        groups = connected.groups.take(deployment(A, B))
        asked = [(name, site.request()) for name in "aabbabab"]
        answers = await asyncio.gather(*(serve(groups[name], one) for name, one in asked))

        assert answers == [site.expected(request) for _, request in asked]
        for name, request in asked:
            spec = {"a": A, "b": B}[name]
            assert request.stats()["group"] == name
            assert request.prefill in spec.prefill
            assert request.decode in spec.decode
        assert {one.decode for _, one in asked} == {"decode_0", "decode_1", "decode_2"}
        await connected.groups.close()
        assert connected.closed == {*A.prefill, *A.decode, *B.prefill, *B.decode}


@virtual
async def test_instances_that_stay_keep_nothing_of_a_group_that_is_gone(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=3, profile=PROFILE) as site:
        connected = ConnectedGroups(site)
        heard = []
        for name in ("a", "another", "a", "another"):
            groups = connected.groups.take(deployment(replaced(A, name=name)))
            await serve(groups[name], site.request())
            await connected.groups.sweep()
            heard.append([len(one.listeners) for one in groups[name].instances.values()])
        assert heard[1:] == heard[:-1]
        await connected.groups.close()


@virtual
async def test_a_group_without_a_prefill_is_passed_over_until_it_is_back(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=3, profile=PROFILE) as site:
        connected = ConnectedGroups(site)
        wanted = deployment(A, B)
        groups = connected.groups.take(wanted)
        (terms,) = wanted.served
        scenario = Scenario(terms, groups)

        async def served(count: int) -> Counter[str]:
            """Serve the requests one after another; return which instances served them."""
            found: Counter[str] = Counter()
            for _ in range(count):
                group = scenario.next_group()
                try:
                    await serve(group, site.request(ttft_limit_s=1.0))
                except PDServeError:
                    found["lost"] += 1
                else:
                    found[group.name] += 1
            return found

        assert await served(4) == {"a": 2, "b": 2}
        connected.links["prefill_0"].break_("its server was stopped")
        found = await served(6)
        assert found["lost"] <= 1, "the KV cache that its group already had"
        assert found["b"] >= 5
        connected.links["prefill_0"].broken = None
        await asyncio.sleep(10)
        assert await served(4) == {"a": 2, "b": 2}
        await connected.groups.close()


@virtual
async def test_a_group_of_the_same_instances_goes_on(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=3, profile=PROFILE) as site:
        connected = ConnectedGroups(site)
        before = connected.groups.take(deployment(A, B))
        after = connected.groups.take(deployment(B, replaced(A, share=3.0)))
        assert after["a"] is before["a"]
        assert after["b"] is before["b"]
        await connected.groups.sweep()
        assert not connected.closed
        assert len(connected.opened) == 5
        await connected.groups.close()


@virtual
async def test_requests_finish_where_they_are(tmp_path: Path) -> None:
    """Instances that stay keep their channel; those that leave keep it as long as it is needed."""
    async with Site(tmp_path, prefills=2, decodes=3, profile=PROFILE) as site:
        connected = ConnectedGroups(site)
        groups = connected.groups.take(deployment(A, B))
        long = [site.request(max_tokens=40) for _ in range(2)]
        running = [asyncio.create_task(serve(groups["a"], request)) for request in long]
        await asyncio.sleep(0.1)
        assert {request.decode for request in long} == {"decode_0", "decode_1"}

        smaller = connected.groups.take(deployment(replaced(A, decode=("decode_1",)), B))
        assert smaller["a"] is groups["a"]
        for _ in range(3):
            await connected.groups.sweep()
        assert not connected.closed
        new = [site.request() for _ in range(6)]
        await asyncio.gather(*(serve(smaller["a"], request) for request in new))
        assert {request.decode for request in new} == {"decode_1"}

        assert await asyncio.gather(*running) == [site.expected(request) for request in long]
        assert not connected.closed
        await connected.groups.sweep()
        assert connected.closed == {"decode_0"}
        assert sorted(connected.opened) == sorted(set(connected.opened))
        await connected.groups.close()


@virtual
async def test_one_that_waits_is_served_by_who_is_there_then(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=PROFILE, prefill={"slots": 1}, decodes=2) as site:
        connected = ConnectedGroups(site)
        one = replaced(A, decode=("decode_0",))
        groups = connected.groups.take(deployment(one))
        requests = [site.request() for _ in range(4)]
        tasks = [asyncio.create_task(serve(groups["a"], one)) for one in requests]
        await asyncio.sleep(0.001)
        connected.groups.take(deployment(replaced(one, decode=("decode_1",))))
        await connected.groups.sweep()
        for answer in await asyncio.gather(*tasks):
            assert len(answer) == 8
        assert [one.decode for one in requests[1:]] == ["decode_1"] * 3
        await connected.groups.sweep()
        assert connected.closed == {"decode_0"}
        await connected.groups.close()


@virtual
async def test_two_groups_become_one(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=3, profile=PROFILE) as site:
        connected = ConnectedGroups(site)
        connected.groups.take(deployment(A, B))
        merged = connected.groups.take(deployment(C))
        assert set(merged) == {"c"}
        asked = [site.request(200) for _ in range(12)]
        answers = await asyncio.gather(*(serve(merged["c"], request) for request in asked))
        assert answers == [site.expected(request) for request in asked]
        assert {request.prefill for request in asked} == {"prefill_0", "prefill_1"}
        assert len(connected.opened) == 5
        await connected.groups.close()


@virtual
async def test_an_instance_at_another_address_is_another(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=PROFILE) as site:
        connected = ConnectedGroups(site)
        first = deployment(config.Group("a", ("prefill_0",), ("decode_0",)))
        connected.groups.take(first)
        server = msgspec.structs.replace(first.servers[0], grpc_port=9)
        moved = msgspec.structs.replace(first, servers=(server,))
        groups = connected.groups.take(moved)
        await connected.groups.sweep()
        assert connected.opened == ["prefill_0", "decode_0"] * 2
        request = site.request()
        assert await serve(groups["a"], request) == site.expected(request)
        await connected.groups.close()


class SilentChannel:
    """A channel on which nothing answers; it records which processes are reported lost."""

    def __init__(self) -> None:
        self.lost: list[bytes] = []
        self.closed = False

    def open(self, call: str, request: Message) -> Replies:
        return Replies(call)

    def forget(self, call: str) -> None:
        pass

    def lose(self, epoch: bytes) -> None:
        self.lost.append(epoch)

    async def close(self) -> None:
        self.closed = True


@virtual
async def test_a_loss_is_heard_at_every_place_of_an_instance() -> None:
    """A request on the instance's former address would otherwise wait until it has stalled."""
    channels: list[SilentChannel] = []

    def connect(name: str, server: config.Server, number: int) -> SilentChannel:
        channels.append(SilentChannel())
        return channels[-1]

    groups = Groups("gateway", connect, Registry(), random.Random(1))
    first = deployment(config.Group("a", ("prefill_0",), ("decode_0",)))
    groups.take(first)
    server = msgspec.structs.replace(first.servers[0], grpc_port=9)
    groups.take(msgspec.structs.replace(first, servers=(server,)))
    groups.lose("decode_0", b"an epoch")
    assert [channel.lost for channel in channels] == [[], [b"an epoch"]] * 2
    await groups.sweep()
    groups.lose("decode_0", b"another")
    assert [channel.closed for channel in channels] == [True, True, False, False]
    assert [len(channel.lost) for channel in channels] == [0, 1, 0, 2]
    groups.lose("nobody", b"an epoch")
    await groups.close()


@virtual
async def test_the_requests_that_wait_are_shown_by_group_and_role(tmp_path: Path) -> None:
    """A request that no prefill has room for, and one that no decode has room for."""
    async with Site(
        tmp_path, prefills=2, decodes=2, profile=PROFILE, prefill={"slots": 1}, decode={"slots": 1}
    ) as site:
        connected = ConnectedGroups(site)
        one = config.Group("a", ("prefill_0",), ("decode_0",))
        two = config.Group("b", ("prefill_1",), ("decode_1",))
        groups = connected.groups.take(deployment(one, two))
        shown: dict[tuple[str, str, str], float] = {}

        def look() -> dict[tuple[str, str, str], float]:
            connected.groups.show()
            for change in site.metrics.drain():
                labels = dict(change.labels)
                if "role" in labels:
                    key = change.name, labels["group"], labels["role"]
                    shown[key] = change.value
                    if change.kind == "gone":
                        del shown[key]
            return shown

        waiting, oldest = "pdserve_waiting_requests", "pdserve_oldest_waiting_seconds"
        assert set(look().values()) == {0}
        requests = [site.request(max_tokens=50) for _ in range(3)]
        answers = [asyncio.create_task(serve(groups["a"], request)) for request in requests]
        await asyncio.sleep(0.3)
        assert shown[waiting, "a", "decode"] == 0, "as it was at the last look"
        look()
        assert shown[waiting, "a", "decode"] + shown[waiting, "a", "prefill"] == 2
        ages = shown[oldest, "a", "decode"], shown[oldest, "a", "prefill"]
        assert max(ages) == pytest.approx(0.3, abs=0.05)
        assert shown[waiting, "b", "prefill"] == shown[oldest, "b", "decode"] == 0
        await asyncio.gather(*answers)
        assert set(look().values()) == {0}
        connected.groups.take(deployment(two))
        await asyncio.sleep(0.1)
        await connected.groups.sweep()
        assert {group for _, group, _ in look()} == {"b"}, "those of a group that is gone vanish"
        await connected.groups.close()
