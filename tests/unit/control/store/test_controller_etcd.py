"""Tests for a controller on a real etcd that is stopped for longer than its leases."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from pdserve.config import Etcd
from pdserve.control import records, stores
from pdserve.control.controller import Controller, State
from pdserve.control.records import Pin
from pdserve.control.store.protocol import put
from pdserve.control.stored import Stored, read
from pdserve.observability.metrics import Registry
from tests.unit.control.fakes import Agent, Servers, deployment, ratio
from tests.unit.control.store.etcd_server import EtcdServer, in_loop

TTL_S = 2.0


def test_a_stopped_etcd_changes_nothing_and_the_controller_goes_on(etcd: EtcdServer) -> None:
    @in_loop
    async def run() -> None:
        made = deployment(4, 4, ratio="never", spares=("d3",), etcd=Etcd((etcd.endpoint,)))
        assert made.control is not None
        store, others = [await stores.opened(made.control, Path()) for _ in range(2)]
        asked: list[str] = []

        async def probe(_: object, name: str) -> bool:
            asked.append(name)
            return True

        servers = Servers(others)
        controller = Controller(
            store, "one", lambda: made, servers.scrape, probe, Registry(), ttl_s=TTL_S
        )
        agent = Agent(others, lambda: made)
        tasks = [asyncio.ensure_future(controller.run()), asyncio.ensure_future(agent.run())]

        async def stored() -> Stored:
            return read(await others.list_prefix(""))

        while len((before := await stored()).observed) < 8:
            await asyncio.sleep(0.1)
        etcd.send(signal.SIGSTOP)
        await asyncio.sleep(3 * TTL_S)
        assert controller.state is State.CANDIDATE, "it knows that it may lead no more"
        etcd.send(signal.SIGCONT)
        tasks[1].cancel()  # the agent's lease has ended, and it does not come back
        while controller.state is not State.LEADING:
            await asyncio.sleep(0.1)
        await asyncio.sleep(3 * TTL_S)
        after = await stored()
        assert after.desired == before.desired, "who answers is not lost, whatever etcd has deleted"
        assert set(asked) == set(after.desired)
        tasks.append(asyncio.ensure_future(agent.run()))
        await put(others, records.PINS + "default", records.encode(Pin(5, 2)))
        while ratio(now := await stored()) != (5, 2) or now.transactions:
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.close()
        await others.close()

    run()
