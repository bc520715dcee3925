"""Tests for the reconciler of one instance, in virtual time, with an agent killed at any moment."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from pdserve.control.assignment import ANY, Assignment, Role
from pdserve.control.records import DesiredInstance, Phase
from pdserve.errors import InstanceError
from pdserve.instances.assigned import Assigned
from pdserve.node.instance_calls import InstanceCalls
from pdserve.node.reconcile import Duty, Kind, Presence
from pdserve.node.reconciler import LATE_S, LOOK_S, TRIES, Reconciler
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import Failed, Reply, Request, Unlink, Unlinked
from tests.unit.inprocess import virtual
from tests.unit.instances.flexible_site import Direct

LOAD_S, DRAIN_S, REQUEST_S = 2.0, 30.0, 4.0


class FakeRole:
    """A role instance that holds one request for a while after it has begun."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.leases = 0
        self.memory = b"arena..." if role == "prefill" else b""
        self._until = asyncio.get_running_loop().time() + REQUEST_S
        self.closed = False

    @property
    def used(self) -> int:
        return int(asyncio.get_running_loop().time() < self._until)

    def assign(self, number: int) -> None: ...

    def start(self, _: object) -> None: ...

    def end_watches(self, _: Reply) -> None: ...

    def end_all(self, _: Failed) -> None:
        self._until = 0.0

    async def close(self) -> None:
        self.closed = True


class Host:
    """The models of one server, and the decodes of the deployment."""

    def __init__(self, kind: Kind, assignment: Assignment) -> None:
        self.kind = kind
        self.kept = assignment
        self.there, self.instance = Presence.LOADED, None
        self.duties: list[Duty] = []
        self.broken = ""
        self.stuck: set[str] = set()
        """Decodes that do not close their link."""
        self.linked = {"decode_0", "decode_1"}
        self.loads = 0
        self.silent = False
        self._epochs = itertools.count()
        self._begin()

    def _begin(self) -> None:
        epoch = b"%08d" % next(self._epochs)
        role: Any = None if self.kept.role == "none" else FakeRole(self.kept.role)
        make: Any = self._make if self.kind == "flexible" else None
        self.instance: Any = Assigned("one", self.kind, self.kept, role, epoch, self._keep, make)
        self.instance.start()
        self._epoch = epoch

    def _keep(self, assignment: Assignment) -> None:
        self.kept = assignment

    async def _make(self, assignment: Assignment) -> Any:
        assert not self.linked or self.instance.role is None
        await asyncio.sleep(0.3)
        if self.broken:
            raise InstanceError(self.broken)
        return None if assignment.role == "none" else FakeRole(assignment.role)

    # ------------------------------------------------------------- its models

    def presence(self, _: str) -> Presence:
        return self.there

    def epoch(self, _: str) -> bytes | None:
        return self._epoch if self.there is Presence.LOADED else None

    def failure(self, _: str) -> str:
        return ""

    def set_duty(self, _: str, duty: Duty) -> None:
        if self.duties[-1:] != [duty]:
            self.duties.append(duty)

    async def load(self, _: str) -> None:
        assert self.there in (Presence.ABSENT, Presence.UNLOADED)
        self.loads += 1
        await asyncio.sleep(LOAD_S)
        if self.broken:
            raise InstanceError(self.broken)
        self.there = Presence.LOADED
        self._begin()

    async def unload(self, _: str) -> None:
        assert self.silent or self.instance.phase in (Phase.DRAINED, Phase.UNASSIGNED)
        self.there = Presence.UNLOADED

    async def remove(self, _: str) -> None:
        assert self.there is Presence.UNLOADED
        self.there = Presence.ABSENT

    # ------------------------------------------------------------ its channels

    def channel(self, name: str) -> Any:
        if name == "one" and not self.silent:
            return Direct(self.instance, ANY)
        return Decode(self, name)

    @property
    def is_as(self) -> tuple[Presence, Assignment, Phase]:
        return self.there, self.kept, self.instance.phase


class Decode:
    """A channel to a decode that has a link, or to what does not answer."""

    def __init__(self, host: Host, name: str) -> None:
        self._host, self._name = host, name
        self._calls = Calls()

    def open(self, call: str, request: Request) -> Replies:
        replies = self._calls.open(call)
        if self._name not in {"one", *self._host.stuck}:
            assert isinstance(request, Unlink)
            assert request.epoch == b"arena..."
            self._host.linked.discard(self._name)
            replies.put(Unlinked())
        return replies

    def forget(self, call: str) -> None:
        self._calls.forget(call)

    async def close(self) -> None: ...


