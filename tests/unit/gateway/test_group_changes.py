"""Tests for instances that join and leave a running group: no request is lost, no state reset."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve import config
from pdserve.errors import InstanceError
from pdserve.rpc.messages import Connect, Failed, NotConnected
from pdserve.scheduling.kv_links import JOIN_S, ROUND_S
from tests.unit.gateway.test_groups import ConnectedGroups, deployment, serve
from tests.unit.group_state import known, state
from tests.unit.inprocess import Site, virtual
from tests.unit.scheduling.test_kv_links import drop_links

if TYPE_CHECKING:
    from pdserve.gateway.groups import Group
    from pdserve.scheduling.scheduler import Scheduler

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
PREFILLS, DECODES = 3, 3


def members(
    prefills: set[int], decodes: set[int], local: Literal["off", "auto"] = "off"
) -> config.Deployment:
    """Return one group with these instances."""
    made = deployment(
        config.Group(
            "a",
            tuple(f"prefill_{i}" for i in sorted(prefills)),
            tuple(f"decode_{i}" for i in sorted(decodes)),
        )
    )
    return msgspec.structs.replace(made, gateway=msgspec.structs.replace(made.gateway, local=local))


def scheduler(group: Group) -> Scheduler:
    return group._scheduler


@virtual
async def test_who_waits_is_offered_to_who_joins(tmp_path: Path) -> None:
    """A waiting request is offered to a prefill that joins, and to a decode that joins."""
    async with Site(
        tmp_path, prefills=2, decodes=2, profile=TIMES, prefill={"slots": 1}, decode={"slots": 1}
    ) as site:
        connected = ConnectedGroups(site)
        group = connected.groups.take(members({0}, {0}))["a"]
        await asyncio.sleep(ROUND_S)
        requests = [site.request(max_tokens=50) for _ in range(6)]
        tasks = [asyncio.create_task(serve(group, one)) for one in requests]
        await asyncio.sleep(0.1)
        assert {one.prefill for one in requests} == {"prefill_0", ""}

        assert connected.groups.take(members({0, 1}, {0, 1}))["a"] is group
        await asyncio.sleep(0.3)
        assert {one.prefill for one in requests} >= {"prefill_0", "prefill_1"}
        assert {one.decode for one in requests} >= {"decode_0", "decode_1"}
        assert await asyncio.gather(*tasks) == [site.expected(one) for one in requests]
        assert all(one.attempts == 1 for one in requests)
        await connected.groups.close()


@virtual
async def test_what_was_learned_of_who_stays_is_kept(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=PREFILLS, decodes=DECODES, profile=TIMES) as site:
        connected = ConnectedGroups(site)
        group = connected.groups.take(members({0, 1}, {0, 1}))["a"]
        await asyncio.sleep(1.25 * ROUND_S)
        prompts = [site.prompt(100) for _ in range(8)]
        asked = [site.request(prompt) for prompt in prompts]
        await asyncio.gather(*(serve(group, one) for one in asked))
        made = scheduler(group)
        for _ in range(10):
            assert made._budget.spend()
        for prefill in ("prefill_0", "prefill_1"):
            made._decode_stage.not_handed_over(prefill, "decode_0")
        links = made._kv_links.table._links
        before = dict(links.known)
        budget, takes = made._budget._left, made._prefill_stage._latency.expected(100)
        assert takes > 0
        assert len(before) == 4

        connected.groups.take(members({0, 2}, {0, 2}))
        await connected.groups.sweep()
        assert connected.closed == {"prefill_1", "decode_1"}
        await asyncio.sleep(ROUND_S / 4)
        assert made is scheduler(group)
        assert made._budget._left == budget
        assert made._prefill_stage._latency.expected(100) == takes
        assert set(made._decode_stage._pairs.known) == {("prefill_0", "decode_0")}
        links = made._kv_links.table._links
        assert links.known[("prefill_0", "decode_0")] == before["prefill_0", "decode_0"]
        assert set(links.known) == {(f"prefill_{i}", f"decode_{j}") for i in (0, 2) for j in (0, 2)}

        again = [site.request(prompt) for prompt in prompts]
        for before, after in zip(asked, again, strict=True):
            await serve(group, after)
            kept = before.prefill == "prefill_0"
            assert after.cached_tokens == (96 if kept else 0), "the directory still points to it"
        assert "prefill_1" not in known(group)
        await connected.groups.close()


@virtual
async def test_who_leaves_while_it_is_connected_has_no_link(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=1, profile=TIMES) as site:
        connected = ConnectedGroups(site)
        group = connected.groups.take(members({0}, {0}))["a"]
        await asyncio.sleep(ROUND_S)
        links = scheduler(group)._kv_links
        connected.groups.take(members({0, 1}, {0}))
        connected.links["decode_0"].delay = (0.1, 0.1)
        prefill = scheduler(group).prefills.instances[1]
        linking = asyncio.create_task(
            links.connect_now(prefill, group._scheduler.decodes.instances[0])
        )
        await asyncio.sleep(0.15)
        connected.groups.take(members({0}, {0}))
        await linking
        await connected.groups.sweep()
        assert set(links.table._links.known) == {("prefill_0", "decode_0")}
        await connected.groups.close()


@virtual
async def test_a_decode_that_cannot_connect_to_a_prefill_that_leaves_has_no_refusal(
    tmp_path: Path,
) -> None:
    """Requests that wait in that prefill go to another decode, and not to this one again."""
    async with Site(tmp_path, prefills=2, decodes=1, profile=TIMES) as site:
        connected = ConnectedGroups(site)
        group = connected.groups.take(members({0, 1}, {0}))["a"]
        await asyncio.sleep(ROUND_S)
        links = scheduler(group)._kv_links
        prefill, decode = (
            scheduler(group).prefills.instances[1],
            scheduler(group).decodes.instances[0],
        )
        connected.groups.take(members({0}, {0}))
        answer = Failed("INTERNAL", "no way there")
        with (
            mock.patch.object(decode, "ask", return_value=answer),
            pytest.raises(InstanceError, match=answer.message),
        ):
            await links.connect_now(prefill, decode)
        assert links.table.refusal("prefill_1", "decode_0") == "no way there"
        await connected.groups.sweep()
        assert links.table.refusal("prefill_1", "decode_0") is None
        await connected.groups.close()


@pytest.mark.parametrize("joins", ["prefill", "decode"])
@virtual
async def test_who_joins_is_offered_requests_once_its_links_are_made(
    tmp_path: Path, joins: Literal["prefill", "decode"]
) -> None:
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        drop_links(site)
        connected = ConnectedGroups(site)
        before, after = ({0}, {0, 1}), ({0, 1}, {0, 1})
        before = before if joins == "prefill" else before[::-1]
        group = connected.groups.take(members(*before))["a"]
        await asyncio.sleep(ROUND_S)
        for link in connected.links.values():
            link.delay = (0.02, 0.02)
        connected.groups.take(members(*after))
        connected.links[f"{joins}_1"].delay = (0.02, 0.02)
        loop = asyncio.get_running_loop()
        joined, served_by = loop.time(), []
        while loop.time() < joined + 2.0:
            request = site.request()
            assert await serve(group, request) == site.expected(request)
            served_by.append(getattr(request, joins))
        assert served_by[0] == f"{joins}_0"
        assert f"{joins}_1" in served_by
        assert not any(link.of(NotConnected) for link in connected.links.values())
        await connected.groups.close()


@virtual
async def test_who_joins_waits_a_bounded_time_for_its_links(tmp_path: Path) -> None:
    """One decode never answers whether it can connect to the new prefill; another one can."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        connected = ConnectedGroups(site)
        group = connected.groups.take(members({0}, {0, 1}))["a"]
        await asyncio.sleep(ROUND_S)
        connected.links["decode_1"].lose = lambda message: isinstance(message, Connect)
        connected.groups.take(members({0, 1}, {0, 1}))
        await asyncio.sleep(JOIN_S - 0.1)
        requests = [site.request() for _ in range(4)]
        await asyncio.gather(*(serve(group, one) for one in requests))
        assert {one.prefill for one in requests} == {"prefill_0"}
        await asyncio.sleep(0.1)
        requests = [site.request() for _ in range(4)]
        await asyncio.gather(*(serve(group, one) for one in requests))
        assert {one.prefill for one in requests} == {"prefill_0", "prefill_1"}
        await connected.groups.close()


