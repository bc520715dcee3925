"""Tests for the watchdog, which detects failures in a server and repairs them, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from pdserve.errors import InstanceError
from pdserve.node.backoff import CALM_S, Backoff
from pdserve.node.health import Life, State
from pdserve.node.reconcile import Duty
from pdserve.node.watchdog import LOOK_S, SERVER, STOPPED_S, Check, Dismissed, NotRestored, Watchdog
from tests.unit.inprocess import virtual

LOAD_S = 30.0
MODELS = ("front", "one", "two")
EVERY_S, WITHIN_S = 1.0, 3.0


class FakeServer:
    """A server whose failures and answers a test sets; it records what is done to it, and when."""

    def __init__(self) -> None:
        self.lives = dict.fromkeys((SERVER, *MODELS), Life.RUNS)
        self.silent: set[str] = set()
        self.broken: dict[str, Exception] = {}
        """Errors that restoring a thing ends with."""
        self.takes: defaultdict[str, float] = defaultdict(lambda: 0.5)
        """Seconds that restoring a thing takes."""
        self.unreachable = False
        """Its models cannot be withdrawn."""
        self.crowded = 0
        """The number of times that withdrawing it fails."""
        self.trouble: Exception | None = None
        """The error of every probe."""
        self.blind = False
        """Its processes cannot be looked at."""
        self.dismissed = ""
        """The reason, when it is found that the server has been stopped."""
        self.done: list[tuple[str, str, float]] = []

    def look(self) -> Mapping[str, Life]:
        if self.blind:
            raise OSError(24, "Too many open files")
        if self.dismissed == "look":
            raise Dismissed("it has been stopped")
        return dict(self.lives)

    async def withdraw(self, thing: str) -> None:
        self._note("withdraw", thing)
        if self.unreachable and thing != SERVER:
            raise OSError("connection refused")
        if self.crowded and thing == SERVER:
            self.crowded -= 1
            raise RuntimeError("can't start new thread")

    async def restore(self, thing: str) -> None:
        self._note("restore", thing)
        if self.dismissed == "restore":
            raise Dismissed("it has been stopped")
        await asyncio.sleep(self.takes[thing])
        if thing in self.broken:
            raise self.broken[thing]
        for one in self.lives if thing == SERVER else [thing]:
            self.lives[one] = Life.RUNS
            self.silent.discard(one)

    async def ask(self, thing: str) -> bool:
        self._note("ask", thing)
        if self.trouble is not None:
            raise self.trouble
        if thing in self.silent:
            await asyncio.sleep(1e6)
        if self.lives[thing] is Life.GONE:
            raise InstanceError("Stub process is not healthy.")
        return True

    def _note(self, what: str, thing: str) -> None:
        self.done.append((what, thing, asyncio.get_running_loop().time()))

    def times(self, what: str, thing: str) -> list[float]:
        return [at for did, to, at in self.done if (did, to) == (what, thing)]


@contextlib.asynccontextmanager
async def watched(server: FakeServer, asked: Sequence[str] = ()) -> AsyncIterator[Watchdog]:
    checks = [
        Check(thing, lambda thing=thing: server.ask(thing), EVERY_S, WITHIN_S) for thing in asked
    ]
    watchdog = Watchdog(server, MODELS, checks, whole={"front"}, load_s=LOAD_S)
    running = asyncio.create_task(watchdog.run())
    try:
        await asyncio.sleep(1)
        yield watchdog
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def now() -> float:
    return asyncio.get_running_loop().time()


class TestNoticing:
    @virtual
    async def test_nothing_is_done_to_what_is_well(self) -> None:
        server = FakeServer()
        async with watched(server, [SERVER, *MODELS]) as watchdog:
            await asyncio.sleep(100)
            assert {what for what, _, _ in server.done} == {"ask"}
            assert {health.state for health in watchdog.health.values()} == {State.HEALTHY}
            assert all(
                now() - health.answered <= EVERY_S + 0.1 for health in watchdog.health.values()
            )

    @virtual
    async def test_a_dead_stub_is_out_of_service_at_once(self) -> None:
        server = FakeServer()
        async with watched(server) as watchdog:
            died = now()
            server.lives["one"] = Life.GONE
            await asyncio.sleep(1.5 * LOOK_S)
            assert server.times("withdraw", "one")[0] - died <= LOOK_S
            assert watchdog.health["one"].state is State.REPAIRING
            assert watchdog.health["two"].state is State.HEALTHY
            await asyncio.sleep(1)
            assert watchdog.health["one"].state is State.HEALTHY
            assert watchdog.health["one"].repairs == 1
            assert watchdog.health["one"].down_s == pytest.approx(0.5)
            assert not server.times("withdraw", SERVER)

    @virtual
    async def test_a_server_that_cannot_be_withdrawn_is_restored_all_the_same(self) -> None:
        server = FakeServer()
        server.crowded = 100
        async with watched(server) as watchdog:
            server.lives[SERVER] = Life.GONE
            await asyncio.sleep(1)
            assert watchdog.health[SERVER].state is State.HEALTHY
            assert len(server.times("withdraw", SERVER)) == 1
            assert len(server.times("restore", SERVER)) == 1

    @virtual
    async def test_who_stops_for_a_moment_is_left_alone(self) -> None:
        server = FakeServer()
        async with watched(server):
            for _ in range(5):
                server.lives["one"] = Life.STOPPED
                await asyncio.sleep(STOPPED_S - 0.2)
                server.lives["one"] = Life.RUNS
                await asyncio.sleep(0.2)
            assert server.done == []
            server.lives["one"] = Life.STOPPED
            await asyncio.sleep(STOPPED_S + 0.2)
            assert len(server.times("withdraw", "one")) == 1

    @virtual
    async def test_one_late_answer_is_no_failure(self) -> None:
        server = FakeServer()
        async with watched(server, ["one"]) as watchdog:
            server.silent.add("one")
            await asyncio.sleep(EVERY_S + WITHIN_S)
            assert watchdog.health["one"].state is State.LATE
            server.silent.clear()
            await asyncio.sleep(10)
            assert watchdog.health["one"].state is State.HEALTHY
            assert not server.times("withdraw", "one")

    @virtual
    async def test_a_wedged_model_is_noticed_by_its_silence(self) -> None:
        server = FakeServer()
        async with watched(server, ["one", "two"]) as watchdog:
            server.silent.add("one")
            began = now()
            await asyncio.sleep(2 * (EVERY_S + WITHIN_S) + 0.6)
            assert server.times("withdraw", "one")[0] - began <= 2 * (EVERY_S + WITHIN_S)
            assert watchdog.health["one"].repairs == 1
            assert "no answer within 3 s" in watchdog.health["one"].reason
            assert watchdog.health["two"].repairs == 0

    @virtual
    async def test_what_a_former_life_did_not_say_is_not_held_against_the_next(self) -> None:
        server = FakeServer()
        async with watched(server, ["one"]) as watchdog:
            server.silent.add("one")
            await asyncio.sleep(EVERY_S + 2 * WITHIN_S)  # a second probe is open
            server.lives["one"] = Life.GONE
            await asyncio.sleep(60)
            assert len(server.times("withdraw", "one")) == 1
            assert watchdog.health["one"].state is State.HEALTHY


class TestTroubles:
    """Failures of the watchdog's own work neither count as failures of its server nor end it."""

    @virtual
    async def test_what_cannot_be_asked_has_not_failed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = FakeServer()
        for trouble in (KeyError("prefill_1"), OSError(24, "Too many open files")):
            server.trouble = trouble
            async with watched(server, ["one", "two"]) as watchdog:
                await asyncio.sleep(20)
                assert not server.times("withdraw", "one")
                assert watchdog.health["one"].state is State.HEALTHY
                said = [record for record in caplog.records if "cannot be asked" in record.message]
                assert len(said) == 2, "logged once for each, not every second"
                caplog.clear()
                server.trouble = None
                server.silent.add("one")
                await asyncio.sleep(20)
                assert server.times("withdraw", "one"), "it is probed again"
            server = FakeServer()

    @virtual
    async def test_misses_count_beside_what_cannot_be_asked(self) -> None:
        server = FakeServer()
        async with watched(server, ["one"]):
            for _ in range(3):
                server.silent.add("one")
                await asyncio.sleep(EVERY_S + WITHIN_S)
                server.silent.clear()
                server.trouble = KeyError("one")
                await asyncio.sleep(3 * EVERY_S)
                server.trouble = None
            assert server.times("withdraw", "one")

    @virtual
    async def test_what_cannot_be_seen_is_looked_at_again(self) -> None:
        server = FakeServer()
        async with watched(server) as watchdog:
            server.blind = True
            server.lives["one"] = Life.GONE
            await asyncio.sleep(5)
            assert server.done == []
            server.blind = False
            await asyncio.sleep(2)
            assert watchdog.health["one"].repairs == 1

    @virtual
    async def test_a_server_that_has_been_stopped_ends_it(self) -> None:
        """This holds in the middle of a repair, too."""
        for what in ("look", "restore"):
            server = FakeServer()
            watchdog = Watchdog(server, MODELS, [], whole=(), load_s=LOAD_S)
            running = asyncio.create_task(watchdog.run())
            await asyncio.sleep(1)
            server.dismissed = what
            server.lives[SERVER] = Life.GONE
            with pytest.raises(Dismissed, match="stopped"):
                await asyncio.wait_for(running, 1)
            assert len(server.times("restore", SERVER)) == (what == "restore")


