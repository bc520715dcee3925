"""Test who leads, and for how long, in virtual time and on the model of a store."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from pdserve.control.store.election import GENERATION, LEADER, LOOK_S, TTL_S, Candidate
from pdserve.control.store.errors import Fenced, StoreUnreachable
from pdserve.control.store.leased import LeasedKeys
from pdserve.control.store.protocol import Delete, Put, put
from tests.unit.control.store.model import Model, ModelStore
from tests.unit.inprocess import virtual


@virtual
async def test_another_one_leads_when_the_leader_resigns() -> None:
    model = Model()
    first = await Candidate(ModelStore(model), "first").lead()
    waiting = asyncio.ensure_future(Candidate(ModelStore(model), "second").lead())
    await asyncio.sleep(60)
    assert not waiting.done()
    assert len(model.leases) == 1, "one that waits holds no lease"
    await first.resign()
    assert first.lost.is_set()
    second = await asyncio.wait_for(waiting, LOOK_S * 2)
    assert second.revision > first.revision
    assert model.entries[LEADER].value == b"second"
    with pytest.raises(Fenced, match=r"elected at revision 2 leads no more: 'second' leads"):
        await first.write(0, [Put("a", b"")])
    assert "a" not in model.entries


@virtual
async def test_a_leader_that_cannot_reach_its_store_stops_within_its_lease() -> None:
    store = ModelStore(Model())
    leadership = await Candidate(store, "a").lead()
    work = asyncio.ensure_future(leadership.run())
    await asyncio.sleep(5 * TTL_S)
    assert not leadership.lost.is_set()
    with mock.patch.object(store, "keep_alive", side_effect=StoreUnreachable("gone")):
        await asyncio.wait_for(leadership.lost.wait(), TTL_S * 1.01)
    await work


async def silent(_: int) -> None:
    """Never answer."""
    await asyncio.Event().wait()


@virtual
async def test_a_leader_whose_store_never_answers_stops_within_its_lease() -> None:
    store = ModelStore(Model())
    leadership = await Candidate(store, "a").lead()
    with mock.patch.object(store, "keep_alive", silent):
        await asyncio.wait_for(leadership.run(), TTL_S * 1.01)
    assert leadership.lost.is_set()


@virtual
async def test_one_that_gives_up_leaves_no_leader_behind() -> None:
    """It is cancelled while the store has its transaction, and has not answered."""
    model = Model()
    store = ModelStore(model)
    transact = store.transact

    async def slow(*arguments: object) -> None:
        await transact(*arguments)  # type: ignore[arg-type]
        await asyncio.sleep(60)

    with mock.patch.object(store, "transact", slow):
        work = asyncio.ensure_future(Candidate(store, "a").lead())
        await asyncio.sleep(1)
        assert LEADER in model.entries
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    assert LEADER not in model.entries
    assert not model.leases


@virtual
async def test_a_candidate_waits_for_its_store() -> None:
    store = ModelStore(Model())
    with mock.patch.object(store, "list_prefix", side_effect=StoreUnreachable("gone")):
        work = asyncio.ensure_future(Candidate(store, "a").lead())
        await asyncio.sleep(60)
        assert not work.done()
    assert await asyncio.wait_for(work, LOOK_S * 2)


@virtual
async def test_generations_follow_each_other() -> None:
    model = Model()
    store = ModelStore(model)
    leadership = await Candidate(store, "a").lead()
    assert await leadership.generation() == 0
    assert await leadership.write(0, [Put("x", b"1")]) == 1
    assert await leadership.write(1, [Delete("x")]) == 2
    assert await leadership.generation() == 2
    for generation in 0, 1, 3:
        with pytest.raises(Fenced, match=f"{generation} was decided upon, but 2 is stored"):
            await leadership.write(generation, [Put("x", b"2")])
    assert not leadership.lost.is_set()
    assert "x" not in model.entries
    await put(store, GENERATION, b"two")
    with pytest.raises(Fenced, match="holds no generation: b'two'"):
        await leadership.generation()


@virtual
async def test_leased_keys_are_put_in_batches_and_once() -> None:
    model = Model()
    store = ModelStore(model)
    leased = LeasedKeys(store, 10.0)
    for number in range(250):
        leased.set(f"a/{number}", b"1")
    work = asyncio.ensure_future(leased.run())
    await asyncio.sleep(1)
    assert leased.written
    assert model.revision == 4
    await asyncio.sleep(100)
    assert model.revision == 4
    leased.set("a/7", b"2")
    assert not leased.written
    await asyncio.sleep(0.01)
    assert leased.written
    assert model.revision == 5
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
