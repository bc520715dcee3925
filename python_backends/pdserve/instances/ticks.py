"""What an instance does at an interval, as long as it holds something or gateways wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Ticks:
    """Calls a function at an interval, and not at all while there is nothing to do.

    Args:
        interval_s: seconds between two calls.
        tick: returns whether it is to be called again without ``wake``.
    """

    def __init__(self, interval_s: float, tick: Callable[[], bool]) -> None:
        self._interval_s = interval_s
        self._tick = tick
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Call it again from now on, the first time after one interval."""
        self._woken.set()

    async def run(self) -> None:
        """Run until cancelled, with a first call at once."""
        while True:
            if not self._tick():
                self._woken.clear()
                await self._woken.wait()
            await asyncio.sleep(self._interval_s)
