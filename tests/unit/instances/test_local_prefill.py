"""Tests for prompts that a decode computes itself, in turns with its steps."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest

from pdserve.instances.local_prefill import INLINE_COPY
from pdserve.rpc.messages import (
    Accepted,
    Busy,
    DecodeRequest,
    Failed,
    Freed,
    Released,
    Reply,
    Tokens,
    Watch,
)
from pdserve.sampling import Sampling
from tests.unit.inprocess import EOS, Site, real, virtual
from tests.unit.instances.test_decode import Client

if TYPE_CHECKING:
    from pathlib import Path

# A turn of 32 tokens takes as long as a prefill takes for a prompt of 32 tokens.
TIMES: dict[str, Any] = {"prefill": {"per_token_ms": 1.0}, "decode": {"base_ms": 10.0}}
LIMITS = {"batch_tokens": 32}
OFTEN = {"response_cost_ms": 0.0}


class LocalClient(Client):
    """A client that submits without a KV cache; `at` has the time of each reply."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.at: dict[str, list[float]] = {}

    def compute(
        self, name: str, prompt: int | bytes = 20, max_tokens: int = 8, **fields: Any
    ) -> bytes:
        data = self.site.prompt(prompt) if isinstance(prompt, int) else prompt
        request = DecodeRequest(
            id=name,
            prompt=data,
            first_token=None,
            handle=b"",
            sampling=fields.pop("sampling", Sampling()),
            salt=fields.pop("salt", ""),
            max_tokens=max_tokens,
            ignore_eos=False,
            min_interval_ms=fields.pop("min_interval_ms", 0.0),
            **fields,
        )

        def send(reply: Reply, last: bool) -> None:
            self.replies.append((name, reply, last))
            self.at.setdefault(name, []).append(asyncio.get_running_loop().time())

        self.site.d[0].submit(request, send)
        return data

    def expected(self, prompt: bytes, tokens: int = 8) -> list[int]:
        ids = np.frombuffer(prompt, "<i4")
        return [self.site.model.token(ids, i) for i in range(tokens)]

    def first(self, name: str) -> Tokens:
        return next(reply for reply in self.of(name) if isinstance(reply, Tokens))

    def first_at(self, name: str) -> float:
        return self.at[name][self.of(name).index(self.first(name))]

    def longest_gap(self, name: str) -> float:
        """Return the longest time in seconds between two replies of a stream."""
        told = zip(self.of(name), self.at[name], strict=True)
        times = [at for reply, at in told if isinstance(reply, Tokens)]
        return max(after - before for before, after in itertools.pairwise(times))

    def cached(self, name: str) -> int:
        transfer = self.first(name).transfer
        assert transfer is not None
        return transfer.cached


# ------------------------------------------------------------------------------------------- tokens


@virtual
async def test_prompt_is_computed_where_there_is_no_handle(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode=OFTEN) as site:
        client = LocalClient(site)
        prompt = client.compute("a", 20)
        await asyncio.sleep(0.2)
        accepted, first, second, *_ = client.of("a")
        assert accepted == Accepted(room=mock.ANY)
        assert client.tokens("a") == client.expected(prompt)
        assert isinstance(first, Tokens)
        assert isinstance(second, Tokens)
        assert (first.start, len(first.ids), second.start) == (0, 4, 1), (
            "at once, and without other tokens"
        )
        assert client.first_at("a") == pytest.approx(0.020)
        transfer = first.transfer
        assert transfer is not None
        assert (transfer.nbytes, transfer.transport, transfer.strategy) == (0, "local", "")
        assert transfer.ms == pytest.approx(20)
        assert second.transfer is None
        assert [last for _, _, last in client.replies].count(True) == 1
        assert not site.p_engines[0].forwards
        assert site.total("pdserve_kv_transfers_total") == 0
        assert site.total("pdserve_local_prefill_seconds_count", instance="decode_0") == 1
        await site.idle(0.0)


