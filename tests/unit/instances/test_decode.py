"""Tests for a decode instance: batches, reservations, response intervals, releases, handles."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest

from pdserve import errors
from pdserve.instances.decode import MAX_CONNECTING
from pdserve.rpc.messages import (
    Accepted,
    Busy,
    Connect,
    Connected,
    DecodeRequest,
    Failed,
    NotConnected,
    Prefilled,
    PrefillRequest,
    Released,
    Reply,
    Room,
    Tokens,
)
from pdserve.sampling import Sampling
from pdserve.transfer.reports import LinkReport
from tests.unit.inprocess import CLEAN_S, EOS, Site, real, until, virtual

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 0.0}, "decode": {"base_ms": 10.0}}


class Client:
    """A client that hands KV caches from the first prefill of a site to its first decode."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.replies: list[tuple[str, Reply, bool]] = []

    async def prefilled(self, name: str, prompt: bytes) -> Prefilled:
        got: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        self.site.p[0].submit(
            PrefillRequest(name, prompt, Sampling(), "", 60_000.0),
            lambda reply, last: got.set_result(reply) if last else None,  # type: ignore[arg-type]
        )
        return await got

    async def submit(
        self,
        name: str,
        prompt: int | bytes = 20,
        max_tokens: int = 8,
        result: Prefilled | None = None,
        min_interval_ms: float = 0.0,
        **fields: Any,
    ) -> None:
        data = self.site.prompt(prompt) if isinstance(prompt, int) else prompt
        result = result or await self.prefilled(name, data)
        request = DecodeRequest(
            id=name,
            prompt=data,
            first_token=result.token,
            handle=result.handle,
            sampling=Sampling(),
            salt="",
            max_tokens=max_tokens,
            ignore_eos=fields.get("ignore_eos", False),
            min_interval_ms=min_interval_ms,
            peers=fields.get("peers", 1),
        )
        self.site.d[0].submit(request, lambda reply, last: self.replies.append((name, reply, last)))

    def release(self, name: str) -> None:
        self.site.d[0].release(name, lambda reply, last: self.replies.append(("", reply, last)))

    def of(self, name: str) -> list[Reply]:
        return [reply for who, reply, _ in self.replies if who == name]

    def tokens(self, name: str) -> list[int]:
        replies = [reply for reply in self.of(name) if isinstance(reply, Tokens)]
        return [int(token) for reply in replies for token in np.frombuffer(reply.ids, "<i4")]


def batches(site: Site) -> list[int]:
    return [len(step) for step in site.d_engines[0].steps]


# -------------------------------------------------------------------------------------------- steps


@virtual
async def test_requests_join_and_leave_between_steps(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        client = Client(site)
        prompts = {name: site.prompt(20) for name in "abc"}
        await client.submit("a", prompts["a"], max_tokens=11)
        await asyncio.sleep(0.035)
        await client.submit("b", prompts["b"], max_tokens=4)
        await asyncio.sleep(0.03)
        await client.submit("c", prompts["c"], max_tokens=6)
        await asyncio.sleep(0.5)
        assert batches(site) == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 1, 1]
        for name, count in (("a", 11), ("b", 4), ("c", 6)):
            ids = np.frombuffer(prompts[name], "<i4")
            assert client.tokens(name) == [site.model.token(ids, i) for i in range(1, count)]
            assert [last for who, _, last in client.replies if who == name].count(True) == 1
        await site.idle(0.0)


@virtual
async def test_first_reply_tells_the_transfer(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"response_cost_ms": 0.0}) as site:
        client = Client(site)
        await client.submit("a", max_tokens=4)
        await asyncio.sleep(0.1)
        accepted, *tokens = client.of("a")
        assert accepted == Accepted(room=mock.ANY), (
            "a step takes longer than the wait for a first reply"
        )
        told = [reply.transfer for reply in tokens if isinstance(reply, Tokens)]
        assert len(told) == 3
        assert told[0] is not None
        assert (told[0].nbytes, told[0].transport, told[0].strategy) == (20 * 128, "shm", "whole")
        assert 0 < told[0].exposed_ms == told[0].ms
        assert told[1:] == [None, None]
        assert site.total("pdserve_kv_transfer_bytes_total", transport="shm") == 20 * 128
        await site.idle(0.0)


