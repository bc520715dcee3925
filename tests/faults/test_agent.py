"""Tests that the agent of a host makes its instances what is desired, whenever it is killed."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from pdctl import fleet, watchers
from pdctl.status import status
from pdserve.control.assignment import FIRST
from pdserve.control.records import Phase
from tests.clients import wait_until
from tests.faults.desires import Desires, controlled
from tests.faults.load import Load
from tests.faults.serving import (
    all_in_one,
    on_this_machine,
    repairs,
    said,
    serves,
    stub,
    watched,
    whole,
)
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

SLOW_S = 2.0
"""Seconds to load a model, within which its agent is killed."""
numbers = itertools.count(FIRST + 1)
"""Numbers of the assignments of ``either``."""
DRAINS = (Phase.DRAINING, Phase.DRAINED)
repeated = pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.full)])


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("agent")
    deployment = controlled(all_in_one(folder))
    (spec,) = deployment.servers
    more = msgspec.structs.replace(spec, prefill=(*spec.prefill, "either"), flexible=("either",))
    with watched(msgspec.structs.replace(deployment, servers=(more,)), folder) as started:
        yield started


@pytest.fixture
def server(_server: Running) -> Iterator[Running]:
    with whole(_server):
        yield _server


@pytest.fixture
def desires(server: Running) -> Desires:
    return Desires(server.deployment, server.servers[0].folder.parent)


def test_it_reports_what_its_instances_say(server: Running, desires: Desires) -> None:
    one = server.servers[0]
    wait_until(lambda: desires.seen("decode_1") is not None, on_this_machine(5))
    kinds = {"prefill_0": "prefill", "decode_1": "decode", "either": "flexible"}
    for name, kind in kinds.items():
        seen = desires.seen(name)
        assert seen is not None
        assert (seen.state, seen.server, seen.address) == ("ready", one.spec.name, one.grpc)
        assert seen.kind == kind
    (agent,) = desires.agents()
    assert agent.pid == watchers.pid(one.folder)
    assert agent.servers == (one.spec.name,)


def test_an_instance_leaves_and_comes_back(server: Running, desires: Desires) -> None:
    one = server.servers[0]
    repaired = repairs(one)
    with Load(server, rate=4, tokens=40) as load:
        time.sleep(1)
        left_s = desires.make("decode_1", FIRST, "decode", "absent", 20)
        assert not (one.repository / "decode_1").exists()
        time.sleep(3)
        back_s = desires.make("decode_1", FIRST, "decode")
        time.sleep(1)
    print(f"\nleft after {left_s:.2f} s, came back after {back_s:.2f} s")
    assert not load.lost
    assert not load.wrong
    assert repairs(one) == repaired, said(one)


def test_an_instance_takes_the_other_role_under_load(server: Running, desires: Desires) -> None:
    one = server.servers[0]
    repaired = repairs(one)
    with Load(server, rate=4, tokens=40) as load:
        time.sleep(1)
        for role in ("decode", "prefill"):
            switched_s = desires.make("either", next(numbers), role)
            print(f"\na {role} after {switched_s:.2f} s")
            time.sleep(2)
    assert not load.lost
    assert not load.wrong
    assert repairs(one) == repaired, said(one)


def test_a_server_that_starts_again_does_not_load_what_has_left(
    server: Running, desires: Desires
) -> None:
    one = server.servers[0]
    desires.make("prefill_1", FIRST, "prefill", "absent", 20)
    before = one.pid
    one.kill()
    wait_until(lambda: one.pid not in (None, before) and one.ready(), on_this_machine(15))
    assert not one.ready("prefill_1")
    assert serves(server)
    seen = desires.seen("prefill_1")
    assert seen is not None
    assert seen.state == "absent"
    assert status(one)["models"]["prefill_1"] == "absent"
    assert status(one)["state"] == "ready"
    desires.make("prefill_1", FIRST, "prefill")


def test_what_dies_while_it_drains_is_loaded_and_drained(server: Running, desires: Desires) -> None:
    """Its requests go on elsewhere at once, and no watchdog repairs it."""
    one = server.servers[0]
    with Load(server, rate=4, tokens=60) as load:
        time.sleep(2)
        desires.set("decode_0", FIRST, "decode", "draining")
        wait_until(lambda: phase(desires, "decode_0") is Phase.DRAINING, on_this_machine(5))
        repaired = repairs(one)
        stub(one, "decode_0").kill()
        desires.make("decode_0", FIRST, "decode", "draining")
        time.sleep(1)
        desires.make("decode_0", FIRST, "decode")
    assert not load.lost
    assert not load.wrong
    assert repairs(one) == repaired, said(one)


def kill_agent(server: Running) -> None:
    """Kill the agent, and start another one, as systemd would."""
    one = server.servers[0]
    found = watchers.pid(one.folder)
    assert found is not None
    psutil.Process(found).kill()
    wait_until(lambda: watchers.pid(one.folder) is None, 2)
    fleet.watch(server.servers)


@repeated
def test_its_agent_is_killed_while_it_drains(server: Running, desires: Desires, times: int) -> None:
    for number in range(times):
        name, role = ("decode_0", "prefill_1")[number % 2], ("decode", "prefill")[number % 2]
        with Load(server, rate=4, tokens=60) as load:
            time.sleep(1.5)
            desires.set(name, FIRST, role, "draining")
            wait_until(lambda name=name: phase(desires, name) in DRAINS, on_this_machine(5))
            kill_agent(server)
            drained_s = desires.make(name, FIRST, role, "draining", 15)
            resumed_s = desires.make(name, FIRST, role)
            time.sleep(0.5)
        print(f"\n{name}: drained {drained_s:.2f} s later, served after {resumed_s:.2f} s")
        assert not load.lost
        assert not load.wrong


@repeated
def test_its_agent_is_killed_while_it_loads(server: Running, desires: Desires, times: int) -> None:
    one = server.servers[0]
    for number in range(times):
        name, role = ("decode_1", "prefill_0")[number % 2], ("decode", "prefill")[number % 2]
        desires.make(name, FIRST, role, "absent", 20)
        code = one.folder / "unloaded" / name / "1" / "model.py"
        text = code.read_text()
        code.write_text(f"import time\ntime.sleep({SLOW_S})\n{text}")
        with Load(server, rate=4, tokens=20) as load:
            desires.set(name, FIRST, role)
            wait_until(lambda name=name: loading(server, name), on_this_machine(5))
            kill_agent(server)
            back_s = desires.make(name, FIRST, role, within_s=SLOW_S + 15)
            time.sleep(0.5)
        print(f"\n{name} was loaded {back_s:.2f} s after its agent")
        assert not load.lost
        assert not load.wrong
        (one.repository / name / "1" / "model.py").write_text(text)


@repeated
def test_an_idle_agent_is_killed(server: Running, desires: Desires, times: int) -> None:
    one = server.servers[0]
    for _ in range(times):
        repaired = said(one).count("has failed")
        with Load(server, rate=4, tokens=20) as load:
            time.sleep(0.5)
            kill_agent(server)
            wait_until(
                lambda: [agent.pid for agent in desires.agents()] == [watchers.pid(one.folder)],
                on_this_machine(5),
            )
            wait_until(lambda: desires.seen("decode_0") is not None, on_this_machine(5))
        assert not load.lost
        assert not load.wrong
        assert load.retried == 0
        assert said(one).count("has failed") == repaired, said(one)


def phase(desires: Desires, name: str) -> Phase | None:
    seen = desires.seen(name)
    return None if seen is None else seen.phase


def loading(server: Running, name: str) -> bool:
    with contextlib.suppress(ValueError, psutil.Error):  # it has not begun yet
        return stub(server.servers[0], name).is_running()
    return False
