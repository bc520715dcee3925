"""Tests that the agent of a host makes its instances what is desired, whenever it is killed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pdctl import watchers
from pdserve.control.assignment import FIRST
from tests.clients import wait_until
from tests.faults.desires import Desires, controlled
from tests.faults.load import Load
from tests.faults.serving import all_in_one, on_this_machine, repairs, said, watched, whole
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("agent")
    with watched(controlled(all_in_one(folder)), folder) as started:
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
    for name in ("prefill_0", "decode_1"):
        seen = desires.seen(name)
        assert seen is not None
        assert (seen.state, seen.server, seen.address) == ("ready", one.spec.name, one.grpc)
        assert seen.kind == name.partition("_")[0]
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
    print(
        f"\nleft after {left_s:.2f} s, came back within {back_s:.2f} s; {len(load.streams)} streams"
    )
    assert not load.lost
    assert not load.wrong
    assert repairs(one) == repaired, said(one)
