"""Tests for the replies to a call: in order, bounded in time, a failure after earlier replies."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.errors import InstanceError
from pdserve.rpc.client import Replies
from pdserve.rpc.messages import Accepted, Busy, Released
from tests.unit.inprocess import virtual

A, B = Accepted(), Released()


@virtual
async def test_replies_come_in_order() -> None:
    replies = Replies()
    three = [Busy(str(number)) for number in range(3)]
    for reply in three:
        replies.put(reply)
    assert [await replies.get(1) for _ in range(3)] == three


@virtual
async def test_a_reader_is_woken_at_once() -> None:
    replies, loop = Replies(), asyncio.get_running_loop()
    loop.call_later(0.5, replies.put, A)
    loop.call_later(0.5, replies.put, B)
    assert await replies.get(1) == A
    assert loop.time() == pytest.approx(0.5)
    assert await replies.get(1) == B
    assert loop.time() == pytest.approx(0.5)


@virtual
async def test_no_reply_in_time() -> None:
    replies, loop = Replies(), asyncio.get_running_loop()
    with pytest.raises(InstanceError, match=r"no answer within 1\.5 s"):
        await replies.get(1.5)
    assert loop.time() == pytest.approx(1.5)
    replies.put(b"late")
    assert await replies.get(1) == b"late"


@virtual
async def test_an_earlier_timer_does_not_end_a_later_wait() -> None:
    replies, loop = Replies(), asyncio.get_running_loop()
    loop.call_later(0.9, replies.put, A)
    assert await replies.get(1) == A
    loop.call_later(0.9, replies.put, B)
    assert await replies.get(1) == B


@virtual
async def test_failure_comes_after_the_replies_before_it() -> None:
    replies = Replies()
    replies.put(A)
    replies.fail(InstanceError("connection reset"))
    assert await replies.get(1) == A
    for _ in range(2):
        with pytest.raises(InstanceError, match="connection reset"):
            await replies.get(1)


@virtual
async def test_failure_wakes_the_reader() -> None:
    replies, loop = Replies(), asyncio.get_running_loop()
    loop.call_later(0.5, replies.fail, InstanceError("connection reset"))
    with pytest.raises(InstanceError, match="connection reset"):
        await replies.get(1)
    assert loop.time() == pytest.approx(0.5)


@virtual
async def test_reply_and_timeout_in_one_moment() -> None:
    replies, loop = Replies(), asyncio.get_running_loop()
    loop.call_later(1, replies.put, A)
    assert await replies.get(1) == A


@virtual
async def test_a_cancelled_reader_leaves_the_reply_to_the_next() -> None:
    replies = Replies()
    reader = asyncio.create_task(replies.get(1))
    await asyncio.sleep(0.1)
    reader.cancel()
    replies.put(A)
    await asyncio.wait([reader])
    assert reader.cancelled()
    assert await replies.get(1) == A


@virtual
async def test_a_reader_cancelled_as_its_reply_comes_does_not_lose_it() -> None:
    replies = Replies()
    reader = asyncio.create_task(replies.get(1))
    await asyncio.sleep(0.1)
    replies.put(A)
    reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled()
    assert await replies.get(1) == A
