"""Tests for replies from an instance to a gateway: one per response, or several together."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pdserve.errors import InstanceError
from pdserve.rpc import messages
from pdserve.rpc.client import Calls
from pdserve.rpc.messages import Accepted, Failed, Released, Reply, Tokens
from pdserve.rpc.server import MAX_RESPONSES, Answers, Call
from tests.unit.inprocess import virtual

Sent = tuple[str, list[tuple[str, Reply]] | None, bool]


class Wire:
    """An instance's end; records what it has sent: the call's key, the replies, the final flag."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.answers = Answers(self._send)

    def _send(self, key: str, data: bytes | None, last: bool) -> None:
        replies = None if data is None else list(messages.decode_replies(data).replies)
        self.sent.append((key, replies, last))

    def call(self, key: str, stream: str = "s") -> Call:
        call = Call(key, f"{stream}/id-{key}")
        self.answers.open(call)
        return call

    async def flushed(self) -> list[Sent]:
        await asyncio.sleep(0)
        sent, self.sent = self.sent, []
        return sent


def tokens(start: int, reason: str = "") -> Tokens:
    return Tokens(start, b"\0\0\0\0", reason)


@virtual
async def test_one_reply_is_a_response_of_its_own() -> None:
    wire = Wire()
    one, other = wire.call("1"), wire.call("2")
    wire.answers.reply(other, Released(), True)
    wire.answers.reply(one, Released(), True)
    assert wire.sent == [("2", [("id-2", Released())], True), ("1", [("id-1", Released())], True)]
    assert not wire.answers.abandon("1")


@virtual
async def test_what_is_said_at_one_moment_is_one_response() -> None:
    wire = Wire()
    calls = [wire.call(str(n)) for n in range(3)]
    for call in calls:
        wire.answers.reply(call, tokens(1), False)
    assert await wire.flushed() == [
        ("1", None, True),
        ("2", None, True),
        ("0", [("id-0", tokens(1)), ("id-1", tokens(1)), ("id-2", tokens(1))], False),
    ]
    wire.answers.reply(calls[2], tokens(2), False)
    assert await wire.flushed() == [("0", [("id-2", tokens(2))], False)]


@virtual
async def test_a_carrier_lasts_as_long_as_any_answer_of_its_stream() -> None:
    wire = Wire()
    first, second = wire.call("1"), wire.call("2")
    wire.answers.reply(first, tokens(1), False)
    wire.answers.reply(second, tokens(1), False)
    await wire.flushed()
    wire.answers.reply(first, tokens(2, "stop"), True)
    assert await wire.flushed() == [("1", [("id-1", tokens(2, "stop"))], False)]
    wire.answers.reply(second, tokens(2, "stop"), True)
    assert await wire.flushed() == [("1", [("id-2", tokens(2, "stop"))], True)]
    third = wire.call("3")
    wire.answers.reply(third, Accepted(), False)
    assert await wire.flushed() == [("3", [("id-3", Accepted())], False)], "the next one carries"


@virtual
async def test_streams_share_nothing() -> None:
    wire = Wire()
    mine, theirs = wire.call("1", "mine"), wire.call("2", "theirs")
    nobody = Call("3", "id-3")
    wire.answers.open(nobody)
    for call in (mine, theirs, nobody):
        wire.answers.reply(call, tokens(1), False)
    assert [key for key, _, _ in await wire.flushed()] == ["1", "2", "3"]
    assert [wire.answers.abandon(key) for key in "123"] == [["id-1"], ["id-2"], ["id-3"]]


@virtual
async def test_a_caller_that_goes_before_the_first_reply() -> None:
    wire = Wire()
    wire.call("1")
    assert wire.answers.abandon("1") == ["id-1"]
    assert not wire.answers.abandon("2")


@virtual
async def test_a_caller_that_goes_takes_along_what_its_carrier_brought() -> None:
    wire = Wire()
    first, second = wire.call("1"), wire.call("2")
    for call in (first, second):
        wire.answers.reply(call, tokens(1), False)
    wire.answers.reply(first, tokens(2, "stop"), True)
    await wire.flushed()
    assert wire.answers.abandon("1") == ["id-2"], "the first has had its last reply"
    late = wire.call("3")
    wire.answers.reply(late, tokens(1), False)
    wire.answers.reply(second, Failed("CANCELLED", "released"), True)
    assert await wire.flushed() == [
        ("3", [("id-3", tokens(1))], False),
        ("1", [("id-2", Failed("CANCELLED", "released"))], True),
    ]
    assert wire.answers.abandon("3") == ["id-3"], "a call that came late is abandoned by itself"


