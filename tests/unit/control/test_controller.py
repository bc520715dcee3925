"""Tests for the controller with agents and servers that only its store and their pages show."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from pdserve.config import Deployment
from pdserve.control import event_log, records
from pdserve.control.controller import Controller, State
from pdserve.control.decide import Decisions, Write, decide
from pdserve.control.events import Event
from pdserve.control.records import DrainOrder, Pin
from pdserve.control.store.election import GENERATION, LEADER
from pdserve.control.store.errors import StoreUnreachable
from pdserve.control.store.protocol import Delete, Listing, put
from pdserve.control.stored import Stored, read
from pdserve.observability.exposition import Exposition
from pdserve.observability.metrics import Registry
from tests.unit.control.fakes import (
    Agent,
    Servers,
    deployment,
    now,
    ratio,
    virtually,
    wanted,
)
from tests.unit.control.store.model import Model, ModelStore

SOON_S = 20.0


class Breakable(ModelStore):
    """A store that can be away, and that counts."""

    away = False
    before_write: Callable[[], None] = staticmethod(lambda: None)
    after_write: Callable[[], None] = staticmethod(lambda: None)

    def _check(self) -> None:
        if self.away:
            raise StoreUnreachable("test: away")

    async def list_prefix(self, prefix: str) -> Listing:
        self._check()
        return await super().list_prefix(prefix)

    async def keep_alive(self, lease: int) -> None:
        self._check()
        await super().keep_alive(lease)

    async def transact(self, compare: Any, operations: Any) -> int | None:
        self._check()
        self.before_write()
        done = await super().transact(compare, operations)
        self.after_write()
        return done


@dataclass
class Site:
    """A deployment in virtual time: a store, an agent, servers, and any number of controllers."""

    deployment: Deployment
    model: Model = field(default_factory=Model)
    silent: set[str] = field(default_factory=set)
    """Instances that answer no probe."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = ModelStore(self.model)
        self.servers = Servers(self.store)
        self.agent = Agent(ModelStore(self.model), lambda: self.deployment)
        self.metrics = Registry()

    async def probe(self, _: Deployment, name: str) -> bool:
        return name not in self.silent

    def controller(
        self, name: str = "one", decisions: Any = decide
    ) -> tuple[Controller, Breakable]:
        store = Breakable(self.model)
        made = Controller(
            store,
            name,
            lambda: self.deployment,
            self.servers.scrape,
            self.probe,
            self.metrics,
            decisions=decisions,
            clock=now,
        )
        return made, store

    def start(self, work: Any) -> asyncio.Task[None]:
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    async def stored(self) -> Stored:
        return read(await self.store.list_prefix(""))

    async def until(self, true: Callable[[Stored], bool], within_s: float = SOON_S) -> Stored:
        """Return what is stored once this is true of it."""
        clock = asyncio.get_running_loop()
        end = clock.time() + within_s
        while not true(found := await self.stored()):
            assert clock.time() < end, found
            await asyncio.sleep(0.1)
        return found

    async def events(self) -> list[Event]:
        return [event for _, event in event_log.decoded((await self.stored()).events)]


@asynccontextmanager
async def running(made: Deployment, *, controlled: bool = True) -> AsyncIterator[Site]:
    site = Site(made)
    site.start(site.agent.run())
    if controlled:
        site.start(site.controller()[0].run())
    try:
        yield site
    finally:
        for task in site.tasks:
            task.cancel()
        await asyncio.gather(*site.tasks, return_exceptions=True)


def complete(stored: Stored) -> bool:
    """Tell whether every instance serves as desired."""
    return len(stored.desired) > 0 and all(
        name in stored.observed and stored.observed[name].assignment == one.assignment
        for name, one in stored.desired.items()
    )


@virtually()
async def test_the_first_leader_writes_the_state_of_the_file() -> None:
    async with running(deployment(3, 2, spares=("d1",))) as site:
        stored = await site.until(complete)
        assert stored.desired["p0"] == wanted(1, "prefill")
        assert stored.desired["d1"] == wanted(1, "none", "")
        assert stored.groups["default"].scenario == "default"
        assert (await site.events())[0].what == "file"


@virtually()
async def test_more_instances_than_a_transaction_takes_are_written_in_several() -> None:
    async with running(deployment(120, 80)) as site:
        stored = await site.until(lambda stored: len(stored.desired) == 200)
        assert stored.generation >= 2


