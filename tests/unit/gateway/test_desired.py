"""Tests that a gateway follows the store, and keeps what it knows when the store is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from pdserve.config import Control
from pdserve.control import records, stores
from pdserve.control.assignment import Assignment
from pdserve.control.records import DesiredGroup, DesiredInstance
from pdserve.control.store.protocol import Delete, put
from pdserve.gateway.desired import Desired

CONTROL, KEY = Control("chat"), bytes(32)
SOON_S = 10.0


class Gateway:
    """What a gateway was told last."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.groups: dict[str, float] = {}

    def take(
        self, instances: Mapping[str, DesiredInstance], groups: Mapping[str, DesiredGroup]
    ) -> None:
        self.numbers = {name: one.assignment.number for name, one in instances.items()}
        self.groups = {name: one.share for name, one in groups.items()}

    async def until(self, true: Callable[[Gateway], bool]) -> None:
        async def wait() -> None:
            while not true(self):
                await asyncio.sleep(0.02)

        await asyncio.wait_for(wait(), SOON_S)


def wanted(number: int) -> bytes:
    return records.encode(DesiredInstance(Assignment(number, "decode", "chat")))


def test_it_is_told_of_changes_and_forgets_what_is_in_no_deployment(tmp_path: Path) -> None:
    async def run() -> None:
        store, gateway = await stores.opened(CONTROL, tmp_path), Gateway()
        following = asyncio.ensure_future(Desired(CONTROL, tmp_path, KEY, gateway.take).run())
        await put(store, "desired/instances/d0", wanted(1))
        await put(store, "desired/instances/d1", wanted(1))
        await put(store, "desired/groups/chat", records.encode(DesiredGroup("chat", 0.5)))
        await put(store, "desired/instances/broken", b"{}")
        await put(store, "desired/other", b"{}")
        await put(store, "desired/instances/d0", wanted(2))
        await gateway.until(lambda one: one.numbers == {"d0": 2, "d1": 1})
        await gateway.until(lambda one: one.groups == {"chat": 0.5})
        await store.transact((), (Delete("desired/instances/d1"),))
        await gateway.until(lambda one: one.numbers == {"d0": 2})
        await store.transact((), (Delete("desired/groups/chat"),))
        await gateway.until(lambda one: one.groups == {})
        assert gateway.numbers == {"d0": 2}
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await store.close()

    asyncio.run(run())


def test_the_store_of_another_deployment_is_not_followed(tmp_path: Path) -> None:
    async def run() -> None:
        store, gateway = await stores.opened(CONTROL, tmp_path), Gateway()
        await stores.claim(store, stores.identity(CONTROL, bytes(31) + b"1"))
        await put(store, "desired/instances/d0", wanted(2))
        following = asyncio.ensure_future(Desired(CONTROL, tmp_path, KEY, gateway.take).run())
        await asyncio.sleep(0.5)
        assert gateway.numbers == {}
        assert not following.done()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await store.close()

    asyncio.run(run())