@virtual
async def test_quick_tokens_speak_for_themselves(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}) as site:
        client = Client(site)
        await client.submit("a", max_tokens=4)
        await asyncio.sleep(1.0)
        assert not any(isinstance(one, Accepted) for one in client.of("a"))
        assert client.tokens("a")
        await site.idle(0.0)


@virtual
async def test_end_of_sequence(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        site.model.script = lambda prompt, position: EOS if position == 2 else 5
        client = Client(site)
        await client.submit("a", max_tokens=5)
        await client.submit("b", max_tokens=5, ignore_eos=True)
        await asyncio.sleep(0.2)
        assert client.tokens("a") == [5, EOS]
        assert client.tokens("b") == [5, EOS, 5, 5]
        ends = [client.of(name)[-1] for name in "ab"]
        assert [end.finish_reason for end in ends if isinstance(end, Tokens)] == ["stop", "length"]
        await site.idle(0.0)


# ------------------------------------------------------------------------------------- reservations


@virtual
async def test_blocks_are_reserved_for_prompt_and_answer(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"blocks": 10, "block_size": 16}) as site:
        client = Client(site)
        await client.submit("a", 60, max_tokens=20)
        assert site.d[0]._blocks.pool.used_blocks == 5
        await client.submit("b", 60, max_tokens=21)
        assert client.of("b") == [Busy("blocks", Room(63, 5))]
        assert site.d[0]._blocks.pool.used_blocks == 5
        await client.submit("c", 60, max_tokens=20)
        await client.submit("d", 1, max_tokens=2)
        assert client.of("d") == [Busy("blocks", mock.ANY)]
        await asyncio.sleep(0.5)
        assert len(client.tokens("a")) == len(client.tokens("c")) == 19
        for name in "bd":
            site.p[0].release(name, lambda reply, last: None)
        await site.idle(0.03)


@virtual
async def test_slots_are_bounded(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"slots": 2}) as site:
        client = Client(site)
        for name in "abc":
            await client.submit(name)
        assert client.of("c") == [Busy("slots", mock.ANY)]
        site.p[0].release("c", lambda reply, last: None)
        await site.idle(0.3)


@virtual
async def test_what_can_never_fit_is_refused(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"blocks": 2}) as site:
        client = Client(site)
        await client.submit("a", 20, max_tokens=13)
        assert client.of("a") == [
            Failed(
                "INVALID_ARG",
                "20 prompt tokens and max_tokens 13 need more than the 32 tokens "
                "that decode_0's blocks hold",
            )
        ]
        await client.submit("b", 20, max_tokens=12)
        await asyncio.sleep(0.3)
        assert len(client.tokens("b")) == 11
        site.p[0].release("a", lambda reply, last: None)
        await site.idle(0.0)


@virtual
async def test_scattered_blocks_hold_a_sequence(tmp_path: Path) -> None:
    """The emulated engine finds every row in its place, though the blocks are not contiguous."""
    async with Site(
        tmp_path, profile=TIMES, prefill={"slots": 8}, decode={"blocks": 12, "block_size": 4}
    ) as site:
        client = Client(site)
        for number in range(6):  # 2 blocks each
            await client.submit(str(number), 4, max_tokens=4 if number % 2 else 3)
        await asyncio.sleep(0.035)  # the requests of 3 tokens have ended
        await client.submit("long", 18, max_tokens=6)
        assert len(site.d[0]._admission.open["long"].reserved.table.runs) == 3
        await asyncio.sleep(0.2)
        assert len(client.tokens("long")) == 5
        await site.idle(0.0)


# ------------------------------------------------------------------------------- response intervals


