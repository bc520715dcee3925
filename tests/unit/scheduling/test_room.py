"""Tests that a request waits for room in a decode before its prefill, not after a token."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc import messages
from pdserve.rpc.messages import DecodeRequest, PrefillRequest, Watch
from pdserve.scheduling.circuit_breaker import FIRST_S
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.request import State
from pdserve.scheduling.room import Promise, Room
from pdserve.scheduling.rooms import HELD_S, KNOWN_S, Rooms
from tests.unit.fake_instances import FakeInstance
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.scheduling.request import Request

TIMES = {"prefill": {"base_ms": 10.0}, "decode": {"base_ms": 5.0}}


def room_with(slots: int, blocks: int) -> Room:
    room = Room()
    room.tell(messages.Room(slots, blocks), 0.0)
    return room


def test_what_is_promised_is_not_promised_again() -> None:
    decodes = [Instance(f"decode_{number}", FakeInstance()) for number in range(2)]
    rooms = Rooms(decodes, blocks=100, block_size=16, at_once=3)
    assert rooms.need(16) == 1
    assert rooms.need(17) == 2
    assert rooms.need(1601) == 0, "no decode has this many blocks: it will be refused there"
    assert rooms.find(100, 0.0) is decodes[0], "unknown room counts as enough"
    assert rooms.plenty(0.0)
    for decode in decodes:
        decode.room.tell(messages.Room(2, 100), 0.0)
    woken: list[int] = []
    first = rooms.find(60, 0.0)
    assert first is decodes[0]
    promise = Promise(first.room, 60, lambda: woken.append(1))
    assert rooms.find(60, 0.0) is decodes[1]
    other = Promise(decodes[1].room, 60)
    assert rooms.find(60, 0.0) is None
    assert rooms.find(40, 0.0) is decodes[0]
    third = Promise(decodes[0].room, 1)
    assert not decodes[0].room.fits(1), "no slot"
    third.over()
    promise.over()
    promise.over()
    assert woken == [1]
    assert rooms.find(60, 0.0) is decodes[0]
    other.over()
    assert [(one.room.slots, one.room.blocks) for one in decodes] == [(0, 0), (0, 0)]


def test_plenty_is_room_for_all_that_may_come_at_once_and_known_of_late() -> None:
    decode = Instance("decode_0", FakeInstance())
    rooms = Rooms([decode], blocks=100, block_size=16, at_once=4)
    rooms.need(16 * 25)
    decode.room.tell(messages.Room(4, 100), 0.0)
    assert rooms.plenty(KNOWN_S / 2)
    assert not rooms.plenty(KNOWN_S)
    assert rooms.plenty(KNOWN_S, math.inf)
    decode.room.tell(messages.Room(3, 100), 0.0)
    assert not rooms.plenty(0.0)
    decode.room.tell(messages.Room(4, 99), 0.0)
    assert not rooms.plenty(0.0)


def test_a_decode_that_has_failed_has_room_for_one_trial() -> None:
    decodes = [Instance(f"decode_{number}", FakeInstance()) for number in range(2)]
    rooms = Rooms(decodes, blocks=100, block_size=16, at_once=3)
    decodes[0].room.tell(messages.Room(0, 100), 0.0)
    assert rooms.find(1, 0.0) is decodes[1]
    decodes[1].breaker.failed(0.0)
    assert rooms.find(1, 0.0) is None, "for a failed decode, unknown room does not count"
    assert rooms.find(1, FIRST_S) is decodes[1]
    trial = Promise(decodes[1].room, 1)
    assert rooms.find(1, FIRST_S) is None
    trial.over()
    decodes[0].breaker.failed(0.0)
    assert rooms.find(1, 0.0) is decodes[1], "all decodes have failed"


def test_what_a_failed_decode_has_told_keeps_no_trial_from_it() -> None:
    """A failed decode is not watched, so an outdated report would count for ever."""
    decode = Instance("decode_0", FakeInstance())
    rooms = Rooms([decode], blocks=100, block_size=16, at_once=3)
    decode.breaker.failed(0.0)
    decode.room.tell(messages.Room(0, 0), 0.0)
    assert rooms.find(1, 0.0) is None
    assert rooms.find(1, FIRST_S) is decode
    Promise(decode.room, 1)
    assert rooms.find(1, FIRST_S) is None
    decode.breaker.good()
    assert rooms.find(1, FIRST_S) is None, "it is watched again, and reports when there is room"


@virtual
async def test_nobody_is_computed_before_there_is_room(tmp_path: Path) -> None:
    """Two of six answers fit into the decode: each answer is complete, or has no token at all."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 6}, decode={"blocks": 64}) as site:
        site.instances[1][0].room.tell(site.d[0]._admission.room(), 0.0)  # as when it is connected
        requests = [site.request(20, max_tokens=480, ttft_limit_s=60.0) for _ in range(6)]
        first, *others = map(site.start, requests)
        await asyncio.sleep(0.2)
        begun = [one for one in requests if one.state is not State.WAITING]
        assert len(begun) == 2
        assert sum(map(len, site.p_engines[0].forwards)) == 2
        answers = await asyncio.gather(first, *others)
        assert answers == [site.expected(one) for one in requests]
        assert all(one.attempts == 1 for one in requests)
        await site.idle()