class TestRepairing:
    @virtual
    async def test_a_gateways_model_takes_the_server_with_it(self) -> None:
        server = FakeServer()
        async with watched(server) as watchdog:
            server.lives["front"] = Life.GONE
            await asyncio.sleep(2)
            assert server.times("withdraw", SERVER)
            assert not server.times("withdraw", "front")
            assert watchdog.health[SERVER].repairs == 1
            assert watchdog.health[SERVER].reason == "front: its process is gone"

    @virtual
    async def test_a_dead_server_ends_the_repairs_of_its_models(self) -> None:
        server = FakeServer()
        server.takes["one"] = 20
        async with watched(server) as watchdog:
            server.lives["one"] = Life.GONE
            await asyncio.sleep(2)
            server.lives |= dict.fromkeys((SERVER, *MODELS), Life.GONE)
            await asyncio.sleep(2)
            assert {health.state for health in watchdog.health.values()} == {State.HEALTHY}
            await asyncio.sleep(60)
            assert [thing for what, thing, _ in server.done if what == "restore"] == [
                "one",
                SERVER,
            ]

    @virtual
    async def test_a_model_that_cannot_be_loaded_is_not_reloaded_in_a_loop(self) -> None:
        """The server keeps serving, and the pauses double from a second to a minute."""
        server = FakeServer()
        server.broken["one"] = NotRestored("no weights in /nowhere")
        server.takes["one"] = 0.0
        async with watched(server) as watchdog:
            server.lives["one"] = Life.GONE
            await asyncio.sleep(40)
            tries = server.times("restore", "one")
            pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
            assert pauses == pytest.approx([1, 2, 4, 8, 16])
            assert watchdog.health["one"].state is State.FAILED
            assert watchdog.health["one"].reason == "no weights in /nowhere"
            assert not server.times("withdraw", SERVER)
            del server.broken["one"]
            await asyncio.sleep(32)
            assert watchdog.health["one"].state is State.HEALTHY

    @virtual
    async def test_a_load_that_does_not_end_restarts_the_server(self) -> None:
        server = FakeServer()
        server.takes["one"] = 1e6
        async with watched(server) as watchdog:
            server.lives["one"] = Life.GONE
            await asyncio.sleep(LOAD_S - 1)
            assert not server.times("withdraw", SERVER)
            await asyncio.sleep(3)
            assert watchdog.health[SERVER].repairs == 1
            assert watchdog.health["one"].state is State.HEALTHY
            assert "the repair of one has failed: too slow" in watchdog.health[SERVER].reason

    @virtual
    async def test_a_server_that_takes_no_part_is_restarted(self) -> None:
        server = FakeServer()
        server.unreachable = True
        async with watched(server) as watchdog:
            server.lives["one"] = Life.GONE
            await asyncio.sleep(2)
            assert watchdog.health[SERVER].repairs == 1
            assert "connection refused" in watchdog.health[SERVER].reason

    @virtual
    async def test_a_server_that_does_not_start_is_started_again(self) -> None:
        server = FakeServer()
        server.broken[SERVER] = NotRestored("port taken")
        async with watched(server) as watchdog:
            server.lives[SERVER] = Life.GONE
            await asyncio.sleep(20)
            tries = server.times("restore", SERVER)
            pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
            assert pauses == pytest.approx([1.5, 2.5, 4.5, 8.5])
            server.broken.clear()
            await asyncio.sleep(17)
            assert watchdog.health[SERVER].state is State.HEALTHY

    @virtual
    async def test_cancelled_it_leaves_everything_as_it_is(self) -> None:
        server = FakeServer()
        server.takes["one"] = 20
        async with watched(server):
            server.lives["one"] = Life.GONE
            await asyncio.sleep(2)
        done = list(server.done)
        await asyncio.sleep(100)
        assert server.done == done