@virtual
async def test_first_token_may_be_the_last(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        client = LocalClient(site)
        client.compute("length", 20, max_tokens=1)
        await asyncio.sleep(0.05)
        site.model.script = lambda prompt, position: EOS
        client.compute("stop", 20)
        await asyncio.sleep(0.05)
        for name in ("length", "stop"):
            assert client.first(name).finish_reason == name
            assert client.of(name)[-1] is client.first(name)
        assert not site.d_engines[0].steps
        await site.idle(0.0)


@virtual
async def test_answer_that_another_pair_began_goes_on(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        client = LocalClient(site)
        prompt = site.prompt(20)
        answer = client.expected(prompt, 12)
        so_far = prompt + np.array(answer[:5], "<i4").tobytes()
        client.compute("a", so_far, max_tokens=7, resumed_tokens=5)
        await asyncio.sleep(0.2)
        assert client.tokens("a") == answer[5:]
        assert client.first("a").start == 0
        await site.idle(0.0)


@virtual
async def test_tokens_that_nobody_reads_as_they_come(tmp_path: Path) -> None:
    """The first token is sent alone, since TTFT is measured by it."""
    async with Site(tmp_path, profile=TIMES) as site:
        client = LocalClient(site)
        client.compute("a", 20, max_tokens=202, min_interval_ms=1000.0)
        await asyncio.sleep(3)
        sizes = [len(reply.ids) // 4 for reply in client.of("a") if isinstance(reply, Tokens)]
        assert sizes == [1, 100, 100, 1]
        await site.idle(0.0)


# -------------------------------------------------------------------------------------------- turns


@virtual
async def test_running_streams_wait_for_one_turn_at_a_time(tmp_path: Path) -> None:
    """Chunked prefill: a prompt of 300 tokens stalls the streams for one turn of 32 at a time."""
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS, decode=OFTEN) as site:
        client = LocalClient(site)
        running = client.compute("running", 20, max_tokens=60)
        await asyncio.sleep(0.1)
        long = client.compute("long", 300)
        await asyncio.sleep(2)
        assert client.longest_gap("running") == pytest.approx(0.032 + 0.010)
        took = client.first_at("long") - 0.1
        assert took == pytest.approx(0.300 + 9 * 0.010, abs=0.011), "10 turns, 9 steps between"
        transfer = client.first("long").transfer
        assert transfer is not None
        assert transfer.ms == pytest.approx(300), "the time of computation, without the steps"
        assert client.tokens("running") == client.expected(running, 60)
        assert client.tokens("long") == client.expected(long)
        await site.idle(0.0)


@virtual
async def test_step_begins_after_a_turn(tmp_path: Path) -> None:
    """A turn overlaps the host's work on the tokens of the step before, but not the next step."""
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS, decode=OFTEN) as site:
        client = LocalClient(site)
        client.compute("running", 20, max_tokens=30)
        await asyncio.sleep(0.105)
        client.compute("a", 4)
        await asyncio.sleep(1)
        assert client.longest_gap("running") == pytest.approx(0.004 + 0.010)
        await site.idle(0.0)


@virtual
async def test_reproducible_prompt_is_computed_in_one_turn(tmp_path: Path) -> None:
    """Its tokens may depend neither on the size of the parts nor on cached prefixes."""
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS, decode=OFTEN) as site:
        client, seeded = LocalClient(site), Sampling(temperature=1.0, seed=1)
        client.compute("running", 20, max_tokens=60)
        await asyncio.sleep(0.1)
        prompt = client.compute("a", 300, sampling=seeded)
        await asyncio.sleep(2)
        assert client.longest_gap("running") == pytest.approx(0.300 + 0.010)
        client.compute("b", prompt, sampling=seeded)
        await asyncio.sleep(2)
        assert (client.cached("a"), client.cached("b")) == (0, 0)
        assert client.tokens("a") == client.tokens("b") == client.expected(prompt)
        await site.idle(0.0)


@virtual
async def test_short_prompts_share_a_turn(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS, decode=OFTEN) as site:
        client = LocalClient(site)
        client.compute("running", 20, max_tokens=60)
        await asyncio.sleep(0.105)
        prompts = {name: client.compute(name, 10) for name in "abc"}
        await asyncio.sleep(1)
        assert client.longest_gap("running") == pytest.approx(0.030 + 0.010)
        began = client.first_at("a") - 0.010
        assert [client.first_at(name) - began for name in "bc"] == pytest.approx([0.02, 0.03])
        for name, prompt in prompts.items():
            assert client.tokens(name) == client.expected(prompt)
        await site.idle(0.0)


@virtual
async def test_prompt_that_does_not_fit_in_waits_for_the_next_turn(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS, decode=OFTEN) as site:
        client = LocalClient(site)
        client.compute("running", 20, max_tokens=60)
        await asyncio.sleep(0.105)
        client.compute("a", 20)
        client.compute("b", 20)
        await asyncio.sleep(1)
        assert client.first_at("b") - client.first_at("a") == pytest.approx(0.010 + 0.020)
        await site.idle(0.0)


