"""Tests for instances that drain and get other assignments while requests run: nothing is lost.

The gateway has no store: it learns all from the replies of the instances.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve import config
from pdserve.control.assignment import ANY, Assignment
from pdserve.gateway.assignments import ASK_S, TURN_S, Assignments
from pdserve.rpc.messages import Assign, DecodeRequest, Drain, Inspected, PrefillRequest, Resume
from pdserve.scheduling.kv_links import JOIN_S, ROUND_S
from pdserve.scheduling.ramp import RAMP_S
from pdserve.scheduling.request import State
from tests.unit.gateway.test_groups import ConnectedGroups, deployment, serve
from tests.unit.inprocess import Site, process, virtual

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.gateway.groups import Group
    from pdserve.instances.assigned import Assigned
    from pdserve.rpc.messages import Reply, Request

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
A = config.Group("a", ("prefill_0", "prefill_1"), ("decode_0", "decode_1"))
B = config.Group("b", ("prefill_2",), ("decode_2",))


class Controlled:
    """A gateway without a store, and the control of its instances.

    Args:
        turns: the gateway also asks instances of which nothing has told it anything.
    """

    def __init__(self, site: Site, *groups: config.Group, turns: bool = False) -> None:
        self.connected = ConnectedGroups(site)
        self.assignments = Assignments(self.connected.groups, self._take)
        self._site = site
        self._deployment = deployment(*groups)
        if turns:
            control = config.Control("moves")
            self._deployment = msgspec.structs.replace(self._deployment, control=control)
        self.changes = 0
        self._take()
        self._following = asyncio.create_task(self.assignments.follow())

    def _take(self) -> None:
        self.changes += 1
        _, self.groups = self.assignments.take(self._deployment)

    def __getitem__(self, name: str) -> Group:
        return self.groups[name]

    def ask(self, name: str, request: Request) -> Reply:
        replies: list[Reply] = []
        self.instance(name).handle(ANY, request, "agent", lambda reply, _: replies.append(reply))
        return replies[0]

    def instance(self, name: str) -> Assigned:
        return self._site.assigned[name]

    def drain(self, name: str, within_s: float = 60.0) -> Reply:
        number = self.instance(name).assignment.number
        return self.ask(name, Drain("drain", process(name), number, within_s))

    def resume(self, name: str) -> Reply:
        number = self.instance(name).assignment.number
        return self.ask(name, Resume("resume", process(name), number))

    def assign(self, name: str, number: int, group: str) -> None:
        now = self.instance(name).assignment
        wanted = Assignment(number, now.role, group)
        said = self.ask(name, Assign("assign", process(name), now.number, wanted))
        assert isinstance(said, Inspected), said

    async def drained(self, name: str) -> None:
        while self.instance(name).phase.value != "drained":
            await asyncio.sleep(0.01)

    def members(self, group: str) -> set[str]:
        return {one.name for one in self.groups[group].instances.values()}

    async def close(self) -> None:
        self._following.cancel()
        await self.connected.groups.close()


def tasks(group: Group, requests: list[Any]) -> list[asyncio.Task[list[int]]]:
    return [asyncio.create_task(serve(group, one)) for one in requests]


def well(site: Site, control: Controlled, requests: list[Any]) -> None:
    """Check that being moved has cost nothing."""
    assert [one.attempts for one in requests] == [1] * len(requests)
    assert site.total("pdserve_retries_total", reason="error") == 0
    for group in control.groups.values():
        scheduler = group._scheduler
        assert scheduler._budget._left == scheduler._budget.MOST
        assert not scheduler._decode_stage._pairs.known
        for instance in group.instances.values():
            assert instance.breaker.closed


@pytest.mark.parametrize("role", ["prefill", "decode"])
@virtual
async def test_a_drain_moves_offers_to_others_and_costs_nothing(tmp_path: Path, role: str) -> None:
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        control = Controlled(site, A)
        await asyncio.sleep(ROUND_S)
        requests = [site.request(max_tokens=50) for _ in range(4)]
        running = tasks(control["a"], requests)
        await asyncio.sleep(0.05)
        control.drain(f"{role}_0")
        more = [site.request(max_tokens=20) for _ in range(8)]
        answers = await asyncio.gather(*running, *tasks(control["a"], more))
        assert answers == [site.expected(one) for one in (*requests, *more)]
        assert {getattr(one, role) for one in more} == {f"{role}_1"}
        well(site, control, requests + more)
        assert f"{role}_0" not in control.members("a")
        await control.drained(f"{role}_0")
        assert site.total("pdserve_retries_total", reason="drained") == 0
        # A gateway that has no store notices that it serves again.
        control.resume(f"{role}_0")
        await asyncio.sleep(ASK_S + JOIN_S + 0.1)
        assert f"{role}_0" in control.members("a")
        again = [site.request(max_tokens=20) for _ in range(8)]
        await asyncio.gather(*tasks(control["a"], again))
        assert {getattr(one, role) for one in again} == {f"{role}_0", f"{role}_1"}
        await control.close()
        await site.idle()


@virtual
async def test_what_is_left_of_a_drain_goes_on_elsewhere_token_exact(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        control = Controlled(site, A)
        await asyncio.sleep(ROUND_S)
        requests = [site.request(max_tokens=300) for _ in range(4)]
        running = tasks(control["a"], requests)
        await asyncio.sleep(0.5)
        assert {one.decode for one in requests} == {"decode_0", "decode_1"}
        control.drain("decode_0", within_s=0.5)
        await asyncio.sleep(1.0)
        assert control.instance("decode_0").phase.value == "drained"
        assert {one.decode for one in requests} == {"decode_1"}
        assert await asyncio.gather(*running) == [site.expected(one) for one in requests]
        assert site.total("pdserve_retries_total", reason="drained") == 2
        assert sorted(one.moves for one in requests) == [0, 0, 1, 1]
        well(site, control, requests)
        await control.close()
        await site.idle()


@virtual
async def test_prompts_that_are_left_of_a_drain_are_computed_elsewhere(tmp_path: Path) -> None:
    slow = {**TIMES, "prefill": {"base_ms": 1000.0}}
    async with Site(tmp_path, prefills=2, decodes=2, profile=slow) as site:
        control = Controlled(site, A)
        await asyncio.sleep(ROUND_S)
        requests = [site.request() for _ in range(2)]
        running = tasks(control["a"], requests)
        await asyncio.sleep(0.1)
        control.drain("prefill_0", within_s=0.2)
        assert await asyncio.gather(*running) == [site.expected(one) for one in requests]
        assert {one.prefill for one in requests} == {"prefill_1"}
        well(site, control, requests)
        await control.close()


@virtual
async def test_kv_caches_of_a_prefill_that_has_left_are_no_failure_of_the_pair(
    tmp_path: Path,
) -> None:
    """Another gateway fills the decode for longer than the drain lasts."""
    async with Site(tmp_path, prefills=2, decodes=1, profile=TIMES, decode={"slots": 1}) as site:
        group = config.Group("a", A.prefill, ("decode_0",))
        control, other = Controlled(site, group), Controlled(site, group)
        await asyncio.sleep(ROUND_S)
        requests = [site.request(max_tokens=300)]
        running = tasks(other["a"], requests)
        await asyncio.sleep(0.2)
        requests.append(waits := site.request(max_tokens=10))
        running += tasks(control["a"], [waits])
        await asyncio.sleep(0.1)
        assert (waits.state, waits.decode) == (State.PREFILLED, "")
        control.drain(waits.prefill, within_s=0.3)
        await asyncio.sleep(ROUND_S)  # the next look at its endpoint finds out
        assert control.instance(waits.prefill).phase.value == "drained"
        assert await asyncio.gather(*running) == [site.expected(one) for one in requests]
        assert waits.moves == 1
        well(site, control, requests)
        await control.close()
        await other.close()


@virtual
async def test_an_instance_moves_to_another_group_and_a_stale_gateway_follows(
    tmp_path: Path,
) -> None:
    async with Site(tmp_path, prefills=3, decodes=3, profile=TIMES) as site:
        control, stale = Controlled(site, A, B), Controlled(site, A, B)
        await asyncio.sleep(ROUND_S)
        prompt = site.prompt(64)
        before = [site.request(prompt, max_tokens=40) for _ in range(6)]
        running = tasks(control["a"], before) + tasks(stale["a"], before[:0])
        await asyncio.sleep(0.05)
        old = {one.name: one for one in control["a"].instances.values()}
        for name in ("prefill_0", "decode_0"):
            control.drain(name)
            await control.drained(name)
            control.assign(name, 2, "b")
        assert "decode_0" in stale.members("a")
        # The first requests find out; nobody notices.
        after = [site.request(max_tokens=20) for _ in range(8)]
        for gateway in (control, stale):
            await asyncio.gather(*tasks(gateway["a"], after[:4]))
            await asyncio.gather(*tasks(gateway["b"], after[4:]))
            after = [site.request(max_tokens=20) for _ in range(8)]
        assert await asyncio.gather(*running) == [site.expected(one) for one in before]
        await asyncio.sleep(ASK_S + JOIN_S)
        for gateway in (control, stale):
            assert gateway.members("a") == {"prefill_1", "decode_1"}
            assert gateway.members("b") == {"prefill_0", "prefill_2", "decode_0", "decode_2"}
            asked = [site.request(max_tokens=30) for _ in range(12)]
            answers = await asyncio.gather(*tasks(gateway["b"], asked))
            assert answers == [site.expected(one) for one in asked]
            assert {one.prefill for one in asked} == {"prefill_0", "prefill_2"}
            assert {one.decode for one in asked} == {"decode_0", "decode_2"}
            well(site, gateway, asked)
            # What was learned under the former assignment is forgotten, and its channel closed.
            new = {one.name: one for one in gateway["b"].instances.values()}
            assert new["prefill_0"] is not old["prefill_0"]
            await gateway.connected.groups.sweep()
            await gateway.connected.groups.sweep()
            known = gateway.connected.groups._instances.values()
            assert len(known) == 6, "the former channels are closed"
            assert gateway["a"]._scheduler._kv_links.table.others("prefill_0") == {}
        await control.close()
        await stale.close()
        await site.idle()


@virtual
async def test_a_new_assignment_in_the_same_group_starts_afresh(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        control = Controlled(site, A)
        await asyncio.sleep(ROUND_S)
        prompt = site.prompt(64)
        for _ in range(4):
            await serve(control["a"], site.request(prompt))
        scheduler = control["a"]._scheduler
        prefixes = scheduler._prefill_stage._prefixes
        cached = scheduler._prefill_stage._cached(site.request(prompt))
        [name] = cached.some
        control.drain(name)
        await control.drained(name)
        control.assign(name, 5, "a")
        for _ in range(4):
            await serve(control["a"], site.request())
        await asyncio.sleep(ASK_S + JOIN_S)
        assert control["a"]._scheduler is scheduler
        assert scheduler._prefill_stage._prefixes is prefixes
        assert scheduler._prefill_stage._cached(site.request(prompt)).some == {}
        assert control.members("a") == {*A.prefill, *A.decode}
        asked = [site.request() for _ in range(8)]
        await asyncio.gather(*tasks(control["a"], asked))
        assert {one.prefill for one in asked} == set(A.prefill)
        well(site, control, asked)
        await control.close()


@virtual
async def test_a_gateway_is_told_once_and_asks_no_more_often_than_it_must(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        control = Controlled(site, A)
        await asyncio.sleep(ROUND_S)
        control.drain("prefill_0")
        control.drain("decode_0")
        requests = [site.request() for _ in range(20)]
        await asyncio.gather(*tasks(control["a"], requests))
        links = control.connected.links
        refused = (
            len(links["prefill_0"].of(PrefillRequest)),
            len(links["decode_0"].of(DecodeRequest)),
        )
        # Offers that were under way together are refused together, and none after them.
        assert max(refused) <= 4
        assert control.changes <= 3
        await asyncio.sleep(5.0)
        assert len(links["prefill_0"].of(PrefillRequest)) == refused[0]
        await control.close()


@virtual
async def test_a_move_that_no_request_meets_is_noticed(tmp_path: Path) -> None:
    """A decode leaves a group that serves nobody: each member is asked in turn."""
    async with Site(tmp_path, prefills=3, decodes=3, profile=TIMES) as site:
        control = Controlled(site, A, B, turns=True)
        await asyncio.sleep(ROUND_S)
        control.drain("decode_1")
        control.assign("decode_1", 2, "b")
        await asyncio.sleep(6 * TURN_S + ASK_S)
        assert control.members("a") == {"prefill_0", "prefill_1", "decode_0"}
        assert control.members("b") == {"prefill_2", "decode_2", "decode_1"}
        await control.close()


@virtual
async def test_an_empty_newcomer_does_not_attract_everything(tmp_path: Path) -> None:
    """Mooncake#3688: the part of the others' load that it has grows for a bounded time."""
    roomy = {"blocks": 10_000}
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES, decode=roomy) as site:
        control = Controlled(site, A)
        control.drain("decode_0")
        await control.drained("decode_0")
        running = []
        for _ in range(24):
            running += tasks(control["a"], [site.request(max_tokens=2000)])
            await asyncio.sleep(0.05)
        control.assign("decode_0", 2, "a")
        while "decode_0" not in control.members("a"):
            await asyncio.sleep(0.01)
        decodes = {one.name: one.load for one in control["a"].instances.values()}
        new, old = decodes["decode_0"], decodes["decode_1"]
        parts = []
        for second in range(6):
            for _ in range(10):
                running += tasks(control["a"], [site.request(max_tokens=2000)])
                await asyncio.sleep(0.1)
            parts.append(new.open / old.open)
            assert new.open <= old.open * min((second + 1.0) / RAMP_S, 1.0) + 1
        assert 0 < parts[0] < 0.3
        assert parts == sorted(parts)
        assert parts[-1] > 0.9
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await control.close()


@virtual
async def test_a_newcomer_is_offered_what_waits_for_busy_others(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES, prefill={"slots": 1}) as site:
        control = Controlled(site, A)
        control.drain("prefill_0")
        await control.drained("prefill_0")
        control.assign("prefill_0", 2, "a")
        requests = [site.request() for _ in range(20)]
        await asyncio.gather(*tasks(control["a"], requests))
        assert sum(one.prefill == "prefill_0" for one in requests) >= 8
        await control.close()
