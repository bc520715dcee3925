"""Tests for thread pools: all threads exist before any work, and refused work ends its request."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from pdserve import pools
from pdserve.errors import DeploymentError, InstanceError
from pdserve.rpc.channels.bls import BlsChannel
from pdserve.rpc.messages import Connect, Describe, Failed, Reply
from tests.unit.inprocess import Site, real, until

if TYPE_CHECKING:
    from pathlib import Path

NO_MORE = RuntimeError("can't start new thread")


def test_every_thread_runs_before_any_work_comes() -> None:
    begun: list[str] = []
    pool = pools.started(5, "pull", lambda: begun.append(threading.current_thread().name))
    assert sorted(begun) == [f"pull_{number}" for number in range(5)]
    with mock.patch.object(threading.Thread, "start", side_effect=NO_MORE):
        futures = [pool.submit(pow, 2, n) for n in range(50)]
        assert [future.result(10) for future in futures] == [2**n for n in range(50)]
    pool.shutdown()


def test_a_limit_on_threads_fails_the_load() -> None:
    start, left = threading.Thread.start, iter(range(3))

    def limited(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise NO_MORE
        start(thread)

    before = threading.active_count()
    with (
        mock.patch.object(threading.Thread, "start", limited),
        pytest.raises(DeploymentError, match="5 threads of pool pull cannot be started"),
    ):
        pools.started(5, "pull")
    for thread in threading.enumerate():
        if thread.name.startswith("pull_"):
            thread.join(10)
    assert threading.active_count() == before


class Refusing(ThreadPoolExecutor):
    """A pool that cannot start its thread."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        raise NO_MORE


@pytest.mark.parametrize("layered", [False, True])
def test_a_pull_that_cannot_be_handed_over_ends_its_request(tmp_path: Path, layered: bool) -> None:
    @real
    async def run() -> None:
        profile = {"speed": 0, "layers": 4}
        async with Site(tmp_path, profile=profile, layered=layered) as site:
            imports: Any = site.d[0]._kv_imports
            usual = imports._puller, imports._follower
            imports._puller = imports._follower = Refusing(1)
            with pytest.raises(InstanceError, match="can't start new thread"):
                await asyncio.wait_for(site.answer(site.request(1500)), 10)
            await site.idle()
            imports._puller, imports._follower = usual
            request = site.request(1500)
            assert await asyncio.wait_for(site.answer(request), 10) == site.expected(request)
            await site.idle()

    run()


@real
async def test_a_connect_that_cannot_be_handed_over_is_answered(tmp_path: Path) -> None:
    async with Site(tmp_path, linked=False) as site:
        imports: Any = site.d[0]._kv_imports
        imports._connector.shutdown()
        imports._connector = Refusing(1)
        replies: list[Reply] = []
        connect = Connect("a", site.holders[0].endpoint)
        site.d[0].connect(connect, lambda reply, _: replies.append(reply))
        await until(lambda: bool(replies))
        (failed,) = replies
        assert isinstance(failed, Failed)
        assert "can't start new thread" in failed.message
        await site.idle()


@real
async def test_a_call_by_bls_that_cannot_be_handed_over_fails() -> None:
    async def responses(decoupled: bool) -> list[object]:
        return [object()]

    request = mock.Mock(async_exec=responses)
    pb_utils: Any = mock.Mock(
        InferenceRequest=mock.Mock(return_value=request), TritonModelException=ValueError
    )
    may_call = asyncio.Event()
    may_call.set()
    channel: Any = BlsChannel(pb_utils, "decode_0", b"k" * 32, 1, may_call)
    channel._threads.shutdown()
    channel._threads = Refusing(1)
    replies = channel.open("a", Describe("a"))
    with pytest.raises(InstanceError, match="can't start new thread"):
        await replies.get(5.0)
    await channel.close()