async def interval(site: Site, streams: int) -> tuple[float, float]:
    """Return the shortest and longest seconds between two chunks with so many open streams."""
    loop = asyncio.get_running_loop()
    requests = [site.request(max_tokens=300) for _ in range(streams)]
    times: list[float] = []

    async def read() -> None:
        times.extend([loop.time() async for _ in site.scheduler.run(requests[0])])

    await asyncio.gather(read(), *map(site.answer, requests[1:]))
    third = len(times) // 3  # not while others join, and not the last chunk, which is sent at once
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return min(gaps[third:-third]), max(gaps[third:-third])


@virtual
async def test_response_interval_grows_with_the_streams_and_is_bounded(tmp_path: Path) -> None:
    """Design, section 7: under load, responses are fewer and larger."""
    async with Site(
        tmp_path,
        profile={"decode": {"base_ms": 1.0}},
        prefill={"slots": 64},
        decode={"slots": 64, "blocks": 2000, "response_cost_ms": 0.5, "max_interval_ms": 20.0},
    ) as site:
        for streams, wanted in ((1, 0.001), (8, 0.004), (20, 0.010), (60, 0.020)):
            least, most = await interval(site, streams)
            assert wanted - 1e-6 <= least <= most <= wanted + 0.001 + 1e-6  # a step is 1 ms
        await site.idle()


@virtual
async def test_decodes_count_as_many_streams_as_all_of_them_have(tmp_path: Path) -> None:
    async with Site(
        tmp_path,
        decodes=2,
        profile={"decode": {"base_ms": 1.0}},
        decode={"response_cost_ms": 0.5, "blocks": 2000},
        prefill={"slots": 16},
    ) as site:
        least, most = await interval(site, 16)
        assert 0.008 - 1e-6 <= least <= most <= 0.009 + 1e-6
        await site.idle()