def test_pauses_double_and_are_forgotten_after_a_calm() -> None:
    backoff = Backoff()
    pauses = []
    at = 0.0
    for _ in range(9):
        pauses.append(backoff.pause(at))
        at += pauses[-1] + 3
        backoff.ended(at)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff.pause(at + CALM_S - 0.1) == 60
    assert backoff.pause(at + CALM_S) == 0


class TestDuties:
    """What is desired of an instance; see `pdserve.node.reconcile`."""

    @virtual
    async def test_what_drains_is_neither_asked_nor_repaired(self) -> None:
        server = FakeServer()
        async with watched(server, ["one"]) as watchdog:
            watchdog.set_duty("one", Duty.DRAINING)
            asked = len(server.times("ask", "one"))
            server.silent.add("one")
            await asyncio.sleep(100)
            assert len(server.times("ask", "one")) <= asked + 1
            assert not server.times("withdraw", "one")
            assert watchdog.health["one"].state is State.DRAINING

    @virtual
    async def test_what_ends_while_it_drains_is_withdrawn_once(self) -> None:
        """Those who wait for it must hear of it; whether it comes back is not for the watchdog.

        A stopped one would make Triton abort.
        """
        for model, life in itertools.product(("one", "front"), (Life.GONE, Life.STOPPED)):
            server = FakeServer()
            async with watched(server) as watchdog:
                watchdog.set_duty(model, Duty.DRAINING)
                server.lives[model] = life
                await asyncio.sleep(20)
                assert len(server.times("withdraw", model)) == 1
                assert not server.times("restore", model)
                assert not server.times("withdraw", SERVER)
                assert watchdog.health[model].state is State.ABSENT

    @virtual
    async def test_what_is_absent_is_not_missed_until_it_is_repaired_again(self) -> None:
        server = FakeServer()
        async with watched(server, ["one"]) as watchdog:
            watchdog.set_duty("one", Duty.ABSENT)
            server.lives["one"] = Life.GONE
            await asyncio.sleep(20)
            assert not server.times("withdraw", "one")
            watchdog.set_duty("one", Duty.REPAIRED)
            await asyncio.sleep(1)
            assert server.times("restore", "one")
            assert watchdog.health["one"].state is State.HEALTHY

    @virtual
    async def test_a_repair_ends_when_it_is_not_wanted_any_more(self) -> None:
        server = FakeServer()
        server.broken["one"] = NotRestored("no weights")
        async with watched(server) as watchdog:
            server.lives["one"] = Life.GONE
            await asyncio.sleep(20)
            tries = len(server.times("restore", "one"))
            assert tries > 3
            assert watchdog.health["one"].backoff.tries >= 3
            watchdog.set_duty("one", Duty.ABSENT)
            await asyncio.sleep(20)
            assert len(server.times("restore", "one")) == tries
            assert not watchdog.repairs("one")

    @virtual
    async def test_a_restart_of_the_server_leaves_absent_what_is_absent(self) -> None:
        server = FakeServer()
        async with watched(server) as watchdog:
            watchdog.set_duty("one", Duty.ABSENT)
            server.lives[SERVER] = Life.GONE
            await asyncio.sleep(10)
            assert server.times("restore", SERVER)
            assert watchdog.health["one"].state is State.ABSENT
            assert watchdog.health["two"].state is State.HEALTHY
