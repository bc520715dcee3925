"""Tests for instances of engines that move KV caches themselves: slots, links, ends, failures."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING
from unittest import mock

import msgspec
import pytest

from pdserve import errors
from pdserve.errors import HandleError, InstanceError
from pdserve.instances.external.handle import ExternalHandle, digest
from pdserve.kvcache.handle import seal, unseal
from pdserve.rpc.messages import (
    Accepted,
    Busy,
    DecodeRequest,
    Failed,
    Freed,
    NotConnected,
    Prefilled,
    PrefillRequest,
    Release,
    Released,
    Reply,
    Tokens,
    Transferred,
    Watch,
)
from pdserve.sampling import Sampling
from tests.unit.external import KEEPS_S, KEY, PREFILL_S, STEP_S, TRANSFER_S, ExternalSite
from tests.unit.inprocess import EOS, virtual

if TYPE_CHECKING:
    from pathlib import Path


@virtual
async def test_an_answer_is_the_first_token_and_then_the_rest(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        request = site.request(max_tokens=8)
        loop = asyncio.get_running_loop()
        began, when = loop.time(), []
        ids = []
        async with aclosing(site.scheduler.run(request)) as chunks:
            async for chunk in chunks:
                ids += chunk.ids
                when.append(loop.time() - began)

        assert ids == site.expected(request)
        # The first token comes before any KV cache has moved.
        assert when[0] == pytest.approx(PREFILL_S, abs=1e-3)
        assert when[1] == pytest.approx(PREFILL_S + TRANSFER_S + STEP_S, abs=1e-3)
        assert request.finish_reason == "length"
        stats = request.stats()
        assert stats["kv"]["transport"] == "scripted"
        assert stats["kv"]["strategy"] == "engine"
        await site.idle()
        assert len(site.p_links[0].of(Transferred)) == 1
        assert site.p_links[0].of(Release) == []


@virtual
async def test_slots_are_counted_though_the_engine_takes_all(tmp_path: Path) -> None:
    """A prefill computes `batch` requests at once, and holds `slots` until decodes took them."""
    async with ExternalSite(tmp_path, prefill={"slots": 3, "batch": 2}) as site:
        tasks = [site.start(site.request(max_tokens=20)) for _ in range(12)]
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, len(site.p[0]._slots.held))
            await asyncio.sleep(0.001)
        for task in tasks:
            task.result()
        assert site.world.most == 2
        assert most <= 3
        assert max(len(one.prompt) for one in site.world.asked) == 20
        await site.idle()


@virtual
async def test_what_is_to_end_with_its_first_token_leaves_nothing(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        request = site.request(max_tokens=1)
        assert await site.answer(request) == site.expected(request)
        assert site.held() == {}
        await site.idle()
        assert site.d_links[0].of(DecodeRequest) == []


@virtual
async def test_the_end_as_first_token(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        site.model.script = lambda prompt, position: EOS if position == 0 else None
        request = site.request(max_tokens=8)
        assert await site.answer(request) == [EOS]
        assert request.finish_reason == "stop"
        await site.idle()

        request = site.request(max_tokens=8, ignore_eos=True)
        assert await site.answer(request) == site.expected(request)
        assert request.finish_reason == "length"
        await site.idle()


@virtual
async def test_a_slot_stays_taken_while_the_engine_keeps_what_nobody_took(tmp_path: Path) -> None:
    """No call frees the engine's memory, so a request accepted instead would find none."""
    async with ExternalSite(
        tmp_path, prefill={"slots": 1, "batch": 1}, decode={"slots": 1}
    ) as site:
        running = site.start(site.request(max_tokens=400))
        await asyncio.sleep(0.2)
        site.instances[1][0].room.forget()  # like a gateway that has not been informed of it yet
        waits = site.start(site.request(max_tokens=4))
        await asyncio.sleep(0.2)  # computed, and no decode has room
        assert len(site.p[0]._slots.held) == 1
        waits.cancel()
        await asyncio.sleep(0.01)
        assert len(site.p[0]._slots.held) == 1
        assert len(site.world.kept) == 1

        late = site.start(site.request(max_tokens=4))
        loop = asyncio.get_running_loop()
        began = loop.time()
        while len(site.world.asked) < 4:  # the context it waits for
            await asyncio.sleep(0.01)
            assert loop.time() < began + 2 * KEEPS_S
        assert loop.time() - began > KEEPS_S / 2
        for task in (running, late):
            await task
        await site.idle()