@virtually()
async def test_the_ratio_follows_a_shifted_load_and_events_tell_why() -> None:
    async with running(deployment(4, 4)) as site:
        # A prefill does 10 requests a second, a decode 50: 6:2 is best.
        site.servers.rate, site.servers.decode_s = 60.0, 0.2
        stored = await site.until(lambda stored: ratio(stored) == (6, 2), 300.0)
        moved = {name for name, one in stored.desired.items() if one.assignment.number > 1}
        assert len(moved) == 2
        await site.until(lambda stored: not stored.transactions and complete(stored))
        begun = [event for event in await site.events() if event.what == "begin"]
        assert begun
        assert begun[0].group == "default"
        assert begun[0].numbers, "an event has the inputs of its decision"


@virtually()
async def test_advise_tells_and_changes_nothing() -> None:
    async with running(deployment(4, 4, ratio="advise")) as site:
        site.servers.rate, site.servers.decode_s = 60.0, 0.2
        await asyncio.sleep(200.0)
        stored = await site.stored()
        assert ratio(stored) == (4, 4)
        assert {one.assignment.number for one in stored.desired.values()} == {1}
        advice = [event for event in await site.events() if event.what == "advice"]
        assert advice
        assert len(advice) < 20, "it does not repeat itself at every tick"


@virtually()
async def test_a_gateway_that_cannot_be_read_is_unknown_and_not_idle() -> None:
    async with running(deployment(4, 4)) as site:
        site.servers.rate, site.servers.decode_s = 60.0, 0.2
        site.servers.silent.add("local")
        await asyncio.sleep(300.0)
        assert ratio(await site.stored()) == (4, 4)
        page = Exposition(site.metrics).page()
        assert 'pdserve_control_scrapes_total{outcome="unknown"}' in page
        assert 'outcome="read"' not in page


@virtually()
async def test_never_does_not_even_look() -> None:
    async with running(deployment(4, 4, ratio="never")) as site:
        site.servers.rate = 60.0
        await asyncio.sleep(60.0)
        assert site.servers.scraped == 0


@virtually()
async def test_another_leader_undoes_no_switch_and_a_reload_neither() -> None:
    async with running(deployment(4, 4, ratio="never"), controlled=False) as site:
        first = site.start(site.controller("one")[0].run())
        await site.until(complete)
        await put(site.store, records.PINS + "default", records.encode(Pin(5, 3)))
        await site.until(lambda stored: ratio(stored) == (5, 3) and not stored.transactions)
        await kill(site, first)
        site.deployment = deployment(4, 4, ratio="never", budget=20)
        await put(site.store, records.PINS + "default", records.encode(Pin(5, 3)))
        site.start(site.controller("two")[0].run())
        await asyncio.sleep(30.0)
        stored = await site.stored()
        assert stored.generation > 0
        assert ratio(stored) == (5, 3)


