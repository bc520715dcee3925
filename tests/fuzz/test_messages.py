"""Tests that instances answer any message, sealed or not, and keep serving."""

from __future__ import annotations

import asyncio
import secrets
import threading
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
from hypothesis import strategies as st

from pdserve.control.assignment import FIRST
from pdserve.rpc import messages
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.client import NoAnswer
from pdserve.rpc.messages import (
    Accepted,
    Busy,
    Connect,
    DecodeRequest,
    Describe,
    Failed,
    Prefilled,
    PrefillRequest,
    Release,
    Tokens,
    Transferred,
    Watch,
)
from pdserve.rpc.seal import Seal, Unsealed
from pdserve.sampling import Sampling
from pdserve.transfer import key
from tests.fuzz.aftermath import unharmed

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from pdserve.rpc.client import Replies
    from pdserve.rpc.messages import Reply, Request
    from tests.fuzz.budget import Budget
    from tests.servers import Running

pytestmark = pytest.mark.triton

ANSWER_S = 60.0
"""Everything but a watch is answered to its end within this, on a busy machine."""
FEWEST = 200
"""Messages to each role: fewer would hardly reach each field of each message."""
BY_DESIGN = (
    str(Unsealed()),
    "this instance speaks version",  # a deployment of two versions
    "came to a",  # a message that is not for this role
    "is not of this deployment: its MAC is wrong",  # a handle, or an endpoint
)
"""INTERNAL, since no client can cause it and no retry mends it."""


class Fed(NamedTuple):
    """One message."""

    model: str
    request: Request
    spoiled: str
    place: int


SPOILS = (*[""] * 16, "unsealed", "altered", "cut", "garbage", "other key", "other instance", "old")
REAL = b"real"
"""Stands for the handle of a KV cache that has been computed for this very prompt."""
tokens = st.lists(st.integers(0, 40_000), min_size=1, max_size=64).map(
    lambda drawn: b"".join(token.to_bytes(4, "little") for token in drawn)
)
integers = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-2, 300)
texts = st.text(st.characters(codec="utf-8"), max_size=300)
floats = st.floats() | st.floats(-1, 100)
anything = {
    "id": texts,
    "prompt": st.binary(max_size=64) | tokens | st.just(bytes(4 * 9000)),
    "sampling": st.builds(
        Sampling, floats, integers, floats, st.none() | integers, floats, floats, floats
    ),
    "salt": texts,
    "gateway": texts,
    "trace": texts,
    "deadline_ms": floats,
    "min_interval_ms": floats,
    "resumed_tokens": integers,
    "peers": integers,
    "max_tokens": integers,
    "first_token": st.none() | integers,
    "handle": st.binary(max_size=300),
    "endpoint": st.binary(max_size=300),
    "version": integers,
}
booleans, labels = st.booleans(), st.text("abc", max_size=3)
uuids = st.uuids().map(str)
sampling = st.just(Sampling()) | st.builds(Sampling, st.floats(0, 2), st.integers(0, 99))
prefills = st.builds(
    PrefillRequest,
    id=uuids,
    prompt=tokens,
    sampling=sampling,
    salt=labels,
    deadline_ms=st.floats(0, 1000),
    gateway=labels,
    hurry=booleans,
    layered=booleans,
    only=booleans,
    ignore_eos=booleans,
)
decodes = st.builds(
    DecodeRequest,
    id=uuids,
    prompt=tokens,
    first_token=st.none() | st.integers(0, 40_000),
    handle=st.just(b"") | st.just(REAL),
    sampling=sampling,
    salt=labels,
    max_tokens=st.integers(1, 64),
    ignore_eos=booleans,
    min_interval_ms=st.floats(0, 5),
    peers=st.integers(1, 4),
)


@st.composite
def out_of_range(draw: st.DrawFn, good: st.SearchStrategy[Request]) -> Request:
    """One field of a good request may be anything of its type."""
    request = draw(good)
    field = draw(st.sampled_from([one for one in request.__struct_fields__ if one in anything]))
    return msgspec.structs.replace(request, **{field: draw(anything[field])})


def maybe(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Request]:
    return good | out_of_range(good)


REQUESTS: dict[str, st.SearchStrategy[Request]] = {
    "prefill": maybe(prefills) | maybe(prefills) | maybe(st.builds(Describe, uuids)),
    "decode": maybe(decodes) | maybe(decodes) | maybe(st.builds(Connect, uuids, st.binary())),
}
either = maybe(
    st.builds(Watch, uuids, labels) | st.builds(Release, uuids) | st.builds(Transferred, uuids)
) | maybe(prefills | decodes)