@virtual
async def test_who_moves_to_another_group_is_forgotten_though_it_is_never_idle(
    tmp_path: Path,
) -> None:
    """It may serve the other group's requests all the time."""

    def both(first: tuple[str, ...], second: tuple[str, ...]) -> config.Deployment:
        return deployment(
            config.Group("a", ("prefill_0",), first), config.Group("b", ("prefill_1",), second)
        )

    async with Site(tmp_path, prefills=2, decodes=3, profile=TIMES) as site:
        connected = ConnectedGroups(site)
        groups = connected.groups.take(both(("decode_0", "decode_1"), ("decode_2",)))
        await asyncio.sleep(ROUND_S)
        own = [site.request(max_tokens=20) for _ in range(2)]
        tasks = [asyncio.create_task(serve(groups["a"], one)) for one in own]
        await asyncio.sleep(0.15)
        assert {one.decode for one in own} == {"decode_0", "decode_1"}

        connected.groups.take(both(("decode_0",), ("decode_1", "decode_2")))
        others = [site.request(max_tokens=100) for _ in range(4)]
        tasks += [asyncio.create_task(serve(groups["b"], one)) for one in others]
        links = scheduler(groups["a"])._kv_links.table._links
        await connected.groups.sweep()
        assert ("prefill_0", "decode_1") in links.known, "it serves a request of the group"
        await asyncio.sleep(0.5)
        tasks.append(asyncio.create_task(serve(groups["a"], site.request(max_tokens=100))))
        await asyncio.sleep(0.1)
        await connected.groups.sweep()
        assert {"decode_1", "decode_2"} == {one.decode for one in others}, "it is never idle"
        assert [task.done() for task in tasks] == [True, True, *[False] * 5]
        assert set(links.known) == {("prefill_0", "decode_0")}
        await asyncio.gather(*tasks)
        await connected.groups.close()


