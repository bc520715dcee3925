"""Tests for the sequence of messages that gives an instance another role, with scripted answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve.control.assignment import Assignment
from pdserve.control.records import Phase
from pdserve.errors import InstanceError
from pdserve.node.instance_calls import REPLY_S
from pdserve.node.role_switch import SETTLE_S, NotSwitched, RoleSwitch, Step
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import (
    Assign,
    Drain,
    Failed,
    Inspected,
    Reassigned,
    Request,
    Resume,
    Unlink,
    Unlinked,
    encode_replies,
)
from tests.unit.inprocess import virtual

if TYPE_CHECKING:
    from collections.abc import Callable

PROCESS, MEMORY = b"process1", b"memory01"
BEFORE, AFTER = Assignment(3, "prefill"), Assignment(4, "decode")
DECODES = ["decode_0", "decode_1", "flexible_0"]
WITHIN_S = 30.0


@dataclass
class Scripted:
    """A prefill that holds requests for some looks, and decodes; all requests are recorded."""

    looks: float = 2
    """Number of looks after which it holds nothing any more."""
    asked: list[tuple[str, Request]] = field(default_factory=list)
    answers: dict[type[Any], Callable[[str, Any], Any]] = field(default_factory=dict)
    """Answers in place of the ordinary ones; None: silence."""
    present: Inspected = field(
        default_factory=lambda: Inspected(BEFORE, Phase.SERVING, PROCESS, 1, 1, "flexible", MEMORY)
    )

    def kinds(self) -> list[str]:
        found = [type(request).__name__ for _, request in self.asked]
        return [kind for n, kind in enumerate(found) if n == 0 or kind != found[n - 1]]

    async def switch(self, wanted: Assignment = AFTER) -> Any:
        switch = RoleSwitch("flexible_0", lambda name: _Channel(self, name), DECODES, WITHIN_S)
        return await switch.run(wanted)

    def answer(self, name: str, request: Request) -> Any:
        self.asked.append((name, request))
        if type(request) in self.answers:
            return self.answers[type(request)](name, request)
        match request:
            case Drain():
                self.change(phase=Phase.DRAINING)
            case Unlink():
                return Unlinked()
            case Assign(assignment=wanted):
                self.change(assignment=wanted, phase=Phase.SERVING, memory=b"")
            case Resume():
                self.change(phase=Phase.SERVING)
            case _ if self.present.phase is Phase.DRAINING:
                self.looks -= 1
                if self.looks <= 0:
                    self.change(phase=Phase.DRAINED, used=0, leases=0)
        return self.present

    def change(self, **fields: Any) -> None:
        self.present = msgspec.structs.replace(self.present, **fields)


class _Channel:
    def __init__(self, scripted: Scripted, name: str) -> None:
        self._scripted, self._name, self._calls = scripted, name, Calls()

    def open(self, call: str, request: Request) -> Replies:
        replies = self._calls.open(call)
        answer = self._scripted.answer(self._name, request)
        if isinstance(answer, InstanceError):
            replies.fail(answer)
        elif answer is not None:
            self._calls.deliver(call, encode_replies([(call, answer)]))
        return replies

    def forget(self, call: str) -> None:
        self._calls.forget(call)

    def lose(self, epoch: bytes) -> None: ...

    async def close(self) -> None: ...


@virtual
async def test_each_step_waits_for_the_one_before() -> None:
    scripted = Scripted()
    done = await scripted.switch()
    assert (done.before.assignment, done.after.assignment) == (BEFORE, AFTER)
    assert scripted.kinds() == ["Inspect", "Drain", "Inspect", "Unlink", "Assign", "Inspect"]
    drain, assign = (
        next(one for _, one in scripted.asked if isinstance(one, kind)) for kind in (Drain, Assign)
    )
    assert (drain.epoch, drain.number, drain.within_s) == (PROCESS, 3, WITHIN_S)
    assert (assign.epoch, assign.number, assign.assignment) == (PROCESS, 3, AFTER)
    unlinks = {name: one for name, one in scripted.asked if isinstance(one, Unlink)}
    assert [*unlinks] == ["decode_0", "decode_1"], "not itself"
    assert {(one.prefill, one.epoch, one.number) for one in unlinks.values()} == {
        ("flexible_0", MEMORY, 3)
    }


@virtual
async def test_a_decode_has_no_memory_that_others_link_to() -> None:
    scripted = Scripted()
    scripted.change(memory=b"", assignment=Assignment(3, "decode"))
    await scripted.switch(Assignment(4, "prefill"))
    assert scripted.kinds() == ["Inspect", "Drain", "Inspect", "Assign", "Inspect"]


@virtual
async def test_an_instance_without_a_role_takes_one_at_once() -> None:
    scripted = Scripted()
    scripted.change(memory=b"", assignment=Assignment(3, "none"), phase=Phase.UNASSIGNED)
    await scripted.switch()
    assert scripted.kinds() == ["Inspect", "Assign", "Inspect"]


@virtual
async def test_what_is_done_already_is_not_done_again() -> None:
    scripted = Scripted()
    scripted.change(assignment=AFTER)
    await scripted.switch()
    assert scripted.kinds() == ["Inspect"]


@virtual
async def test_a_switch_that_was_interrupted_goes_on() -> None:
    scripted = Scripted()
    scripted.change(phase=Phase.DRAINED, used=0, leases=0)
    scripted.answers[Drain] = lambda *_: scripted.present
    await scripted.switch()
    assert scripted.kinds() == ["Inspect", "Drain", "Unlink", "Assign", "Inspect"]


@virtual
async def test_a_drain_that_does_not_end_is_given_up() -> None:
    scripted = Scripted(looks=float("inf"))
    with pytest.raises(NotSwitched, match="drain: draining, 1 slots and 1 leases are held") as why:
        await scripted.switch()
    assert why.value.step is Step.DRAIN
    assert scripted.kinds()[-2:] == ["Inspect", "Resume"]
    assert scripted.present.phase is Phase.SERVING


async def given_up(scripted: Scripted, step: Step, why: str) -> NotSwitched:
    with pytest.raises(NotSwitched, match=why) as raised:
        await scripted.switch()
    assert raised.value.step is step
    assert scripted.kinds()[-1] == "Resume"
    assert not any(isinstance(one, Assign) for _, one in scripted.asked) or step in (
        Step.ASSIGN,
        Step.VERIFY,
    )
    return raised.value


@virtual
async def test_decodes_that_keep_their_link_are_all_named() -> None:
    for answer in (None, InstanceError("broken"), Failed("INTERNAL", "a copy does not end")):
        scripted = Scripted(answers={Unlink: lambda *_, answer=answer: answer})
        error = await given_up(scripted, Step.UNLINK, "linked still: decode_0: .*; decode_1: ")
        assert error.silent == ("decode_0", "decode_1")
        assert scripted.present.phase is Phase.SERVING


@virtual
async def test_an_assignment_that_is_refused() -> None:
    refused = Reassigned(BEFORE, Phase.DRAINED)
    scripted = Scripted(answers={Assign: lambda *_: refused})
    await given_up(scripted, Step.ASSIGN, "answered Reassigned.* to Assign")


@virtual
async def test_a_switch_that_did_nothing_is_told_from_one_that_did() -> None:
    """Both answer fast, and right."""
    scripted = Scripted(answers={Assign: lambda *_: scripted.present})
    await given_up(scripted, Step.VERIFY, "it has .*number=3.*drained")


@virtual
async def test_another_process_is_not_switched() -> None:
    scripted = Scripted(looks=float("inf"))
    scripted.answers[Drain] = lambda *_: msgspec.structs.replace(
        scripted.present, phase=Phase.DRAINING
    )
    scripted.change(phase=Phase.SERVING, epoch=b"process2")
    first = msgspec.structs.replace(scripted.present, epoch=PROCESS)
    answers = iter([first])
    ordinary = scripted.answer
    scripted.answer = lambda name, request: next(answers, None) or ordinary(name, request)  # type: ignore[method-assign]
    await given_up(scripted, Step.DRAIN, "another process")


@virtual
async def test_an_instance_that_does_not_answer_is_left_alone() -> None:
    scripted = Scripted()
    scripted.answer = lambda *_: None  # type: ignore[method-assign]
    began = asyncio.get_running_loop().time()
    with pytest.raises(NotSwitched, match="inspect: no answer within 5 s"):
        await scripted.switch()
    assert asyncio.get_running_loop().time() - began < REPLY_S + SETTLE_S
    assert not scripted.asked