@virtual
async def test_prompts_do_not_queue_up(tmp_path: Path) -> None:
    """Like a prefill, a decode has no queue of prompts: a later prompt is served elsewhere."""
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS) as site:
        client, told = LocalClient(site), []
        client.compute("a", 31)
        client.compute("b", 100)
        client.compute("c", 1)
        assert client.of("c") == [Busy("prompts", mock.ANY)]
        site.d[0].watch(
            Watch("w", "gateway"), "gateway", lambda reply, last: told.append((reply, last))
        )
        await client.submit("handed over", 20)
        assert told == []
        await asyncio.sleep(0.035)
        assert told == [(Freed(mock.ANY), True)], "one less waits"
        await asyncio.sleep(0.3)
        client.compute("c", 1)
        await asyncio.sleep(0.3)
        for name in ("a", "b", "c"):
            assert len(client.tokens(name)) == 8
        assert len(client.tokens("handed over")) == 7
        await site.idle(0.0)


@virtual
async def test_long_prompt_shows_life(tmp_path: Path) -> None:
    """A gateway treats an instance without any sign of life as failed."""
    slow = {"prefill": {"per_token_ms": 100.0}, "decode": {"base_ms": 10.0}}
    async with Site(tmp_path, profile=slow, prefill=LIMITS) as site:
        client = LocalClient(site)
        client.compute("a", 200)
        await asyncio.sleep(21)
        assert client.of("a")[0] == Accepted(room=mock.ANY)
        silences = np.diff([0.0, *client.at["a"]])
        assert len(silences) > 3
        assert silences.max() <= 5.0 + 3.2
        await site.idle(1.0)


# ------------------------------------------------------------------------------------- what is held


@virtual
async def test_room_is_reserved_on_acceptance(tmp_path: Path) -> None:
    limits = {"blocks": 10, "block_size": 16, "slots": 2}
    async with Site(tmp_path, profile=TIMES, decode=limits) as site:
        client = LocalClient(site)
        client.compute("a", 60, max_tokens=20)
        assert site.d[0]._blocks.pool.used_blocks == 5
        client.compute("b", 60, max_tokens=21)
        client.compute("never", 100, max_tokens=61)
        client.compute("c", 60, max_tokens=20)
        client.compute("d", 1)
        assert client.of("b") == [Busy("blocks", mock.ANY)]
        assert client.of("d") == [Busy("slots", mock.ANY)]
        [failed] = client.of("never")
        assert isinstance(failed, Failed)
        assert failed.code == "INVALID_ARG"
        await asyncio.sleep(1)
        assert len(client.tokens("a")) == len(client.tokens("c")) == 20
        await site.idle(0.0)


@virtual
async def test_cached_prefix_is_not_computed(tmp_path: Path) -> None:
    """A prefix is reused, whether computed here or handed over; a hand-over pulls the rest."""
    async with Site(tmp_path, profile=TIMES) as site:
        client, prefix = LocalClient(site), site.prompt(64)
        await client.submit("handed over", site.prompt(20, prefix))
        await asyncio.sleep(0.2)
        began = asyncio.get_running_loop().time()
        prompt = client.compute("a", site.prompt(10, prefix))
        await asyncio.sleep(0.2)
        assert client.cached("a") == 64
        assert client.first_at("a") - began == pytest.approx(0.010)
        assert client.tokens("a") == client.expected(prompt)
        client.compute("other", site.prompt(10, prefix), salt="other")
        client.compute("whole", prompt)
        await asyncio.sleep(0.3)
        assert client.cached("other") == 0, "tenants share nothing"
        assert client.cached("whole") == 64, (
            "whole blocks are reused, and at least one token is computed"
        )
        await client.submit("pulled", site.prompt(5, prompt))
        await asyncio.sleep(0.2)
        transfer = client.first("pulled").transfer
        assert transfer is not None
        assert transfer.nbytes == 15 * site.model.layout.bytes_per_token
        await site.idle(0.0)


@real
async def test_long_cached_prefix_is_copied_beside_the_loop(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0, "layers": 2}, decode={"blocks": 512}) as site:
        client, prefix = LocalClient(site), site.prompt(2048)
        assert 2048 * site.model.layout.bytes_per_token > INLINE_COPY
        prompts = [client.compute("0", site.prompt(10, prefix))]
        await asyncio.sleep(0.2)
        prompts += [client.compute(f"{i}", site.prompt(10, prefix)) for i in (1, 2)]
        await asyncio.sleep(0.5)
        assert [client.cached(f"{i}") for i in range(3)] == [0, 2048, 2048]
        for i, prompt in enumerate(prompts):
            assert client.tokens(f"{i}") == client.expected(prompt)
        await site.idle(0.0)