async def race(site: Site, tokens: int, limit_s: float) -> list[Request]:
    """Ask for 16 long answers at two gateways at once, some of them a little later."""
    sites, rng = [site, site.beside()], random.Random(site.seed)
    requests: list[Request] = []

    async def ask(where: Site) -> None:
        await asyncio.sleep(rng.choice((0.0, 0.0, rng.uniform(0.0, 3.0))))
        request = where.request(rng.randrange(10, 60), max_tokens=tokens, ttft_limit_s=limit_s)
        request.id = f"{sites.index(where)}{request.id}"
        requests.append(request)
        try:
            assert await where.answer(request) == where.expected(request)
        except errors.Unavailable:
            assert not request.output, "a first token, and then no decode"

    for one in sites:  # as when they are connected
        for instance, decode in zip(one.instances[1], site.d, strict=True):
            instance.room.tell(decode._admission.room(), asyncio.get_running_loop().time())
    await asyncio.gather(*(ask(sites[number % 2]) for number in range(16)))
    return requests


@pytest.mark.parametrize("seed", range(8))
@virtual
async def test_nobody_gets_a_token_and_then_no_decode(tmp_path: Path, seed: int) -> None:
    """16 clients at two gateways compete for the room of two decodes, some with limits."""
    limit_s = (3.0, 100.0)[seed % 2]
    async with Site(
        tmp_path,
        prefills=2,
        decodes=2,
        profile=TIMES,
        prefill={"slots": 4, "lease_s": 1.0},
        decode={"blocks": 80},
        seed=seed,
    ) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (1e-4, 2e-3)
        requests = await race(site, 400, limit_s)
        served = [one for one in requests if one.state is State.FINISHED]
        assert len(served) == 16 or limit_s == 3.0
        assert len(served) >= 4
        await site.idle()


@virtual
async def test_a_wait_for_room_ends_with_its_limit_and_without_a_token(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"slots": 1}) as site:
        running = site.start(site.request(max_tokens=200))
        await asyncio.sleep(0.1)
        late = site.request(ttft_limit_s=0.5)
        with pytest.raises(errors.Late, match="no decode with room within the TTFT limit of 500"):
            await site.answer(late)
        assert (late.state, late.output_tokens, late.offers) == (State.EXPIRED, 0, [])
        alone = site.request(max_tokens=1)
        assert await site.answer(alone) == site.expected(alone), "it needs no decode"
        await running
        await site.idle()


@virtual
async def test_room_that_another_gateway_frees_is_heard_of(tmp_path: Path) -> None:
    """One watch reports it, without repeated offers."""
    async with Site(tmp_path, profile=TIMES, decode={"slots": 1}) as site:
        other = site.beside()
        running = other.start(other.request(max_tokens=200))
        await asyncio.sleep(0.1)
        site.instances[1][0].room.tell(
            site.d[0]._admission.room(), asyncio.get_running_loop().time()
        )
        request = site.request()
        task = site.start(request)
        await asyncio.sleep(0.5)
        assert not site.p_links[0].of(PrefillRequest)
        await running
        ended = asyncio.get_running_loop().time()
        assert await task == site.expected(request)
        assert request.first_token - ended < 0.02
        assert len(site.d_links[0].of(DecodeRequest)) == 1
        assert len(site.d_links[0].of(Watch)) <= 3
        await site.idle()


@virtual
async def test_who_leaves_the_line_for_room_lets_the_next_one_look(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"slots": 1}) as site:
        running = site.start(site.request(max_tokens=100))
        await asyncio.sleep(0.1)
        waiting = [site.start(site.request(max_tokens=4)) for _ in range(3)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()
        await asyncio.gather(running, *waiting[1:])
        await site.idle()


@virtual
async def test_a_token_held_back_outlives_the_lease_while_no_decode_can_be_reached(
    tmp_path: Path,
) -> None:
    """No token has been sent, so the prompt is computed again, and a decode is there in time."""
    async with Site(tmp_path, profile=TIMES, prefill={"lease_s": 1.0}) as site:
        site.instances[1][0].room.tell(messages.Room(1, 1000), asyncio.get_running_loop().time())
        site.d_links[0].broken = "connection refused"
        request = site.request(ttft_limit_s=30.0)
        task = site.start(request)
        await asyncio.sleep(1.5)
        assert len(site.p_engines[0].forwards) == 2
        site.d_links[0].broken = None
        assert await task == site.expected(request)
        await site.idle()


@pytest.mark.parametrize("slots", [8, 1])
@virtual
async def test_a_token_waits_a_moment_for_a_decode_that_does_not_answer(
    tmp_path: Path, slots: int
) -> None:
    """A decode that had room for all is waited for briefly; one that had none, until it answers."""
    async with Site(tmp_path, profile=TIMES, decode={"slots": slots}) as site:
        await site.answer(site.request())
        await asyncio.sleep(KNOWN_S)
        link = site.d_links[0]
        before = len(link.of(DecodeRequest))
        link.delay = (0.5, 0.5)
        request = site.request()
        began = asyncio.get_running_loop().time()
        async with aclosing(site.scheduler.run(request)) as chunks:
            first = asyncio.ensure_future(anext(chunks))
            await asyncio.sleep(0.5)
            assert first.done() == (slots == 8)
            ids = [*(await first).ids]
            if slots == 8:
                assert request.first_token - began == pytest.approx(0.01 + HELD_S, abs=2e-3)
            ids += [token async for chunk in chunks for token in chunk.ids]
        assert ids == site.expected(request)
        assert len(link.of(DecodeRequest)) == before + 1, "the same offer is waited for"
        assert request.attempts == 1
        link.delay = (0.0, 0.0)
        await asyncio.sleep(1.0)
        await site.idle()