some = st.sets(st.integers(0, PREFILLS - 1), min_size=1)
steps = st.lists(
    st.tuples(some, some, st.integers(0, 6), st.floats(0.0, 0.3)), min_size=1, max_size=8
)


@settings(max_examples=60)
@given(steps=steps, local=st.sampled_from(["off", "auto"]))
def test_any_joins_and_leaves_lose_nothing_and_end_as_if_built_at_once(
    steps: list[tuple[set[int], set[int], int, float]], local: Literal["off", "auto"]
) -> None:
    @virtual
    async def run(folder: Path) -> None:
        async with Site(
            folder,
            prefills=PREFILLS,
            decodes=DECODES,
            profile=TIMES,
            prefill={"slots": 2},
            decode={"slots": 3},
        ) as site:
            connected = ConnectedGroups(site)
            tasks, requests = [], []
            for prefills, decodes, count, pause in steps:
                group = connected.groups.take(members(prefills, decodes, local))["a"]
                new = [site.request(max_tokens=1 + site.rng.randrange(20)) for _ in range(count)]
                requests += new
                tasks += [asyncio.create_task(serve(group, one)) for one in new]
                for line in (scheduler(group).prefills, scheduler(group).decodes):
                    seen = {*line._watching, *line.candidates.busy, *line.candidates._told}
                    assert seen <= set(line.instances)
                await asyncio.sleep(pause)
                await connected.groups.sweep()
            answers = await asyncio.gather(*tasks)
            assert answers == [site.expected(one) for one in requests]
            assert all(one.attempts == 1 for one in requests), (
                "an instance that leaves finishes its requests"
            )
            await asyncio.sleep(2 * ROUND_S)
            await connected.groups.sweep()
            expected = {f"prefill_{i}" for i in prefills} | {f"decode_{i}" for i in decodes}
            assert set(connected.links) - connected.closed == expected
            assert known(group) <= expected
            pairs_known = scheduler(group)._decode_stage._pairs
            assert {name for pair in pairs_known.known for name in pair} <= expected
            pairs = len(prefills) * len(decodes)
            for kind, count in {"connected": pairs, "refused": 0, "unknown": 0}.items():
                assert site.level("pdserve_kv_links", group="a", state=kind) == count

            fresh = ConnectedGroups(site)
            built = fresh.groups.take(members(prefills, decodes, local))["a"]
            await asyncio.sleep(2 * ROUND_S)
            assert state(group) == state(built)
            await connected.groups.close()
            await fresh.groups.close()

    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))
