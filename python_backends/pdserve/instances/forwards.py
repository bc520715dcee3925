"""How busy an engine is with its forwards, and when it will want the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pdserve.latency_estimate import LatencyEstimate

# So long before the end of a forward the next batch is let in: to be told, to offer and to accept
# take 2 to 3 ms together.
AHEAD_S = 0.004


class Forwards:
    """Knows the forward that an engine is running, one after the other.

    Args:
        nearly_over: called when the running one leaves room for the next batch, if that can be
            said before it is over.
    """

    def __init__(self, nearly_over: Callable[[], None]) -> None:
        self._nearly_over = nearly_over
        self._latency = LatencyEstimate()
        self.prompts = 0
        """That leave no room for others."""

    @contextmanager
    def running(self, prompts: int, tokens: int) -> Iterator[None]:
        """One of so many prompts, and of tokens that are not cached."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.prompts = prompts
        takes = self._latency.expected(tokens)
        timer = loop.call_at(began + takes - AHEAD_S, self._leave_room) if takes else None
        try:
            yield
            self._latency.saw(tokens, loop.time() - began)
        finally:
            self.prompts = 0
            if timer is not None:
                timer.cancel()

    def _leave_room(self) -> None:
        self.prompts = 0
        self._nearly_over()