class Agent:
    """Reconciles the instance of a host; it can be killed and started again."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.desired: DesiredInstance | None = None
        self.start()

    def start(self) -> None:
        calls = InstanceCalls(self.host.channel, self.host.channel)
        self.one = Reconciler(
            "one",
            self.host.kind,
            self.host,
            calls,
            lambda: self.desired,
            lambda: ["one", "decode_0", "decode_1"],
            lambda: DRAIN_S,
        )
        self._task = asyncio.create_task(self.one.run())

    async def kill(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def want(self, assignment: Assignment, state: Any = "serving") -> None:
        self.desired = DesiredInstance(assignment, state)
        self.one.soon.set()


PREFILL = Assignment(1, "prefill", "a")


@virtual
async def test_a_role_switch_waits_for_requests_and_links() -> None:
    host = Host("flexible", PREFILL)
    agent = Agent(host)
    former = host.instance.role
    agent.want(Assignment(2, "decode", "a"))
    await asyncio.sleep(REQUEST_S - 0.1)
    assert host.instance.phase is Phase.DRAINING
    assert not former.closed
    await asyncio.sleep(1)
    assert host.is_as == (Presence.LOADED, Assignment(2, "decode", "a"), Phase.SERVING)
    assert former.closed
    assert not host.linked
    assert set(host.duties) == {Duty.REPAIRED}
    assert agent.one.known is not None
    assert agent.one.known.assignment.number == 2
    await agent.kill()


@virtual
async def test_who_keeps_a_link_is_named_and_nothing_is_given_back() -> None:
    host = Host("flexible", PREFILL)
    host.stuck.add("decode_1")
    agent = Agent(host)
    agent.want(Assignment(2, "decode", "a"))
    await asyncio.sleep(60)
    assert host.is_as == (Presence.LOADED, PREFILL, Phase.DRAINED)
    assert "decode_1 (no answer within" in agent.one.reason
    assert "decode_0" not in agent.one.reason
    host.stuck.clear()
    await asyncio.sleep(30)
    assert host.instance.phase is Phase.SERVING
    assert agent.one.reason == ""
    await agent.kill()


@virtual
async def test_the_reason_is_still_told_after_thousands_of_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def load(_: str) -> None:
        raise InstanceError("no weights")

    monkeypatch.setattr("pdserve.node.reconciler.MOST_RETRY_S", 1e-3)
    host = Host("decode", Assignment(3, "decode"))
    host.there = Presence.UNLOADED
    monkeypatch.setattr(host, "load", load)
    agent = Agent(host)
    agent.want(host.kept)
    await asyncio.sleep(4.0)
    assert agent.one.tries > 3000
    assert agent.one.reason == "load: no weights"
    await agent.kill()


@virtual
async def test_one_that_leaves_does_not_wait_for_a_silent_decode() -> None:
    """Its process ends, and its memory is nobody else's."""
    host = Host("prefill", PREFILL)
    host.stuck.add("decode_1")
    agent = Agent(host)
    agent.want(PREFILL, "absent")
    await asyncio.sleep(REQUEST_S + LATE_S + 30)
    assert host.there is Presence.ABSENT
    assert host.duties[-2:] == [Duty.DRAINING, Duty.ABSENT]
    agent.want(PREFILL)
    await asyncio.sleep(LOAD_S + 1)
    assert host.is_as == (Presence.LOADED, PREFILL, Phase.SERVING)
    assert host.duties[-1] is Duty.REPAIRED
    await agent.kill()


@virtual
async def test_a_drain_is_taken_back() -> None:
    host = Host("decode", Assignment(3, "decode"))
    agent = Agent(host)
    agent.want(host.kept, "draining")
    await asyncio.sleep(1)
    assert host.duties[-1] is Duty.DRAINING
    agent.want(host.kept)
    await asyncio.sleep(0.1)
    assert host.instance.phase is Phase.SERVING
    agent.want(host.kept, "draining")
    await asyncio.sleep(REQUEST_S)
    assert host.instance.phase is Phase.DRAINED
    await agent.kill()


@virtual
async def test_what_cannot_be_loaded_counts_as_failed_and_is_tried_on() -> None:
    host = Host("decode", Assignment(3, "decode"))
    host.there, host.broken = Presence.UNLOADED, "no weights"
    agent = Agent(host)
    agent.want(host.kept)
    await asyncio.sleep(30)
    assert agent.one.tries > TRIES
    assert "no weights" in agent.one.reason
    host.broken = ""
    await asyncio.sleep(LOAD_S + 6)
    assert host.is_as == (Presence.LOADED, host.kept, Phase.SERVING)
    assert (agent.one.tries, agent.one.reason) == (0, "")
    await agent.kill()


@virtual
async def test_one_without_the_memory_of_its_role_is_loaded_again() -> None:
    host = Host("flexible", PREFILL)
    agent = Agent(host)
    host.broken = "no room in /dev/shm"
    agent.want(Assignment(2, "decode"))
    await asyncio.sleep(REQUEST_S + 2)
    assert host.instance.phase is Phase.UNASSIGNED
    host.broken = ""
    await asyncio.sleep(LATE_S + LOAD_S + 2)
    assert host.loads == 1
    assert host.is_as == (Presence.LOADED, Assignment(2, "decode"), Phase.SERVING)
    await agent.kill()


@virtual
async def test_one_that_does_not_answer_is_taken_out() -> None:
    host = Host("decode", Assignment(3, "decode"))
    host.silent = True
    agent = Agent(host)
    agent.want(host.kept, "absent")
    await asyncio.sleep(LATE_S + 15)
    assert host.there is Presence.ABSENT
    await agent.kill()


@virtual
async def test_another_process_is_asked_again() -> None:
    host = Host("decode", Assignment(3, "decode"))
    agent = Agent(host)
    agent.want(host.kept)
    await asyncio.sleep(1)
    host.kept = Assignment(2, "decode")  # as from a copy of a former state
    host._begin()
    await asyncio.sleep(LOOK_S + REQUEST_S + 1)
    assert host.is_as == (Presence.LOADED, Assignment(3, "decode"), Phase.SERVING)
    await agent.kill()


@pytest.mark.parametrize("state", ["serving", "absent"])
@virtual
async def test_an_agent_that_is_killed_at_any_moment_is_replaced(state: str) -> None:
    """Each agent lives for a little longer than the one before."""
    host = Host("flexible", PREFILL)
    agent = Agent(host)
    wanted = Assignment(2, "decode", "b")
    for number in range(60):
        agent.want(wanted, state)
        await asyncio.sleep(0.005 * number)
        await agent.kill()
        agent.start()
    await asyncio.sleep(10)
    if state == "absent":
        assert host.there is Presence.ABSENT
    else:
        assert host.is_as == (Presence.LOADED, wanted, Phase.SERVING)
    await agent.kill()
