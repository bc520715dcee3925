"""How busy an engine is with its forwards, and when it needs the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pdserve.latency_estimate import LatencyEstimate

# Seconds before the end of a forward at which the next batch is admitted: to notify a gateway and
# to get and accept its offer takes 2 to 3 ms.
AHEAD_S = 0.004


class Forwards:
    """Keeps track of the forward that an engine is running.

    Args:
        nearly_over: called when the running forward leaves room for the next batch, if its end can
            be estimated.
    """

    def __init__(self, nearly_over: Callable[[], None]) -> None:
        self._nearly_over = nearly_over
        self._latency = LatencyEstimate()
        self.prompts = 0
        """Number of prompts in the running forward that leave no room for others."""

    @contextmanager
    def running(self, prompts: int, tokens: int) -> Iterator[None]:
        """Account for one forward of ``prompts`` prompts with ``tokens`` uncached tokens."""
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
