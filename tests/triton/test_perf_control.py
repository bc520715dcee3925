"""Tests for the benchmark of the ratio controller: real servers, an agent, a hurried controller."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from perf.control import controlled, mixes, servers
from perf.scheduling import client
from perf.scheduling.servers import gateways, serving
from perf.scheduling.workload import Ask

from pdserve.control import records, stores
from pdserve.control.records import Pin
from pdserve.control.store.protocol import Put
from tests.clients import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve import config

pytestmark = [pytest.mark.triton, pytest.mark.alone]

WITHIN_S = 60.0


async def _pin(control: config.Control, run: Path, pin: Pin) -> None:
    store = await stores.opened(control, run)
    try:
        await store.transact((), (Put(records.PINS + "default", records.encode(pin)),))
    finally:
        await store.close()


def test_the_controller_of_the_benchmark_changes_roles_of_real_servers() -> None:
    section = controlled.section()
    deployment = servers.deployment(mixes.INSTANCES // 2, section)
    with serving(deployment) as server, controlled.controlling(server) as controller:
        asyncio.run(_pin(section, server.servers[0].folder.parent, Pin(3, 5)))

        def ended() -> bool:
            return any(event.what == "end" for event in controller.events())

        wait_until(ended, WITHIN_S, lambda: str(controller.events()))
        desired = controller.stored().desired
        prefills = {name for name, one in desired.items() if one.assignment.role == "prefill"}
        assert (len(prefills), len(desired)) == (3, mixes.INSTANCES)
        addresses = [gateway.grpc for gateway in gateways(server)]
        with servers.measuring(server) as used:
            found = client.run([[Ask(0.0, 100, 30.0, seed)] for seed in range(12)], addresses)
    assert [one.error for one in found if one.error] == []
    assert {one.prefill for one in found} <= prefills
    assert 0 < used.servers < used.machine + 0.1
    assert used.client > 0
