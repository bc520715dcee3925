"""Tests that a prefill's memory comes back: released, expired, or read by a process that dies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.kvcache.arena import State as RangeState
from pdserve.rpc.messages import Accepted, Busy, Failed, Prefilled, Released
from pdserve.transfer.lease.remote import RemoteLease
from pdserve.transfer.lease.words import Pull
from pdserve.transfer.producer.lease_manager import QUIET_S
from tests.unit.inprocess import Site, virtual
from tests.unit.instances.test_prefill import TIMES, Client
from tests.unit.transfers import MidPull

if TYPE_CHECKING:
    from pathlib import Path


@virtual
async def test_release_before_during_and_after_the_forward(tmp_path: Path) -> None:
    """TensorRT-LLM#12540: a range is freed only when no one writes to it or reads from it."""
    async with Site(tmp_path, profile=TIMES, prefill={"batch_tokens": 1}) as site:
        client = Client(site)
        for name in "abc":
            client.submit(name)
        await asyncio.sleep(0.01)
        client.release("c")
        assert client.of("c")[-1] == Failed("CANCELLED", "released")
        client.release("a")
        assert client.of("a") == [Accepted()], "its forward continues"
        assert len(site.p[0]._slots.held) == 2
        await asyncio.sleep(0.02)
        assert client.of("a")[-1] == Failed("CANCELLED", "released")
        await asyncio.sleep(0.04)
        assert isinstance(client.of("b")[-1], Prefilled)
        assert site.level("pdserve_kv_leases", state="leased") == 1
        client.release("b")
        await site.idle(0.0)
        assert len(site.p_engines[0].forwards) == 2
        client.release("b")
        client.release("nobody")
        assert client.replies[-2:] == [("", Released(), True)] * 2


@virtual
async def test_lease_expires_without_any_work(tmp_path: Path) -> None:
    """TensorRT-LLM#12313: the sweep runs at every tick, independent of load."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1, "lease_s": 1.0}) as site:
        client = Client(site)
        client.submit("a")
        await asyncio.sleep(0.03)
        client.submit("b")
        assert client.of("b") == [Busy("slots")]
        await asyncio.sleep(1.02)
        await site.idle(0.0)
        client.submit("c")
        await asyncio.sleep(0.03)
        assert isinstance(client.of("c")[-1], Prefilled)
        client.release("c")


@virtual
async def test_range_that_is_being_read_is_quarantined(tmp_path: Path) -> None:
    """TensorRT-LLM#14565, vllm#21570: the range is withheld for a time, and the reader is told."""
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1, "lease_s": 1.0}) as site:
        client = Client(site)
        client.submit("a")
        await asyncio.sleep(0.001)
        [result] = client.of("a")
        assert isinstance(result, Prefilled)
        receiver = site.receivers[0]
        pull = MidPull(receiver, receiver.open(result.handle))
        client.release("a")
        assert site.p[0]._exports.leases.counts()[RangeState.QUARANTINED][0] == 1
        await asyncio.sleep(QUIET_S - 0.1)
        assert site.held()["prefill_0 quarantined"] == 1
        client.submit("b")
        await asyncio.sleep(0.001)
        assert isinstance(client.of("b")[-1], Prefilled), "the slot is free meanwhile"
        client.release("b")
        with pytest.raises(errors.HandleError, match="lease 0 has ended"):
            pull.end()
        await site.idle(0.021)


@virtual
async def test_reader_that_has_died_is_waited_for_so_long(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 4, "lease_s": 1.0}) as site:
        client, receiver = Client(site), site.receivers[0]
        pulls = []
        for number in range(MAX_QUARANTINED):
            client.submit(str(number))
            await asyncio.sleep(0.001)
            [result] = client.of(str(number))
            assert isinstance(result, Prefilled)
            handle = receiver.open(result.handle)
            pulls.append(RemoteLease(receiver.peers.find(handle.epoch).link, handle, planes=2))
            pulls[-1].look()
            pulls[-1].say(Pull.PULLING)  # the reader's last sign of life
            client.release(str(number))
        client.submit("one more")
        assert client.of("one more") == [Busy("slots")], "no memory is promised that may be read"
        await asyncio.sleep(QUIET_S - 0.1)
        assert len(site.p[0]._exports.leases.quarantined) == MAX_QUARANTINED
        await site.idle(0.13)
        client.submit("after")
        await asyncio.sleep(0.001)
        assert isinstance(client.of("after")[-1], Prefilled)
        client.release("after")
        for pull in pulls:
            with pytest.raises(errors.HandleError, match="has ended, or is another's"):
                pull.look()


@virtual
async def test_arena_that_is_full_of_what_is_being_read(tmp_path: Path) -> None:
    """TensorRT-LLM#12540: prompts are refused as long as a reader may read, then there is room."""
    async with Site(
        tmp_path, profile={"speed": 0}, prefill={"arena_mib": 1}, decode={"blocks": 400}
    ) as site:
        client, receiver = Client(site), site.receivers[0]
        client.submit("a", 5000)
        await asyncio.sleep(0.001)
        [result] = client.of("a")
        assert isinstance(result, Prefilled)
        pull = MidPull(receiver, receiver.open(result.handle))
        client.release("a")
        client.submit("b", 5000)
        assert client.of("b") == [Busy("arena")]
        client.submit("c", 2000)
        await asyncio.sleep(0.001)
        assert isinstance(client.of("c")[-1], Prefilled), "the rest of the memory can be allocated"
        client.release("c")
        with pytest.raises(errors.HandleError, match="has ended"):
            pull.end()
        client.submit("d", 5000)
        await asyncio.sleep(0.001)
        assert isinstance(client.of("d")[-1], Prefilled), "at the next offer, without a tick"
        client.release("d")
        await site.idle(0.0)


@virtual
async def test_reader_after_expiry_is_refused(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"lease_s": 1.0}) as site:
        client, loop = Client(site), asyncio.get_running_loop()
        client.submit("a")
        await asyncio.sleep(1.1)
        [result] = client.of("a")
        assert isinstance(result, Prefilled)
        receiver = site.receivers[0]
        with pytest.raises(errors.HandleError, match=r"KV handle expired 0\.1.* s ago"):
            receiver.open(result.handle)
        receiver._clock.monotonic = lambda: loop.time() - 1  # type: ignore[method-assign]
        with pytest.raises(errors.HandleError, match="has ended"):
            receiver.pull(receiver.open(result.handle), [(0, 20)])
        await site.idle(0.0)