@virtual
async def test_prompt_over_scattered_blocks(tmp_path: Path) -> None:
    """The emulated engine finds every row in its place, the cached ones included."""
    async with Site(
        tmp_path,
        profile=TIMES,
        prefill={"batch_tokens": 12},
        decode={"blocks": 50, "block_size": 4},
    ) as site:
        client, prefix = LocalClient(site), site.prompt(32)
        client.compute("0", prefix, max_tokens=4)  # 9 blocks
        await asyncio.sleep(0.1)
        for number in range(1, 6):  # 10 blocks of a stream that continues, 4 of one that has ended
            client.compute(f"{number}", 4, max_tokens=36 if number % 2 else 12)
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.13)
        prompt = client.compute("long", site.prompt(6, prefix), max_tokens=6)  # 11 blocks
        assert len(site.d[0]._admission.open["long"].sequence.runs) == 3
        await asyncio.sleep(1)
        assert client.cached("long") == 32
        assert client.tokens("long") == client.expected(prompt, 6)
        await site.idle(0.0)


# ---------------------------------------------------------------------- ends before the first token


@virtual
async def test_release_ends_it_between_two_turns(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS) as site:
        client = LocalClient(site)
        client.compute("a", 1000)
        await asyncio.sleep(0.05)
        used = site.d[0]._blocks.pool.used_blocks
        client.release("a")
        assert client.replies[-1] == ("", Released(), True)
        assert site.d[0]._blocks.pool.used_blocks == used, "the turn still writes to it"
        await asyncio.sleep(0.033)
        assert client.of("a")[-1] == Failed("CANCELLED", "released")
        await site.idle(0.0)
        prompt = client.compute("b", 20)
        await asyncio.sleep(0.2)
        assert client.tokens("b") == client.expected(prompt)
        await site.idle(0.0)


@virtual
async def test_release_of_a_prompt_that_waits(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS) as site:
        client = LocalClient(site)
        client.compute("a", 30)
        client.compute("b", 1000)
        client.release("b")
        await asyncio.sleep(0.5)
        assert client.of("b")[-1] == Failed("CANCELLED", "released")
        assert len(client.tokens("a")) == 8
        assert client.longest_gap("a") == pytest.approx(0.010), "none of it was computed"
        await site.idle(0.0)


@virtual
async def test_release_in_the_last_turn(tmp_path: Path) -> None:
    """The prompt is complete by then, and stays cached."""
    async with Site(tmp_path, profile=TIMES) as site:
        client = LocalClient(site)
        prompt = client.compute("a", 70)
        await asyncio.sleep(0.03)
        client.release("a")
        await asyncio.sleep(0.1)
        assert client.of("a") == [Accepted(room=mock.ANY), Failed("CANCELLED", "released")]
        assert not site.d_engines[0].steps
        client.compute("b", prompt)
        await asyncio.sleep(0.3)
        assert client.cached("b") == 64
        await site.idle(0.0)


@virtual
async def test_failure_is_of_one_request(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS) as site:
        client, engine = LocalClient(site), site.d_engines[0]
        compute = engine.prefill

        async def failing(sequence: Any, begin: int, end: int) -> int | None:
            token = await compute(sequence, begin, end)
            if len(sequence.prompt) == 100 and end > 50:
                raise RuntimeError("out of memory")
            return token

        engine.prefill = failing  # type: ignore[method-assign]
        prompts = {"running": client.compute("running", 20, max_tokens=30)}
        await asyncio.sleep(0.05)
        prompts["before"] = client.compute("before", 20)
        client.compute("bad", 100)
        await asyncio.sleep(1)
        prompts["after"] = client.compute("after", 20)
        await asyncio.sleep(1)
        assert client.of("bad")[-1] == Failed("INTERNAL", "decode_0: out of memory")
        for name, prompt in prompts.items():
            assert client.tokens(name) == client.expected(prompt, 30 if name == "running" else 8)
        await site.idle(0.0)


@virtual
async def test_wrong_prefix_is_noticed(tmp_path: Path) -> None:
    """vllm#21570: the rows of a cached prefix are checked when they are used."""
    async with Site(tmp_path, profile=TIMES) as site:
        client, prefix = LocalClient(site), site.prompt(64)
        client.compute("a", site.prompt(10, prefix))
        await asyncio.sleep(0.3)
        site.d_engines[0].pool[0, 17] += 1
        client.compute("b", site.prompt(10, prefix))
        await asyncio.sleep(0.3)
        [*_, failed] = client.of("b")
        assert isinstance(failed, Failed)
        assert "is not this prompt's" in failed.message
        await site.idle(0.0)


