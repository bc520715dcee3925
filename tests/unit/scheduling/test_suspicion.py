"""Tests for requests that are open when an instance dies: which are suspects, where they may go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest

from pdserve import errors
from pdserve.config import Role
from pdserve.errors import InstanceEnded
from pdserve.instances.acceptance import TRIAL_S
from pdserve.rpc.messages import (
    SUSPECT,
    Accepted,
    Busy,
    DecodeRequest,
    Failed,
    Prefilled,
    PrefillRequest,
    Reply,
    Tokens,
)
from pdserve.sampling import Sampling
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.request import Request
from pdserve.scheduling.suspicion import ENDS, UNANSWERED, Stay, admits
from tests.unit.fake_instances import FakeInstance
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def request(name: str = "7") -> Request:
    return Request(id=name, prompt=bytes(4), max_tokens=1)


def instance(name: str) -> Instance:
    return Instance(name, FakeInstance())


def stay(asked: Request, where: str, *, answered: bool = True, role: Role = "decode") -> Stay:
    made = Stay(asked, instance(where), role)
    made.answered = answered
    return made


def test_the_second_end_that_had_accepted_it_is_its_last() -> None:
    asked = request()
    stay(asked, "decode_0", answered=False).ended()
    with pytest.raises(errors.Suspected, match="request 7 was open on decode_0 and decode_1 when"):
        stay(asked, "decode_1").ended()
    assert ENDS == 2


def test_an_instance_that_may_have_been_dead_before_counts_less() -> None:
    asked = request()
    for number in range(UNANSWERED - 1):
        stay(asked, f"decode_{number}", answered=False).ended()
    with pytest.raises(errors.Suspected):
        stay(asked, "decode_9", answered=False).ended()


def test_progress_clears_those_of_its_role() -> None:
    asked = request()
    stay(asked, "decode_0").ended()
    stay(asked, "prefill_0", role="prefill").ended()
    stay(asked, "prefill_1", role="prefill").progress()
    assert asked.ends == {"prefill": [], "decode": ["decode_0"]}
    there = stay(asked, "decode_1")
    there.progress()
    there.ended()  # not by this request
    assert asked.ends == {"prefill": [], "decode": []}


def test_one_suspect_at_a_time_and_all_others_as_ever() -> None:
    one, other, usual = request("1"), request("2"), request("3")
    for suspect in (one, other):
        stay(suspect, "decode_0").ended()
    decode = instance("decode_1")
    there = Stay(one, decode, "decode")
    assert admits(decode, one, "decode", 0.0)
    assert not admits(decode, other, "decode", 0.0)
    assert admits(decode, other, "prefill", 0.0)
    assert admits(decode, usual, "decode", 0.0)
    Stay(usual, decode, "decode").over()
    assert not admits(decode, other, "decode", 0.0)
    there.progress()
    assert admits(decode, other, "decode", 0.0)
    decode.suspects_from = 5.0
    assert not admits(decode, other, "decode", 4.9)
    assert admits(decode, other, "decode", 5.0)
    assert admits(decode, usual, "decode", 4.9)


class Client:
    """A client that asks instances of a site without a gateway."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.replies: dict[str, list[Reply]] = {}

    def prefill(self, name: str, prompt: bytes, suspect: bool = False) -> None:
        told = self.replies.setdefault(name, [])
        message = PrefillRequest(name, prompt, Sampling(), "", 60_000.0, suspect=suspect)
        self.site.p[0].submit(message, lambda reply, _: told.append(reply))

    def decode(self, name: str, prompt: bytes, result: Prefilled, suspect: bool = False) -> None:
        told = self.replies.setdefault(name, [])
        message = DecodeRequest(
            name, prompt, result.token, result.handle, Sampling(), "", 8, True, 0.0, suspect=suspect
        )
        self.site.d[0].submit(message, lambda reply, _: told.append(reply))

    def last(self, name: str) -> Reply:
        return self.replies[name][-1]


