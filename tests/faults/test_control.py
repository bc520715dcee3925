"""Tests of the control plane on real servers: two gateways, and instances that change roles."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from pdctl import controllers, orders
from pdserve.config import Control, Decode, Deployment, Gateway, Prefill
from pdserve.config import Server as Spec
from pdserve.control import event_log, stores
from pdserve.control.events import Event
from pdserve.control.records import Phase
from pdserve.control.store.protocol import Delete, Put, Store
from pdserve.control.stored import Stored, read
from tests.clients import wait_until
from tests.faults.load import Load
from tests.faults.serving import gateways, on_this_machine, serves, watched, whole
from tests.servers import Running, emulated_deployment, free_ports

pytestmark = [pytest.mark.triton, pytest.mark.alone]

T = TypeVar("T")
PROFILE = {"prefill": {"base_ms": 1000}, "decode": {"base_ms": 50}}
TOKENS = 4
"""A prefill does one request a second, a decode many more: of six instances 4:2 is best."""
RATE = 2.7
"""Requests a second, of 3 that three prefills can do."""
NAMES = [f"one_{number}" for number in range(6)]
CHANGED_S = 120.0
"""A window of a minute, its decision and its change."""


def flexible(folder: Path, **control: object) -> Deployment:
    """Return two gateways, and one server with six flexible instances, three of each role."""
    whole = emulated_deployment(
        folder,
        PROFILE,
        prefill=Prefill(slots=2, batch=1, arena_mib=16, lease_s=2.0),
        decode=Decode(slots=16),
        gateway=Gateway(stall_s=5.0, ttft_limit_ms=20_000),
    )
    fronts = [Spec(name=f"gateway_{number}") for number in range(2)]
    roles = {"prefill": tuple(NAMES[:3]), "decode": tuple(NAMES[3:])}
    workers = Spec(name="workers", gateway=False, **roles, flexible=tuple(NAMES))
    section = Control("test", **{"metrics_port": free_ports(1)[0], **control})  # type: ignore[arg-type]
    return msgspec.structs.replace(whole, servers=(*fronts, workers), control=section)


class Plane:
    """The control plane of a running deployment, as an operator has it."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.run = running.servers[0].folder.parent
        self.folder = controllers.folder(running.deployment, self.run)

    def start(self) -> int:
        controllers.start(self.running.deployment, held=False, run=self.run)
        pid = controllers.pid(self.folder)
        assert pid
        return pid

    def do(self, work: Callable[[Store], Awaitable[T]]) -> T:
        async def done() -> T:
            section = self.running.deployment.control
            assert section is not None
            store = await stores.opened(section, self.run)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(done())

    @property
    def stored(self) -> Stored:
        return self.do(self._read)

    @staticmethod
    async def _read(store: Store) -> Stored:
        return read(await store.list_prefix(""))

    def events(self, what: str) -> list[Event]:
        found = event_log.decoded(self.stored.events)
        return [event for _, event in found if event.what == what]

    def order(self, one: Put | Delete) -> None:
        self.do(lambda store: store.transact((), (one,)))

    def pin(self, ratio: str) -> None:
        self.order(orders.pin(self.running.deployment, self.stored, "default", ratio))

    def ratio(self) -> tuple[int, int]:
        """Return how many instances serve in each role, by what they say of themselves."""
        seen = self.stored.observed.values()
        roles = [
            one.assignment.role for one in seen if one.assignment and one.phase is Phase.SERVING
        ]
        return roles.count("prefill"), roles.count("decode")

    def settled(self, prefills: int, decodes: int) -> bool:
        return not self.stored.transactions and self.ratio() == (prefills, decodes)

    def wait(self, prefills: int, decodes: int, within_s: float) -> None:
        wait_until(
            lambda: self.settled(prefills, decodes),
            on_this_machine(within_s),
            lambda: (self.ratio(), self.stored.transactions, self.events("hold")),
        )


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("control")
    with watched(flexible(folder, ratio="act"), folder) as started:
        yield started


@pytest.fixture
def plane(_running: Running) -> Iterator[Plane]:
    made = Plane(_running)
    made.start()
    made.wait(3, 3, 20)
    try:
        with whole(_running):
            yield made
            made.start()
            made.pin("3:3")
            made.wait(3, 3, 30)
            made.order(orders.unpin(made.stored, "default"))
    finally:
        controllers.end(made.folder)


@contextlib.contextmanager
def loaded(running: Running, rate: float) -> Iterator[list[Load]]:
    """Send so many requests a second, half of them through each gateway."""
    with contextlib.ExitStack() as stack:
        fronts = gateways(running)
        yield [
            stack.enter_context(Load(front, rate=rate / len(fronts), tokens=TOKENS, seed=number))
            for number, front in enumerate(fronts)
        ]


def check(loads: list[Load]) -> None:
    for load in loads:
        assert load.streams
        assert not load.lost
        assert not load.wrong


def test_the_ratio_follows_the_load_in_place(plane: Plane) -> None:
    before = {name: one.epoch for name, one in plane.stored.observed.items()}
    with loaded(plane.running, RATE) as loads:
        began = time.monotonic()
        plane.wait(4, 2, CHANGED_S)
        print(f"\n3:3 became 4:2 after {time.monotonic() - began:.1f} s of load")
        time.sleep(3)
    check(loads)
    print(sum(len(load.streams) for load in loads), "requests")
    assert {name: one.epoch for name, one in plane.stored.observed.items()} == before
    begun = plane.events("begin")[-1]
    assert begun.numbers, begun
    assert begun.instances, begun
    print(begun.text, begun.numbers)


def test_a_controller_killed_in_a_change_is_replaced_and_nothing_is_lost(plane: Plane) -> None:
    with loaded(plane.running, 2.0) as loads:
        for ratio in ("4:2", "2:4", "3:3", "4:2"):
            prefills, decodes = map(int, ratio.split(":"))
            plane.pin(ratio)
            time.sleep(0.4)
            pid = controllers.pid(plane.folder)
            assert pid
            os.kill(pid, signal.SIGKILL)
            time.sleep(1)
            plane.start()
            plane.wait(prefills, decodes, 30)
    check(loads)


def test_gateways_and_instances_go_on_without_store_and_controller(plane: Plane) -> None:
    plane.pin("4:2")
    plane.wait(4, 2, 30)
    controllers.end(plane.folder)
    away = plane.folder.with_name("away")
    plane.folder.rename(away)
    try:
        with loaded(plane.running, 2.0) as loads:
            time.sleep(15)
        check(loads)
        assert all(serves(front) for front in gateways(plane.running))
    finally:
        away.rename(plane.folder)


def test_two_controllers_on_one_host_change_each_instance_once(plane: Plane) -> None:
    numbers = {name: one.assignment.number for name, one in plane.stored.desired.items()}
    command = [sys.executable, "-m", "pdctl.controller", str(plane.folder)]
    other = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        log = plane.folder / "controller.log"
        wait_until(lambda: f"process {other.pid}" in log.read_text(), on_this_machine(10))
        plane.pin("4:2")
        plane.wait(4, 2, 30)
    finally:
        other.terminate()
        assert other.wait(on_this_machine(10)) == 0
    after = {name: one.assignment.number for name, one in plane.stored.desired.items()}
    assert sorted(after[name] - numbers[name] for name in numbers) == [0, 0, 0, 0, 0, 1]
