"""Tests for groups of many instances: the cost of a request, and the links that are made."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Coroutine
from typing import Any

import pytest
from perf.group_cost import ROOM, SLOTS, Memory, Site

from pdserve.rpc import messages
from pdserve.rpc.client import Replies
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import LINKS, KVLinks
from pdserve.scheduling.link_plan import PEERS, Ring
from pdserve.scheduling.pairs import Pair
from tests.unit.inprocess import virtual

NO_ROOM = messages.Room(0, 0)
SAME = 1.5
"""The largest ratio of Python calls per request, in a large group and in a small one."""


def planned(site: Site) -> set[Pair]:
    return set(site.links.table.pairs())


def without(site: Site, leaves: Instance) -> tuple[list[Instance], list[Instance]]:
    prefills = [one for one in site.prefills if one is not leaves]
    return prefills, [one for one in site.decodes if one is not leaves]


# -------------------------------------------------------------------------------- the plan of links


@pytest.mark.parametrize("half", [1, 3, PEERS])
def test_in_a_small_group_all_are_linked(half: int) -> None:
    assert len(planned(Site(2 * half))) == half * half


def test_in_a_large_group_each_has_peers() -> None:
    site = Site(400)
    pairs = planned(site)
    for instance in (*site.prefills, *site.decodes):
        assert PEERS <= sum(instance.name in pair for pair in pairs) <= LINKS
    assert len(pairs) <= PEERS * 400


@virtual
async def test_who_leaves_changes_the_links_of_few() -> None:
    site = Site(200)
    before = planned(site)
    for leaves in (site.decodes[7], site.prefills[7]):
        site.links.update(*without(site, leaves))
        others = {pair for pair in before if leaves.name not in pair}
        assert others <= planned(site), "no link between others is given up"
        assert len(planned(site) - others) <= 4 * PEERS


def test_gateways_plan_the_same_links_whatever_their_order() -> None:
    site = Site(100)
    other = Site(100)
    other.links.update(other.prefills[::-1], other.decodes[::-1])
    assert planned(site) == planned(other)


def test_a_ring_gives_each_name_once() -> None:
    names = [f"decode_{number}" for number in range(50)]
    assert sorted(Ring(names).after("prefill_0")) == sorted(names)
    assert not list(Ring([]).after("prefill_0"))


@virtual
async def test_a_prefill_whose_peers_refuse_it_is_linked_to_others() -> None:
    site = Site(100)
    refuses = set(itertools.islice(site.links.table.planned("prefill_0"), 4))
    for channel in site.channels:
        channel.refuses = channel.name in refuses
    await site.linked()
    reached = {one.name for one in site.links.decodes("prefill_0")}
    assert len(reached) >= PEERS
    assert not reached & refuses
    assert not site.links.table.avoided


# ---------------------------------------------------------------------------- the cost of a request


def calls(work: Coroutine[Any, Any, None]) -> int:
    """Return the number of calls of Python functions until it is done."""
    count = 0

    def called(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(called)
    try:
        asyncio.run(work)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("state", ["idle", "half full", "half busy"])
def test_a_request_in_a_large_group_costs_what_one_in_a_small_group_does(state: Any) -> None:
    cost = {}
    for instances in (2, 1000):
        site = Site(instances)

        async def serve(times: int, site: Site = site) -> None:
            for _ in range(times):
                await site.serve()

        asyncio.run(site.linked())
        site.put(state)
        asyncio.run(serve(instances))  # the busy instances are known by then
        cost[instances] = (calls(serve(40)) - calls(serve(0))) / 40
    assert cost[1000] <= SAME * cost[2], cost


def test_requests_that_wait_for_room_in_a_large_group_cost_what_those_in_a_small_one_do() -> None:
    """They wait before their prompt is computed, until some decode reports room."""
    cost, waiting = {}, 65
    for instances in (2, 1000):
        site = Site(instances)

        async def serve(requests: int, site: Site = site) -> None:
            for decode in site.decodes:
                decode.heard(messages.Busy("blocks", NO_ROOM))
            tasks = [asyncio.create_task(site.serve()) for _ in range(requests)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in tasks)
            site.decodes[0].heard(messages.Busy("slots", ROOM))
            site.scheduler.decodes.freed(site.decodes[0])
            await asyncio.gather(*tasks)

        asyncio.run(site.linked())
        cost[instances] = (calls(serve(waiting)) - calls(serve(1))) / (waiting - 1)
    assert cost[1000] <= SAME * cost[2], cost


# ---------------------------------------------------------------------------------- links on demand


class Slow(Memory):
    """A channel to an instance with a slow prefill; it records the requests."""

    def __init__(self, name: str, asked: list[tuple[str, messages.Request]]) -> None:
        super().__init__(name)
        self.asked = asked

    def open(self, call: str, request: messages.Request) -> Replies:
        self.asked.append((self.name, request))
        if not isinstance(request, messages.PrefillRequest):
            return super().open(call, request)
        replies = Replies(call)
        replies.put(messages.Accepted())
        loop = asyncio.get_running_loop()
        for reply in self._replies(request):
            loop.call_later(0.05, replies.put, reply)
        return replies


def fill(instances: list[Instance]) -> None:
    for instance in instances:
        instance.load.add(SLOTS)


@virtual
async def test_a_link_on_demand_is_made_while_the_prompt_is_computed() -> None:
    asked: list[tuple[str, messages.Request]] = []
    site = Site(100, lambda name: Slow(name, asked))
    await site.linked()
    fill(site.prefills[1:])
    linked = site.links.decodes("prefill_0")
    fill(linked)
    asked.clear()
    await site.serve()
    assert len(site.links.decodes("prefill_0")) == len(linked) + 1
    told = [(name, type(message)) for name, message in asked]
    (name,) = (name for name, kind in told if kind is messages.Connect)
    assert told.index((name, messages.Connect)) < told.index((name, messages.DecodeRequest))
    assert [kind for _, kind in told].count(messages.DecodeRequest) == 1

    asked.clear()
    await site.serve()
    assert messages.Connect not in [type(message) for _, message in asked], (
        "the link exists by then"
    )


@virtual
async def test_who_waits_for_a_decode_gets_one_that_becomes_free_and_was_not_linked() -> None:
    asked: list[tuple[str, messages.Request]] = []
    site = Site(100, lambda name: Slow(name, asked))
    await site.linked()
    fill(site.prefills[1:])
    fill(site.decodes)
    serving = asyncio.create_task(site.serve())
    await asyncio.sleep(0.5)
    assert not serving.done()
    linked = site.links.decodes("prefill_0")
    free = next(one for one in site.decodes if one not in linked)
    free.load.add(-SLOTS)
    site.scheduler.decodes.freed(free)
    await asyncio.wait_for(serving, 0.1)
    assert free in site.links.decodes("prefill_0")


@virtual
async def test_links_on_demand_are_bounded() -> None:
    site = Site(200)
    await site.linked()
    prefill = site.prefills[0]
    for decode in site.decodes:
        site.links.connect(prefill, decode)
        await asyncio.sleep(0.01)
    assert len(site.links.decodes(prefill.name)) == LINKS


@virtual
async def test_only_one_link_on_demand_is_made_at_once() -> None:
    asked: list[tuple[str, messages.Request]] = []
    site = Site(100, lambda name: Slow(name, asked))
    await site.linked()
    asked.clear()
    for decode in site.decodes:
        site.links.connect(site.prefills[0], decode)
    await asyncio.sleep(0.01)
    assert sum(isinstance(message, messages.Connect) for _, message in asked) == 1


@virtual
async def test_prefills_of_a_large_group_take_turns_to_be_asked() -> None:
    """A restarted prefill is found, though not all prefills are asked in each round."""
    asked: list[tuple[str, messages.Request]] = []
    site = Site(400, lambda name: Slow(name, asked))
    running = asyncio.create_task(site.links.run())
    await asyncio.sleep(1.0)
    assert not site.links.table.counts()["unknown"]
    asked.clear()
    await asyncio.sleep(10.0)
    described = [name for name, message in asked if isinstance(message, messages.Describe)]
    assert set(described) == {one.name for one in site.prefills}
    assert len(described) <= 6 * 64
    running.cancel()
    assert isinstance(site.links, KVLinks)