@virtual
async def test_cancelled_at_every_stage(tmp_path: Path) -> None:
    stages = (PREFILL_S / 2, PREFILL_S + TRANSFER_S / 2, PREFILL_S + TRANSFER_S + 3.5 * STEP_S)
    async with ExternalSite(tmp_path) as site:
        for stage in stages:
            task = site.start(site.request(max_tokens=50))
            await asyncio.sleep(stage)
            task.cancel()
            await asyncio.sleep(0.01)
            assert site.world.computing == site.world.decoding == 0
            await site.idle(KEEPS_S + 0.1)


@virtual
async def test_a_context_that_is_given_up_keeps_its_slot_until_the_engine_lets_go(
    tmp_path: Path,
) -> None:
    """It is answered at once; its slot is taken while it is computed, and then for the lease."""
    async with ExternalSite(tmp_path, prefill={"slots": 1, "batch": 1}) as site:
        site.world.drains = True
        prefill, client = site.p[0], DirectClient()
        prefill.submit(PrefillRequest("one", site.prompt(5), Sampling(), "", 1e4), client.send)
        await asyncio.sleep(PREFILL_S / 2)
        prefill.release("one", client.send)
        await asyncio.sleep(0.001)
        assert [type(reply) for reply in client.replies] == [Accepted, Released, Failed]
        prefill.release("one", client.send)

        def refused() -> bool:
            other = DirectClient()
            two = PrefillRequest("two", site.prompt(5), Sampling(), "", 1e4)
            prefill.submit(two, other.send)
            return [type(reply) for reply in other.replies] == [Busy]

        for seconds, kept in ((PREFILL_S / 4, 0), (PREFILL_S, 1), (KEEPS_S - 2 * PREFILL_S, 1)):
            await asyncio.sleep(seconds)
            assert len(site.world.kept) == kept
            assert refused()
        await asyncio.sleep(2 * PREFILL_S)
        assert not refused()
        assert client.replies[3:] == [Released()], "it has ended once"


@virtual
async def test_a_generation_that_is_given_up_keeps_its_slot_until_the_transfer_is_over(
    tmp_path: Path,
) -> None:
    async with ExternalSite(tmp_path, decode={"slots": 1}) as site:
        site.world.drains = True
        prompt = site.prompt(12)
        made = await prefilled(site, prompt)
        await site.kv_links.connect_now(site.instances[0][0], site.instances[1][0])
        decode, client = site.d[0], DirectClient()
        request = asks(site, prompt, made.handle, made.token)
        decode.submit(request, client.send)
        await asyncio.sleep(TRANSFER_S / 2)
        decode.release(request.id, client.send)
        await asyncio.sleep(TRANSFER_S / 4)
        assert [type(reply) for reply in client.replies] == [Released, Failed]
        assert len(site.world.kept) == 1
        other = DirectClient()
        decode.submit(asks(site, prompt, b"", None), other.send)
        assert [type(reply) for reply in other.replies] == [Busy]
        await asyncio.sleep(TRANSFER_S)
        assert not site.world.kept
        assert len(client.replies) == 2, "it has ended once"
        decode.submit(asks(site, prompt, b"", None), other.send)
        assert len(other.replies) == 1, "it has been accepted"


@virtual
async def test_engines_are_told_whose_prompt_it_is(tmp_path: Path) -> None:
    """The engines keep their tenants' cached prefixes apart, in both roles."""
    async with ExternalSite(tmp_path) as site:
        request = site.request(salt="alice")
        assert await site.answer(request) == site.expected(request)
        assert [asked.salt for asked in site.world.asked] == ["alice", "alice"]
        await site.idle()


