"""The clock of threads that move KV caches: the time, and a way to wait."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The part of the module ``time`` that the transfer plane uses; that module implements it."""

    def monotonic(self) -> float:
        """Return seconds on the clock of this host's leases, CLOCK_MONOTONIC."""

    def perf_counter(self) -> float:
        """Return seconds by which durations are measured."""

    def sleep(self, seconds: float, /) -> None:
        """Suspend the calling thread."""
