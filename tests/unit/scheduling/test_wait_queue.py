"""Tests for the wait queue: its order, and that a leaving request passes its wake-up on."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.scheduling.request import PRIORITY_S, RECOVER_S, Request
from pdserve.scheduling.wait_queue import Order, QueuePlace, WaitQueue
from tests.unit.inprocess import virtual


async def served(line: WaitQueue, *orders: Order) -> list[int]:
    """Return the order in which requests that join in turn are served by one wake-up."""
    done: list[int] = []

    async def wait(number: int, place: QueuePlace) -> None:
        assert await place.turn(deadline=60.0)
        done.append(number)
        await asyncio.sleep(0.001)  # it tries, and is served
        place.leave()

    places = [line.join(order) for order in orders]
    tasks = [asyncio.create_task(wait(i, place)) for i, place in enumerate(places)]
    await asyncio.sleep(0)
    line.wake()
    await asyncio.gather(*tasks)
    assert not len(line)
    return done


async def waiting(
    line: WaitQueue, *orders: Order
) -> tuple[list[QueuePlace], list[asyncio.Task[bool]]]:
    """Start requests that have joined the queue and wait for their turn."""
    places = [line.join(order) for order in orders]
    tasks = [asyncio.create_task(place.turn(60.0)) for place in places]
    await asyncio.sleep(0)
    return places, tasks


async def woken(tasks: list[asyncio.Task[bool]]) -> list[int]:
    await asyncio.sleep(0.001)
    return [number for number, task in enumerate(tasks) if task.done()]


@virtual
async def test_one_after_the_other_by_their_order() -> None:
    line = WaitQueue()
    orders = [(True, 2.0), (True, 1.0), (False, 9.0), (True, 0.5), (False, 8.0)]
    assert await served(line, *orders) == [4, 2, 3, 1, 0]


@virtual
async def test_equals_keep_the_order_of_joining() -> None:
    assert await served(WaitQueue(), *[(True, 1.0)] * 5) == [0, 1, 2, 3, 4]


@virtual
async def test_a_wake_up_lets_one_of_them_try() -> None:
    line = WaitQueue()
    _, tasks = await waiting(line, (True, 2.0), (True, 1.0), (True, 3.0))
    assert await woken(tasks) == [], "no request tries in vain"
    line.wake()
    assert await woken(tasks) == [1]
    line.wake()
    assert await woken(tasks) == [0, 1]
    assert len(line) == 3, "a request that tries has not left"


@virtual
async def test_who_finds_nothing_stands_where_it_stood() -> None:
    line = WaitQueue()
    places, tasks = await waiting(line, (True, 1.0), (True, 1.0))
    line.wake()
    assert await woken(tasks) == [0]
    tasks[0] = asyncio.create_task(places[0].turn(60.0))
    await asyncio.sleep(0)
    line.wake()
    assert await woken(tasks) == [0]


@virtual
async def test_who_leaves_wakes_the_next() -> None:
    """The room it was woken for may still be there, as it was served elsewhere or gave up."""
    line = WaitQueue()
    places, tasks = await waiting(line, (True, 1.0), (True, 2.0), (True, 3.0))
    line.wake()
    places[0].leave()
    assert await woken(tasks) == [0, 1]


@pytest.mark.parametrize("when", ["before it is woken", "as it is woken", "as it tries"])
@virtual
async def test_a_wake_up_is_not_lost_with_one_who_is_cancelled(when: str) -> None:
    line = WaitQueue()

    async def wait(place: QueuePlace) -> None:
        try:
            await place.turn(60.0)
            await asyncio.sleep(30)
        finally:
            place.leave()

    first = asyncio.create_task(wait(line.join((True, 1.0))))
    second = asyncio.create_task(line.join((True, 2.0)).turn(60.0))
    await asyncio.sleep(0)
    if when == "before it is woken":
        first.cancel()
    line.wake()
    if when == "as it tries":
        await asyncio.sleep(0.1)
    first.cancel()
    assert await asyncio.wait_for(second, 0.001)


@virtual
async def test_a_deadline_passes_at_the_head_and_behind_it() -> None:
    line, loop = WaitQueue(), asyncio.get_running_loop()
    first, second = line.join((True, 1.0)), line.join((True, 2.0))
    ended = [asyncio.create_task(first.turn(1.0)), asyncio.create_task(second.turn(0.5))]
    assert not await ended[1]
    assert loop.time() == pytest.approx(0.5, abs=1e-4)
    assert not await ended[0]
    assert loop.time() == pytest.approx(1.0, abs=1e-4)
    for place in (first, second):
        place.leave()
    assert not len(line)


@virtual
async def test_a_deadline_in_the_past_gives_no_turn() -> None:
    place = WaitQueue().join((True, 0.0))
    assert not await place.turn(asyncio.get_running_loop().time())
    place.leave()


@virtual
async def test_a_wait_shorter_than_the_clock_can_tell_ends() -> None:
    place, loop = WaitQueue().join((True, 0.0)), asyncio.get_running_loop()
    assert not await place.turn(loop.time() + 1e-9)
    place.leave()


@virtual
async def test_who_is_past_its_deadline_is_passed_over() -> None:
    line = WaitQueue()
    late, second = line.join((True, 1.0)), line.join((True, 2.0))
    gone = asyncio.create_task(late.turn(0.5))
    task = asyncio.create_task(second.turn(60.0))
    assert not await gone
    line.wake()
    assert await woken([task]) == [0]


# ---------------------------------------------------------------------------- the order of requests


def request(arrived: float, **fields: object) -> Request:
    request = Request(id="1", prompt=bytes(4), max_tokens=1, **fields)  # type: ignore[arg-type]
    request.arrived = request.waiting_since = arrived
    return request


def test_the_earlier_deadline_goes_first() -> None:
    assert request(0.0).order < request(1.0).order
    assert request(5.0, ttft_limit_s=2.0).order < request(0.0, ttft_limit_s=60.0).order
    assert request(1.0, time_limit_s=3.0).order < request(0.0).order


def test_priority_goes_before_deadline_and_is_worth_a_bounded_wait() -> None:
    """No request starves: one that has waited long enough goes before any newcomer."""
    assert request(PRIORITY_S - 0.1, priority=1).order < request(0.0).order
    assert request(0.0).order < request(PRIORITY_S + 0.1, priority=1).order
    assert request(0.0, priority=-2).order < request(2 * PRIORITY_S + 0.1).order


def test_who_has_been_promised_an_answer_goes_first() -> None:
    begun = request(1000.0)
    begun.add(bytes(4))
    assert begun.order < request(0.0, priority=99).order
    assert begun.deadline == 1000.0 + RECOVER_S


@virtual
async def test_the_oldest_is_who_joined_first_and_is_still_there() -> None:
    line = WaitQueue()
    assert line.oldest is None
    began = asyncio.get_running_loop().time()
    first = line.join((False, 5.0))
    await asyncio.sleep(2)
    second = line.join((False, 1.0))
    assert line.oldest == began
    first.leave()
    assert line.oldest == pytest.approx(began + 2)
    second.leave()
    assert line.oldest is None