@virtual
async def test_closing_does_not_wait_for_transfers(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        site.world.drains = site.world.hangs = True
        client = DirectClient()
        for number in range(2):
            request = PrefillRequest(f"{number}", site.prompt(5), Sampling(), "", 1e4)
            site.p[0].submit(request, client.send)
        await asyncio.sleep(0.001)
        site.p[0].release("0", client.send)
        await asyncio.sleep(0.001)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await site.p[0].close()
        assert loop.time() - began < 1
        ends = [type(reply) for reply in client.replies if not isinstance(reply, Accepted)]
        assert ends == [Released, Failed, Failed]
        assert site.world.computing == 0


@virtual
async def test_given_up_in_the_moment_in_which_it_was_accepted(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        prompt = site.prompt(5)
        client = DirectClient()
        site.p[0].submit(PrefillRequest("one", prompt, Sampling(), "", 1e4), client.send)
        site.p[0].release("one", client.send)
        request = asks(site, prompt, b"", None)
        site.d[0].submit(request, client.send)
        site.d[0].release(request.id, client.send)
        await asyncio.sleep(0.001)
        assert site.held() == {}
        assert [type(reply) for reply in client.replies] == [Released, Released, Failed, Failed]


@virtual
async def test_a_context_that_never_comes_ends_with_its_limit(tmp_path: Path) -> None:
    """A stalled transfer may wedge the engine: it is told to give up, and the slot becomes free."""
    async with ExternalSite(tmp_path) as site:
        site.world.hangs = True
        request = site.request(ttft_limit_s=1.0)
        with pytest.raises(errors.Late, match="no first token within the TTFT limit of 1000 ms"):
            await site.answer(request)
        assert request.ended - request.arrived == pytest.approx(1.0, abs=0.01)
        assert site.world.computing == 0
        await site.idle()


@virtual
async def test_a_context_that_fails_is_tried_elsewhere(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path, prefills=2) as site:
        site.world.context_failures = [InstanceError("KV transfer timed out")]
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert request.attempts == 2
        await site.idle()


@virtual
async def test_an_answer_that_breaks_off_goes_on_elsewhere(tmp_path: Path) -> None:
    """The tokens stay the same: prompt and tokens so far make a new prompt."""
    async with ExternalSite(tmp_path, prefills=2, decodes=2) as site:
        request = site.request(max_tokens=20)
        task = site.start(request)
        await asyncio.sleep(PREFILL_S + TRANSFER_S + 5.5 * STEP_S)
        site.world.generation_failures = [RuntimeError("CUDA error")]
        assert await task == site.expected(request)
        assert request.attempts == 2
        assert [one.resumed_tokens for one in site.world.asked] == [0, 0, 6, 6]
        await site.idle()


@virtual
async def test_a_bug_of_the_engine_ends_one_request_not_the_instance(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        site.world.context_failures = [KeyError("bug")] * 9
        with pytest.raises(errors.InstanceError, match="KeyError"):
            await site.answer(site.request())
        site.world.context_failures = []
        await asyncio.sleep(10)  # for the circuit breaker
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        await site.idle()


@virtual
async def test_pairs_that_cannot_exchange_are_refused_before_the_first_request(
    tmp_path: Path,
) -> None:
    """One side has TensorRT-LLM 1.2, the other 1.3."""

    def fingerprint(name: str) -> str:
        return "trtllm:1.2" if name == "prefill_1" else "trtllm:1.3"

    async with ExternalSite(tmp_path, prefills=2, fingerprint=fingerprint) as site:
        linking = asyncio.create_task(site.kv_links.run())
        await asyncio.sleep(0.5)
        refusal = site.kv_links.table.refusal("prefill_1", "decode_0")
        assert refusal is not None
        assert "prefill_1 is trtllm:1.2; this instance trtllm:1.3" in refusal
        assert site.kv_links.table.refusal("prefill_0", "decode_0") is None
        for _ in range(6):
            request = site.request()
            assert await site.answer(request) == site.expected(request)
        assert site.p_links[1].of(PrefillRequest) == []
        linking.cancel()
        await asyncio.gather(linking, return_exceptions=True)
        await site.idle()


class DirectClient:
    """A caller of an instance, which keeps the instance's replies."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def send(self, reply: Reply, last: bool) -> None:
        self.replies.append(reply)


def asks(site: ExternalSite, prompt: bytes, handle: bytes, first: int | None = 5) -> DecodeRequest:
    return DecodeRequest(
        id=f"d{len(site.world.asked)}-{len(handle)}-{first}",
        prompt=prompt,
        first_token=first,
        handle=handle,
        sampling=Sampling(),
        salt="",
        max_tokens=8,
        ignore_eos=False,
        min_interval_ms=0.0,
    )


async def prefilled(site: ExternalSite, prompt: bytes) -> Prefilled:
    client = DirectClient()
    site.p[0].submit(PrefillRequest("one", prompt, Sampling(), "", 10_000), client.send)
    await asyncio.sleep(PREFILL_S + 0.001)
    reply = client.replies[-1]
    assert isinstance(reply, Prefilled)
    return reply


@virtual
async def test_handles_that_a_decode_does_not_take(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        prompt = site.prompt(12)
        made = await prefilled(site, prompt)
        client = DirectClient()
        decode = site.d[0]

        decode.submit(asks(site, prompt, made.handle), client.send)
        assert client.replies == [NotConnected()]
        await site.kv_links.connect_now(site.instances[0][0], site.instances[1][0])

        flipped = bytes([made.handle[0] ^ 1]) + made.handle[1:]
        theirs = unseal(made.handle, ExternalHandle, KEY)
        foreign = seal(theirs, b"x" * 32)
        empty = seal(msgspec.structs.replace(theirs, link=b""), KEY)
        for handle, words in (
            (flipped, "MAC is wrong"),
            (made.handle[:40], "MAC is wrong"),
            (foreign, "MAC is wrong"),
            (empty, "has kept nothing"),
        ):
            decode.submit(asks(site, prompt, handle), client.send)
            reply = client.replies[-1]
            assert isinstance(reply, Failed)
            assert words in reply.message
        decode.submit(asks(site, site.prompt(12), made.handle), client.send)
        assert "another prompt" in client.replies[-1].message

        decode.submit(asks(site, prompt, made.handle, made.token), client.send)
        await asyncio.sleep(1)
        assert isinstance(client.replies[-1], Tokens)
        # The KV cache is gone by now, and the engine says so.
        decode.submit(asks(site, prompt, made.handle, made.token), client.send)
        await asyncio.sleep(1)
        assert "no KV cache" in client.replies[-1].message
        assert digest(prompt) == theirs.prompt


@virtual
async def test_who_waits_is_told_when_a_decode_has_taken_it(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path, prefill={"slots": 1, "batch": 1}) as site:
        await prefilled(site, site.prompt(5))
        client = DirectClient()
        site.p[0].submit(PrefillRequest("two", site.prompt(5), Sampling(), "", 1e4), client.send)
        assert client.replies == [Busy("slots", mock.ANY)]
        site.p[0].watch(Watch("w", "gateway"), "gateway", client.send)
        assert client.replies == [Busy("slots", mock.ANY)]
        site.p[0].transferred("one", lambda reply, last: None)
        assert client.replies == [Busy("slots", mock.ANY), Freed(mock.ANY)]


@virtual
async def test_what_can_never_be_served_is_said(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path, profile={"context_length": 64}) as site:
        client = DirectClient()
        site.p[0].submit(PrefillRequest("x", site.prompt(64), Sampling(), "", 1e4), client.send)
        site.d[0].submit(asks(site, site.prompt(60), b"", None), client.send)
        for reply in client.replies:
            assert isinstance(reply, Failed)
            assert reply.code == "INVALID_ARG"
            assert "64" in reply.message


@virtual
async def test_a_decode_computes_short_prompts_itself(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path, gateway={"local": "on"}) as site:
        request = site.request(max_tokens=8)
        assert await site.answer(request) == site.expected(request)
        assert site.p_links[0].of(PrefillRequest) == []
        await site.idle()


@virtual
async def test_the_engines_memory_is_shown(tmp_path: Path) -> None:
    """An engine without statistics, or whose statistics fail, still serves."""
    async with ExternalSite(tmp_path) as site:
        await prefilled(site, site.prompt(5))
        await asyncio.sleep(2.1)
        assert site.level("pdserve_kv_blocks", instance="prefill_0", state="cached") == 1
        assert site.total("pdserve_kv_events_total", instance="prefill_0", type="stored") >= 2
        request = site.request()
        assert await site.answer(request) == site.expected(request)


@virtual
async def test_closing_ends_what_is_open(tmp_path: Path) -> None:
    async with ExternalSite(tmp_path) as site:
        tasks = [site.start(site.request(max_tokens=200)) for _ in range(3)]
        await asyncio.sleep(0.3)
        for instance in (*site.p, *site.d):
            await instance.close()
        await asyncio.sleep(0)
        for link in (*site.p_links, *site.d_links):
            link.break_("its server has stopped")
        assert all(engine.closed for engine in (*site.contexts, *site.generations))
        for task in tasks:
            with pytest.raises((InstanceError, errors.Unavailable, HandleError)):
                await task
        assert site.world.computing == site.world.decoding == 0
