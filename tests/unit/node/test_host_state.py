"""Tests for what an agent reads from a store, and keeps in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from pdserve.control import records
from pdserve.control.assignment import Assignment
from pdserve.control.records import DesiredInstance, ObservedAgent, ObservedInstance, Phase
from pdserve.control.store.file.store import FileStore
from pdserve.control.store.protocol import Delete, put
from pdserve.node import host_state
from pdserve.node.host_state import HostState
from tests.unit.inprocess import real

SEEN = ObservedInstance(
    "host", "local", "here:8001", "decode", "ready", "00", Assignment(1, "decode"), Phase.SERVING
)
WITHIN_S = 5.0


async def until(done: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + WITHIN_S
    while not done():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def stored(store: FileStore) -> dict[str, bytes]:
    return {entry.key: entry.value for entry in (await store.list_prefix("")).entries}


@real
async def test_desired_and_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_state, "COUNTS_S", 0.5)
    controller = await FileStore.opened(tmp_path)
    own = await FileStore.opened(tmp_path)
    told: list[str] = []
    state = HostState(own, "host", told.extend)
    running = asyncio.create_task(state.run())
    wanted = DesiredInstance(Assignment(2, "decode", "a"), "draining")
    key = records.DESIRED_INSTANCES + "one"
    await put(controller, key, records.encode(wanted))
    await until(lambda: state.desired("one") == wanted)
    assert told == ["one"]
    await put(controller, key, b"{}")
    await controller.transact((), [Delete(key)])
    await asyncio.sleep(0.3)
    assert state.desired("one") == wanted, "it is what it was, also without a store"
    assert state.desired("two") is None

    state.serve(7, ["local"])
    state.observe("one", SEEN)
    await asyncio.sleep(0.3)
    found = await stored(controller)
    agent = records.decode(found[records.OBSERVED_AGENTS + "host"], ObservedAgent)
    assert agent == ObservedAgent(7, ("local",))

    def observed() -> ObservedInstance:
        return records.decode(found[records.OBSERVED_INSTANCES + "one"], ObservedInstance)

    assert observed() == SEEN
    busy = replace(SEEN, used=3)
    state.observe("one", busy)
    await asyncio.sleep(0.2)
    found = await stored(controller)
    assert observed() == SEEN, "mere counts of one that serves can wait"
    await asyncio.sleep(0.4)
    state.observe("one", busy)
    await asyncio.sleep(0.2)
    found = await stored(controller)
    assert observed() == busy
    drained = replace(busy, phase=Phase.DRAINING, used=2)
    state.observe("one", drained)
    state.observe("one", replace(drained, used=0))
    await asyncio.sleep(0.2)
    found = await stored(controller)
    assert observed().used == 0
    await until(lambda: not state.absent("one"))
    await put(
        controller,
        records.OBSERVED_INSTANCES + "far",
        records.encode(replace(SEEN, state="absent")),
    )
    await until(lambda: state.absent("far"))

    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await own.close()
    found = await stored(controller)
    assert records.OBSERVED_AGENTS + "host" not in found, "its lease is its own"
    await controller.close()
