"""Tests for assignments: what an instance accepts under which number, drains, and replays."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from pdserve.control.assignment import ANY, Assignment
from pdserve.control.records import Phase
from pdserve.errors import Drained, InstanceError
from pdserve.instances.assigned import LOOK_S, Assigned
from pdserve.instances.protocol import RELEASED
from pdserve.node.assignment_file import AssignmentFile
from pdserve.rpc.messages import (
    Assign,
    Busy,
    Connect,
    DecodeRequest,
    Describe,
    Described,
    Drain,
    Failed,
    Inspect,
    Inspected,
    NotConnected,
    Prefilled,
    PrefillRequest,
    Reassigned,
    Release,
    Released,
    Reply,
    Request,
    Resume,
    Tokens,
    Watch,
)
from pdserve.sampling import Sampling
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

OWN, OTHER = b"own_proc", b"other_pr"
DRAIN = Drain("drain", OWN, 1, 60.0)
RESUME = Resume("resume", OWN, 1)
PROMPT = bytes(80)


class Kept:
    """What an instance has stored."""

    def __init__(self) -> None:
        self.assignments: list[Assignment] = []
        self.error: OSError | None = None

    def __call__(self, assignment: Assignment) -> None:
        if self.error is not None:
            raise self.error
        self.assignments.append(assignment)


class Asked:
    """The replies of an instance to one request."""

    def __init__(self, instance: Assigned, request: Request, number: int) -> None:
        self.replies: list[Reply] = []
        self.over = False
        instance.handle(number, request, "stream", self._send)

    def _send(self, reply: Reply, last: bool) -> None:
        assert not self.over, "a reply after the last one"
        self.replies.append(reply)
        self.over = last

    @property
    def last(self) -> Reply | None:
        return self.replies[-1] if self.over else None


class Subject:
    """A prefill, or a decode, of a site under an assignment; the gateway of the site is unused."""

    def __init__(self, site: Site, role: str = "prefill") -> None:
        self.kept = Kept()
        self.role: Any = site.p[0] if role == "prefill" else site.d[0]
        kind: Any = role
        first = Assignment(1, kind, "here")
        self.instance = Assigned(f"{role}_0", kind, first, self.role, OWN, self.kept)

    def ask(self, request: Request, number: int = 1) -> Asked:
        return Asked(self.instance, request, number)

    def says(self, request: Request, number: int = 1) -> Reply:
        """Return the one reply, which comes at once."""
        [reply] = self.ask(request, number).replies
        return reply

    @property
    def phase(self) -> Phase:
        inspected = self.says(Inspect("look"), ANY)
        assert isinstance(inspected, Inspected)
        return inspected.phase


def prefill(name: str, **fields: Any) -> PrefillRequest:
    return PrefillRequest(name, PROMPT, Sampling(), "", 30_000.0, **fields)


def decode(name: str, max_tokens: int = 400) -> DecodeRequest:
    """A request whose prompt the decode computes itself."""
    return DecodeRequest(name, PROMPT, None, b"", Sampling(), "", max_tokens, True, 0.0)


def reassigned(number: int, phase: Phase, role: Any = "prefill", group: str = "here") -> Reassigned:
    return Reassigned(Assignment(number, role, group), phase)


@virtual
async def test_another_number_is_refused_and_nothing_is_held(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        for role in ("prefill", "decode"):
            subject = Subject(site, role)
            begun = prefill("a") if role == "prefill" else decode("a")
            asks: tuple[Request, ...] = (begun, Watch("w", "gateway"), Connect("c", b"x"))
            asks += (Describe("d"),) if role == "prefill" else ()
            for number in (2, ANY, 1 << 40):
                for request in asks:
                    said = subject.says(request, number)
                    assert said == reassigned(1, Phase.SERVING, role)
            assert subject.role.used == 0
            assert subject.phase is Phase.SERVING
        await site.idle()


@virtual
async def test_releases_are_taken_under_any_number(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"prefill": {"base_ms": 50.0}}) as site:
        subject = Subject(site)
        asked = subject.ask(prefill("a"))
        assert subject.says(Release("a"), 7) == Released()
        await asyncio.sleep(0.2)
        assert asked.last == RELEASED
        await site.idle()


@virtual
async def test_a_drain_ends_when_slots_and_leases_are_zero(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        subject = Subject(site)
        asked = subject.ask(prefill("a"))
        watching = [subject.ask(Watch("w", "gateway")) for _ in range(1)]
        await asyncio.sleep(0)
        drained = subject.says(DRAIN, ANY)
        assert isinstance(drained, Inspected)
        assert (drained.phase, drained.used) == (Phase.DRAINING, 1)
        assert subject.says(prefill("b")) == reassigned(1, Phase.DRAINING)
        assert subject.says(Watch("v", "gateway")) == reassigned(1, Phase.DRAINING)
        assert all(isinstance(one.last, Reassigned) or one.over for one in watching)
        await asyncio.sleep(0.5)
        result = asked.last
        assert isinstance(result, Prefilled), "what was accepted goes on"
        # A decode may still be linked to it, to pull what waits.
        assert isinstance(subject.says(Describe("d")), Described)
        looked = subject.says(Inspect("look"), ANY)
        assert isinstance(looked, Inspected)
        assert (looked.phase, looked.used, looked.leases) == (Phase.DRAINING, 1, 1)
        site.receivers[0].pull(site.receivers[0].open(result.handle), [(0, 20)])
        await asyncio.sleep(0.05 + LOOK_S)
        looked = subject.says(Inspect("look"), ANY)
        assert isinstance(looked, Inspected)
        assert (looked.phase, looked.used, looked.leases) == (Phase.DRAINED, 0, 0)
        assert subject.says(Describe("d")) == reassigned(1, Phase.DRAINED)
        assert subject.says(RESUME, ANY) != looked
        assert subject.phase is Phase.SERVING
        assert subject.ask(prefill("c")).replies == []


@virtual
async def test_a_waiting_watch_learns_of_the_drain(tmp_path: Path) -> None:
    async with Site(tmp_path, prefill={"slots": 1}) as site:
        subject = Subject(site)
        subject.ask(prefill("a"))
        watch = subject.ask(Watch("w", "gateway"))
        assert watch.replies == []
        subject.says(DRAIN, ANY)
        assert watch.last == reassigned(1, Phase.DRAINING)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@virtual
async def test_what_is_left_after_the_time_ends_as_drained(tmp_path: Path, role: str) -> None:
    base_ms = 30_000.0 if role == "prefill" else 100.0
    slow = {role: {"base_ms": base_ms}}
    async with Site(tmp_path, profile=slow) as site:
        subject = Subject(site, role)
        asked = subject.ask(decode("a") if role == "decode" else prefill("a"))
        assert subject.role.used == 1
        subject.says(Drain("drain", OWN, 1, 5.0), ANY)
        # A drain that is repeated, after a restart of the agent, ends no later.
        await asyncio.sleep(3.0)
        subject.says(Drain("again", OWN, 1, 5.0), ANY)
        await asyncio.sleep(1.9)
        assert not asked.over
        await asyncio.sleep(0.3 if role == "decode" else 40.0)
        assert isinstance(asked.last, Failed)
        assert asked.last.code == Drained.code
        await asyncio.sleep(0.2)
        assert subject.phase is Phase.DRAINED
        await site.idle()


@virtual
async def test_a_kv_cache_that_nobody_takes_holds_up_a_drain_until_its_lease_ends(
    tmp_path: Path,
) -> None:
    async with Site(tmp_path, prefill={"lease_s": 2.0}) as site:
        subject = Subject(site)
        subject.ask(prefill("a"))
        await asyncio.sleep(0.5)
        subject.says(DRAIN, ANY)
        await asyncio.sleep(1.0)
        assert subject.phase is Phase.DRAINING
        await asyncio.sleep(1.5)
        assert subject.phase is Phase.DRAINED


@virtual
async def test_an_assignment_is_taken_when_nothing_is_held(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        subject = Subject(site)
        wanted = Assignment(4, "prefill", "there")
        assign = Assign("assign", OWN, 1, wanted)
        assert subject.says(assign, ANY) == reassigned(1, Phase.SERVING)
        first = subject.ask(prefill("a"))
        subject.says(DRAIN, ANY)
        assert subject.says(assign, ANY) == reassigned(1, Phase.DRAINING)
        await asyncio.sleep(0.5)
        assert isinstance(first.last, Prefilled)
        subject.says(Release("a"))
        assert subject.kept.assignments == []
        said = subject.says(assign, ANY)
        assert isinstance(said, Inspected)
        assert (said.assignment, said.phase) == (wanted, Phase.SERVING)
        assert subject.kept.assignments == [wanted]
        assert subject.says(prefill("b"), 1) == Reassigned(wanted, Phase.SERVING)
        second = subject.ask(prefill("c"), 4)
        await asyncio.sleep(0.5)
        assert isinstance(second.last, Prefilled)


@virtual
async def test_what_is_replayed_or_forged_changes_nothing(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        subject = Subject(site)
        wanted = Assignment(2, "prefill", "there")
        assign = Assign("assign", OWN, 1, wanted)
        forged = (
            Drain("x", OTHER, 1, 0.0),
            Drain("x", OWN, 2, 0.0),
            Resume("x", OTHER, 1),
            Assign("x", OTHER, 1, wanted),
            Assign("x", OWN, 2, wanted),
        )
        for request in forged:
            assert subject.says(request, ANY) == reassigned(1, Phase.SERVING)
        subject.says(DRAIN, ANY)
        for request in (
            *forged,
            Assign("lower", OWN, 1, Assignment(1, "prefill", "there")),
            Assign("role", OWN, 1, Assignment(2, "decode", "there")),
            Assign("none", OWN, 1, Assignment(2, "none")),
        ):
            assert subject.says(request, ANY) == reassigned(1, Phase.DRAINED)
        assert subject.kept.assignments == []
        subject.says(assign, ANY)
        for replay in (DRAIN, RESUME, assign):
            assert subject.says(replay, ANY) == Reassigned(wanted, Phase.SERVING)
        assert subject.kept.assignments == [wanted]


@virtual
async def test_an_assignment_that_cannot_be_kept_is_not_taken(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        subject = Subject(site)
        subject.says(DRAIN, ANY)
        subject.kept.error = OSError(28, "No space left on device")
        said = subject.says(Assign("assign", OWN, 1, Assignment(2, "prefill")), ANY)
        assert isinstance(said, Failed)
        assert "No space left" in said.message
        assert subject.says(prefill("a")) == reassigned(1, Phase.DRAINED)


@virtual
async def test_handles_name_the_assignment_and_a_decode_refuses_that_of_another(
    tmp_path: Path,
) -> None:
    async with Site(tmp_path) as site:
        subject = Subject(site)
        asked = subject.ask(prefill("a"))
        await asyncio.sleep(0.5)
        old = asked.last
        assert isinstance(old, Prefilled)
        subject.says(Release("a"))
        subject.says(DRAIN, ANY)
        subject.says(Assign("assign", OWN, 1, Assignment(2, "prefill", "there")), ANY)
        asked = subject.ask(prefill("b"), 2)
        await asyncio.sleep(0.5)
        new = asked.last
        assert isinstance(new, Prefilled)
        decode_1 = Subject(site, "decode")

        def offered(name: str, result: Prefilled) -> Asked:
            request = DecodeRequest(
                name, PROMPT, result.token, result.handle, Sampling(), "", 4, True, 0.0
            )
            return decode_1.ask(request)

        # Its link is to the former assignment still.
        assert offered("early", new).last == NotConnected()
        described = subject.says(Describe("d"), 2)
        assert isinstance(described, Described)
        connecting = decode_1.ask(Connect("c", described.endpoint))
        for _ in range(100):
            await asyncio.sleep(0.01)
            if connecting.over:
                break
        refused = offered("stale", old).last
        assert isinstance(refused, Failed)
        assert "assignment 1 of prefill_0, which has 2 now" in refused.message
        served = offered("new", new)
        await asyncio.sleep(0.5)
        assert isinstance(served.last, Tokens)


class Begun:
    """A role instance that its site has started, and closes."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self.open = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instance, name)

    def start(self, _sent: object) -> None:
        self.open = True

    async def close(self) -> None:
        self.open = False


