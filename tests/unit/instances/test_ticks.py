"""What an instance does at an interval, and that an idle one does nothing."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING
from unittest import mock

from pdserve.instances.ticks import Ticks
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path


@virtual
async def test_it_is_called_as_long_as_it_asks_for_it() -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    busy = True

    def tick() -> bool:
        times.append(round(loop.time() - began, 6))
        return busy

    ticks, began = Ticks(0.02, tick), loop.time()
    task = asyncio.create_task(ticks.run())
    await asyncio.sleep(0.05)
    assert times == [0.0, 0.02, 0.04]
    ticks.wake()
    busy = False
    await asyncio.sleep(10.0)
    assert times[3:] == [0.06], "what has changed until then is seen by that one"
    ticks.wake()
    await asyncio.sleep(10.0)
    assert times[4:] == [10.07]
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@virtual
async def test_an_idle_instance_does_nothing(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        request = site.request(20)
        assert await site.answer(request) == site.expected(request)
        await site.idle()
        instances = (site.p[0], site.d[0])
        for instance in instances:
            wrapped = mock.Mock(wraps=instance._ticks._tick)
            instance._ticks._tick = wrapped  # type: ignore[method-assign]
        await asyncio.sleep(10.0)
        calls = [instance._ticks._tick for instance in instances]
        assert [call.call_count for call in calls] == [0, 0]  # type: ignore[attr-defined]
        assert await site.answer(site.request(20))
        await site.idle()
        assert all(call.call_count for call in calls)  # type: ignore[attr-defined]