async def kill(site: Site, task: asyncio.Task[None]) -> None:
    """End a controller as a kill does: its lease ends, and nothing else happens."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    entries = {one.key: one for one in (await site.store.list_prefix("control/")).entries}
    if LEADER in entries:
        site.model.end(entries[LEADER].lease)
        site.store._notify()


@virtually()
async def test_a_reload_adds_and_removes_instances() -> None:
    async with running(deployment(3, 3, ratio="never")) as site:
        await site.until(complete)
        site.deployment = deployment(4, 2, ratio="never")
        stored = await site.until(lambda stored: "p3" in stored.desired and complete(stored))
        assert "d2" not in stored.desired
        text = " ".join(event.text for event in await site.events())
        assert "p3" in text
        assert "d2" in text


@virtually()
async def test_a_drained_instance_is_out_until_the_order_is_withdrawn() -> None:
    async with running(deployment(4, 4, ratio="never")) as site:
        await site.until(complete)
        order = records.encode(DrainOrder(now()))
        await put(site.store, records.DRAINS + "p1", order)
        await site.until(lambda stored: stored.desired["p1"].state == "draining")
        await site.store.transact((), (Delete(records.DRAINS + "p1"),))
        await site.until(lambda stored: stored.desired["p1"].state == "serving", 60.0)


@virtually()
async def test_an_agent_that_is_gone_is_no_loss_while_its_instances_answer() -> None:
    async with running(deployment(4, 4, spares=("d3",), ratio="never")) as site:
        await site.until(complete)
        before = (await site.stored()).desired
        await kill_agent(site)
        await asyncio.sleep(120.0)
        assert (await site.stored()).desired == before
        assert not [event for event in await site.events() if event.what == "lost"]


async def kill_agent(site: Site) -> None:
    site.tasks[0].cancel()
    await asyncio.gather(site.tasks[0], return_exceptions=True)
    site.store._notify()


@virtually()
async def test_a_silent_instance_without_an_agent_is_lost_and_replaced_by_a_spare() -> None:
    made = deployment(4, 4, spares=("d3",), ratio="never")
    own = replace(made.servers[0], name="own", prefill=("p0",), decode=(), gateway=False)
    rest = replace(made.servers[0], prefill=("p1", "p2", "p3"))
    async with running(replace(made, servers=(rest, own)), controlled=False) as site:
        site.agent.deployment = lambda: replace(site.deployment, servers=(rest,))
        other = Agent(ModelStore(site.model), lambda: replace(site.deployment, servers=(own,)), "b")
        gone = site.start(other.run())
        site.start(site.controller()[0].run())
        await site.until(complete)
        gone.cancel()
        site.silent.add("p0")
        stored = await site.until(
            lambda stored: stored.desired["d3"].assignment.role == "prefill", 60.0
        )
        assert stored.desired["d3"].assignment.group == "default"
        whats = [event.what for event in await site.events()]
        assert "lost" in whats
        assert "begin" in whats


@virtually()
async def test_a_failed_instance_is_replaced_by_a_spare() -> None:
    async with running(deployment(4, 4, spares=("d3",), ratio="never")) as site:
        await site.until(complete)
        site.agent.failed.add("p0")
        await site.until(lambda stored: stored.desired["d3"].assignment.role == "prefill")
        await site.until(lambda stored: not stored.transactions)


@virtually()
async def test_two_controllers_have_one_leader_and_the_other_takes_over() -> None:
    async with running(deployment(4, 4, ratio="never"), controlled=False) as site:
        controllers = {name: site.controller(name)[0] for name in ("one", "two")}
        tasks = {name: site.start(made.run()) for name, made in controllers.items()}
        await site.until(complete)
        leading = [name for name, made in controllers.items() if made.state is State.LEADING]
        assert len(leading) == 1
        await kill(site, tasks[leading[0]])
        (other,) = set(controllers) - set(leading)
        await asyncio.sleep(5.0)
        assert controllers[other].state is State.LEADING


@virtually()
async def test_a_leader_that_was_replaced_writes_nothing_and_stands_again() -> None:
    async with running(deployment(4, 4, ratio="never"), controlled=False) as site:
        old, store = site.controller("old")
        site.start(old.run())
        await site.until(complete)
        store.away = True  # it is stopped, for all that the store sees of it
        entries = {one.key: one for one in (await site.store.list_prefix("control/")).entries}
        site.model.end(entries[LEADER].lease)
        new, _ = site.controller("new")
        site.start(new.run())
        await asyncio.sleep(3.0)
        assert new.state is State.LEADING
        await put(site.store, records.PINS + "default", records.encode(Pin(5, 3)))
        store.away = False
        await site.until(lambda stored: ratio(stored) == (5, 3) and not stored.transactions)
        await asyncio.sleep(30.0)
        assert old.state is State.CANDIDATE
        leader = {one.key: one.value for one in (await site.store.list_prefix("control/")).entries}
        assert leader[LEADER] == b"new"


@pytest.mark.parametrize("step", range(8), ids=lambda step: f"{step}th")
@virtually()
async def test_a_controller_killed_at_each_write_of_a_change_leaves_one_that_ends(
    step: int,
) -> None:
    async with running(deployment(4, 4, ratio="never"), controlled=False) as site:
        first, store = site.controller("first")
        task = site.start(first.run())
        await site.until(complete)
        writes, killed = 0, asyncio.Event()

        def die() -> None:
            task.cancel()
            killed.set()
            raise asyncio.CancelledError

        def before() -> None:
            if writes == step // 2 and step % 2 == 0:
                die()

        def after() -> None:
            nonlocal writes
            writes += 1
            if writes == step // 2 + 1 and step % 2 == 1:
                die()

        store.before_write, store.after_write = before, after
        await put(site.store, records.PINS + "default", records.encode(Pin(6, 2)))
        await asyncio.wait_for(killed.wait(), 60.0)
        await kill(site, task)
        site.start(site.controller("second")[0].run())
        stored = await site.until(
            lambda stored: ratio(stored) == (6, 2) and not stored.transactions and complete(stored),
            60.0,
        )
        numbers = sorted(one.assignment.number for one in stored.desired.values())
        assert numbers == [1] * 6 + [2] * 2, "each instance was changed once"


@virtually()
async def test_decisions_that_fail_end_nothing() -> None:
    calls = 0

    def failing(*given: Any) -> Decisions:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise KeyError("a bad value")
        return decide(*given)

    async with running(deployment(4, 4, ratio="never"), controlled=False) as site:
        site.start(site.controller(decisions=failing)[0].run())
        await put(site.store, records.PINS + "default", records.encode(Pin(5, 3)))
        await site.until(lambda stored: ratio(stored) == (5, 3), 60.0)
        assert 'turns_total{outcome="failed"} 3' in Exposition(site.metrics).page()


BAD = (
    'pdserve_prefill_seconds_count{instance="p0"} NaN\n'
    'pdserve_busy_seconds_total{instance="p0"} +Inf\n'
    'pdserve_busy_seconds_total{instance="p1"} much\n'
    'pdserve_waiting_requests{gateway="pdserve",group="default",role="prefill"} -1e400\n'
    'pdserve_waiting_requests{group="default"\n'
)


@virtually()
async def test_bad_numbers_and_values_of_the_store_end_nothing() -> None:
    async with running(deployment(4, 4)) as site:
        site.servers.rate, site.servers.extra = 60.0, BAD
        await site.until(complete)
        for key in ("transactions/default", "observed/instances/p0", "drains/p1", "pins/x", "a/b"):
            await put(site.store, key, b'{"kind": "\xff"}')
        await put(site.store, "events/what", b"\x00")
        await put(site.store, records.DESIRED_INSTANCES + "p2", b"[]")
        await asyncio.sleep(60.0)
        assert 'turns_total{outcome="failed"}' not in Exposition(site.metrics).page()
        stored = await site.stored()
        assert stored.desired["p2"] == wanted(1, "prefill"), "what cannot be read is written anew"


@virtually()
async def test_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEPT", 20)

    def talking(*given: Any) -> Decisions:
        said = Event(now(), "hold", "default", f"{now():.2f}")
        return Decisions((), (said,), decide(*given).memory)

    async with running(deployment(4, 4), controlled=False) as site:
        site.start(site.controller(decisions=talking)[0].run())
        await asyncio.sleep(60.0)
        stored = await site.stored()
        assert len(stored.events) == 20
        numbers = [event_log.number(key) for key, _ in stored.events]
        assert numbers == list(range(numbers[0], numbers[0] + 20))
        assert numbers[0] > 20


@virtually()
async def test_a_large_write_tells_as_much_as_fits() -> None:
    def flooding(cluster: Any, policy: Any, memory: Any) -> Decisions:
        found = decide(cluster, policy, memory)
        writes = tuple(Write(f"lent/x{number}", None) for number in range(118))
        events = tuple(Event(now(), "hold", "default", str(number)) for number in range(30))
        return Decisions(writes, events, found.memory)

    async with running(deployment(4, 4), controlled=False) as site:
        site.start(site.controller(decisions=flooding)[0].run())
        await asyncio.sleep(10.0)
        assert 'outcome="written"' in (page := Exposition(site.metrics).page())
        assert 'outcome="unreachable"' not in page
        assert (await site.events())[-1].text == "8"


@virtually()
async def test_while_the_store_is_away_nothing_changes_and_then_it_goes_on() -> None:
    async with running(deployment(4, 4, ratio="never"), controlled=False) as site:
        made, store = site.controller()
        site.start(made.run())
        before = await site.until(complete)
        store.away = True
        await asyncio.sleep(60.0)
        after = await site.stored()
        assert after.desired == before.desired
        store.away = False
        await put(site.store, records.PINS + "default", records.encode(Pin(5, 3)))
        await site.until(lambda stored: ratio(stored) == (5, 3), 60.0)


@virtually()
async def test_its_page_tells_who_leads_and_what_is_desired_and_serves() -> None:
    async with running(deployment(4, 4, ratio="never"), controlled=False) as site:
        made, _ = site.controller()
        page = Exposition(site.metrics)
        made.show()
        assert "pdserve_control_leader 0\n" in page.page()
        assert "pdserve_control_store_age_seconds -1\n" in page.page()
        task = site.start(made.run())
        await site.until(complete)
        await asyncio.sleep(6.0)
        made.show()
        text = page.page()
        assert "# TYPE pdserve_control_leader gauge\npdserve_control_leader 1\n" in text
        serving = 'pdserve_control_instances{group="default",role="prefill",state="serving"} 4\n'
        assert serving in text
        assert "pdserve_control_turn_seconds_count" in text
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert "pdserve_control_instances" not in page.page()


def test_the_generation_key_is_not_one_of_records() -> None:
    """A listing is one revision, whose generation fences what is decided from it."""
    assert GENERATION.startswith(records.CONTROL)