def fed(role: str) -> st.SearchStrategy[Fed]:
    return st.builds(
        Fed,
        st.sampled_from([f"{role}_0", f"{role}_1"]),
        REQUESTS[role] | REQUESTS[role] | either,
        st.sampled_from(SPOILS),
        st.integers(0, 1 << 16),
    )


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_messages_harm_nobody(fuzzed_server: Running, budget: Budget, role: str) -> None:
    with unharmed(fuzzed_server), Feeder(fuzzed_server) as feeder:
        made = budget.spend(st.lists(fed(role), min_size=1, max_size=40), feeder.feed, FEWEST)
    print(f"\n{made} messages to {role}: {feeder.said}")
    assert made >= min(budget.count, FEWEST)


class Feeder:
    """A gateway that has lost its mind: one connection to each instance."""

    def __init__(self, server: Running) -> None:
        self._address = server.grpc
        self._secret = key.load(Path(server.deployment.transfer.key_file))
        self._channels: dict[str, GrpcChannel] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.said: dict[str, int] = {}
        """How often each kind of answer came."""

    def __enter__(self) -> Feeder:  # noqa: PYI034 - Self is not there in Python 3.10
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def feed(self, batch: list[Fed]) -> int:
        """All at once; each is answered, and nothing is left open afterwards."""
        self._run(self._feed(batch))
        return len(batch)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.result(2 * ANSWER_S)

    async def _feed(self, batch: list[Fed]) -> None:
        await asyncio.gather(*map(self._one, batch))

    async def _one(self, one: Fed) -> None:
        channel = self._channel(one.model)
        call = uuid.uuid4().hex
        if isinstance(one.request, DecodeRequest) and one.request.handle == REAL:
            one = one._replace(request=await self._computed(one.request))
        replies = channel.send(call, self._bytes(one))
        if isinstance(one.request, Watch) and not one.spoiled:
            try:
                await replies.get(0.05)
            except NoAnswer:
                channel.send(f"{call}-over", self._bytes(one._replace(request=_end(one.request))))
            channel.forget(call)
            return
        if isinstance(one.request, PrefillRequest | DecodeRequest) and one.place % 3 == 0:
            await asyncio.sleep(one.place % 7 / 1000)
            await self._end_of(channel.send(f"{call}-over", self._bytes(self._released(one))), one)
        last = await self._end_of(replies, one)
        channel.forget(call)
        self._check(one, last)
        if isinstance(one.request, PrefillRequest):  # nobody takes what it has computed
            await self._end_of(channel.send(f"{call}-end", self._bytes(self._released(one))), one)

    async def _computed(self, request: DecodeRequest) -> DecodeRequest:
        """With the handle of a KV cache that it may pull."""
        call = uuid.uuid4().hex
        prefill = PrefillRequest(call, request.prompt, Sampling(), "", 60_000.0, layered=True)
        replies, handle = self._channel("prefill_0").open(call, prefill), b""
        while not isinstance(reply := await replies.get(ANSWER_S), Prefilled | Busy | Failed):
            handle = getattr(reply, "handle", None) or handle
        return msgspec.structs.replace(request, handle=handle)

    def _released(self, one: Fed) -> Fed:
        return one._replace(request=_end(one.request), spoiled="")

    async def _end_of(self, replies: Replies, one: Fed) -> Reply:
        while True:
            reply = await replies.get(ANSWER_S)
            goes_on = isinstance(reply, Tokens) and not reply.finish_reason
            if not goes_on and not isinstance(reply, Accepted):
                return reply

    def _check(self, one: Fed, last: Reply) -> None:
        name = type(last).__name__
        if isinstance(last, Failed):
            name = last.code
            if last.code == "INTERNAL":
                assert any(words in last.message for words in BY_DESIGN), (one, last)
        self.said[name] = self.said.get(name, 0) + 1

    def _channel(self, model: str) -> GrpcChannel:
        if model not in self._channels:
            self._channels[model] = GrpcChannel(self._address, model, self._secret)
        return self._channels[model]

    def _bytes(self, one: Fed) -> bytes:
        request = one.request
        if one.spoiled == "old":
            request = msgspec.structs.replace(request, version=one.place % messages.VERSION)
        message, seal = messages.encode(request), Seal(self._secret, one.model)
        match one.spoiled:
            case "unsealed":
                return message
            case "garbage":
                return seal.close(secrets.token_bytes(one.place % 100), FIRST)
            case "cut":
                return seal.close(message[: one.place % len(message)], FIRST)
            case "altered":
                sealed = bytearray(seal.close(message, FIRST))
                sealed[one.place % len(sealed)] ^= 1 + one.place % 255
                return bytes(sealed)
            case "other key":
                return Seal(bytes(32), one.model).close(message, FIRST)
            case "other instance":
                return Seal(self._secret, "prefill_7").close(message, FIRST)
        return seal.close(message, FIRST)

    async def _close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


def _end(request: Request) -> Release:
    return Release(request.id)