class Roles:
    """Makes the role instances of a flexible instance, from those of a site."""

    def __init__(self, site: Site) -> None:
        self.made = {"prefill": Begun(site.p[0]), "decode": Begun(site.d[0]), "none": None}
        self.error: Exception | None = None
        self.asked: list[Assignment] = []

    async def __call__(self, assignment: Assignment) -> Any:
        self.asked.append(assignment)
        assert not any(one.open for one in self.made.values() if one), "two roles at once"
        await asyncio.sleep(0.1)
        if self.error is not None:
            raise self.error
        return self.made[assignment.role]


@virtual
async def test_a_flexible_instance_changes_its_role(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        roles, kept = Roles(site), Kept()
        first = Assignment(1, "none")
        instance = Assigned("flexible_0", "flexible", first, None, OWN, kept, roles)
        instance.start()

        def ask(request: Request, number: int = ANY) -> Asked:
            return Asked(instance, request, number)

        assert ask(prefill("a"), 1).last == Reassigned(first, Phase.UNASSIGNED)
        wanted = Assignment(2, "decode", "here")
        assign = ask(Assign("assign", OWN, 1, wanted))
        assert not assign.over
        # Meanwhile it is nothing, and cannot be assigned again.
        assert ask(decode("b"), 2).last == Reassigned(wanted, Phase.UNASSIGNED)
        again = Assign("again", OWN, 2, Assignment(3, "prefill"))
        assert ask(again).last == Reassigned(wanted, Phase.UNASSIGNED)
        await asyncio.sleep(0.2)
        assert isinstance(assign.last, Inspected)
        assert (assign.last.phase, assign.last.assignment) == (Phase.SERVING, wanted)
        answer = ask(decode("c", max_tokens=3), 2)
        await asyncio.sleep(0.5)
        assert isinstance(answer.last, Tokens)
        # A role that cannot be made leaves none, and another may be tried.
        roles.error = InstanceError("no memory")
        ask(Drain("drain", OWN, 2, 1.0))
        await asyncio.sleep(0.1)
        failed = ask(Assign("fails", OWN, 2, Assignment(3, "prefill")))
        await asyncio.sleep(0.5)
        assert isinstance(failed.last, Failed)
        assert ask(Release("c")).last == Released()
        roles.error = None
        better = ask(Assign("better", OWN, 3, Assignment(4, "prefill")))
        await asyncio.sleep(0.5)
        assert isinstance(better.last, Inspected)
        assert better.last.phase is Phase.SERVING
        assert [one.number for one in kept.assignments] == [2, 3, 4]
        assert not isinstance(ask(prefill("d"), 4).last, Reassigned | Busy | Failed)


def test_the_file_keeps_the_assignment_and_a_broken_one_is_told_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = AssignmentFile(tmp_path / "assignments", "prefill_0")
    assert file.read() is None
    assert caplog.records == []
    wanted = Assignment(7, "prefill", "chat", "model-key")
    file.write(wanted)
    assert AssignmentFile(tmp_path / "assignments", "prefill_0").read() == wanted
    path = tmp_path / "assignments" / "prefill_0.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    for broken in (b"", b"{", path.read_bytes()[:-3], b'{"number": 0, "role": "prefill"}', b"\xff"):
        path.write_bytes(broken)
        caplog.clear()
        assert file.read() is None
        assert str(path) in caplog.text
    file.write(wanted)
    assert file.read() == wanted
