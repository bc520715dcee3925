"""Test what a view keeps, and what it tells, in virtual time and on the model of a store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest

from pdserve.control.store import view as view_module
from pdserve.control.store.errors import Refused, StoreUnreachable
from pdserve.control.store.protocol import Delete, KeyChange, Listing, put
from pdserve.control.store.view import RELIST_S, RETRY_S, Difference, View
from tests.unit.control.store.model import Model, ModelStore
from tests.unit.inprocess import virtual


class Breakable(ModelStore):
    """A store that can be unreachable, and whose watches can be broken."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.gone = False
        self.broken = asyncio.Event()
        self.lists = 0

    async def list_prefix(self, prefix: str) -> Listing:
        self.lists += 1
        if self.gone:
            raise StoreUnreachable("gone")
        return await super().list_prefix(prefix)

    async def watch_prefix(self, prefix: str, revision: int) -> AsyncIterator[KeyChange]:
        async with aclosing(super().watch_prefix(prefix, revision)) as changes:
            while True:
                change = asyncio.ensure_future(anext(changes))
                broken = asyncio.ensure_future(self.broken.wait())
                try:
                    await asyncio.wait((change, broken), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if lost := not change.done():
                        change.cancel()
                    broken.cancel()
                    await asyncio.gather(change, broken, return_exceptions=True)
                if lost:
                    raise StoreUnreachable("broken")
                yield change.result()


def number(_: str, value: bytes) -> int:
    return msgspec.json.decode(value, type=int)


class Following:
    """A view at work on a breakable store."""

    def __init__(self) -> None:
        self.model = Model()
        self.writer = ModelStore(self.model)
        self.store = Breakable(self.model)
        self.told: list[Difference] = []
        self.view = View(self.store, "x/", number, self.told.append)
        self.task = asyncio.ensure_future(self.view.run())

    async def put(self, key: str, value: bytes) -> None:
        await put(self.writer, key, value)
        await asyncio.sleep(0.01)

    async def delete(self, key: str) -> None:
        await self.writer.transact((), [Delete(key)])
        await asyncio.sleep(0.01)

    def lose(self) -> None:
        self.store.gone = True
        self.store.broken.set()

    async def find(self) -> None:
        self.store.gone = False
        self.store.broken.clear()
        await asyncio.sleep(RETRY_S * 2)

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@virtual
async def test_it_follows_what_is_put() -> None:
    one = Following()
    assert not one.view.known.is_set()
    assert one.view.age_s == float("inf")
    await one.put("x/1", b"1")
    await one.put("y/1", b"1")
    await one.put("x/1", b"2")
    assert one.view.known.is_set()
    assert one.view.values == {"x/1": 2}
    assert one.told == [Difference(frozenset({"x/1"}))] * 2
    await one.end()


@virtual
async def test_a_deleted_key_stays_until_it_is_forgotten() -> None:
    one = Following()
    await one.put("x/1", b"1")
    await one.delete("x/1")
    assert one.view.values == {"x/1": 1}
    assert one.view.deleted == {"x/1"}
    assert one.told[-1] == Difference(deleted=frozenset({"x/1"}))
    await one.put("x/1", b"1")
    assert not one.view.deleted
    assert one.told[-1] == Difference(frozenset({"x/1"})), "it may be another holder's"
    one.view.forget("x/1")
    assert one.view.values == {"x/1": 1}, "it exists again"
    await one.delete("x/1")
    one.view.forget("x/1")
    assert not one.view.values
    assert not one.view.deleted
    await one.end()


@virtual
async def test_it_keeps_everything_while_the_store_is_gone() -> None:
    one = Following()
    for name in "abc":
        await one.put(f"x/{name}", b"1")
    one.lose()
    await asyncio.sleep(60)
    assert one.view.values == {"x/a": 1, "x/b": 1, "x/c": 1}
    assert not one.view.deleted
    assert one.view.age_s > 59
    assert 60 / RETRY_S * 0.9 < one.store.lists < 60 / RETRY_S * 1.1
    one.told.clear()
    await one.delete("x/a")
    await one.put("x/b", b"2")
    await one.put("x/d", b"4")
    one.model.compact(one.model.revision)
    await one.find()
    assert one.view.values == {"x/a": 1, "x/b": 2, "x/c": 1, "x/d": 4}
    assert one.told == [Difference(frozenset({"x/b", "x/d"}), frozenset({"x/a"}))]
    await one.end()


@virtual
async def test_a_store_made_anew_deletes_nothing_from_the_view() -> None:
    one = Following()
    await one.put("x/1", b"1")
    await one.put("x/2", b"2")
    one.lose()
    one.model.__init__()  # type: ignore[misc]
    await one.put("x/1", b"9")
    assert one.model.revision == 2, "the revision that the old value had"
    await one.find()
    assert one.view.values == {"x/1": 9, "x/2": 2}
    assert one.view.deleted == {"x/2"}
    await one.end()


@virtual
async def test_it_lists_again_though_nothing_has_happened() -> None:
    one = Following()
    await asyncio.sleep(2 * RELIST_S + 1)
    assert one.store.lists == 3
    assert not one.told
    await one.end()


@virtual
async def test_an_invalid_value_is_reported_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MAX_VALUE", 20)
    one = Following()
    await one.put("x/1", b"1")
    await one.put("x/1", b"{" * 10)
    await one.put("x/2", b"true")
    await one.put("x/3", b"1" * 21)
    assert one.view.values == {"x/1": 1}
    assert [*one.view.invalid] == ["x/1", "x/2", "x/3"]
    assert one.view.invalid["x/3"] == "it has 21 bytes, and at most 20 are allowed"
    assert "Expected `int`, got `bool`" in one.view.invalid["x/2"]
    assert len(one.told) == 1
    await one.put("x/1", b"3")
    await one.delete("x/2")
    assert one.view.values == {"x/1": 3}
    assert [*one.view.invalid] == ["x/3"]
    assert not one.view.deleted
    await one.end()


@virtual
async def test_it_keeps_a_bounded_number_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MAX_KEYS", 3)
    one = Following()
    for name in "abcd":
        await one.put(f"x/{name}", b"1")
    assert [*one.view.values] == ["x/a", "x/b", "x/c"]
    assert one.view.invalid == {"x/d": "there are 3 keys already"}
    await one.put("x/a", b"2")
    assert one.view.values["x/a"] == 2
    await one.end()


def test_a_prefix_is_checked() -> None:
    with pytest.raises(Refused, match=r"prefix '\.\./' is invalid"):
        View(ModelStore(Model()), "../", number)