@virtual
async def test_a_prefill_takes_one_suspect_at_a_time(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"prefill": {"base_ms": 100.0}}) as site:
        client, prompts = Client(site), [site.prompt(20) for _ in range(4)]
        client.prefill("a", prompts[0], suspect=True)
        assert client.replies["a"] == [Accepted()]
        client.prefill("b", prompts[1], suspect=True)
        assert client.replies["b"] == [Busy(SUSPECT)]
        client.prefill("c", prompts[2])
        await asyncio.sleep(TRIAL_S / 2)
        assert [len(forward) for forward in site.p_engines[0].forwards] == [1], "c, and not a"
        await asyncio.sleep(0.25)
        assert isinstance(client.last("a"), Prefilled)
        assert isinstance(client.last("c"), Prefilled)
        client.prefill("b", prompts[1], suspect=True)
        client.prefill("d", prompts[3])
        site.p[0].release("b", lambda *_: None)
        await asyncio.sleep(0.3)
        assert client.last("b") == Failed("CANCELLED", "released")
        for name in "acd":
            site.p[0].release(name, lambda *_: None)
        await site.idle()


class Outgoing:
    """Implements ``Sent``: replies reach the server when a test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, then: Callable[[], None]) -> None:
        self.waiting.append(then)

    def arrive(self) -> None:
        """The server has all replies that were sent so far."""
        waiting, self.waiting = self.waiting, []
        for then in waiting:
            then()


@virtual
async def test_a_suspect_is_computed_only_once_the_server_has_its_acceptance(
    tmp_path: Path,
) -> None:
    """On a busy machine that takes any time; until then its gateway could not know of the trial."""
    async with Site(tmp_path) as site:
        client, prompt, outgoing = Client(site), site.prompt(20), Outgoing()
        site.p[0]._trials.sent = site.d[0]._trials.sent = outgoing
        client.prefill("p", prompt, suspect=True)
        await asyncio.sleep(50 * TRIAL_S)
        assert client.replies["p"] == [Accepted()]
        assert not site.p_engines[0].forwards
        outgoing.arrive()
        await asyncio.sleep(2 * TRIAL_S)
        result = client.last("p")
        assert isinstance(result, Prefilled)

        client.decode("d", prompt, result, suspect=True)
        client.decode("e", prompt, result, suspect=True)
        await asyncio.sleep(50 * TRIAL_S)
        assert client.replies["d"] == [Accepted(room=mock.ANY)]
        assert not site.d_engines[0].steps
        outgoing.arrive()
        await asyncio.sleep(2 * TRIAL_S)
        assert isinstance(client.last("d"), Tokens)
        await site.idle()


@virtual
async def test_a_decode_takes_one_suspect_at_a_time(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"decode": {"base_ms": 10.0}}) as site:
        client, prompts = Client(site), [site.prompt(20) for _ in range(3)]
        results: Any = {}
        for name, prompt in zip("abc", prompts, strict=True):
            client.prefill(f"p{name}", prompt)
            await asyncio.sleep(0.05)
            results[name] = client.last(f"p{name}")
        client.decode("a", prompts[0], results["a"], suspect=True)
        assert client.replies["a"] == [Accepted(room=mock.ANY)]
        client.decode("b", prompts[1], results["b"], suspect=True)
        assert client.replies["b"] == [Busy(SUSPECT, mock.ANY)]
        client.decode("c", prompts[2], results["c"])
        await asyncio.sleep(TRIAL_S / 2)
        assert not site.d_engines[0].steps or len(site.d_engines[0].steps[0]) == 1
        await asyncio.sleep(2 * TRIAL_S)
        assert isinstance(client.last("a"), Tokens)
        client.decode("b", prompts[1], results["b"], suspect=True)
        assert client.last("b") == Accepted(room=mock.ANY)
        await asyncio.sleep(0.5)
        for name, prompt in zip("abc", prompts, strict=True):
            tokens = [one for one in client.replies[name] if isinstance(one, Tokens)]
            told = [int(token) for one in tokens for token in np.frombuffer(one.ids, "<i4")]
            ids = np.frombuffer(prompt, "<i4")
            assert told == [site.model.token(ids, position) for position in range(1, 8)]
        await site.idle()


@virtual
async def test_a_request_whose_decodes_end_is_given_up_and_named(tmp_path: Path) -> None:
    async with Site(
        tmp_path, decodes=3, prefill={"lease_s": 5.0}, profile={"decode": {"base_ms": 50.0}}
    ) as site:

        async def end(number: int) -> None:
            link = site.d_links[number]
            while not any(isinstance(reply, Accepted) for _, reply in link.replies):
                await asyncio.sleep(0.001)
            link.break_("its process is gone", InstanceEnded)

        ends = [asyncio.create_task(end(number)) for number in range(3)]
        with pytest.raises(
            errors.Suspected, match=r"request 1 was open on decode_\d and decode_\d"
        ):
            await site.answer(site.request())
        assert sum(task.done() for task in ends) == 2
        for task in ends:
            task.cancel()