@virtual
async def test_close_ends_what_is_being_computed(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill=LIMITS) as site:
        client = LocalClient(site)
        client.compute("a", 31)
        client.compute("b", 100)
        await asyncio.sleep(0.01)
        await site.d[0].close()
        for name in "ab":
            assert client.of(name)[-1] == Failed("INTERNAL", "decode_0 is shutting down")
        assert site.held() == {}


# ------------------------------------------------------------------------------------- slot watches


class Watcher:
    def __init__(self, site: Site) -> None:
        self.site = site
        self.told: list[tuple[str, Reply, bool]] = []

    def watch(self, name: str, gateway: str = "gateway") -> None:
        self.site.d[0].watch(
            Watch(name, gateway), gateway, lambda reply, last: self.told.append((name, reply, last))
        )


@virtual
async def test_watch_of_an_idle_decode_is_told_at_once(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        watcher = Watcher(site)
        watcher.watch("w")
        assert watcher.told == [("w", Freed(mock.ANY), True)]


@virtual
async def test_watch_that_comes_after_the_end_is_told_at_once(tmp_path: Path) -> None:
    """A slot that becomes free while the refusal is on its way counts. After that, it waits."""
    async with Site(tmp_path, profile=TIMES, decode={"slots": 2}) as site:
        client, watcher = LocalClient(site), Watcher(site)
        client.compute("a", max_tokens=3)
        client.compute("b", max_tokens=100)
        client.compute("c")
        assert client.of("c") == [Busy("slots", mock.ANY)]
        watcher.watch("w", "1")
        await asyncio.sleep(0.1)
        assert watcher.told == [("w", Freed(mock.ANY), True)]
        watcher.watch("late", "2")
        assert watcher.told[1:] == [("late", Freed(mock.ANY), True)]
        client.compute("d", 20, max_tokens=100)
        client.compute("e")
        watcher.watch("v", "2")
        assert watcher.told[2:] == []
        client.release("b")
        await asyncio.sleep(0.1)
        assert watcher.told[2:] == [("v", Freed(mock.ANY), True)]
        client.release("d")
        await site.idle(0.05)


@pytest.mark.parametrize("how", ["end", "release", "failure"])
def test_every_watch_is_told_of_an_end(tmp_path: Path, how: str) -> None:
    @virtual
    async def run() -> None:
        async with Site(tmp_path, profile=TIMES, decode={"slots": 2}) as site:
            client, watcher = LocalClient(site), Watcher(site)
            client.compute("a", max_tokens=10)
            client.compute("b", max_tokens=100)
            watcher.watch("w", "1")
            watcher.watch("v", "2")
            await asyncio.sleep(0.06)  # a turn has ended: register the watches
            watcher.told.clear()
            watcher.watch("w", "1")
            watcher.watch("v", "2")
            assert watcher.told == []
            if how == "release":
                client.release("a")
            if how == "failure":
                site.d_engines[0].failures.append(RuntimeError())
            await asyncio.sleep(0.015 if how != "end" else 0.1)
            assert watcher.told == [("w", Freed(mock.ANY), True), ("v", Freed(mock.ANY), True)]
            client.release("b")
            await site.idle(0.05)
            assert len(watcher.told) == 2, "notified once"

    run()


@virtual
async def test_watch_ends_with_its_release_and_with_the_next(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"slots": 1}) as site:
        client, watcher = LocalClient(site), Watcher(site)
        await client.submit("a", max_tokens=4)
        watcher.watch("w")
        watcher.watch("v")
        assert watcher.told == [("w", Released(), True)]
        client.release("v")
        assert watcher.told[1:] == [("v", Released(), True)]
        await asyncio.sleep(0.15)
        assert len(client.tokens("a")) == 3
        assert len(watcher.told) == 2
        assert site.level("pdserve_slot_watches", instance="decode_0") == 0
        await site.idle(0.0)


@virtual
async def test_watches_end_with_the_instance(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, decode={"slots": 1}) as site:
        client, watcher = LocalClient(site), Watcher(site)
        client.compute("a", max_tokens=100)
        watcher.watch("w")
        await asyncio.sleep(0.01)
        await site.d[0].close()
        assert watcher.told == [("w", Failed("INTERNAL", "decode_0 is shutting down"), True)]