@virtual
async def test_a_failed_carrier_fails_what_it_brought() -> None:
    calls = Calls()
    carried, carrier, other = calls.open("1"), calls.open("2"), calls.open("3")
    calls.deliver("2", messages.encode_replies([("1", Accepted()), ("gone", Accepted())]))
    calls.fail("2", InstanceError("the model is dead"))
    assert await carried.get(1) == Accepted(), "earlier replies are read first"
    for replies in (carried, carrier):
        with pytest.raises(InstanceError, match="the model is dead"):
            await replies.get(1)
    calls.deliver("3", messages.encode_replies([("3", Accepted())]))
    assert await other.get(1) == Accepted()
    assert len(calls) == 1
    calls.fail_all(InstanceError("the stream was closed"))
    with pytest.raises(InstanceError, match="closed"):
        await other.get(1)


def test_malformed_replies_are_one_clear_error() -> None:
    with pytest.raises(InstanceError, match="malformed message"):
        Calls().deliver("1", b"\x91\x92\xa1a\x81\xa4type\xa5later")


@virtual
async def test_a_carrier_is_retired_after_so_many_responses() -> None:
    """Triton keeps some memory for every response until the request has ended."""
    wire = Wire()
    first, second = wire.call("1"), wire.call("2")
    wire.answers.reply(first, tokens(1), False)
    wire.answers.reply(second, tokens(1), False)
    await wire.flushed()
    for start in range(2, MAX_RESPONSES + 1):
        wire.answers.reply(first, tokens(start), False)
        assert await wire.flushed() == [("1", [("id-1", tokens(start))], False)]
    third = wire.call("3")
    wire.answers.reply(third, tokens(1), False)
    assert await wire.flushed() == [("1", None, True), ("3", [("id-3", tokens(1))], False)]
    wire.answers.reply(first, tokens(9, "stop"), True)
    wire.answers.reply(second, tokens(2), False)
    assert await wire.flushed() == [
        ("3", [("id-1", tokens(9, "stop")), ("id-2", tokens(2))], False)
    ]
    assert wire.answers.abandon("1") == []
    assert sorted(wire.answers.abandon("3")) == ["id-2", "id-3"]


@virtual
async def test_a_retired_carrier_first_sends_its_pending_replies() -> None:
    wire = Wire()
    first = wire.call("1")
    for start in range(MAX_RESPONSES):
        wire.answers.reply(first, tokens(start), False)
        await wire.flushed()
    second, late = wire.call("2"), tokens(MAX_RESPONSES)
    wire.answers.reply(first, late, False)
    wire.answers.reply(second, tokens(1), False)
    wire.answers.reply(first, tokens(MAX_RESPONSES + 1, "stop"), True)
    assert await wire.flushed() == [
        ("1", [("id-1", late)], True),
        ("2", [("id-2", tokens(1)), ("id-1", tokens(MAX_RESPONSES + 1, "stop"))], False),
    ]
    wire.answers.reply(second, tokens(2, "stop"), True)
    assert await wire.flushed() == [("2", [("id-2", tokens(2, "stop"))], True)]


@virtual
async def test_under_steady_load_no_request_carries_for_ever() -> None:
    """A carrier that ended with the last open answer would never end under steady load."""
    wire, open_calls, most = Wire(), list[Call](), Counter[str]()
    for number in range(20 * MAX_RESPONSES):
        open_calls.append(wire.call(f"{number}"))
        wire.answers.reply(open_calls[-1], tokens(1), False)
        if len(open_calls) > 3:
            wire.answers.reply(open_calls.pop(0), tokens(2, "stop"), True)
        most.update(key for key, replies, _ in await wire.flushed() if replies is not None)
    assert max(most.values()) <= MAX_RESPONSES
    assert len(most) >= 20
