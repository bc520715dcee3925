"""Tests for liveness: a model that works is alive; an idle one is probed; a stuck one is not."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve.errors import InstanceError
from pdserve.node.heartbeat import Beats, Heartbeat, read
from pdserve.node.liveness import Liveness
from tests.unit.inprocess import virtual

WITHIN_S = 3.0


class Model:
    """Threads whose turns and work a test counts; a probe is answered after ``takes`` seconds."""

    def __init__(self, threads: int = 2) -> None:
        self.beats = [Beats(1, 0)] * threads
        self.takes = 0.0
        self.asked = 0
        self.meanwhile: Callable[[], None] = lambda: None

    def count(self, thread: int, turns: int = 1, work: int = 0) -> None:
        before = self.beats[thread]
        self.beats[thread] = Beats(before.turns + turns, before.work + work)

    def turn(self) -> None:
        for thread in range(len(self.beats)):
            self.count(thread)

    async def ask(self) -> bool:
        self.asked += 1
        await asyncio.sleep(self.takes / 2)
        self.meanwhile()
        await asyncio.sleep(self.takes / 2)
        if self.beats:
            self.count(0, turns=0, work=1)
        return False

    def liveness(self) -> Liveness:
        return Liveness(lambda: list(self.beats), self.ask, WITHIN_S)


@virtual
async def test_one_that_does_nothing_is_asked_each_time() -> None:
    model = Model()
    alive = model.liveness()
    for looks in range(1, 5):
        assert await alive() is False
        assert model.asked == looks, "the probe itself does not count as work"
        await asyncio.sleep(1)
        model.turn()


@virtual
async def test_one_that_works_is_not_asked() -> None:
    model = Model()
    alive = model.liveness()
    await alive()
    model.takes = 1e6
    for _ in range(20):
        model.turn()
        model.count(1, work=1)
        assert await alive() is False
        await asyncio.sleep(1)
    assert model.asked == 1


@virtual
async def test_a_question_behind_a_burst_is_no_death() -> None:
    model = Model()
    alive = model.liveness()
    model.takes = 1e6
    asyncio.get_running_loop().call_later(1, model.count, 1, 1, 1)
    assert await alive() is False


@virtual
async def test_no_answer_to_anybody_is_a_failure() -> None:
    model = Model()
    alive = model.liveness()
    model.takes = 1e6
    with pytest.raises(InstanceError, match=r"^no answer within 3 s$"):
        await alive()


@pytest.mark.parametrize(("thread", "which"), [(0, "event loop"), (1, "sending thread 1")])
def test_a_thread_that_stands_still_is_a_failure_whatever_the_others_do(
    thread: int, which: str
) -> None:
    @virtual
    async def run() -> None:
        model = Model()
        alive = model.liveness()
        for _ in range(4):
            model.count(1 - thread, work=1)
            await alive()
            await asyncio.sleep(1)
        with pytest.raises(InstanceError, match=f"its {which} has stood still for 4.0 s"):
            await alive()
        model.turn()
        await alive()

    run()


@virtual
async def test_a_thread_without_a_loop_does_not_turn() -> None:
    model = Model(threads=1)
    model.beats = [Beats(0, 0)]
    alive = model.liveness()
    for _ in range(10):
        await alive()
        await asyncio.sleep(1)


@virtual
async def test_a_new_life_counts_anew() -> None:
    model = Model()
    alive = model.liveness()
    model.beats = [Beats(900, 50), Beats(900, 50)]
    await alive()
    model.beats = [Beats(1, 0), Beats(1, 0)]
    await alive()
    model.beats = []
    await alive()


@virtual
async def test_what_the_question_says_is_passed_on() -> None:
    async def ask() -> bool:
        raise InstanceError("UNAVAILABLE: connection refused")

    with pytest.raises(InstanceError, match="connection refused"):
        await Liveness(list, ask, WITHIN_S)()


def test_a_heartbeat_is_read_by_others(tmp_path: Path) -> None:
    os.umask(old := os.umask(0))
    try:
        os.umask(0)
        path = tmp_path / "a.heartbeat"
        assert read(path) == []
        heartbeat = Heartbeat(path, threads=3)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(old)
    heartbeat.turned(0)
    for _ in range(1000):
        heartbeat.turned(2)
    heartbeat.worked(2)
    assert read(path) == [(1, 0), (0, 0), (1000, 1)]
    later = Heartbeat(path, threads=1)
    assert read(path) == [(0, 0)], "a new process counts from zero"
    heartbeat.close()
    assert read(path) == [(0, 0)], "a former process ends, and does not change it"
    for _ in range(2):
        later.close()
        assert not path.exists()
    later.turned(0)


def test_a_heartbeat_that_nobody_reads() -> None:
    heartbeat = Heartbeat(None, threads=2)
    heartbeat.turned(1)
    heartbeat.worked(1)
