"""The room of a decode, by itself: no engine, no blocks, and times that the test gives."""

from __future__ import annotations

import asyncio
from functools import partial

from pdserve import config
from pdserve.instances.acceptance import AFTER_S
from pdserve.instances.accepted_call import AcceptedCall
from pdserve.instances.room_admission import RoomAdmission
from pdserve.rpc.messages import (
    SUSPECT,
    Accepted,
    Busy,
    DecodeRequest,
    Failed,
    Freed,
    Reply,
    Room,
    Tokens,
    Watch,
)
from pdserve.sampling import Sampling
from pdserve.transfer.reports import TransferReport
from tests.unit.inprocess import virtual

REPORT = TransferReport(0, "shm", "whole", 1.0, 1.0, 1.0, 7)


class Decode(RoomAdmission[AcceptedCall]):
    """With `slots`, and as many blocks as `blocks` says."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__(config.Decode(slots=slots), lambda: self.blocks)
        self.blocks = 10
        self.replies: list[tuple[str, Reply]] = []

    def offer(self, name: str, hurry: bool = False, suspect: bool = False) -> Reply | AcceptedCall:
        request = DecodeRequest(
            id=name,
            prompt=bytes(4),
            first_token=7,
            handle=b"handle",
            sampling=Sampling(),
            salt="",
            max_tokens=4,
            ignore_eos=False,
            min_interval_ms=0.0,
            hurry=hurry,
            suspect=suspect,
        )
        refusal = self.refusal(request)
        if refusal is not None:
            return refusal
        call = AcceptedCall(request, lambda reply, _: self.replies.append((name, reply)))
        self.take_in(call, 0.0)
        return call

    def accepted(self, name: str, **fields: bool) -> AcceptedCall:
        call = self.offer(name, **fields)
        assert isinstance(call, AcceptedCall)
        return call

    def hears(self, name: str, reply: Reply, last: bool) -> None:
        self.replies.append((name, reply))

    def look(self, name: str, room: Room | None = None) -> None:
        self.watch(Watch(name, name, room), name, partial(self.hears, name), 0.0)


@virtual
async def test_a_slot_for_each_and_an_id_once() -> None:
    decode = Decode()
    decode.accepted("a")
    assert decode.offer("a") == Failed("INVALID_ARG", "request id a is in use")
    decode.accepted("b")
    assert decode.offer("c") == Busy("slots", Room(0, 10))
    decode.blocks = 12
    assert decode.busy("blocks") == Busy("blocks", Room(0, 12))


@virtual
async def test_acceptance_is_told_unless_a_reply_comes_before() -> None:
    decode = Decode(3)
    decode.accepted("hurried", hurry=True)
    assert decode.replies.pop() == ("hurried", Accepted(room=Room(2, 10)))
    decode.accepted("slow")
    quick = decode.accepted("quick")
    decode.tell(quick, decode.tokens(quick, 1, ""), 0.0)
    decode.replies.clear()
    await asyncio.sleep(2 * AFTER_S)
    assert decode.replies == [("slow", Accepted(room=Room(0, 10)))]


@virtual
async def test_a_suspect_is_on_trial_until_its_first_tokens_are_sent() -> None:
    decode = Decode(3)
    call = decode.accepted("a", suspect=True)
    assert decode.offer("b", suspect=True) == Busy(SUSPECT, Room(2, 10))
    call.arrived_at, call.transfer = 0.0, REPORT
    assert decode.offer("b", suspect=True) == Busy(SUSPECT, Room(2, 10))
    decode.look("w")
    decode.replies.clear()
    decode.tell(call, decode.tokens(call, 1, ""), 0.0)
    assert decode.replies[1:] == [("w", Freed(Room(2, 10)))]
    decode.accepted("b", suspect=True)


@virtual
async def test_room_is_in_the_first_reply_and_in_the_last() -> None:
    decode = Decode()
    call = decode.accepted("a", hurry=True)
    decode.replies.clear()
    call.transfer, call.unsent = REPORT, [8]
    decode.tell(call, decode.tokens(call, 1, ""), 0.5)
    assert (call.unsent, call.transfer, call.sent_at) == ([], None, 0.5)
    call.unsent = [9, 10]
    decode.tell(call, decode.tokens(call, 2, ""), 0.6)
    call.unsent = [11]
    last = decode.tokens(call, 4, "length")
    decode.blocks = 14
    decode.end(call, last, 0.7)
    ids = [token.to_bytes(4, "little") for token in range(12)]
    assert [reply for _, reply in decode.replies] == [
        Tokens(1, ids[8], "", REPORT, Room(1, 10)),
        Tokens(2, ids[9] + ids[10]),
        Tokens(4, ids[11], "length", None, Room(2, 14)),
    ]
    assert not decode.open


@virtual
async def test_all_who_wait_are_told_of_an_end() -> None:
    decode = Decode(1)
    call = decode.accepted("a", hurry=True)
    decode.offer("b")
    for name in "vw":
        decode.look(name, Room(0, 10))
    decode.replies.clear()
    decode.end(call, Failed("CANCELLED", "released"), 1.0)
    freed = Freed(Room(1, 10))
    assert decode.replies == [
        ("a", Failed("CANCELLED", "released")),
        ("v", freed),
        ("w", freed),
    ]
