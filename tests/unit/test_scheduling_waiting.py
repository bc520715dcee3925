"""The line of waiting requests: who is its head, who is woken, and what a wait costs."""

from __future__ import annotations

import asyncio
import random

from pdserve.scheduling.waiting import Place, WaitingLine
from tests.unit.inprocess import virtual


def line() -> WaitingLine:
    return WaitingLine(random.Random(1))


async def served(waiting: WaitingLine, *places: Place) -> list[int]:
    """The order in which the places have their turns, each leaving at its first."""
    order: list[int] = []

    async def wait(number: int, place: Place) -> None:
        assert await place.turn(deadline=60.0)
        order.append(number)
        await asyncio.sleep(0.001)  # it tries
        place.leave()

    await asyncio.gather(*(wait(number, place) for number, place in enumerate(places)))
    assert not len(waiting)
    return order


@virtual
async def test_first_come_first_served() -> None:
    waiting = line()
    assert await served(waiting, *(waiting.join(0, float(i)) for i in range(5))) == [0, 1, 2, 3, 4]


@virtual
async def test_priority_then_arrival() -> None:
    waiting = line()
    places = [waiting.join(priority, arrived) for priority, arrived in
              ((0, 1.0), (5, 4.0), (-1, 0.0), (5, 3.0), (0, 0.5))]  # fmt: skip
    assert await served(waiting, *places) == [3, 1, 4, 0, 2]


@virtual
async def test_equal_arrivals_keep_the_order_of_joining() -> None:
    waiting = line()
    assert await served(waiting, *(waiting.join(0, 1.0) for _ in range(4))) == [0, 1, 2, 3]


@virtual
async def test_an_earlier_arrival_that_joins_again_is_the_head() -> None:
    """A request whose prefill failed does not lose its place to later ones."""
    waiting = line()
    assert await served(waiting, waiting.join(0, 2.0), waiting.join(0, 1.0)) == [1, 0]


@virtual
async def test_only_the_head_tries_until_it_leaves() -> None:
    waiting = line()
    first, second = waiting.join(0, 1.0), waiting.join(0, 2.0)
    behind = asyncio.create_task(second.turn(60.0))
    for _ in range(20):
        assert await first.turn(60.0)
    assert not behind.done()
    first.leave()
    assert await behind


@virtual
async def test_deadline_passes_at_the_head_and_behind_it() -> None:
    waiting, loop = line(), asyncio.get_running_loop()
    first, second = waiting.join(0, 1.0), waiting.join(0, 2.0)
    began = loop.time()
    assert not await second.turn(began + 0.5)
    assert abs(loop.time() - began - 0.5) < 1e-6
    while await first.turn(began + 1.0):
        pass
    assert abs(loop.time() - began - 1.0) < 1e-6
    second.leave()
    first.leave()
    assert not len(waiting)


@virtual
async def test_deadline_in_the_past_gives_no_turn() -> None:
    place = line().join(0, 0.0)
    assert not await place.turn(asyncio.get_running_loop().time())
    place.leave()


@virtual
async def test_wake_reaches_the_head_at_once() -> None:
    waiting, loop = line(), asyncio.get_running_loop()
    place = waiting.join(0, 0.0)
    for _ in range(10):  # let its pause grow to the longest
        await place.turn(60.0)
    began = loop.time()
    waiting.wake()
    assert await place.turn(60.0)
    assert loop.time() == began


@virtual
async def test_wake_while_the_head_tries_is_not_lost() -> None:
    waiting, loop = line(), asyncio.get_running_loop()
    place = waiting.join(0, 0.0)
    await place.turn(60.0)
    waiting.wake()  # it is trying now, and will find that it came too early
    began = loop.time()
    assert await place.turn(60.0)
    assert loop.time() == began


@virtual
async def test_pauses_grow_to_a_bound() -> None:
    waiting, loop = line(), asyncio.get_running_loop()
    place = waiting.join(0, 0.0)
    pauses = []
    for _ in range(12):
        began = loop.time()
        await place.turn(60.0)
        pauses.append(loop.time() - began)
    assert 0.0005 <= pauses[0] <= 0.001
    assert all(0.01 <= pause <= 0.02 + 1e-9 for pause in pauses[-4:])
    assert len(set(pauses[-4:])) > 1, "gateways would ask in step"


@virtual
async def test_cancel_of_the_head_wakes_the_next() -> None:
    waiting = line()
    first, second = waiting.join(0, 1.0), waiting.join(0, 2.0)

    async def wait(place: Place) -> None:
        try:
            await place.turn(60.0)
            await asyncio.sleep(30)
        finally:
            place.leave()

    tasks = [asyncio.create_task(wait(first)), asyncio.create_task(second.turn(60.0))]
    await asyncio.sleep(0.1)
    tasks[0].cancel()
    assert await asyncio.wait_for(tasks[1], 0.001)