@virtual
async def test_the_interval_follows_the_peers_of_each_request(tmp_path: Path) -> None:
    """Requests may come from gateways with groups of different sizes, or from a group that grew."""
    async with Site(
        tmp_path,
        profile={"decode": {"base_ms": 1.0}},
        decode={"response_cost_ms": 0.95, "max_interval_ms": 39.5},
    ) as site:
        client = Client(site)
        for name, peers in (("alone", 1), ("ten", 10), ("thousand", 1000)):
            await client.submit(name, max_tokens=301, peers=peers)
        await asyncio.sleep(0.25)
        for name, tokens in (("alone", 3), ("ten", 29), ("thousand", 40)):
            sizes = [len(reply.ids) // 4 for reply in client.of(name) if isinstance(reply, Tokens)]
            assert set(sizes[2:-2]) == {tokens}, name
        await asyncio.sleep(0.5)
        await site.idle(0.0)


@virtual
async def test_tokens_that_nobody_reads_as_they_come(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        client = Client(site)
        await client.submit("a", max_tokens=251, min_interval_ms=1000.0)
        await asyncio.sleep(3)
        sizes = [len(reply.ids) // 4 for reply in client.of("a") if isinstance(reply, Tokens)]
        assert sizes == [100, 100, 50]
        await site.idle(0.0)


# ----------------------------------------------------------------------------------------- releases


@virtual
async def test_release_during_a_step(tmp_path: Path) -> None:
    """TensorRT-LLM#12540: the blocks are freed when the step that uses them has ended."""
    async with Site(tmp_path, profile=TIMES) as site:
        client = Client(site)
        await client.submit("a", max_tokens=100)
        await client.submit("b", max_tokens=10)
        await asyncio.sleep(0.035)
        used = site.d[0]._blocks.pool.used_blocks
        client.release("a")
        assert client.replies[-1] == ("", Released(), True)
        assert site.d[0]._blocks.pool.used_blocks == used
        await asyncio.sleep(0.006)
        assert site.d[0]._blocks.pool.used_blocks < used
        assert client.of("a")[-1] == Failed("CANCELLED", "released")
        count = len(client.of("a"))
        await asyncio.sleep(0.2)
        assert len(client.of("a")) == count
        assert len(client.tokens("b")) == 9
        client.release("a")
        client.release("nobody")
        await site.idle(0.0)


@real
async def test_release_during_a_pull(tmp_path: Path) -> None:
    """TensorRT-LLM#12540: blocks are freed only after the copy has ended; other steps continue."""
    async with Site(tmp_path, profile={"decode": {"base_ms": 1.0}}) as site:
        client, engine = Client(site), site.d_engines[0]
        going, joined = threading.Event(), engine.joined

        def slow(sequence: Any) -> None:
            if len(sequence.prompt) > 2048:
                assert going.wait(5)
            joined(sequence)

        engine.joined = slow  # type: ignore[method-assign]
        await client.submit("other", max_tokens=40)
        await client.submit("a", 2100, max_tokens=10)
        used = site.d[0]._blocks.pool.used_blocks
        await asyncio.sleep(0.02)
        client.release("a")
        await until(lambda: len(client.tokens("other")) == 39, 2)
        assert site.held()["decode_0 pulls"] == 1
        assert 0 < site.d[0]._blocks.pool.used_blocks < used
        going.set()
        await until(lambda: len(client.of("a")) == 2, CLEAN_S)
        assert client.of("a") == [Accepted(room=mock.ANY), Failed("CANCELLED", "released")]
        await site.idle(0.05)


@real
async def test_large_prompts_are_pulled_beside_the_steps(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0, "layers": 4}, decode={"blocks": 512}) as site:
        requests = [site.request(1500 + i, max_tokens=30) for i in range(4)]
        requests += [site.request(20, max_tokens=100) for _ in range(2)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(request) for request in requests]
        await site.idle()


# ------------------------------------------------------------------------------------------ handles


@virtual
async def test_used_handle_is_refused(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        client, prompt = Client(site), site.prompt(20)
        result = await client.prefilled("first", prompt)
        await client.submit("a", prompt, result=result)
        await client.submit("b", prompt, result=result)
        await asyncio.sleep(0.021)  # the holder checks its leases every 20 ms
        await client.submit("c", prompt, result=result)
        assert [client.of(name) for name in "bc"] == [
            [Failed("INTERNAL", "decode_0: KV handle was used before: lease 0")],
            [Failed("INTERNAL", "decode_0: lease 0 has ended, or is another's")],
        ]
        await asyncio.sleep(0.2)
        assert len(client.tokens("a")) == 7
        await site.idle(0.0)


@virtual
async def test_kv_cache_of_another_prompt_is_noticed(tmp_path: Path) -> None:
    """vllm#21570: the emulated engine checks every row, so these tests would notice wrong ones."""
    async with Site(tmp_path, profile=TIMES) as site:
        client = Client(site)
        result = await client.prefilled("other", site.prompt(20))
        await client.submit("a", 20, result=result)
        [failed] = client.of("a")
        assert isinstance(failed, Failed)
        assert "the KV cache that arrived is not this prompt's" in failed.message
        await site.idle(0.03)


@virtual
async def test_handle_of_another_model_is_refused(tmp_path: Path) -> None:
    """sglang#15674: instances that do not match report it to the client."""
    (tmp_path / "other").mkdir()
    async with (
        Site(tmp_path, profile=TIMES) as site,
        Site(tmp_path / "other", profile={"layers": 2}) as other,
    ):
        foreign = await Client(other).prefilled("x", other.prompt(20))
        client = Client(site)
        await client.submit("a", 20, result=foreign)
        [failed] = client.of("a")
        assert isinstance(failed, Failed)
        assert "KV handle is of model 'emulated-" in failed.message
        other.p[0].release("x", lambda reply, last: None)
        await site.idle(0.03)


@virtual
async def test_handle_of_a_holder_that_has_ended(tmp_path: Path) -> None:
    """A linked decode may still pull what is leased to it; a decode without a link cannot."""
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        client, prompts = Client(site), [site.prompt(20) for _ in range(2)]
        results = [await client.prefilled(name, p) for name, p in zip("xy", prompts, strict=True)]
        without = site.receivers[1]
        without.peers.leave(without.peers.find(site.holders[0].epoch))
        endpoint = site.holders[0].endpoint
        await site.p[0].close()
        site.p[0].close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
        await client.submit("a", prompts[0], result=results[0])
        await asyncio.sleep(0.2)
        assert len(client.tokens("a")) == 7
        site.d[0] = site.d[1]
        await client.submit("b", prompts[1], result=results[1])
        assert client.of("b") == [NotConnected()]
        told: list[Reply] = []
        site.d[1].connect(Connect("c", endpoint), lambda reply, last: told.append(reply))
        await asyncio.sleep(0.1)
        [failed] = told
        assert isinstance(failed, Failed)
        assert "decode_1: prefill_0 cannot be reached; shm: " in failed.message
        assert "has its holder ended?" in failed.message
        assert not [what for what in site.held() if what.startswith("decode")]


# -------------------------------------------------------------------------------------------- links


@virtual
async def test_link_is_shown_as_it_is(tmp_path: Path) -> None:
    """The gauge of a former link goes to zero, so that all gauges together show one link."""
    links = [
        LinkReport("nixl", "rc_mlx5/mlx5_0:1", 3e-6, 2e10, {"shm": "another host"}, fallback=False),
        LinkReport("nixl", "tcp/eth0", 1e-4, 1e8, {}, fallback=True),
    ]
    async with Site(tmp_path, profile=TIMES) as site:
        told: list[Reply] = []
        for link in (links[0], links[0], links[1]):
            site.receivers[0].connect = lambda _, link=link: ("prefill_0", link)  # type: ignore[method-assign,misc]
            site.d[0].connect(Connect("j", b""), lambda reply, last: told.append(reply))
            await asyncio.sleep(0.001)
        per_token = site.model.layout.bytes_per_token
        assert told == [
            Connected("prefill_0", link, per_token, Room(64, 256)) for link in (links[0], *links)
        ]
        for gauge, wanted in (("bytes_per_second", 1e8), ("latency_seconds", 1e-4)):
            for detail, value in (("rc_mlx5/mlx5_0:1", 0.0), ("tcp/eth0", wanted)):
                labels = {"prefill": "prefill_0", "decode": "decode_0", "detail": detail}
                assert site.level(f"pdserve_kv_link_{gauge}", **labels) == value
        assert site.level("pdserve_kv_link_fallback") == 1


# ------------------------------------------------------------------------------------------ closing


@virtual
async def test_close_ends_every_answer(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        client = Client(site)
        await client.submit("a", max_tokens=100)
        await client.submit("b", 3000, max_tokens=100)
        await site.d[0].close()
        await asyncio.sleep(1)
        for name in "ab":
            assert client.of(name)[-1] == Failed("INTERNAL", "decode_0 is shutting down")
            assert [last for who, _, last in client.replies if who == name][-1]
        assert site.d[0]._blocks.pool.used_blocks == 0
        site.d[0].close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]


@virtual
async def test_concurrent_connects_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Site(tmp_path) as site:
        decode, told = site.d[0], list[Reply]()
        connecting: list[Callable[..., None]] = []
        monkeypatch.setattr(decode._kv_imports, "connect", lambda _, done: connecting.append(done))

        def connect() -> None:
            decode.connect(Connect("call", b"endpoint"), lambda reply, _last: told.append(reply))

        for _ in range(MAX_CONNECTING + 1):
            connect()
        assert len(connecting) == MAX_CONNECTING
        (refused,) = told
        assert isinstance(refused, Failed)
        assert refused.message == f"decode_0: {MAX_CONNECTING} connects are under way already"
        connecting.pop()(errors.HandleError("forged"))
        connect()
        assert len(connecting) == MAX_CONNECTING
